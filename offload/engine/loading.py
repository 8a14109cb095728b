"""Weights into memory: the target's layers where a plan puts them, the draft whole. What fails leaves nothing behind.

Memory is taken before any weight is read, the device's first: what does not fit is refused in a moment, not after minutes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from tree.sources import TokenSources

from ..config import bytes_text
from ..device import Device, open_device
from ..device.host import available_bytes
from ..errors import FitError, HostMemoryError
from ..model.apart import ApartDrafter
from ..model.architecture import Architecture
from ..model.base_model import base_architecture
from ..model.causal_lm import CausalLM, WeightSource
from ..model.drafter import ModelDrafter
from ..model.kv_cache import KVCache
from ..planner.cost import ledger_lines, size_text, stored_bytes
from ..planner.fallback import Fallbacks
from ..planner.plan import Plan
from ..source import ModelSource
from ..streaming.stream import LayerStream, ResidentWeights, Weights
from ..weights.placement import RING_BUFFERS, Placement
from ..weights.source import borrowed_layers
from ..weights.store import WeightStore
from ..weights.through_host import Upload, load_through_host

logger = logging.getLogger(__name__)

# `progress(read_bytes, total_bytes)` while weights are read.
LoadProgress = Callable[[int, int], None]
HOST_RESERVE_BYTES = 2**30


class ReadCounter:
    """Adds up bytes read for a progress callback that wants totals."""

    def __init__(self, progress: LoadProgress | None, total_bytes: Callable[[Plan], int]) -> None:
        self._progress, self._total_bytes_of = progress, total_bytes
        self._total_bytes = self._read_bytes = 0

    def begin(self, plan: Plan) -> None:
        """Count what loading under `plan` reads."""
        self._read_bytes, self._total_bytes = 0, self._total_bytes_of(plan)

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def bytes_to_read(source: ModelSource, draft: ModelSource | None, plan: Plan) -> int:
    """What loading under `plan` reads: layers on disk are read later, those that borrow memory not at all."""
    num_bytes = _bytes_of(source, plan.placement)
    if draft is not None and not draft.model.drafts_from_base:
        num_bytes += _bytes_of(draft, _resident(draft))
    return num_bytes


def _bytes_of(source: ModelSource, placement: Placement) -> int:
    """A layer with a base is read as a parameter where it is resident as it computes; elsewhere the base is read, too."""
    codecs = source.model.codecs
    raw = {layer for layer in placement.resident - placement.coded if codecs[layer].base.fields}
    stored = [*(placement.resident - raw), *placement.host_owners]
    names = [*source.stored_names(stored), *source.base_names(placement.decoded), *source.outside_names]
    return sum(map(source.tensors.num_bytes, names)) + sum(map(source.parameters.num_bytes, source.parameter_names(raw)))


def lend_memory(source: ModelSource, plan: Plan, host_bytes: int, *, may_refuse: bool) -> Plan:
    """`plan` with host layers that borrow the memory of one with the same bytes, as few as `host_bytes` asks for, with
    room for a ring if the device may refuse to pin some. FitError when even so it does not suffice."""
    equal, layer_bytes = source.tensors.equal_layers, source.model.cost.slot_bytes
    if not equal:
        return plan
    most_layers = host_bytes // layer_bytes - (RING_BUFFERS if may_refuse else 0)
    borrowed = borrowed_layers(plan.placement.host, equal, most_layers)
    num_held = len(plan.placement.host) - len(borrowed)
    if num_held * layer_bytes > host_bytes:
        raise FitError(
            ledger_lines({f"{num_held} layers that differ": num_held * layer_bytes}, host_bytes),
            where="--host-memory",
            cure=f"allow at least {size_text(num_held * layer_bytes)}, or keep more layers on the device",
        )
    return replace(plan, placement=replace(plan.placement, borrowed=borrowed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A pair in its memory, ready to run once it is `read`, and the plan that it runs under."""

    plan: Plan
    target: CausalLM
    stream: LayerStream
    store: WeightStore
    drafter: ModelDrafter | ApartDrafter | None
    parts: "tuple[_Memory, ...]"

    def read(self, counter: ReadCounter) -> None:
        """The weights, from wherever they come."""
        counter.begin(replace(self.plan, placement=self.store.placement))  # a ring may have sent layers to disk
        target, *others = self.parts
        target.fill(counter, self.stream.any_slot)
        for part in others:
            part.fill(counter)


def take_memory(
    device: Device,
    target: ModelSource,
    draft: ModelSource | None,
    plan: Plan,
    fallbacks: Fallbacks,
    stack: ExitStack,
    sources: Sequence[TokenSources] = (),
) -> Loaded:
    """Under `plan`, or, if by now the host has less memory than was planned, under a smaller one: once, then it is an error.
    `stack` is given what ends the use of all that was taken.
    The draft's trees have what `sources` find, too."""
    in_host_bytes = sum(plan.device_ledger.values()) if device.host_addressable else 0
    try:
        borrowed_bytes = stored_bytes(target.model.cost, plan.placement.borrowed)
        _check_host(sum(plan.host_ledger.values()) - borrowed_bytes + in_host_bytes)
        return _take_memory(device, target, draft, plan, stack, sources)
    except HostMemoryError as error:
        if target.tensors.equal_layers:
            raise  # nothing of it could come from disk
        refused = error.what  # not the error itself: its traceback holds all that was allocated
    plan = fallbacks.less_host(plan, available_bytes() - HOST_RESERVE_BYTES - in_host_bytes)
    logger.warning("%s: %s", refused, plan.notes[-1])
    return _take_memory(device, target, draft, plan, stack, sources)


def _check_host(needed_bytes: int) -> None:
    left_bytes = available_bytes()
    if needed_bytes > left_bytes:
        raise HostMemoryError(
            f"{bytes_text(needed_bytes)} of host memory are needed, {bytes_text(left_bytes)} are left",
            where="host memory",
            cure="lower --host-memory or --max-context, or free memory",
        )


def _take_memory(
    device: Device,
    target: ModelSource,
    draft: ModelSource | None,
    plan: Plan,
    stack: ExitStack,
    sources: Sequence[TokenSources],
) -> Loaded:
    with ExitStack() as own:
        main = _Memory(device, target, plan.placement, plan, own)
        stream = LayerStream(device, main.store, plan.num_slots)
        own.callback(stream.close)
        model = main.model(stream, own)
        parts = [main]
        drafter: ModelDrafter | ApartDrafter | None = None
        if draft is not None and draft.model.drafts_from_base:
            drafter = _drafter(main.base_draft(draft, plan, own), device, target, plan, own, sources)
            stream.watch(partial(_follow, drafter, main.store))
        elif draft is not None:
            there = _opened_cpu(own) if plan.draft_on_host else device
            aside = _Memory(there, draft, _resident(draft), plan, own, plan.ahead_rows)
            parts.append(aside)
            draft_model = aside.model(_weights_of(aside.store.resident.values(), own), own)
            inner = _drafter(draft_model, there, target, plan, own, sources)
            drafter = ApartDrafter(inner, device) if plan.draft_on_host else inner
        for part in parts:
            part.store.take_host_memory()
        stack.push(own.pop_all())
    return Loaded(plan=plan, target=model, stream=stream, store=main.store, drafter=drafter, parts=tuple(parts))


def _opened_cpu(stack: ExitStack) -> Device:
    """For a draft beside a device that has the target."""
    cpu = open_device("cpu")
    stack.callback(cpu.close)
    return cpu


def _drafter(
    model: CausalLM, device: Device, target: ModelSource, plan: Plan, stack: ExitStack, sources: Sequence[TokenSources]
) -> ModelDrafter:
    """Over `model`, which is on `device`, for the tokens of `target`."""
    about = model, device, target.architecture.vocab_size, plan.aim, plan.pass_rows
    drafter = ModelDrafter(*about, max_nodes=plan.room_nodes, ahead_rows=plan.ahead_rows, sources=sources)
    stack.callback(drafter.close)
    return drafter


class _Memory:
    """Of a model on the device: its layers as `placement` has them, its cache for the texts of `plan`, each `more_rows` longer,
    and one buffer for what lies outside the layers. Taken here, filled by `fill`; `stack` is given what ends its use."""

    def __init__(
        self,
        device: Device,
        source: ModelSource,
        placement: Placement,
        plan: Plan,
        stack: ExitStack,
        more_rows: int = 0,
    ) -> None:
        self._device, self._source, architecture = device, source, source.architecture
        self._outside = device.alloc(source.model.outside_layout.num_bytes)
        self._cache = _cache_of(device, source, plan, more_rows)
        codecs, prefix = source.model.codecs, architecture.prefix
        most_bytes, parameters = plan.host_budget_bytes, source.parameters
        self.store = WeightStore(device, source.tensors, codecs, prefix, placement, most_bytes, parameters)
        stack.callback(self.store.close)

    def model(self, weights: WeightSource, stack: ExitStack) -> CausalLM:
        """The model in this memory, which need not be filled yet."""
        return self._model(self._source.architecture, weights, self._cache, stack)

    def base_draft(self, draft: ModelSource, plan: Plan, stack: ExitStack) -> CausalLM:
        """The `draft` that the base of this model is, in the same memory but for keys and values, which are its own."""
        model = draft.model
        assert model.base is not None
        architecture = base_architecture(model.architecture, model.base, model.bases, kernels=model.kernels)
        weights = _weights_of(self.store.drafting, stack)
        return self._model(architecture, weights, _cache_of(self._device, draft, plan, plan.ahead_rows), stack)

    def _model(self, architecture: Architecture, weights: WeightSource, cache: KVCache, stack: ExitStack) -> CausalLM:
        outside = self._source.model.outside_layout.views(self._outside)
        model = CausalLM(architecture, self._device, self._source.model.dtype, outside, weights, cache)
        stack.callback(model.close)
        return model

    def fill(self, counter: ReadCounter, slot: torch.Tensor | None = None) -> None:
        """`slot`: see WeightStore.load."""
        layout = self._source.model.outside_layout
        with self._source.parameters.open() as feed:
            if self._device.host_addressable:
                feed.fill(layout.views(self._outside), counter)
            else:
                upload = Upload(memory=(self._outside,), lay_out=lambda host: [layout.views(host)])
                load_through_host(self._device, [upload], [], feed, counter)
        self.store.load(counter, slot)


def _resident(source: ModelSource) -> Placement:
    num_layers = source.architecture.num_layers
    return Placement(num_layers=num_layers, resident=frozenset(range(num_layers)))


def _cache_of(device: Device, source: ModelSource, plan: Plan, more_rows: int) -> KVCache:
    architecture = source.architecture
    return KVCache(
        device,
        layer_shapes=architecture.kv_shapes,
        num_segments=plan.max_sequences,
        segment_rows=plan.context_rows + more_rows,
        dtype=source.model.dtype,
        rope=architecture.rope,
    )


def _weights_of(layers: Iterable[Weights], stack: ExitStack) -> ResidentWeights:
    """Of a draft, which stays on the device whole."""
    weights = ResidentWeights(list(layers))
    stack.callback(weights.close)
    return weights


def _follow(drafter: ModelDrafter, store: WeightStore) -> None:
    """Layers of the target have left the device: their base is there now, and recordings knew where they lay."""
    drafter.rebind(ResidentWeights(store.drafting))
