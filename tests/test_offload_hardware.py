"""Hardware profiles: what a file must say, what it is taken for, and what the machine measures of itself."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import INVALID, assert_error, assert_usage_error, run_command
from offload import assemble
from offload.calibrate import QUICK, Subject, measure_copies, measure_hardware, measuring
from offload.calibrate.draft_levels import BRANCHING, num_levels, planned_tree, tree_of_levels
from offload.calibrate.draw_and_verify import measure_verification
from offload.calibrate.models import layer_times
from offload.calibrate.short_model import short_models
from offload.calibrate.stopwatch import MOST_TURNS, Stopwatch, Work, typical_s
from offload.calibrate.tables import LEAST_POINTS, rising, table_of
from offload.calibrate.threads import TURNS, choose_threads, own_threads, quickest, thread_choices
from offload.config import EngineSettings, sampling_kind
from offload.device import Ticket
from offload.device.cpu import CpuDevice
from offload.errors import OutOfMemoryError
from offload.planner.hardware import ROWS, HardwareProfile, ModelTimes, TaskTimes, interpolate
from offload.planner.hardware_file import PRESETS, find_hardware, from_json, read_hardware, to_json
from offload.planner.shapes import find_shape
from offload.source import check_source
from planning import L40, LLAMA_2_70B, PUBLISHED, plan
from tree.acceptance import Acceptance
from tree.draft import DraftTree
from tree.shape import TreeShape

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


def test_drawing_and_verifying_take_what_the_sampling_asked_for_takes() -> None:
    """Greedy work is no sampled work, and top-p sorts besides: estimated, and as profiles have it."""
    for task in ("draw", "verify"):
        seconds = [float(L40.task_times(task, 32000, kind).at(256)) for kind in ("greedy", "sampled", "nucleus")]
        assert seconds == sorted(set(seconds))
    assert [sampling_kind(*params) for params in ((0.0, 0.9), (0.6, 1.0), (0.6, 0.9))] == ["greedy", "sampled", "nucleus"]
    table = TaskTimes(task="verify", sampling="nucleus", vocab_size=1000, rows=(1, 2), task_s=(1.0, 2.0))
    measured = replace(L40, tasks=(table,))
    assert float(measured.task_times("verify", 2000, "nucleus").at(2)) == 4.0
    assert measured.task_times("verify", 2000, "sampled") == L40.task_times("verify", 2000, "sampled")


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8))
def test_measured_times_never_fall_with_rows_and_change_no_more_than_that_takes(seconds: list[float]) -> None:
    found = rising(seconds)
    assert list(found) == sorted(found) and sum(found) == pytest.approx(sum(seconds))
    if seconds == sorted(seconds):
        assert found == tuple(seconds)


class Clock(CpuDevice):
    """A device on which work takes as many seconds as it says by adding to `now_s`."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def mark(self) -> Ticket:
        ticket = super().mark()
        ticket.at_s = self.now_s  # type: ignore[attr-defined]
        return ticket

    def works(self, seconds: Iterable[float]) -> Work:
        """Work that takes the next of `seconds` each time, and the last of them from then on."""
        left = list(seconds)

        def run() -> None:
            self.now_s += left.pop(0) if len(left) > 1 else left[0]

        return Work(run)


@pytest.fixture
def clock() -> Iterator[Clock]:
    device = Clock()
    yield device
    device.close()


ONCE = replace(QUICK, point_s=0.0, repeats=4, longest_s=1e9)


def test_one_hiccup_does_not_end_a_table(clock: Clock) -> None:
    """A first run that takes long is no sign of work that does: tables of one point would call every tree free."""
    effort = replace(QUICK, longest_s=0.01, point_s=0.0, repeats=2)
    assert Stopwatch(clock, effort).seconds([clock.works([0.02, 0.001])]) == pytest.approx([0.001])
    measured, columns = table_of(range(1, 100), lambda rows: (1e-3, 0.02), effort)
    assert measured == tuple(range(1, LEAST_POINTS + 1)) and columns == ((1e-3,) * LEAST_POINTS, (0.02,) * LEAST_POINTS)


def test_works_take_turns_and_count_from_the_ticket_they_return(clock: Clock) -> None:
    """What is a thousand times as long before that ticket is not counted; what is done three times takes a third."""
    order = []

    def late() -> Ticket:
        order.append("late")
        clock.now_s += 5.0
        return clock.mark()

    def other() -> None:
        order.append("other")
        clock.now_s += 0.03

    found = Stopwatch(clock, replace(ONCE, repeats=2)).seconds([Work(late), Work(other, times=3)])
    assert found == pytest.approx([0.0, 0.01]) and order == ["late", "other"] * 3


def test_a_hiccup_is_left_out_and_what_happens_often_is_not() -> None:
    """A median would call a machine idle whose every third pass is interrupted."""
    assert typical_s([1.0, 1.0, 500.0, 1.0]) == 1.0
    assert typical_s([1.0, 1.0, 7.0] * 20) == pytest.approx(3.0, rel=0.05)
    assert typical_s([2.0]) == 2.0


def test_times_whose_halves_are_far_apart_are_taken_again_and_then_marked(clock: Clock) -> None:
    watch = Stopwatch(clock, ONCE)
    assert watch.seconds([clock.works([1.0])]) == [1.0] and (watch.num_timed, watch.num_doubtful) == (1, 0)
    settled = clock.works([1.0, 1.0, 1.0, 9.0, 9.0, *[5.0] * 99])
    assert watch.seconds([settled]) == pytest.approx([(1 + 1 + 9 + 4 * 5.0) / 7]) and watch.num_doubtful == 0
    rising_s = clock.works([1.0 * 3**turn for turn in range(99)])
    watch.seconds([rising_s])
    assert watch.num_doubtful == 1
    assert watch.doubts == (f"measured on a busy machine: 1 of 3 times contradicted themselves, {MOST_TURNS} times over",)


def test_times_that_deny_each_other_are_taken_again_and_then_marked(clock: Clock) -> None:
    """More layers took less: once is a hiccup, and always is nothing to plan with."""
    watch = Stopwatch(clock, ONCE)
    few, more = clock.works([1.0]), clock.works([0.9] * 5 + [1.5] * 99)
    few_s, more_s = watch.seconds([few, more], lambda found: found[1] > found[0])
    assert more_s > few_s and watch.num_doubtful == 0
    watch.seconds([clock.works([1.0]), clock.works([0.5])], lambda found: found[1] > found[0])
    assert watch.num_doubtful == 1


def test_no_layer_is_free_however_noisy_the_passes_were() -> None:
    """A busy machine once measured layers that took less than nothing, and a pass of 30 layers was to take 3e-08 s."""
    assert layer_times([1.0, 1.0, 1.0], [3.0, 3.0, 3.0]) == (1.0, 1.0, 1.0)
    assert layer_times([1.0, 2.0, 1.0], [3.0, 2.5, 4.0]) == pytest.approx((0.625, 0.625, 1.5))
    noise = layer_times([5.0, 9.0, 9.0], [3.0, 3.0, 6.0])
    assert all(seconds >= 0.05 for seconds in noise) and list(noise) == sorted(noise)


def test_a_busy_machine_is_told_in_the_plan_and_kept_in_its_file() -> None:
    doubtful = replace(L40, doubts=("measured on a busy machine: 9 of 9",))
    assert plan(device_gib=48, hardware=doubtful).notes[-1] == doubtful.doubts[0]
    assert from_json(json.loads(json.dumps(to_json(doubtful)))).doubts == doubtful.doubts


def test_verification_is_timed_on_trees_that_a_planner_makes(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """It takes a step for every rank of every level: 8-ary trees have a third of those that trees of a planner have."""
    seen: list[TreeShape] = []

    def note(draft: DraftTree, *arguments: object, method: str) -> None:
        seen.append(draft.shape)

    monkeypatch.setattr("offload.calibrate.draw_and_verify.verify", note)
    effort = replace(ONCE, rows=(1, 16, 64, 96))
    measure_verification(Stopwatch(clock, effort), 97, "sampled", PUBLISHED)
    assert {shape.num_nodes for shape in seen} == {1, 16, 64, 96}
    assert {shape for shape in seen} == {planned_tree(PUBLISHED, num_nodes, 97) for num_nodes in effort.rows}
    chain = Acceptance(((0.9,),))  # no tree of a planner has more nodes than levels
    assert measure_verification(Stopwatch(clock, effort), 97, "sampled", chain).rows == (1, 16, 64)


def test_a_core_is_left_to_the_copies_and_nobody_gets_more_threads_than_allowed() -> None:
    assert thread_choices(2, 2) == (1,) and thread_choices(1, 64) == (1,) and thread_choices(8, 1) == (1,)
    assert thread_choices(64, 64) == (1, 2, 4, 8, 16, 32, 63)
    assert thread_choices(4, 64) == (1, 2, 4)


def test_more_threads_are_taken_only_where_they_win_clearly() -> None:
    """Idle, two win 14 % of a token's time; beside one other process they lose half of it and more."""
    assert quickest({1: 1.0, 2: 0.95, 4: 0.94}) == 1
    assert quickest({1: 1.0, 2: 0.6, 4: 0.58}) == 2
    assert quickest({1: 1.0, 2: 0.6, 4: 0.35}) == 4


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_callers_threads_come_back(threads: None, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the caller has changed them meanwhile; a caller who said a number in the environment keeps it."""
    monkeypatch.setattr("offload.calibrate.threads.choose_threads", lambda subjects, effort: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(3)
    with assemble.open_engine(EngineSettings(model=str(models()), device="cpu")):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 3
    with own_threads([], QUICK):
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with own_threads([], QUICK):
        assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_every_number_of_threads_is_tried_on_both_models(
    threads: None, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tried = check_source(str(models()), "--model", "float32", "cpu"), list[int]()
    subjects = [Subject(role="target", model=source.model), Subject(role="draft", model=source.model)]

    def seconds(watch: Stopwatch, works: Sequence[Work]) -> list[float]:
        works[0].run()
        tried.append(torch.get_num_threads())
        return [1.0 / tried[-1]]

    monkeypatch.setattr("offload.calibrate.threads.os.sched_getaffinity", lambda pid: set(range(5)))
    monkeypatch.setattr(Stopwatch, "seconds", seconds)
    torch.set_num_threads(4)
    assert choose_threads(subjects, replace(BRIEF, contexts=(8,))) == 4
    assert set(tried) == {1, 2, 4} and len(tried) == 2 * 3 * TURNS and torch.get_num_threads() == 4


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
    measured = measure_hardware(device, subjects, replace(BRIEF, longest_s=60.0))
    device.close()
    assert measured.link_bytes_per_s > 0 and measured.task_times("verify", 97, "sampled").at(64) > 0
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
    """First, as the levels of a draft are timed with it; and the one that is verified."""
    profiles: list[HardwareProfile] = []

    def measure(*arguments: Any, **options: Any) -> HardwareProfile:
        profiles.append(measure_once(*arguments, **options))
        return profiles[-1]

    measure_once = measuring.measure_hardware
    monkeypatch.setattr(measuring, "measure_hardware", measure)
    folder = str(models())
    settings = EngineSettings(model=folder, draft_models=(folder,), device="cpu", verifier=verifier, sampling="sampled")
    assemble.open_engine(settings).close()
    tasks = profiles[0].tasks
    assert (tasks[0].task, tasks[0].sampling) == ("draw", drawn)
    assert ("verify", "sampled") in [(known.task, known.sampling) for known in tasks]


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


def test_a_table_of_drawing_ends_where_the_device_has_no_memory_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    device, allowed = CpuDevice(), 3

    def short_of_memory(*arguments: object) -> list[float]:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise torch.OutOfMemoryError
        return [1e-3]

    monkeypatch.setattr(Stopwatch, "seconds", short_of_memory)
    assert measure_verification(Stopwatch(device, BRIEF), 97, "nucleus", PUBLISHED).rows == BRIEF.rows[:3]
    with pytest.raises(OutOfMemoryError):
        measure_verification(Stopwatch(device, BRIEF), 97, "nucleus", PUBLISHED)
    device.close()


def test_a_link_of_a_byte_a_second_can_be_measured_beside(models: Models) -> None:
    """The copies beside are cut to what the link carries in moments: neither is the last one waited for, nor memory lost."""
    source, device = check_source(str(models()), "--model", "float32", "cpu"), CpuDevice(1.0)
    started_s = time.monotonic()
    measured = measure_hardware(device, [Subject(role="target", model=source.model)], BRIEF, link_bytes_per_s=1.0)
    assert measured.link_bytes_per_s == 1.0 and time.monotonic() - started_s < 60
    device.close()


def test_levels_wider_than_any_that_is_recorded_are_timed(models: Callable[..., Path]) -> None:
    """They have more nodes than the widest recorded pass has rows."""
    wide = check_source(str(models(vocab_size=600)), "--model", "float32", "cpu").model
    for model in short_models(CpuDevice(), wide, "draft", replace(QUICK, rows=(512,), contexts=(16,))):
        assert model.work(512, 16, "greedy").run() is not None
        model.close()
