"""The draft's passes in fixed shapes, recorded and replayed, against passes of the size needed: same logits, same trees."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, VOCAB_SIZE
from drafters import PROMPT, open_drafters, open_tiny, run_round
from fakes import CountingDevice, RecordingDevice
from offload.device.cpu import CpuDevice
from offload.errors import FitError
from offload.model.buckets import LEAST_CACHED_ROWS, MAX_ROWS, rows_bucket, widest_pass, width_bucket
from tree.draft import grow
from tree.sampling import SamplingParams
from tree.shape import TreeShape

Models = Callable[..., Path]


class FixedDevice(CpuDevice):
    """Fixed shapes without a recording: `record` returns the work itself."""

    replays = True


DEVICES = (CpuDevice, FixedDevice, RecordingDevice)
LARGE = "64x4:kary"  # of whose nodes as many as MAX_ROWS may be in a level


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_of_every_width_have_the_logits_of_plain_passes(models: Models, family: str) -> None:
    """Widths at, below and above every edge of a bucket; several rounds and commits, the cache longer each time."""
    generator = torch.Generator().manual_seed(1)
    widths = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33) if family != "llama" else (1, 63, 64, 65, 127, 128, 129, 192, 193)
    with open_drafters(DEVICES, models(family, num_layers=2), max_context=1500, tree=LARGE) as drafters:
        for width in widths:
            run_round(drafters, TreeShape.from_widths((width, 1, 1)), generator)
        run_round(drafters, TreeShape.from_widths((2, 3, 1, 2)), generator)


@pytest.mark.parametrize("width", [MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1])
def test_the_widest_levels_are_computed_either_way(models: Models, width: int) -> None:
    with open_drafters(DEVICES, models(num_layers=1), max_context=2400, tree=LARGE) as drafters:
        for _ in range(2):
            run_round(drafters, TreeShape.from_widths((width, 1, 1)), torch.Generator().manual_seed(2))


@pytest.mark.parametrize("max_context", [900, 1024, 2000])
def test_the_cache_grows_through_its_buckets(models: Models, max_context: int) -> None:
    """Committed rows cross 512 and go on to the last row of a cache whose size is no bucket."""
    generator = torch.Generator().manual_seed(3)
    with open_drafters(DEVICES, models(num_layers=1), max_context) as drafters:
        cache = drafters[0]._model.cache
        shape = TreeShape.chains(5, 3)
        for length in (490, 496, 500, 505, 511, 512, 513, cache.capacity - 40, cache.capacity - 11):
            for drafter in drafters:
                drafter.extend_context([11] * (length - len(drafter._context)))
            run_round(drafters, shape, generator)
        with pytest.raises(FitError, match="cached rows"):
            for _ in range(5):
                run_round(drafters[::-1], shape, generator)


@pytest.mark.parametrize("sampled", [True, False])
def test_trees_are_identical_over_rounds_and_commits(models: Models, sampled: bool) -> None:
    shapes = [TreeShape.chains(4, 5), TreeShape.from_widths((9, 2, 2)), TreeShape.chain(6), TreeShape.chains(17, 2)]
    with open_drafters(DEVICES, models()) as drafters:
        for seed, shape in enumerate(shapes * 2):
            params = SamplingParams(0.8, top_p=0.9) if sampled else SamplingParams()
            generators = [torch.Generator().manual_seed(seed) for _ in drafters]
            drafts = [
                grow(drafter, drafter._context[-1], shape, params, generator, sampled=sampled)
                for drafter, generator in zip(drafters, generators, strict=True)
            ]
            for draft in drafts[1:]:
                assert draft.token_ids.tolist() == drafts[0].token_ids.tolist()
            path = shape.path(shape.num_nodes - 1 - seed % 3)
            for drafter in drafters:
                drafter.commit(path)
                drafter.extend_context([int(drafts[0].token_ids[node]) for node in path[1:]] + [seed])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_engine_that_replays_writes_the_same_text(models: Models, temperature: float) -> None:
    texts = []
    for device in DEVICES:
        with open_tiny(models(), device()) as engine:
            request = {"max_new_tokens": 40, "temperature": temperature, "ignore_eos": True}
            texts.append([engine.generate(prompt, seed=4, **request).token_ids for prompt in (PROMPT, [3] * 70, PROMPT)])  # type: ignore[arg-type]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] == texts[0][2]


def test_each_shape_is_recorded_once(models: Models) -> None:
    device = RecordingDevice()
    with open_tiny(models(), device, tree="9x3:kary") as engine:
        for _ in range(3):
            engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True)
        assert 1 <= device.num_recordings <= 5  # rows 1, 2, 4, 8, 16


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
        assert device.num_recordings > 6 and device.held_bytes == kept_bytes + least_bytes
        assert kept_bytes == rows * (3 * 8 + 1400 + VOCAB_SIZE * 4) < engine.plan.device_ledger["draft recordings"]


def test_a_drafter_that_takes_less_memory_has_the_same_logits(models: Models) -> None:
    """As when a tree has become smaller for want of memory. Wider levels are computed as they come."""
    device = CountingDevice()
    with open_drafters((CpuDevice, lambda: device), models(), max_context=600, tree=LARGE) as drafters:
        before_bytes, generator = device.held_bytes, torch.Generator().manual_seed(6)
        run_round(drafters, TreeShape.from_widths((70, 1)), generator)
        for drafter in drafters:
            drafter.limit(1024, 8)
        assert device.held_bytes < before_bytes
        run_round(drafters, TreeShape.from_widths((70, 2, 1)), generator)


def test_prompts_are_not_recorded(models: Models) -> None:
    """A pass for one logit out of a hundred would keep the memory of a hundred."""
    device = RecordingDevice()
    with open_tiny(models(), device) as engine:
        engine.generate([3] * 100, max_new_tokens=1)
        assert device.num_recordings == 0
        texts = [engine.generate([3] * length, max_new_tokens=9, ignore_eos=True).token_ids for length in (2, 66)]
    with open_tiny(models(), CpuDevice()) as engine:
        assert texts == [engine.generate([3] * length, max_new_tokens=9, ignore_eos=True).token_ids for length in (2, 66)]


def test_what_an_earlier_text_left_behind_is_not_read(models: Models) -> None:
    """NaN in a masked row would spoil a pass of fixed shape: 0 * NaN."""
    generator = torch.Generator().manual_seed(5)
    with open_drafters(DEVICES, models()) as drafters:
        for drafter in drafters:
            drafter._model.cache.truncate(0)
            drafter._model.cache.poison_tail()
            drafter.restart(PROMPT)
        run_round(drafters, TreeShape.chains(3, 3), generator)
        assert all(drafter.begin(TreeShape.chain(2)).isfinite().all() for drafter in drafters)


def test_a_model_that_waits_in_a_pass_is_not_recorded(models: Models) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    device = RecordingDevice()
    with open_tiny(models(rope_parameters=rope), device) as engine:
        assert len(engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids) == 12
    assert device.num_recordings == 0


def test_buckets_are_few_and_near() -> None:
    widths = [width_bucket(num_rows) for num_rows in range(1, MAX_ROWS + 1)]
    assert widths == sorted(widths) and len(set(widths)) == 10
    assert all(num_rows <= width < max(2 * num_rows, num_rows + 64) for num_rows, width in enumerate(widths, start=1))
    for capacity in (100, 512, 1000, 4096):
        rows = [rows_bucket(num_rows, capacity) for num_rows in range(1, capacity + 1)]
        assert rows == sorted(rows) and rows[-1] == capacity and rows[0] == min(LEAST_CACHED_ROWS, capacity)
        assert all(num_rows <= bucket for num_rows, bucket in enumerate(rows, start=1)) and len(set(rows)) <= 4
