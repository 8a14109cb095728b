"""What only a GPU can tell: parity, races under delays and poison, registered memory, one host sync per pass.
The fastest come first, as time on such a machine may be short."""

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, reference_model
from drafters import extend, open_drafters, run_round, start_all
from fakes import layer_fault
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import pinned
from offload.device.base import CopyTicket, Ticket
from offload.device.cuda import CudaDevice, RegisteredBuffer
from offload.doctor.gather import gather_facts
from offload.doctor.judge import judge
from offload.engine.engine import Engine
from offload.engine.generation import Step
from offload.model.attention import Block, tree_attention
from offload.model.transformers_api import carry
from planning import L40
from shapes import from_widths
from tree.logprobs import Scoring

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]


class RacingCudaDevice(CudaDevice):
    """Both streams are delayed at random, and a released slot is filled with NaN behind its last user: a missing wait in
    either direction becomes a wrong logit."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(0)

    def _delay(self) -> None:
        torch.cuda._sleep(self._random.choice([0, 0, 100_000, 2_000_000]))

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        with torch.cuda.stream(self._copy_stream):
            self._delay()
        return super().copy_async(dst, src, after)

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        tensor = super().wait(ticket)
        self._delay()
        return tensor

    def release(self, buffer: torch.Tensor) -> Ticket:
        self._delay()
        buffer.fill_(0xFF)
        return super().release(buffer)


def open_tiny(folder: Path, draft: Path | None, device: CudaDevice | None = None, **changes: object) -> Engine:
    settings: dict[str, Any] = {"tree": "4x6:kary" if draft else "none", "dtype": "float32", **changes}
    settings = {"model": str(folder), "draft_models": (str(draft),) if draft else (), "device": "cuda", **settings}
    return open_engine(EngineSettings(**settings), device=device)


class RestrictedRuntime:
    """CUDA's runtime, which registers `room_bytes` of host memory at a time."""

    def __init__(self, room_bytes: int) -> None:
        self._runtime, self._room_bytes = torch.cuda.cudart(), room_bytes
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if sum(self.registered.values()) + num_bytes > self._room_bytes:
            return 2  # out of memory
        self.registered[address] = num_bytes
        return int(self._runtime.cudaHostRegister(address, num_bytes, flags))

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return int(self._runtime.cudaHostUnregister(address))


class SourcesDevice(RacingCudaDevice):
    """Knows which copies came from memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_pageable_copies = 0

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        self.num_pageable_copies += not src.is_pinned()
        return super().copy_async(dst, src, after)


class EagerCudaDevice(CudaDevice):
    """The draft's passes are launched kernel by kernel, each of the size needed."""

    replays = False


def free_workspaces() -> int:
    """Gives back what the matrix library keeps for every stream that it ran on, 32 MiB each on Hopper; returns how much that
    was. Recordings must not be replayed afterwards."""
    before_bytes = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before_bytes - torch.cuda.memory_allocated()


def test_host_memory_is_registered_exactly_and_given_back() -> None:
    num_bytes = 5 * 2**20 + 4096
    for _ in range(3):
        buffer = RegisteredBuffer(num_bytes, [2**20, 3 * 2**20])
        assert buffer.pinned_bytes == num_bytes == buffer.tensor.numel()
        assert buffer.tensor.is_pinned()
        view = buffer.tensor
        buffer.close()
        assert not view.is_pinned()  # the view keeps the memory, but it is registered no more


def test_the_clock_is_set_anew_without_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    old = device.mark()
    device.drain(old)
    monkeypatch.setattr("offload.device.cuda.CLOCK_VALID_S", 0.0)
    first = device.interval(old).end_s
    device.renew_clock()
    start_s = time.monotonic()
    new = device.mark()
    device.drain(new)
    assert device.interval(old).end_s == first
    assert abs(device.interval(new).end_s - start_s) < 0.01
    device.close()


def test_attention_is_the_kernel_that_takes_masks_and_needs_no_building() -> None:
    """Not the fallback, which makes all scores at once, nor cuDNN's, which is built anew for every length."""
    rows, columns, heads = 768, 1801, 64
    query = torch.randn(1, heads, rows, 128, dtype=torch.bfloat16, device="cuda")
    key = torch.randn(1, 8, columns, 128, dtype=torch.bfloat16, device="cuda")
    mask = torch.rand(1, 1, rows, columns, device="cuda") < 0.5
    carrier = carry({None: (Block(slice(rows), slice(columns), mask),)}, mask.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        tree_attention(torch.nn.Module(), query, key, key, carrier)
        used_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert "aten::_scaled_dot_product_efficient_attention" in {event.key for event in profile.key_averages()}
    repeated_bytes, mask_bytes = 2 * heads * columns * 128 * 2, rows * columns * 2
    assert used_bytes < 2 * query.nbytes + repeated_bytes + 4 * mask_bytes


def test_recordings_share_one_stream_whose_workspace_is_there_once() -> None:
    device = CudaDevice()
    matrices = [torch.ones(size, size, device="cuda") for size in (64, 128, 192, 256, 320)]
    device.record(partial(torch.mm, matrices[0], matrices[0], out=torch.empty_like(matrices[0])))
    allocated_bytes = torch.cuda.memory_allocated()
    for matrix in matrices[1:]:
        device.record(partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix)))
    assert torch.cuda.memory_allocated() - allocated_bytes < 4 * 2**20
    device.close()


@pytest.mark.parametrize("way", ["copy", "mapped"])
def test_small_uploads_arrive_as_they_were(way: str) -> None:
    device = CudaDevice(small_uploads=way)
    hosts = [torch.arange(length) for length in (0, 1, 7, 1000, 8192)] + [torch.rand(40, 3) < 0.5, torch.tensor(5)]
    for host in hosts * 200:  # more than lies in mapped memory at a time
        found = device.upload(host)
        assert found.device == device.torch_device and found.dtype == host.dtype
    for host in hosts:
        assert torch.equal(device.upload(host).cpu(), host)
    device.close()


def test_small_uploads_get_past_a_layer_under_way() -> None:
    """Twenty of them land while one copy of 2 GiB is under way; or each level of a draft takes as long as a layer's copy."""
    device, num_bytes, numbers = CudaDevice(small_uploads="auto"), 2**31, torch.arange(8192)
    slot = device.alloc(num_bytes)
    with pinned(device, num_bytes, ()) as source:
        device.drain(device.copy_async(slot, source.tensor, device.mark()))
        copy = device.copy_async(slot, source.tensor, device.mark())
        for _ in range(20):
            found = device.upload(numbers)
            device.drain(device.mark())
        got_past = not device.passed(copy)
        device.drain(copy)
    assert got_past and torch.equal(found.cpu(), numbers)
    device.close()


def test_streamed_weights_are_pinned_and_resident_ones_take_no_host_memory(models: Models) -> None:
    folder = models(num_layers=5)
    with open_tiny(folder, None, resident_layers=2, slots=2) as engine:
        memory = engine.memory()
        assert memory.host_pinned_bytes == memory.host_weights_bytes == engine.plan.bytes_per_pass


def test_a_round_syncs_the_host_once(models: Models) -> None:
    folder = models(num_layers=5)
    for params in ({}, {"temperature": 0.8, "top_p": 0.9}):
        with open_tiny(folder, folder, resident_layers=1, slots=2) as engine:
            engine.generate(PROMPT, max_new_tokens=100, ignore_eos=True, **params)  # type: ignore[arg-type]  # libraries set up
            generation = engine.stream(PROMPT, max_new_tokens=60, ignore_eos=True, **params)  # type: ignore[arg-type]
            next(generation)
            next(generation)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    next(generation)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            # The mode itself warns, too, that it is a prototype.
            syncs = [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]
            assert len(syncs) <= 1, syncs


def test_an_exception_in_a_layer_leaves_the_engine_usable(models: Models) -> None:
    folder = models(num_layers=4)
    with open_tiny(folder, folder, resident_layers=1, slots=2) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=12).token_ids
        layer = list(engine.loop._target._model.get_submodule("model.layers").children())[2]
        hook = layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(PROMPT, max_new_tokens=12)
        hook.remove()
        assert engine.generate(PROMPT, max_new_tokens=12).token_ids == expected


def test_replayed_drafts_change_no_token(models: Models) -> None:
    folder = models(num_layers=5)
    texts = []
    for device in (EagerCudaDevice(), CudaDevice(), RacingCudaDevice()):
        with open_tiny(folder, folder, device, tree="9x4:kary", resident_layers=1, slots=2) as engine:
            prompts = (PROMPT, [3] * 40, PROMPT)
            texts.append([engine.generate(prompt, max_new_tokens=40, ignore_eos=True).token_ids for prompt in prompts])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_on_the_gpu_is_that_of_transformers(models: Models, family: str) -> None:
    folder = models(family)
    reference = reference_model(folder).cuda()
    expected = reference.generate(torch.tensor([PROMPT]).cuda(), max_new_tokens=20, do_sample=False)[0, len(PROMPT) :]
    for draft, resident, slots in ((folder, 0, 2), (models(family, num_layers=1, seed=1), 1, 3), (None, 0, 2), (folder, 3, 2)):
        with open_tiny(folder, draft, resident_layers=resident, slots=slots) as engine:
            assert list(engine.generate(PROMPT, max_new_tokens=20).token_ids) == expected.tolist()


@pytest.mark.parametrize("resident", [0, 2])
def test_layers_on_disk_give_the_same_tokens(models: Models, resident: int) -> None:
    folder = models(num_layers=5)
    with open_tiny(folder, folder, resident_layers=5) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=16).token_ids
        layer_bytes = engine.plan.device_ledger["5 resident layers"] // 5
    with open_tiny(folder, folder, resident_layers=resident, slots=2, host_memory_bytes=2 * layer_bytes) as engine:
        assert engine.generate(PROMPT, max_new_tokens=16).token_ids == expected


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_delayed_copies_and_poisoned_slots_change_no_token(models: Models, slots: int) -> None:
    folder = models(num_layers=5)
    with open_tiny(folder, folder, resident_layers=5) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True).token_ids
    for resident in (0, 2):
        with open_tiny(folder, folder, RacingCudaDevice(), resident_layers=resident, slots=slots) as engine:
            for _ in range(3):
                assert engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True).token_ids == expected


class BesideDevice(RacingCudaDevice):
    """The pass and what is beside it are delayed at random, too, each against the other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_beside = 0

    @contextmanager
    def beside(self, after: Ticket) -> Iterator[None]:
        self.num_beside += 1
        with super().beside(after):
            self._delay()
            yield
            self._delay()


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_that_grow_beside_a_pass_change_no_token(models: Models, resident: int, temperature: float) -> None:
    """Recorded passes are replayed there, too. A seed repeats the text of a device without delays."""
    folder, texts, foreseen = models(num_layers=4), [], []
    for device in (CudaDevice(), BesideDevice()):
        sizes = {"tree": "16:dynamic", "resident_layers": resident, "slots": 2, "fixed_plan": True}
        with open_tiny(folder, folder, device, **sizes) as engine:
            engine.loop._plan = replace(engine.plan, ahead_steps=6)
            for _ in range(3):
                engine.forget()
                request: dict[str, Any] = {"max_new_tokens": 48, "temperature": temperature, "seed": 1, "ignore_eos": True}
                report = engine.generate(PROMPT, **request)
                texts.append(report.token_ids)
                foreseen.append(sum(one.foreseen_nodes for one in report.stats.passes))
            assert not isinstance(device, BesideDevice) or device.num_beside > 0
    if not temperature:
        with open_tiny(folder, None) as engine:
            texts.append(engine.generate(PROMPT, max_new_tokens=48, ignore_eos=True).token_ids)
    assert len(set(texts)) == 1 and len(set(foreseen)) == 1 and (foreseen[0] > 0 or temperature)


def test_closing_gives_device_and_host_memory_back(models: Models) -> None:
    folder = models(num_layers=5)
    gc.collect()
    torch.cuda.empty_cache()
    base_bytes = torch.cuda.memory_allocated() - free_workspaces()
    for _ in range(3):
        with open_tiny(folder, folder, resident_layers=2, slots=2) as engine:
            engine.generate(PROMPT, max_new_tokens=16, ignore_eos=True)
            arena = engine.loop._stream._store.any_source()
            assert arena.is_pinned()
        assert not arena.is_pinned()
        free_workspaces()
        assert torch.cuda.memory_allocated() - base_bytes < 2**20


def test_recordings_take_what_the_plan_has_for_them(models: Models) -> None:
    """With a vocabulary as large as that of real drafts, whose logits are most of what a pass allocates."""
    wide = {
        "vocab_size": 128_000,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    }
    folder = models(num_layers=1, **wide)
    held_bytes = []
    for draft_passes in ("eager", "graphs"):
        shape: dict[str, Any] = {"tree": "12x3:kary", "max_context": 2048, "resident_layers": 1}
        with open_tiny(folder, folder, draft_passes=draft_passes, **shape) as engine:
            planned_bytes = engine.plan.device_ledger["draft recordings"]
            gc.collect()
            torch.cuda.empty_cache()
            held_bytes.append(torch.cuda.memory_reserved())
    grown_bytes = held_bytes[1] - held_bytes[0]
    assert grown_bytes <= planned_bytes + 64 * 2**20, "beyond the plan: a library's workspace, and the allocator's rounding"


def test_the_peak_is_within_5_percent_of_the_ledger_and_a_layer_given_up_is_free(models: Models) -> None:
    """Allocated by torch during a run, but for the libraries' workspaces, which the planner leaves a reserve for."""
    shape: dict[str, Any] = {"num_layers": 8, "hidden_size": 1024, "intermediate_size": 2752, "head_dim": 256}
    folder, draft = models(**shape), models(**{**shape, "num_layers": 1})
    free_workspaces()
    base_bytes = torch.cuda.memory_allocated()
    settings = EngineSettings(
        model=str(folder),
        draft_models=(str(draft),),
        tree="4x6:kary",
        device="cuda",
        dtype="float32",
        max_context=160,
        gpu_memory_bytes=320 * 2**20,
    )
    with open_engine(settings, hardware=L40) as engine:
        plan, layer_bytes = engine.plan, engine.loop._stream.slot_bytes
        prompt = [token % 90 for token in range(plan.text_tokens - 16)]
        expected = engine.generate(prompt, max_new_tokens=16, ignore_eos=True).token_ids
        assert plan.placement.streamed
        peak_bytes = engine.memory().device_peak_bytes - base_bytes
        before_bytes, num_resident = torch.cuda.memory_allocated(), len(plan.placement.resident)
        with layer_fault(engine, 3, lambda: len(engine.plan.placement.resident) == num_resident):
            assert engine.generate(prompt, max_new_tokens=16, ignore_eos=True).token_ids == expected
        assert before_bytes - torch.cuda.memory_allocated() == pytest.approx(layer_bytes, rel=0.05)
        assert peak_bytes - free_workspaces() == pytest.approx(sum(plan.device_ledger.values()), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_drafts_have_the_logits_of_eager_ones(models: Models, family: str) -> None:
    """Captured ahead and replayed in any order, over commits and a growing cache."""
    generator = torch.Generator().manual_seed(1)
    with open_drafters((EagerCudaDevice, CudaDevice), models(family), rows=1500, num_texts=2) as drafters:
        texts = [start_all(drafters, PROMPT, place) for place in range(2)]
        for width in (1, 2, 3, 4, 64, 65, 9, 3, 128, 1, 200, 5):
            for contexts in texts:
                run_round(contexts, from_widths((width, 1, 1)), generator, tolerance=1e-4)
        extend(texts[1], [11] * 500)  # into the next bucket of attended rows
        for width in (5, 64, 2):
            for contexts in texts:
                run_round(contexts, from_widths((width, 2, 1)), generator, tolerance=1e-4)


@pytest.mark.parametrize("disk", [0, 3])
def test_what_the_driver_would_not_pin_is_copied_from_pinned_memory_and_changes_no_token(
    models: Models, monkeypatch: pytest.MonkeyPatch, disk: int
) -> None:
    """Six streamed layers and a ring; the driver registers two to five of these. Logits are compared where a token was
    chosen."""
    folder = models(num_layers=7)

    def scored_steps(engine: Engine) -> list[Step]:
        request = engine.admission.request(PROMPT, max_new_tokens=24, ignore_eos=True, scoring=Scoring())
        return list(engine.run(request))

    with open_tiny(folder, folder, resident_layers=7) as engine:
        expected = scored_steps(engine)
    with open_tiny(folder, None, resident_layers=1, slots=2) as engine:
        layer_bytes = engine.loop._stream.slot_bytes
    host = {"host_memory_bytes": (8 - disk) * layer_bytes} if disk else {}
    for room_layers, slots in ((2, 2), (3, 3), (4, 2), (5, 3)):
        runtime = RestrictedRuntime(room_layers * layer_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "cudart", lambda runtime=runtime: runtime)
            device = SourcesDevice()
            with open_tiny(folder, folder, device, resident_layers=1, slots=slots, **host) as engine:
                memory, placement = engine.memory(), engine.plan.placement
                assert memory.host_pinned_bytes == room_layers * layer_bytes == sum(runtime.registered.values())
                assert (len(placement.pageable), len(placement.disk)) == (6 - disk - (room_layers - 2), disk)
                before = device.num_pageable_copies
                for _ in range(2):
                    steps = scored_steps(engine)
                    assert [step.token_ids for step in steps] == [step.token_ids for step in expected]
                    for step, other in zip(steps, expected, strict=True):
                        for score, right in zip(step.scores, other.scores, strict=True):
                            assert score.logprob == pytest.approx(right.logprob, abs=1e-4)
                assert device.num_pageable_copies == before
            assert runtime.registered == {}


def test_doctor_registers_memory_and_looks_at_the_link_under_load() -> None:
    facts = gather_facts(model=None, draft_model=None, device="cuda")
    assert facts.gpu is not None and facts.copies is not None
    assert facts.copies.pinned_bytes == facts.copies.tried_bytes and facts.copies.bytes_per_s > 1e9
    assert facts.gpu.activity.under_load or facts.gpu.driver == "unknown"
    assert {finding.name: finding.status for finding in judge(facts)}["GPU"] == "ok"
