"""The draft's passes in fixed shapes, recorded and replayed, against passes of the size needed: same logits, same trees."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, VOCAB_SIZE
from drafters import PROMPT, WIDE, extend, model_of, open_drafters, open_tiny, run_round, start_all
from fakes import CountingDevice, RecordingDevice
from offload.device.cpu import CpuDevice
from offload.errors import DeviceError, FitError, UsageError
from offload.model.buckets import LEAST_CACHED_ROWS, MAX_ROWS, rows_bucket, widest_pass, width_bucket
from shapes import chain, from_widths
from tree.aim import MOST_STEP_ROWS, Aim
from tree.sampling import SamplingParams
from tree.shape import TreeShape

Models = Callable[..., Path]


class FixedDevice(CpuDevice):
    """Fixed shapes without a recording: `record` returns the work itself."""

    replays = True


class OrderedDevice(RecordingDevice):
    """Remembers what it recorded, by new and by attended rows, and counts replays."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[int, int]] = []
        self.num_replays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        inputs = inspect.getclosurevars(work).nonlocals["inputs"]
        ((block,),) = inputs.masks.values()
        self.recorded.append(tuple(block.mask.shape[2:]))
        replay = super().record(work)

        def counted() -> None:
            self.num_replays += 1
            replay()

        return counted


class BrokenDevice(RecordingDevice):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise self._error


DEVICES = (CpuDevice, FixedDevice, RecordingDevice)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_every_width_have_the_logits_of_plain_passes(models: Models, family: str) -> None:
    """Widths at, below and above every edge of a bucket; several rounds and commits, the cache longer each time."""
    generator = torch.Generator().manual_seed(1)
    widths = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33) if family != "llama" else (1, 63, 64, 65, 127, 128, 129, 192, 193)
    with open_drafters(DEVICES, models(family, num_layers=2), rows=1500) as drafters:
        contexts = start_all(drafters)
        for width in widths:
            run_round(contexts, from_widths((width, 1, 1)), generator)
        run_round(contexts, from_widths((2, 3, 1, 2)), generator)


@pytest.mark.parametrize("width", [MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1])
def test_the_widest_levels_are_computed_either_way(models: Models, width: int) -> None:
    with open_drafters(DEVICES, models(num_layers=1), rows=2400) as drafters:
        contexts = start_all(drafters)
        for _ in range(2):
            run_round(contexts, from_widths((width, 1, 1)), torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", [939, 1063, 2039])
def test_the_cache_grows_through_its_buckets(models: Models, rows: int) -> None:
    """Committed rows cross 512 and go on to the last row of a segment whose size is no bucket."""
    generator = torch.Generator().manual_seed(3)
    with open_drafters(DEVICES, models(num_layers=1), rows) as drafters:
        contexts, shape = start_all(drafters), TreeShape.chains(5, 3)
        for length in (490, 496, 500, 505, 511, 512, 513, rows - 40, rows - 11):
            extend(contexts, [11] * (length - len(model_of(contexts[0])._token_ids)))
            run_round(contexts, shape, generator)
        with pytest.raises(FitError, match="cached rows"):
            for _ in range(5):
                run_round(contexts[::-1], shape, generator)


def test_texts_in_segments_of_their_own_are_recorded_in_turns(models: Models) -> None:
    """Each grows through its buckets, beside others whose tails are no numbers."""
    generator, shape = torch.Generator().manual_seed(8), TreeShape.chains(5, 3)
    with open_drafters(DEVICES, models(num_layers=2), rows=700, num_texts=3) as drafters:
        texts = [start_all(drafters, [*PROMPT, *[number] * 200 * number], number) for number in range(3)]
        for _ in range(2):
            for contexts in texts:
                run_round(contexts, shape, generator)
        for drafter in drafters:  # the text in the middle ends; what comes after it has no rows yet
            drafter.cache.segments[1].truncate(0)
            drafter.cache.segments[1].poison_tail()
        texts[1] = start_all(drafters, PROMPT, 1)
        for _ in range(2):
            for contexts in (texts[1], texts[0], texts[2]):
                run_round(contexts, shape, generator)


@pytest.mark.parametrize("sampled", [True, False])
def test_trees_are_identical_over_rounds_and_commits(models: Models, sampled: bool) -> None:
    shapes = [TreeShape.chains(4, 5), from_widths((9, 2, 2)), chain(6), TreeShape.chains(17, 2)]
    with open_drafters(DEVICES, models()) as drafters:
        contexts = start_all(drafters)
        for seed, shape in enumerate(shapes * 2):
            drafts = []
            for drafter, context in zip(drafters, contexts, strict=True):
                drafter.aim(Aim(shape=shape), 1024)
                params = SamplingParams(0.8, top_p=0.9) if sampled else SamplingParams()
                drafts.append(context.grow(100, 100, params, torch.Generator().manual_seed(seed), sampled=sampled))
            for draft in drafts[1:]:
                assert draft.shape == shape and draft.token_ids.tolist() == drafts[0].token_ids.tolist()
            path = shape.path(shape.num_nodes - 1 - seed % 3)
            for context in contexts:
                context.follow(path, (*(int(drafts[0].token_ids[node]) for node in path[1:]), seed), None)


@pytest.mark.matrix
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_engine_that_replays_writes_the_same_text(models: Models, temperature: float) -> None:
    texts = []
    for device in DEVICES:
        with open_tiny(models(), device()) as engine:
            request = {"max_new_tokens": 40, "temperature": temperature, "ignore_eos": True}
            texts.append([engine.generate(prompt, seed=4, **request).token_ids for prompt in (PROMPT, [3] * 70, PROMPT)])  # type: ignore[arg-type]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] == texts[0][2]


def test_each_shape_is_recorded_once_and_before_any_round(models: Models) -> None:
    """The widths of the tree and of catching up, the widest first, at each length of the cache; whatever the rounds bring."""
    device = OrderedDevice()
    folder = models(max_position_embeddings=1500)
    with open_tiny(folder, device, max_context=1400, tree="9x3:kary") as engine:
        shapes = [(width, rows) for width in (16, 2, 1) for rows in (1400, 1024, 512)]
        assert device.recorded == shapes
        for prompt in (PROMPT, [3] * 40, [3] * 600, [3] * 1100):
            for params in ({"max_new_tokens": 30}, {"max_new_tokens": 3}, {"max_new_tokens": 20, "temperature": 0.7}):
                engine.generate(prompt, ignore_eos=True, **params)  # type: ignore[arg-type]
        assert device.recorded == shapes and device.num_replays > 20


def test_passes_of_the_planned_tree_are_replayed_and_not_computed_again(models: Models) -> None:
    """Only the first pass of a request, which reads the prompt, is computed as it comes."""
    device = OrderedDevice()
    with open_tiny(models(), device, tree="4x4:kary") as engine:
        drafter = engine.loop._drafter
        assert drafter is not None
        computed: list[int] = []
        forward = drafter._model.forward
        drafter._model.forward = lambda parts: (computed.append(parts[0].num_rows), forward(parts))[1]  # type: ignore[method-assign]
        engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
        assert computed == [len(PROMPT)] and device.num_replays > 10


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError()])
def test_a_device_that_cannot_record_computes_as_it_goes(
    models: Models, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    device = BrokenDevice(error)
    with open_tiny(models(), CpuDevice()) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
    with open_tiny(models(), device) as engine:
        assert engine.plan.draft_passes == "eager" and "could not be recorded" in engine.plan.notes[-1]
        assert engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids == expected
    assert "could not be recorded" in caplog.text
    with pytest.raises(DeviceError, match="could not be recorded"):
        open_tiny(models(), BrokenDevice(error), draft_passes="graphs")


@pytest.mark.parametrize(("draft_passes", "recorded"), [("auto", True), ("graphs", True), ("eager", False)])
def test_who_asks_for_eager_passes_gets_them_and_the_plan_says_so(models: Models, draft_passes: str, recorded: bool) -> None:
    device = RecordingDevice()
    with open_tiny(models(), device, draft_passes=draft_passes) as engine:
        text = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        assert (device.num_recordings > 0) is recorded
        assert text.to_json()["plan"]["draft_passes"] == ("graphs" if recorded else "eager")  # type: ignore[index]
        assert (engine.plan.device_ledger["draft recordings"] > 0) is recorded


def test_graphs_are_refused_where_there_are_none(models: Models) -> None:
    with pytest.raises(UsageError, match="does not replay"):
        open_tiny(models(), CpuDevice(), draft_passes="graphs")


def test_recordings_keep_the_memory_of_the_widest_however_many_there_are(models: Models) -> None:
    device, plain = CountingDevice(), CountingDevice()
    plain.replays = False
    folder = models(max_position_embeddings=1500)
    with open_tiny(folder, plain, max_context=1400, tree="9x3:kary") as engine:
        assert engine.plan.device_ledger["draft recordings"] == 0
        least_bytes = plain.held_bytes
    with open_tiny(folder, device, max_context=1400, tree="9x3:kary") as engine:
        kept_bytes, rows = device.held_bytes - least_bytes, widest_pass(engine.plan.tree.num_nodes)
        for length in (5, 600, 1100):
            engine.generate([3] * length, max_new_tokens=30, ignore_eos=True)
        assert device.num_recordings >= 9 and device.held_bytes == kept_bytes + least_bytes
        assert kept_bytes == rows * (4 * 8 + 1400 + VOCAB_SIZE * 4) < engine.plan.device_ledger["draft recordings"]


def test_a_drafter_that_takes_less_memory_has_the_same_logits(models: Models) -> None:
    """As when a tree has become smaller for want of memory. Wider levels are computed as they come."""
    device = CountingDevice()
    with open_drafters((CpuDevice, lambda: device), models(), rows=600) as drafters:
        contexts, generator = start_all(drafters), torch.Generator().manual_seed(6)
        before_bytes = device.held_bytes
        run_round(contexts, from_widths((70, 1)), generator)
        for drafter in drafters:
            drafter.aim(Aim(shape=from_widths((7,))), 1024)
        assert device.held_bytes < before_bytes
        run_round(contexts, from_widths((70, 2, 1)), generator)
        after_bytes = device.held_bytes
        for drafter in drafters:
            drafter.aim(Aim(shape=WIDE), 1024)
        assert device.held_bytes == after_bytes


def test_prompts_are_not_recorded(models: Models) -> None:
    """However short: recording stops the device for longer than such a pass takes."""
    device = RecordingDevice()
    with open_tiny(models(), device) as engine:
        num_recordings = device.num_recordings
        for length in (1, 3, 10, 60, 100):
            engine.generate([3] * length, max_new_tokens=1)
        assert device.num_recordings == num_recordings
        texts = [engine.generate([3] * length, max_new_tokens=9, ignore_eos=True).token_ids for length in (2, 66)]
    with open_tiny(models(), CpuDevice()) as engine:
        assert texts == [engine.generate([3] * length, max_new_tokens=9, ignore_eos=True).token_ids for length in (2, 66)]


def test_what_an_earlier_text_left_behind_is_not_read(models: Models) -> None:
    """NaN in a masked row would spoil a pass of fixed shape: 0 * NaN."""
    generator = torch.Generator().manual_seed(5)
    with open_drafters(DEVICES, models()) as drafters:
        for drafter in drafters:
            drafter.cache.segments[0].poison_tail()
        contexts = start_all(drafters)
        run_round(contexts, TreeShape.chains(3, 3), generator)
        assert all(model_of(context).begin().isfinite().all() for context in contexts)


def test_a_step_of_a_dynamic_tree_is_no_wider_than_what_is_recorded() -> None:
    assert MOST_STEP_ROWS == MAX_ROWS


def test_buckets_are_few_and_near() -> None:
    widths = [width_bucket(num_rows) for num_rows in range(1, MAX_ROWS + 1)]
    assert widths == sorted(widths) and len(set(widths)) == 10
    assert all(num_rows <= width < max(2 * num_rows, num_rows + 64) for num_rows, width in enumerate(widths, start=1))
    for capacity in (100, 512, 1000, 4096):
        rows = [rows_bucket(num_rows, capacity) for num_rows in range(1, capacity + 1)]
        assert rows == sorted(rows) and rows[-1] == capacity and rows[0] == min(LEAST_CACHED_ROWS, capacity)
        assert all(num_rows <= bucket for num_rows, bucket in enumerate(rows, start=1)) and len(set(rows)) <= 4
