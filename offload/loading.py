"""Weights into memory: the target's layers where a plan puts them, the draft whole. What fails leaves nothing behind."""

import logging
from collections.abc import Callable
from contextlib import ExitStack

import torch

from .device import Device
from .device.host import available_bytes
from .errors import HostMemoryError
from .model.causal_lm import CausalLM
from .model.drafter import PROMPT_CHUNK_TOKENS, ModelDrafter
from .model.kv_cache import KVCache
from .planner.cost import GIB
from .planner.fallback import Fallbacks
from .planner.plan import Plan
from .source import ModelSource
from .streaming.stream import LayerStream, ResidentWeights, Weights
from .weights.placement import Placement
from .weights.reader import ReadJob, TensorReader
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
        self._total_bytes, self._read_bytes = self._total_bytes_of(plan), 0

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def bytes_to_read(source: ModelSource, draft: ModelSource | None, plan: Plan) -> int:
    prefix, disk = source.architecture.prefix, plan.placement.disk
    on_disk = tuple(f"{prefix}.{layer}." for layer in disk)
    tensors = source.checkpoint.tensors
    wanted = source.architecture.expected_tensors
    num_bytes = sum(tensors[name].num_bytes for name in wanted if not (on_disk and name.startswith(on_disk)))
    return num_bytes + (draft.checkpoint.num_bytes if draft else 0)


def load_target(
    device: Device, source: ModelSource, plan: Plan, fallbacks: Fallbacks, counter: ReadCounter, stack: ExitStack
) -> tuple[Plan, CausalLM, LayerStream, WeightStore]:
    """Under `plan`, or, if by now the host has less memory than was planned, under a smaller one: once, then it is an error."""
    in_host_bytes = sum(plan.device_ledger.values()) if device.host_addressable else 0
    try:
        _check_host(sum(plan.host_ledger.values()) + in_host_bytes)
        return plan, *_load_streamed(device, source, plan, counter, stack)
    except HostMemoryError as error:
        refused = error.what  # not the error itself: its traceback holds all that was allocated
    plan = fallbacks.less_host(plan, available_bytes() - HOST_RESERVE_BYTES - in_host_bytes)
    logger.warning("%s: %s", refused, plan.notes[-1])
    return plan, *_load_streamed(device, source, plan, counter, stack)


def _check_host(needed_bytes: int) -> None:
    left_bytes = available_bytes()
    if needed_bytes > left_bytes:
        raise HostMemoryError(
            f"{needed_bytes / GIB:.2f} GiB of host memory are needed, {left_bytes / GIB:.2f} GiB are left",
            where="host memory",
            cure="lower --host-memory or --max-context, or free memory",
        )


def _load_streamed(
    device: Device, source: ModelSource, plan: Plan, counter: ReadCounter, stack: ExitStack
) -> tuple[CausalLM, LayerStream, WeightStore]:
    counter.begin(plan)
    with ExitStack() as own:
        shared = _load_shared(device, source, counter)
        cache = _cache(device, source, plan.context_rows)
        store = WeightStore(device, source.checkpoint, source.model.layout, source.architecture.prefix, plan.placement)
        own.callback(store.close)
        store.load(counter)
        stream = LayerStream(device, store, plan.num_slots)
        own.callback(stream.close)
        model = CausalLM(source.architecture, device, source.model.dtype, shared, stream, cache)
        stack.push(own.pop_all())
    return model, stream, store


def load_draft(
    device: Device, source: ModelSource, plan: Plan, vocab_size: int, counter: ReadCounter, stack: ExitStack
) -> ModelDrafter:
    """The draft stays on the device whole."""
    shared = _load_shared(device, source, counter)
    num_layers = source.architecture.num_layers
    everything = Placement(num_layers=num_layers, resident=frozenset(range(num_layers)))
    store = WeightStore(device, source.checkpoint, source.model.layout, source.architecture.prefix, everything)
    stack.callback(store.close)
    store.load(counter)
    weights = ResidentWeights([store.resident[layer] for layer in range(num_layers)])
    cache = _cache(device, source, plan.context_rows)
    model = CausalLM(source.architecture, device, source.model.dtype, shared, weights, cache)
    return ModelDrafter(model, device, vocab_size, chunk_tokens=min(PROMPT_CHUNK_TOKENS, plan.pass_rows))


def _load_shared(device: Device, source: ModelSource, counter: ReadCounter) -> Weights:
    """The tensors outside the decoder layers, in one device buffer."""
    layout, checkpoint = source.model.shared_layout, source.checkpoint
    buffer = device.alloc(layout.num_bytes)

    def jobs(host: torch.Tensor) -> list[ReadJob]:
        views = layout.views(host)
        return [ReadJob(tensor=checkpoint.tensors[name], destination=view) for name, view in views.items()]

    with TensorReader(checkpoint) as reader:
        if device.host_addressable:
            reader.read(jobs(buffer), counter)
        else:
            load_through_host(device, [(buffer, jobs)], [], reader, counter)
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
