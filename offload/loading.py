"""Weights into memory: the target's layers where a plan puts them, the draft whole. What fails leaves nothing behind."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from .config import bytes_text
from .device import Device
from .device.host import available_bytes
from .errors import FitError, HostMemoryError
from .model.causal_lm import CausalLM
from .model.drafter import PROMPT_CHUNK_TOKENS, ModelDrafter
from .model.kv_cache import KVCache
from .model.masks import TreeMasks
from .planner.cost import ledger_lines, size_text
from .planner.fallback import Fallbacks
from .planner.plan import Plan
from .source import ModelSource
from .streaming.stream import LayerStream, ResidentWeights, Weights
from .weights.placement import RING_BUFFERS, Placement
from .weights.source import share_layers
from .weights.store import WeightStore, load_through_host

logger = logging.getLogger(__name__)

# `progress(read_bytes, total_bytes)` while weights are read.
Progress = Callable[[int, int], None]
HOST_RESERVE_BYTES = 2**30


class ReadCounter:
    """Adds up bytes read for a progress callback that wants totals."""

    def __init__(self, progress: Progress | None, total_bytes: Callable[[Plan], int]) -> None:
        self._progress, self._total_bytes_of = progress, total_bytes
        self._total_bytes = self._read_bytes = 0

    def begin(self, plan: Plan) -> None:
        """Count what loading under `plan` reads."""
        self._read_bytes = 0
        self.expect(plan)

    def expect(self, plan: Plan) -> None:
        """Go on counting, for `plan`."""
        self._total_bytes = self._total_bytes_of(plan)

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def bytes_to_read(source: ModelSource, draft: ModelSource | None, plan: Plan, shared: Mapping[int, int]) -> int:
    """What loading under `plan` reads: layers on disk are read later, those that share memory not at all."""
    prefix = source.architecture.prefix
    unread = tuple(f"{prefix}.{layer}." for layer in (*plan.placement.disk, *shared))
    wanted = source.architecture.expected_tensors
    num_bytes = sum(source.tensors.num_bytes(name) for name in wanted if not (unread and name.startswith(unread)))
    if draft is not None:
        num_bytes += sum(draft.tensors.num_bytes(name) for name in draft.architecture.expected_tensors)
    return num_bytes


def share_memory(source: ModelSource, placement: Placement, host_bytes: int, *, may_refuse: bool) -> dict[int, int]:
    """{borrower: owner}: host layers that borrow the memory of one with the same bytes, as few as `host_bytes` asks for, with
    room for a ring if the device may refuse to pin some. FitError when even so it does not suffice."""
    equal, layer_bytes = source.tensors.equal_layers, source.model.layout.num_bytes
    if not equal:
        return {}
    shared = share_layers(placement.host, equal, host_bytes // layer_bytes - (RING_BUFFERS if may_refuse else 0))
    num_held = len(placement.host) - len(shared)
    if num_held * layer_bytes > host_bytes:
        raise FitError(
            ledger_lines({f"{num_held} layers that differ": num_held * layer_bytes}, host_bytes),
            where="--host-memory",
            cure=f"allow at least {size_text(num_held * layer_bytes)}, or keep more layers on the device",
        )
    return shared


def load_target(
    device: Device,
    source: ModelSource,
    plan: Plan,
    shared: Mapping[int, int],
    fallbacks: Fallbacks,
    counter: ReadCounter,
    stack: ExitStack,
) -> tuple[Plan, CausalLM, LayerStream, WeightStore]:
    """Under `plan`, or, if by now the host has less memory than was planned, under a smaller one: once, then it is an error."""
    in_host_bytes = sum(plan.device_ledger.values()) if device.host_addressable else 0
    try:
        borrowed_bytes = len(shared) * source.model.layout.num_bytes
        _check_host(sum(plan.host_ledger.values()) - borrowed_bytes + in_host_bytes)
        return plan, *_load_streamed(device, source, plan, shared, counter, stack)
    except HostMemoryError as error:
        if source.tensors.equal_layers:
            raise  # nothing of it could come from disk
        refused = error.what  # not the error itself: its traceback holds all that was allocated
    plan = fallbacks.less_host(plan, available_bytes() - HOST_RESERVE_BYTES - in_host_bytes)
    logger.warning("%s: %s", refused, plan.notes[-1])
    return plan, *_load_streamed(device, source, plan, shared, counter, stack)


def _check_host(needed_bytes: int) -> None:
    left_bytes = available_bytes()
    if needed_bytes > left_bytes:
        raise HostMemoryError(
            f"{bytes_text(needed_bytes)} of host memory are needed, {bytes_text(left_bytes)} are left",
            where="host memory",
            cure="lower --host-memory or --max-context, or free memory",
        )


def _load_streamed(
    device: Device, source: ModelSource, plan: Plan, shared: Mapping[int, int], counter: ReadCounter, stack: ExitStack
) -> tuple[CausalLM, LayerStream, WeightStore]:
    counter.begin(plan)
    with ExitStack() as own:
        outside = _load_outside(device, source, counter)
        cache = _cache(device, source, plan.context_rows)
        prefix, most_bytes = source.architecture.prefix, plan.host_budget_bytes
        store = WeightStore(device, source.tensors, source.model.layout, prefix, plan.placement, shared, most_bytes)
        own.callback(store.close)
        counter.expect(replace(plan, placement=store.placement))  # a ring may have sent layers to disk
        store.load(counter)
        stream = LayerStream(device, store, plan.num_slots)
        own.callback(stream.close)
        model = CausalLM(source.architecture, device, source.model.dtype, outside, stream, cache)
        own.callback(model.close)
        stack.push(own.pop_all())
    return model, stream, store


def load_draft(
    device: Device,
    source: ModelSource,
    plan: Plan,
    vocab_size: int,
    masks: TreeMasks,
    counter: ReadCounter,
    stack: ExitStack,
) -> ModelDrafter:
    """The draft stays on the device whole."""
    outside = _load_outside(device, source, counter)
    num_layers = source.architecture.num_layers
    everything = Placement(num_layers=num_layers, resident=frozenset(range(num_layers)))
    store = WeightStore(device, source.tensors, source.model.layout, source.architecture.prefix, everything)
    stack.callback(store.close)
    store.load(counter)
    weights = ResidentWeights([store.resident[layer] for layer in range(num_layers)])
    stack.callback(weights.close)
    cache = _cache(device, source, plan.context_rows)
    model = CausalLM(source.architecture, device, source.model.dtype, outside, weights, cache)
    chunk_tokens = min(PROMPT_CHUNK_TOKENS, plan.pass_rows)
    drafter = ModelDrafter(model, device, vocab_size, masks, chunk_tokens=chunk_tokens, max_nodes=plan.tree.num_nodes)
    stack.callback(drafter.close)
    return drafter


def _load_outside(device: Device, source: ModelSource, counter: ReadCounter) -> Weights:
    """The tensors outside the decoder layers, in one device buffer."""
    layout = source.model.shared_layout
    buffer = device.alloc(layout.num_bytes)
    with source.tensors.open() as feed:
        if device.host_addressable:
            feed.fill(layout.views(buffer), counter)
        else:
            load_through_host(device, [(buffer, layout.views)], [], feed, counter)
    return layout.views(buffer)


def _cache(device: Device, source: ModelSource, rows: int) -> KVCache:
    architecture = source.architecture
    return KVCache(
        device,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        capacity=rows,
        dtype=source.model.dtype,
    )
