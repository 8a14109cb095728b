"""From settings to a loaded Engine. Everything that can be refused is refused before the first weight byte is read."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch

from .admission import Admission
from .config import EngineSettings
from .decode import DecodeLoop
from .device import Device, open_device
from .device.host import available_bytes
from .engine import Engine
from .errors import FitError, UsageError
from .model.architecture import check_window
from .model.causal_lm import CausalLM
from .model.drafter import ModelDrafter
from .model.kv_cache import KVCache
from .model.locate import read_eos_token_ids
from .planner.cost import ledger_lines, size_text
from .planner.plan import Plan, plan_run
from .planner.tree_choice import resolve_method, resolve_tree
from .report import Memory
from .source import ModelSource, check_source
from .streaming.stream import LayerStream, ResidentWeights, Weights
from .text import check_same_vocabulary
from .trace import Trace
from .weights.source import Destinations, share_layers
from .weights.store import Placement, WeightStore, load_through_host

# `progress(read_bytes, total_bytes)` while weights are read.
Progress = Callable[[int, int], None]
HOST_RESERVE_BYTES = 2**30
CUDA_RESERVE_BYTES = 2**30  # context, kernels' workspaces, fragmentation


def open_engine(
    settings: EngineSettings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    trace: Trace | None = None,
    device: Device | None = None,
    admit: Callable[[Admission], None] | None = None,
) -> Engine:
    """Load what `settings` name. Raises the errors of errors.py; nothing stays allocated after one.

    `device` takes the place of the one that the settings name; the engine closes it. `admit` is called when everything is
    planned and no weight has been read, so that a request which cannot be finished is refused in time.
    """
    start_s = time.monotonic()
    with ExitStack() as stack:
        device = device or open_device(settings.device, settings.emulate_link_bytes_per_s)
        stack.callback(device.close)
        target = check_source(settings.model, "--model", settings.dtype, device.torch_device.type)
        draft = None
        if settings.draft_model is not None:
            draft = check_source(settings.draft_model, "--draft-model", settings.dtype, device.torch_device.type)
            sizes = (target.architecture.vocab_size, draft.architecture.vocab_size)
            check_same_vocabulary(target.codec, draft.codec, sizes, "--draft-model")
        plan = _plan(settings, device, target, draft)
        check_window(target.architecture, plan.text_tokens, str(target.folder / "config.json"))
        admission = Admission(plan=plan, codec=target.codec, vocab_size=target.architecture.vocab_size, seed=seed)
        if admit is not None:
            admit(admission)
        eos_token_ids = read_eos_token_ids(target.folder, target.architecture.eos_token_ids)
        shared = _share(settings, target, plan.placement)
        counter = _Counter(progress, _bytes_to_read(target, plan, shared) + (_all_bytes(draft) if draft else 0))
        model, stream, store = _load_streamed(device, target, plan, shared, counter, stack)
        drafter = _load_draft(device, draft, plan, target.architecture.vocab_size, counter, stack) if draft else None
        plan = replace(plan, link_bytes_per_s=settings.emulate_link_bytes_per_s or stream.measure_link())
        method = resolve_method(settings.verifier)
        loop = DecodeLoop(device, model, stream, drafter, plan, method=method, trace=trace)
        memory = _memory_of(device, store)
        close = stack.pop_all().close
    return Engine(
        loop=loop,
        plan=plan,
        admission=admission,
        eos_token_ids=eos_token_ids,
        load_s=time.monotonic() - start_s,
        method=method,
        emulated_link=settings.emulate_link_bytes_per_s is not None,
        device_name=device.name,
        memory=memory,
        close=close,
    )


def _plan(settings: EngineSettings, device: Device, target: ModelSource, draft: ModelSource | None) -> Plan:
    tree, expected_tokens = resolve_tree(
        settings.tree,
        settings.acceptance,
        has_draft=draft is not None,
        vocab_size=target.architecture.vocab_size,
        max_context=settings.max_context,
    )
    if tree.max_branching > target.architecture.vocab_size:
        raise UsageError(
            f"a node with {tree.max_branching} children, and a vocabulary of {target.architecture.vocab_size} tokens",
            where="--tree",
            cure="take a narrower tree",
        )
    device_budget = settings.gpu_memory_bytes
    if device_budget is None and settings.emulate_link_bytes_per_s is None:
        reserve = CUDA_RESERVE_BYTES if device.torch_device.type == "cuda" else HOST_RESERVE_BYTES
        device_budget = max(device.free_bytes() - reserve, 0)
    host_budget: int | None = _host_budget(settings)
    if target.tensors.equal_layers:  # beyond the budget they share memory, see _share
        host_budget = None
    return plan_run(
        settings,
        tree,
        target.model.cost,
        draft.model.cost if draft else None,
        expected_tokens_per_pass=expected_tokens,
        max_positions=target.architecture.max_positions,
        device_budget_bytes=device_budget,
        host_budget_bytes=host_budget,
    )


def _host_budget(settings: EngineSettings) -> int:
    return settings.host_memory_bytes or max(available_bytes() - HOST_RESERVE_BYTES, 0)


def _share(settings: EngineSettings, source: ModelSource, placement: Placement) -> dict[int, int]:
    """Host layers that borrow the memory of one with the same bytes, as few as the budget asks for. FitError when even so
    it does not suffice."""
    equal, layer_bytes = source.tensors.equal_layers, source.model.layout.num_bytes
    if not equal:
        return {}
    budget = _host_budget(settings)
    shared = share_layers(placement.host, equal, budget // layer_bytes)
    num_held = len(placement.host) - len(shared)
    if num_held * layer_bytes > budget:
        raise FitError(
            ledger_lines({f"{num_held} layers that differ": num_held * layer_bytes}, budget),
            where="--host-memory",
            cure=f"allow at least {size_text(num_held * layer_bytes)}, or keep more layers on the device",
        )
    return shared


class _Counter:
    """Adds up bytes read for a progress callback that wants totals."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._read_bytes = progress, total_bytes, 0

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def _bytes_to_read(source: ModelSource, plan: Plan, shared: dict[int, int]) -> int:
    prefix = source.architecture.prefix
    unread = tuple(f"{prefix}.{layer}." for layer in (*plan.placement.disk, *shared))
    wanted = source.architecture.expected_tensors
    return sum(source.tensors.num_bytes(name) for name in wanted if not (unread and name.startswith(unread)))


def _all_bytes(source: ModelSource) -> int:
    return sum(source.tensors.num_bytes(name) for name in source.architecture.expected_tensors)


def _load_streamed(
    device: Device, source: ModelSource, plan: Plan, shared: dict[int, int], counter: _Counter, stack: ExitStack
) -> tuple[CausalLM, LayerStream, WeightStore]:
    outside = _load_shared(device, source, counter)
    cache = _cache(device, source, plan.context_rows)
    store = WeightStore(device, source.tensors, source.model.layout, source.architecture.prefix, plan.placement, shared)
    stack.callback(store.close)
    store.load(counter)
    stream = LayerStream(device, store, plan.num_slots)
    stack.callback(stream.close)
    model = CausalLM(source.architecture, device, source.model.dtype, outside, stream, cache)
    return model, stream, store


def _load_draft(
    device: Device, source: ModelSource, plan: Plan, vocab_size: int, counter: _Counter, stack: ExitStack
) -> ModelDrafter:
    """The draft stays on the device whole."""
    shared = _load_shared(device, source, counter)
    num_layers = source.architecture.num_layers
    everything = Placement(num_layers=num_layers, resident=frozenset(range(num_layers)))
    store = WeightStore(device, source.tensors, source.model.layout, source.architecture.prefix, everything)
    stack.callback(store.close)
    store.load(counter)
    weights = ResidentWeights([store.resident[layer] for layer in range(num_layers)])
    cache = _cache(device, source, plan.context_rows)
    model = CausalLM(source.architecture, device, source.model.dtype, shared, weights, cache)
    return ModelDrafter(model, device, vocab_size)


def _load_shared(device: Device, source: ModelSource, counter: _Counter) -> Weights:
    """The tensors outside the decoder layers, in one device buffer."""
    layout = source.model.shared_layout
    buffer = device.alloc(layout.num_bytes)

    def views(host: torch.Tensor) -> Destinations:
        return layout.views(host)

    with source.tensors.open() as feed:
        if device.host_addressable:
            feed.fill(views(buffer), counter)
        else:
            load_through_host(device, [(buffer, views)], [], feed, counter)
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


def _memory_of(device: Device, store: WeightStore) -> Callable[[], Memory]:
    return lambda: Memory(
        device_peak_bytes=device.peak_bytes(),
        host_weights_bytes=store.host_bytes,
        host_pinned_bytes=store.pinned_bytes,
        host_shared_layers=len(store.shared),
    )
