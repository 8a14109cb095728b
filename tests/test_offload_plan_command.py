"""`plan` as people and programs use it: presets, other machines, pictures, sweeps, and what it refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import DOES_NOT_FIT, INVALID, assert_error, assert_usage_error, run_command
from conftest import save_tiny_model
from offload.cli.parser import parse_arguments
from offload.cli.plan_question import read_question
from offload.planner.hardware import MeasuredModel, ModelTimes, shape_of

ROOT = Path(__file__).resolve().parents[1]
Capsys = pytest.CaptureFixture[str]
BIG = ("--model", "llama-2-70b", "--draft-model", "llama-2-7b", "-q")


def planned(capsys: Capsys, *flags: object) -> dict[str, object]:
    finished = run_command(capsys, "plan", *BIG, "--json", *flags)
    assert finished.code == 0, finished.stderr
    document: dict[str, object] = json.loads(finished.stdout)
    return document


@pytest.mark.parametrize(
    ("rate", "resident", "seconds"),
    [("12GB/s", 0, 11.41), ("20GB/s", 7, 6.25), ("25GB/s", 0, 5.48), ("25GB/s", 14, 4.52), ("55GB/s", 40, 1.24)],
)
def test_seconds_per_pass_by_resident_layers_and_rate(capsys: Capsys, rate: str, resident: int, seconds: float) -> None:
    made = planned(capsys, "--tree", "none", "--link", rate, "--resident-layers", resident)
    assert made["predicted_pass_s"] == pytest.approx(seconds, rel=0.01)
    assert made["bytes_per_pass"] == (80 - resident) * 855_654_400 * 2


def test_the_json_has_what_the_contract_names(capsys: Capsys) -> None:
    made = planned(capsys, "--profile", "l40", "--tree", "64x8")
    assert {
        *("schema_version", "fits", "resident_layers", "streamed_layers", "disk_layers", "slots", "bytes_per_pass"),
        *("link_bytes_per_s", "predicted_pass_s", "predicted_draft_s", "predicted_round_s", "predicted_s_per_token"),
        *("autoregressive_s_per_token", "tree", "memory"),
    } <= set(made)
    tree, memory = made["tree"], made["memory"]
    assert isinstance(tree, dict) and isinstance(memory, dict)
    assert (tree["nodes"], tree["levels"], sum(tree["nodes_per_level"])) == (64, 8, 64)
    assert sum(memory["device_bytes"].values()) <= memory["device_budget_bytes"]
    assert made["predicted_s_per_token"] < made["autoregressive_s_per_token"]


def test_the_screen_tells_what_goes_where_and_how_fast(capsys: Capsys) -> None:
    finished = run_command(capsys, "plan", *BIG, "--profile", "rtx-4090", "--ram", "64GiB", "--disk", "3GB/s")
    assert finished.code == 0
    for part in (
        "FITS.",
        "pinned layers",
        "bounce ring",
        "s/token without a tree",
        "the disk sets the pace",
        "GiB more host memory",
    ):
        assert part in finished.stdout
    assert len(finished.stdout.splitlines()) < 24


def test_a_small_model_is_shown_in_units_that_are_not_all_zeros(tmp_path: Path, capsys: Capsys) -> None:
    """Once all of it was `0.00` of `0.0 GiB`."""
    tiny = ("plan", "--model", save_tiny_model(tmp_path / "model"), "--profile", "l40")
    finished = run_command(capsys, *tiny, "--gpu-memory", "1MiB", "--host-memory", "1MiB", "--link", "20MB/s")
    assert finished.code == 0 and not re.search(r"\b0\.0+ ", finished.stdout)
    swept = run_command(capsys, *tiny, "--sweep", "gpu-memory=1MiB..2MiB")
    assert "MiB" in swept.stdout.splitlines()[0] and swept.stdout.splitlines()[1].split()[0] == "1.00"
    compared = run_command(capsys, *tiny, "--draft-model", tmp_path / "model", "--compare-drafts").stdout
    assert not re.search(r"\b0\.0+(\s|$)", compared)


def test_what_does_not_fit_says_by_how_much(capsys: Capsys) -> None:
    refused = run_command(capsys, "plan", *BIG, "--gpu-memory", "3GiB", "--json")
    assert refused.code == DOES_NOT_FIT and "allow at least" in refused.stderr
    assert json.loads(refused.stdout)["fits"] is False
    assert_error(
        run_command(capsys, "plan", *BIG, "--gpu-memory", "3GiB"), DOES_NOT_FIT, "GiB >", "--gpu-memory", "allow at least"
    )


def test_a_model_folder_is_planned_from_its_config_alone(tmp_path: Path, capsys: Capsys) -> None:
    folder = save_tiny_model(tmp_path / "model")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    finished = run_command(capsys, "plan", "-q", "--model", folder, "--json")
    assert finished.code == 0 and json.loads(finished.stdout)["streamed_layers"] == 0


def test_a_plan_for_a_preset_imports_neither_torch_nor_transformers() -> None:
    """It answers in under 0.5 s because of that; time itself depends on who else is using the machine."""
    code = (
        "from sys import modules; from offload.cli.main import main; "
        f"code = main(['plan', *{BIG!r}]); print(code, [m for m in ('torch', 'transformers') if m in modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "0 []" and ran.stderr == ""


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_tree_is_drawn(capsys: Capsys, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"tree.{kind}"
    planned(capsys, "--tree", "16x6", "--draw", path)
    content = path.read_bytes()
    assert content.startswith(b"<svg" if kind == "svg" else b"\x89PNG") and len(content) > 2000


def test_a_sweep_gets_quicker_with_memory_and_is_drawn(capsys: Capsys, tmp_path: Path) -> None:
    path = tmp_path / "sweep.png"
    swept = planned(capsys, "--tree", "64x8", "--sweep", "gpu-memory=4GiB..80GiB", "--plot", path)
    points = swept["points"]
    assert isinstance(points, list) and 10 < len(points) <= 24 and path.read_bytes().startswith(b"\x89PNG")
    seconds = [point["predicted_s_per_token"] for point in points]
    assert seconds == sorted(seconds, reverse=True)
    table = run_command(capsys, "plan", *BIG, "--tree", "none", "--sweep", "link=5GB/s..50GB/s")
    assert table.code == 0 and len(table.stdout.splitlines()) == 25


def test_drafts_are_compared_by_the_law(capsys: Capsys) -> None:
    flags = ("--draft-model", "tinyllama-1.1b", "--compare-drafts", "--profile", "l40")
    compared = planned(capsys, *flags)
    drafts = compared["drafts"]
    assert isinstance(drafts, list) and {draft["name"] for draft in drafts} == {"llama-2-7b", "tinyllama-1.1b"}
    table = run_command(capsys, "plan", *BIG, *flags)
    assert "by the law" in table.stdout and "none" in table.stdout


def test_a_draft_that_was_measured_on_the_cpu_is_planned_there() -> None:
    """And takes nothing of the device's memory."""
    asked = parse_arguments(["plan", *BIG, "--profile", "l40", "--draft-device", "cpu"])
    question = read_question(asked)
    cost = question.drafts[0].cost(question.dtype_bytes)
    times = ModelTimes(context_rows=512, rows=(1, 1024), layer_s=(0.001, 0.01), rest_s=(0.001, 0.01))
    there = MeasuredModel(role="host draft", shape=shape_of(cost), times=(times,))
    hardware = replace(question.hardware, models=(*question.hardware.models, there))
    made = replace(question, hardware=hardware).answer(question.tree)
    assert made.draft_on_host and made.draft is not None
    assert not any(name.startswith("draft") and num_bytes for name, num_bytes in made.device_ledger.items())


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--sweep", "ram"), "--sweep"),
        (("--sweep", "gpu-memory=80GiB..12GiB"), "--sweep"),
        (("--plot", "x.png"), "--plot"),
        (("--draw", "tree.jpg"), "--draw"),
        (("--draw", "tree.svg", "--compare-drafts"), "at a time"),
        (("--link", "fast"), "--link"),
        (("--flops", "-3TFLOP/s"), "--flops"),
        (("--gpu-memory", "lots"), "--gpu-memory"),
        (("--profile", "l40", "--draft-device", "cpu"), "--draft-device"),
        (("--draft-model", "none", "--model", "llama-2-70b", "--compare-drafts"), "names"),
    ],
)
def test_flags_that_make_no_plan_are_refused(capsys: Capsys, flags: tuple[str, ...], part: str) -> None:
    finished = run_command(capsys, "plan", "-q", *flags)
    assert_usage_error(finished) if part == "names" else assert_usage_error(finished, part)


def test_a_draft_of_another_vocabulary_and_an_unknown_model_are_refused(capsys: Capsys) -> None:
    other = run_command(capsys, "plan", "-q", "--model", "llama-2-70b", "--draft-model", "llama-3-8b")
    assert_error(other, INVALID, "128256", "32000")
    assert_error(run_command(capsys, "plan", "-q", "--model", "lama-2"), INVALID, "lama-2", "llama-2-70b")
