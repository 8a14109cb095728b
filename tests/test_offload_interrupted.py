"""A real signal in the middle of loading ends the process at once, with its exit code and nothing left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_points", "code", "stderr"), [("SIGINT", 10, 130, "interrupted\n"), ("SIGTERM", 4, 143, "")]
)
def test_a_signal_at_any_point_of_loading_leaves_nothing(
    models: Callable[..., Path], name: str, num_points: int, code: int, stderr: str
) -> None:
    target, draft = models(num_layers=6), models(num_layers=1, seed=1)
    flags = ["--model", target, "--draft-model", draft, "--tree", "3x4:kary", "--resident-layers", "1", "--slots", "2"]
    flags += ["--prompt-ids", "5,9,33", "--max-new-tokens", "2", "--device", "cpu", "--profile", "l40"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/interrupted.py"), str(num_points), name, *map(str, flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(ended) == num_points, done.stderr
    assert ended[0]["call"] == "alloc" and ended[-1]["call"] == "filled"
    for one in ended:
        left = (one["held_bytes"], one["under_way"], one["threads"])
        assert (one["code"], one["stderr"], *left) == (code, stderr, 0, 0, []), one["call"]
