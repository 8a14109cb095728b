"""The suite: every step at small scale, records that outlive an interruption, a report that leads with table and floor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import INVALID, Finished, assert_error, assert_usage_error, run_command
from offload.bench.steps import STEPS, SuiteStep, fit_line
from offload.bench.suite import run_suite
from offload.bench.suite_size import SuiteSize, cpu_size, gpu_size
from offload.planner.hardware_file import find_hardware
from test_offload_bench import run_here


@pytest.fixture
def suite(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *argv: run_command(capsys, "bench", "suite", "--device", "cpu", *argv)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines have a process of their own, whose start takes seconds. That it works is tested side by side with ours."""
    monkeypatch.setattr("offload.bench.steps.run_isolated", run_here)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_step_runs_at_small_scale_and_the_report_leads_with_the_floor(
    suite: Callable[..., Finished], in_process: None, tmp_path: Path
) -> None:
    """The same command as on a GPU machine. No figure is asked for: what is, is whether all is measured and told."""
    finished = suite("--out", tmp_path / "new", "--max-seconds", 300)
    assert finished.code == 0, finished
    manifest = json.loads((tmp_path / "new/manifest.json").read_text())
    assert {name: step["status"] for name, step in manifest["steps"].items()} == dict.fromkeys(STEPS, "done"), manifest
    records = {name: json.loads((tmp_path / f"new/{name}.json").read_text()) for name in STEPS}
    assert find_hardware(str(tmp_path / "new/hardware.json")).source == "measured"
    rows = records["table"]["rows"]
    assert [(row["engine"], row["temperature"]) for row in rows] == [("ours", 0), ("ours", 0.6), ("plain", 0)] * 2
    assert all(row["s_per_token_p50"] > 0 and row["floor_s_per_token"] > 0 for row in rows)
    assert rows[0]["facts"]["resident_layers"] > rows[3]["facts"]["resident_layers"]
    assert rows[3]["facts"]["host_shared_layers"] > 0
    assert len(records["pass_time"]["curve"]) == 3 and records["baselines"]["rows"][0]["s_per_layer"] is not None
    assert all(row["link_utilisation"] > 0 for row in records["utilisation"]["rows"])
    report = finished.stdout
    assert report == (tmp_path / "new/report.md").read_text()
    titles = [line for line in report.splitlines() if line.startswith("#")]
    assert titles[0].startswith("# scale:") and titles[1] == "## Seconds a token, and the physical floor"
    assert "an easy language" in report and "emulated link" in report and "identical layers shared host memory" in report
    pictures = {path.name for path in (tmp_path / "new").glob("*.png")}
    assert pictures == {"timeline.png", "pass_time.png", "s_per_token_by_nodes.png", "s_per_token_by_memory.png"}
    again = suite("--out", tmp_path / "new")
    assert again.code == 0 and again.stderr.count("done before") == len(STEPS)


def test_steps_plan_with_the_profile_given_or_with_the_measured_one(tmp_path: Path) -> None:
    planned_with: list[str | None] = []

    def look(size: SuiteSize, max_seconds: float) -> dict[str, Any]:
        planned_with.append(size.settings.profile)
        return {}

    steps = {"a": (look, 1), "hardware": (look, 1), "b": (look, 1)}
    run_suite(tmp_path / "measured", "cpu", 1e3, lambda text: None, steps)
    run_suite(tmp_path / "given", "cpu", 1e3, lambda text: None, steps, profile="l40")
    assert planned_with == [None, None, str(tmp_path / "measured/hardware.json"), "l40", "l40"]


def test_a_profile_that_is_none_is_refused(suite: Callable[..., Finished], tmp_path: Path) -> None:
    assert_error(suite("--out", tmp_path, "--profile", "no-such-card"), INVALID, "no hardware profile", "l40")


def fake(answers: dict[str, Any], ran: list[str], name: str) -> tuple[SuiteStep, int]:
    def step(size: SuiteSize, max_seconds: float) -> dict[str, Any]:
        ran.append(name)
        if isinstance(answers[name], Exception):
            raise answers[name]
        return dict(answers[name])

    return step, 1


def test_a_suite_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What failed, or had no time, or not enough, is run again; what is done is not."""
    answers: dict[str, Any] = {"a": {"x": 1}, "b": RuntimeError("the driver\nsays no"), "c": {"x": 3, "complete": False}}
    ran: list[str] = []
    steps = {name: fake(answers, ran, name) for name in answers}
    run_suite(tmp_path, "cpu", 1e3, lambda text: None, steps)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["steps"]
    assert [manifest[name]["status"] for name in "abc"] == ["done", "failed", "partial"]
    assert manifest["b"]["reason"] == "RuntimeError: the driver"
    answers |= {"b": {"x": 2}, "c": {"x": 3}}
    report = run_suite(tmp_path, "cpu", 1e3, lambda text: None, steps)
    assert ran == ["a", "b", "c", "b", "c"]
    assert "- b: done" in report.read_text()
    run_suite(tmp_path, "cpu", 1e3, lambda text: None, steps)
    assert len(ran) == 5


def test_steps_without_time_are_skipped_with_the_reason(tmp_path: Path) -> None:
    ran: list[str] = []
    said: list[str] = []
    run_suite(tmp_path, "cpu", 0.1, said.append, {"a": fake({"a": {}}, ran, "a")})
    assert ran == [] and said == ["a: skipped: 0 s were left, 2 s are the least"]


def test_records_of_another_machine_are_refused(suite: Callable[..., Finished], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"machine": {"gpu": "another"}, "steps": {}}))
    assert_usage_error(suite("--out", tmp_path), "another machine")
    manifest.write_text("{")
    assert_error(suite("--out", tmp_path), INVALID, "not a record of the suite", "manifest.json")


def test_the_line_through_the_depths_is_exact_on_a_line() -> None:
    fitted = fit_line([(4, 1.0), (8, 1.8), (12, 2.6)], 80)
    assert fitted["s_per_layer"] == pytest.approx(0.2) and fitted["extrapolated_s_per_token"] == pytest.approx(16.2)
    assert fitted["worst"] == pytest.approx(0)
    assert fit_line([(4, 1.0)], 80)["s_per_layer"] is None


def test_the_suite_on_a_gpu_is_the_one_that_the_issue_names() -> None:
    gpu, cpu = gpu_size("cuda"), cpu_size()
    assert gpu.settings.model == "scale:llama-2-70b" and [budget / 2**30 for budget in gpu.budgets] == [48, 24]
    assert max(gpu.pass_nodes) == 4096 and len(gpu.depths) >= 3
    assert gpu.on_gpu and not cpu.on_gpu
