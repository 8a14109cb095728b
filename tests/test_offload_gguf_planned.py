"""A GGUF file is planned and inspected from its head alone, with the sizes of the model that runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import INVALID, assert_error, run_command
from gguf_files import write_gguf
from offload.doctor import model_checks
from offload.planner.shapes import find_shape
from offload.source import check_source

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_of_a_file_are_those_of_the_model_that_runs(family: str, tmp_path: Path) -> None:
    """Layers that nobody packed among them, and of a Llama queries and keys that lie in pairs, whatever their type."""
    path = tmp_path / "model.gguf"
    others = {1: "Q6_K", 2: "Q8_0", 3: "F16", 4: "F32"}
    write_gguf(path, "Q4_K", others=others, family=family, num_hidden_layers=6)
    shape = find_shape(str(path), "--model")
    assert shape.name == str(path) and shape.has_weights
    assert shape.stored is not None and not shape.stored.is_estimated
    for dtype in ("float32", "bfloat16"):
        model = check_source(str(path), "--model", dtype, "cpu").model
        cost = shape.cost(model.dtype.itemsize)
        assert cost == model.cost and cost.weights.startswith("GGUF Q")
        first, *_, last = cost.layers
        assert first is last and first.stored_bytes < 0.33 * first.computed_bytes


def test_a_doctor_names_a_file_and_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Q4_K")
    shape = find_shape(str(path), "--model")
    inspected = model_checks.inspect_model(str(path), "--model", "model", on_gpu=True)
    assert f"llama in {shape.weights}, 3 layers" in inspected.checks[0].value and inspected.checks[0].cure is None
    assert inspected.cost == shape.cost(2)


def test_a_plan_for_a_file_imports_no_torch_and_says_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Q5_K")
    code = (
        "from sys import modules; from offload.cli.main import main; "
        f"code = main(['plan', '-q', '--json', '--model', {str(path)!r}]); "
        "print(code, [m for m in ('torch', 'transformers') if m in modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    document, imported = ran.stdout.splitlines()
    assert imported == "0 []" and ran.stderr == "" and json.loads(document)["weights"].startswith("GGUF Q5_K")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "Q4_K")
    path.write_bytes(path.read_bytes()[:-1000])
    assert_error(run_command(capsys, "plan", "-q", "--model", path), INVALID, "truncated")
