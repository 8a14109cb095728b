"""Hardware profiles: what a file must say, what it is taken for, and what the machine measures of itself."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import INVALID, assert_error, assert_usage_error, run_command
from offload import assemble
from offload.calibrate import QUICK, Subject, measure_copies, measure_hardware
from offload.calibrate.effort import LEAST_POINTS, Work, rising, table_of, typical_s
from offload.calibrate.growing import BRANCHING, num_levels, tree_of_levels
from offload.calibrate.law_times import measure_verification
from offload.config import EngineSettings, law_kind
from offload.device import Ticket
from offload.device.cpu import CpuDevice
from offload.errors import OutOfMemoryError
from offload.planner.hardware import ROWS, HardwareProfile, LawTimes, ModelTimes, interpolate
from offload.planner.hardware_file import PRESETS, find_hardware, from_json, read_hardware, to_json
from offload.planner.shapes import find_shape
from offload.source import check_source
from planning import L40, LLAMA_2_70B

Models = Callable[..., Path]
GOOD = to_json(L40)
BRIEF = replace(QUICK, repeats=1, point_s=0.0)


def test_estimates_follow_the_roofline() -> None:
    """One row reads the layer's 1.71 GB once; 4096 rows multiply 7 TFLOP in it."""
    times = L40.times(LLAMA_2_70B, "target", 0, "greedy")
    assert times.rows == ROWS
    assert times.layer_s[0] == pytest.approx(1e-4 + 855_654_400 * 2 / 864e9, rel=1e-3)
    multiplied = 2 * 4096 * 855_654_400 + 4 * 4096 * 4096 * 8192  # matrices, and attention among the rows themselves
    assert times.layer_s[-1] == pytest.approx(1e-4 + multiplied / 110e12, rel=1e-3)


def test_times_between_measured_points_lie_on_the_line_and_go_on_beyond() -> None:
    assert interpolate((1, 3), (1.0, 2.0), [1, 2, 3, 5]).tolist() == [1.0, 1.5, 2.0, 3.0]
    assert interpolate((1, 3), (2.0, 1.0), [9]).tolist() == [1.0]
    with pytest.raises(ValueError, match="do not increase"):
        ModelTimes(context_rows=0, rows=(4, 1), layer_s=(1.0, 1.0), rest_s=(0.0, 0.0))


def test_work_on_laws_is_that_of_the_law_that_is_asked_for() -> None:
    """Greedy work is no sampled work, and top-p sorts besides: estimated, and as profiles have it."""
    for task in ("draw", "verify"):
        greedy, sampled, nucleus = (float(L40.law_times(task, 32000, law).at(256)) for law in ("greedy", "sampled", "nucleus"))
        assert greedy < sampled < nucleus
    assert [law_kind(*params) for params in ((0.0, 0.9), (0.6, 1.0), (0.6, 0.9))] == ["greedy", "sampled", "nucleus"]
    table = LawTimes(task="verify", law="nucleus", vocab_size=1000, rows=(1, 2), task_s=(1.0, 2.0))
    measured = replace(L40, laws=(table,))
    assert float(measured.law_times("verify", 2000, "nucleus").at(2)) == 4.0
    assert measured.law_times("verify", 2000, "sampled") == L40.law_times("verify", 2000, "sampled")


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8))
def test_measured_times_never_fall_with_rows_and_change_no_more_than_that_takes(seconds: list[float]) -> None:
    found = rising(seconds)
    assert list(found) == sorted(found) and sum(found) == pytest.approx(sum(seconds))
    if seconds == sorted(seconds):
        assert found == tuple(seconds)


def test_one_hiccup_does_not_end_a_table() -> None:
    """A first run that takes long is no sign of work that does: tables of one point would call every tree free."""
    effort = replace(QUICK, longest_s=0.01, point_s=0.0, repeats=2)
    device, runs = CpuDevice(), iter([0.02, *[0.0] * 9])
    assert max(typical_s(device, [Work(lambda: time.sleep(next(runs)))], effort)) < 0.01
    device.close()
    measured, columns = table_of(range(1, 100), lambda rows: (1e-3, 0.02), effort)
    assert measured == tuple(range(1, LEAST_POINTS + 1)) and columns == ((1e-3,) * LEAST_POINTS, (0.02,) * LEAST_POINTS)


def test_works_take_turns_and_count_from_the_ticket_they_return() -> None:
    """What is a thousand times as long before that ticket is not counted; what is done three times takes a third."""
    device, order = CpuDevice(), []

    def late() -> Ticket:
        order.append("late")
        time.sleep(0.05)
        return device.mark()

    works = [Work(late), Work(lambda: (order.append("other"), time.sleep(0.03)), times=3)]
    late_s, other_s = typical_s(device, works, replace(QUICK, point_s=0.0, repeats=2, longest_s=1.0))
    device.close()
    assert late_s < 0.01 <= other_s < 0.03
    assert order == ["late", "other"] * 3


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_tree_that_is_timed_has_as_many_nodes_with_children_on_every_level(rows: int, vocab_size: int) -> None:
    rows = min(rows, vocab_size)
    shape = tree_of_levels(rows, vocab_size)
    assert [len(nodes) for nodes in shape.expanded] == [1, *[rows] * num_levels(rows), 0]
    assert shape.max_branching == max(rows, min(BRANCHING, vocab_size))


def test_this_machine_measures_itself_and_the_file_says_the_same(models: Models, tmp_path: Path) -> None:
    source = check_source(str(models()), "--model", "float32", "cpu")
    device = CpuDevice()
    subjects = [Subject(role="target", model=source.model), Subject(role="draft", model=source.model)]
    measured = measure_hardware(device, subjects, BRIEF)
    device.close()
    assert measured.link_bytes_per_s > 0 and measured.law_times("verify", 97, "sampled").at(64) > 0
    for role in ("target", "draft"):
        times = measured.times(source.model.cost, role, 300, "greedy")
        assert min(times.layer_s) > 0 and times.rows[0] == 1
    target, draft = (model.times[0].rows for model in measured.models)
    assert len(target) >= len(draft) and max(draft) <= source.model.cost.vocab_size  # a root cannot have more children
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(to_json(measured)))
    assert read_hardware(path) == measured


def test_measuring_draws_none_of_the_callers_random_numbers(models: Models) -> None:
    source, device, state = check_source(str(models()), "--model", "float32", "cpu"), CpuDevice(), torch.get_rng_state()
    subjects = [Subject(role="target", model=source.model), Subject(role="draft", model=source.model)]
    measure_hardware(device, subjects, replace(BRIEF, rows=(1, 2), contexts=(8,)))
    measure_copies(device, [2**16], 1)
    device.close()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("verifier", "drawn"), [("traversal", "sampled"), ("sample", "greedy")])
def test_what_drafts_will_draw_from_is_measured(
    models: Models, monkeypatch: pytest.MonkeyPatch, verifier: str, drawn: str
) -> None:
    """First, as the levels of a draft are timed with it; and the law that is verified."""
    profiles: list[HardwareProfile] = []

    def measure(*arguments: Any, **options: Any) -> HardwareProfile:
        profiles.append(measure_once(*arguments, **options))
        return profiles[-1]

    measure_once = assemble.measure_hardware
    monkeypatch.setattr(assemble, "measure_hardware", measure)
    folder = str(models())
    settings = EngineSettings(model=folder, draft_models=(folder,), device="cpu", verifier=verifier, law="sampled")
    assemble.open_engine(settings).close()
    laws = profiles[0].laws
    assert (laws[0].task, laws[0].law) == ("draw", drawn)
    assert ("verify", "sampled") in [(known.task, known.law) for known in laws]


def test_presets_are_found_by_name_and_plan_every_model() -> None:
    for path in PRESETS.glob("*.json"):
        profile = find_hardware(path.stem)
        times = profile.times(find_shape("llama-2-70b", "--model").cost(2), "target", 1024, "nucleus")
        assert all(second >= 0 for second in times.layer_s)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"link_bytes_per_s": None}, "missing key 'link_bytes_per_s'"),
        ({"link_bytes_per_s": -1.0}, "not a positive number"),
        ({"disk_bytes_per_s": float("nan")}, "not a positive number"),
        ({"flops_per_s": "fast"}, "not a number"),
        ({"device_memory_bytes": 1.5}, "not a whole number"),
        ({"lnik": 1}, "unknown key 'lnik'"),
        ({"models": [{"role": "judge"}]}, "an entry of models"),
        ({"models": {}}, "models is not a list"),
        ({"laws": [{"vocab_size": 0}]}, "an entry of laws"),
        ({"facts": []}, "facts is not an object"),
    ],
)
def test_a_profile_that_is_none_is_refused_with_its_fault(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, **change}))
    assert_error(run_command(capsys, "plan", "-q", "--profile", path), INVALID, message, str(path))
    with pytest.raises(ValueError, match=message.split("'")[0]):
        from_json({**GOOD, **change})


def test_a_profile_that_is_missing_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(run_command(capsys, "plan", "-q", "--profile", "rtx-9090"), INVALID, "rtx-9090", "rtx-4090", "l40")


def test_profile_hardware_writes_what_plan_reads(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.calibrate.FULL", BRIEF)
    monkeypatch.setattr("offload.cli.profile_hardware.COPY_SIZES", (2**16, 2**20))
    path = tmp_path / "here.json"
    finished = run_command(capsys, "profile", "hardware", "--model", models(), "--device", "cpu", "--output", path)
    assert finished.code == 0 and str(path) in finished.stderr
    profile = read_hardware(path)
    assert isinstance(profile, HardwareProfile) and profile.device_type == "cpu"
    assert profile.disk_bytes_per_s and set(profile.facts) >= {"measured_at", "commit", "link_bytes_per_s_by_copy"}
    planned = run_command(capsys, "plan", "-q", "--model", models(), "--profile", path, "--json")
    assert planned.code == 0 and json.loads(planned.stdout)["fits"]


def test_profile_hardware_refuses_a_place_it_cannot_write_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    finished = run_command(capsys, "profile", "hardware", "-q", "--output", tmp_path / "no" / "file.json")
    assert_usage_error(finished, "--output")


def test_a_table_of_laws_ends_where_the_device_has_no_memory_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device, allowed = CpuDevice(), 3

    def short_of_memory(*arguments: object) -> list[float]:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise torch.OutOfMemoryError
        return [1e-3]

    monkeypatch.setattr("offload.calibrate.law_times.typical_s", short_of_memory)
    assert measure_verification(device, 97, BRIEF, "nucleus").rows == BRIEF.rows[:3]
    with pytest.raises(OutOfMemoryError):
        measure_verification(device, 97, BRIEF, "nucleus")
    device.close()


def test_a_link_of_a_byte_a_second_can_be_measured_beside(models: Models) -> None:
    """The copies beside are cut to what the link carries in moments: neither is the last one waited for, nor memory lost."""
    source, device = check_source(str(models()), "--model", "float32", "cpu"), CpuDevice(1.0)
    started_s = time.monotonic()
    measured = measure_hardware(device, [Subject(role="target", model=source.model)], BRIEF, link_bytes_per_s=1.0)
    assert measured.link_bytes_per_s == 1.0 and time.monotonic() - started_s < 60
    device.close()
