"""From settings to a loaded Engine. Everything that can be refused is refused before the first weight byte is read."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch

from .admission import Admission
from .calibrate import QUICK, Subject, measure_hardware
from .config import EngineSettings
from .decode import DecodeLoop
from .device import Device, open_device
from .device.host import available_bytes
from .engine import Engine
from .model.architecture import check_window
from .model.causal_lm import CausalLM
from .model.drafter import ModelDrafter
from .model.kv_cache import KVCache
from .model.locate import read_eos_token_ids
from .planner.hardware import HardwareProfile
from .planner.hardware_file import find_hardware
from .planner.memory import Budgets
from .planner.plan import TYPICAL_CONTEXT_ROWS, Plan, make_workload, plan_run
from .planner.search import DraftOption
from .planner.tree_choice import read_acceptances, read_tree, resolve_method
from .report import Memory
from .source import ModelSource, check_source
from .streaming.stream import LayerStream, ResidentWeights, Weights
from .text import check_same_vocabulary
from .trace import Trace
from .weights.placement import Placement
from .weights.reader import ReadJob, TensorReader
from .weights.store import WeightStore, load_through_host

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
    hardware: HardwareProfile | None = None,
    admit: Callable[[Admission], None] | None = None,
) -> Engine:
    """Load what `settings` name. Raises the errors of errors.py; nothing stays allocated after one.

    `device` takes the place of the one that the settings name; the engine closes it. `hardware` takes the place of the
    profile that they name, or of a quick measurement. `admit` is called when everything is
    planned and no weight has been read, so that a request which cannot be finished is refused in time.
    """
    start_s = time.monotonic()
    with ExitStack() as stack:
        device = device or open_device(settings.device, settings.emulate_link_bytes_per_s)
        stack.callback(device.close)
        target = check_source(settings.model, "--model", settings.dtype, device.torch_device.type)
        drafts = _drafts(settings, target, device.torch_device.type)
        budgets = _budgets(settings, device)
        hardware = hardware or _measure(settings, budgets, device, target, drafts)
        plan = _plan(settings, hardware, budgets, target, drafts)
        draft = drafts[plan.draft] if plan.draft is not None else None
        check_window(target.architecture, plan.text_tokens, str(target.folder / "config.json"))
        admission = Admission(plan=plan, codec=target.codec, vocab_size=target.architecture.vocab_size, seed=seed)
        if admit is not None:
            admit(admission)
        eos_token_ids = read_eos_token_ids(target.folder, target.architecture.eos_token_ids)
        counter = _Counter(progress, _bytes_to_read(target, plan) + (draft.checkpoint.num_bytes if draft else 0))
        model, stream, store = _load_streamed(device, target, plan, counter, stack)
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


def _drafts(settings: EngineSettings, target: ModelSource, device_type: str) -> list[ModelSource]:
    drafts = [check_source(name, "--draft-model", settings.dtype, device_type) for name in settings.draft_models]
    for draft in drafts:
        sizes = (target.architecture.vocab_size, draft.architecture.vocab_size)
        check_same_vocabulary(target.codec, draft.codec, sizes, "--draft-model")
    return drafts


def _budgets(settings: EngineSettings, device: Device) -> Budgets:
    """What the flags allow; else what is free, less a reserve. An emulated link is there to be used: without a budget of
    its own nothing is resident."""
    is_cpu = device.torch_device.type == "cpu"
    device_bytes, host_bytes = settings.gpu_memory_bytes, settings.host_memory_bytes
    if device_bytes is None and settings.emulate_link_bytes_per_s is None:
        device_bytes = max(device.free_bytes() - (HOST_RESERVE_BYTES if is_cpu else CUDA_RESERVE_BYTES), 0)
    if host_bytes is None:
        host_bytes = max(available_bytes() - HOST_RESERVE_BYTES, 0)
    return Budgets(device_bytes=device_bytes, host_bytes=host_bytes, shared=is_cpu and settings.host_memory_bytes is None)


def _measure(
    settings: EngineSettings, budgets: Budgets, device: Device, target: ModelSource, drafts: list[ModelSource]
) -> HardwareProfile:
    """The profile that the settings name, or a quick look at this machine, on a device of its own: what measuring
    allocates is gone before the run begins."""
    if settings.profile is not None:
        return find_hardware(settings.profile)
    layers_bytes = target.model.cost.num_layers * target.model.cost.layer_bytes
    may_need_disk = budgets.host_bytes is not None and layers_bytes > budgets.host_bytes
    subjects = [Subject(role="target", model=target.model), *(Subject(role="draft", model=draft.model) for draft in drafts)]
    own = open_device(settings.device)
    try:
        return measure_hardware(
            own,
            subjects,
            QUICK,
            link_bytes_per_s=settings.emulate_link_bytes_per_s,
            disk=target.checkpoint if may_need_disk else None,
        )
    finally:
        own.close()


def _plan(
    settings: EngineSettings, hardware: HardwareProfile, budgets: Budgets, target: ModelSource, drafts: list[ModelSource]
) -> Plan:
    tree = read_tree(settings.tree, has_draft=bool(drafts))
    max_positions = target.architecture.max_positions
    workload = make_workload(settings, target.model.cost, hardware, budgets, max_positions=max_positions)
    options = [
        DraftOption(
            name=draft.folder.name,
            cost=draft.model.cost,
            times=hardware.times(draft.model.cost, "draft", TYPICAL_CONTEXT_ROWS),
            acceptance=acceptance,
        )
        for draft, acceptance in zip(drafts, read_acceptances(settings), strict=True)
    ]
    return plan_run(settings, tree, workload, options, max_positions=max_positions, budgets=budgets)


class _Counter:
    """Adds up bytes read for a progress callback that wants totals."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._read_bytes = progress, total_bytes, 0

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def _bytes_to_read(source: ModelSource, plan: Plan) -> int:
    prefix, disk = source.architecture.prefix, plan.placement.disk
    on_disk = tuple(f"{prefix}.{layer}." for layer in disk)
    tensors = source.checkpoint.tensors
    wanted = source.architecture.expected_tensors
    return sum(tensors[name].num_bytes for name in wanted if not (on_disk and name.startswith(on_disk)))


def _load_streamed(
    device: Device, source: ModelSource, plan: Plan, counter: _Counter, stack: ExitStack
) -> tuple[CausalLM, LayerStream, WeightStore]:
    shared = _load_shared(device, source, counter)
    cache = _cache(device, source, plan.context_rows)
    store = WeightStore(device, source.checkpoint, source.model.layout, source.architecture.prefix, plan.placement)
    stack.callback(store.close)
    store.load(counter)
    stream = LayerStream(device, store, plan.num_slots)
    stack.callback(stream.close)
    model = CausalLM(source.architecture, device, source.model.dtype, shared, stream, cache)
    return model, stream, store


def _load_draft(
    device: Device, source: ModelSource, plan: Plan, vocab_size: int, counter: _Counter, stack: ExitStack
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
    return ModelDrafter(model, device, vocab_size)


def _load_shared(device: Device, source: ModelSource, counter: _Counter) -> Weights:
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


def _memory_of(device: Device, store: WeightStore) -> Callable[[], Memory]:
    return lambda: Memory(
        device_peak_bytes=device.peak_bytes(),
        host_weights_bytes=store.host_bytes,
        host_pinned_bytes=store.pinned_bytes,
    )
