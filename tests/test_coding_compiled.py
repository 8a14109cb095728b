"""Kernels compile for GPUs as they are, and round there as they do in the interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from every_codec import EVERY_CODEC

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_and_approximate_nothing(capability: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "compiled_kernels.py"), str(capability)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=590)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[str]] = json.loads(ran.stdout)
    assert found.keys() == {name for name, make in EVERY_CODEC.items() if make(48, 256)[0].kernel is not None}
    assert {name: instructions for name, instructions in found.items() if instructions} == {}
