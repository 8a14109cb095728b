"""From settings to a loaded Engine. Everything that can be refused is refused before the first weight byte is read."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .admission import Admission
from .config import EngineSettings
from .decode import DecodeLoop
from .device import Device, open_device
from .device.host import available_bytes
from .engine import Engine
from .errors import ModelError, UsageError
from .model.architecture import Architecture, check_weights, check_window, read_architecture
from .model.causal_lm import CausalLM
from .model.drafter import ModelDrafter
from .model.kv_cache import KVCache
from .model.locate import locate_model, read_eos_token_ids
from .planner.cost import ModelCost, kv_bytes_per_row
from .planner.plan import Plan, plan_run
from .planner.tree_choice import resolve_method, resolve_tree
from .report import Memory
from .streaming.stream import LayerStream, ResidentWeights, Weights
from .text import TextCodec, check_same_vocabulary, open_codec
from .trace import Trace
from .weights.checkpoint import Checkpoint, open_checkpoint
from .weights.layout import LayerLayout
from .weights.reader import ReadJob, TensorReader
from .weights.store import Placement, WeightStore, load_through_host

# `progress(read_bytes, total_bytes)` while weights are read.
Progress = Callable[[int, int], None]
HOST_RESERVE_BYTES = 2**30
CUDA_RESERVE_BYTES = 2**30  # context, kernels' workspaces, fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A model that was checked and not yet loaded."""

    folder: Path
    architecture: Architecture
    checkpoint: Checkpoint
    codec: TextCodec | None
    dtype: torch.dtype
    layout: LayerLayout

    @property
    def shared_layout(self) -> LayerLayout:
        return LayerLayout.pack(self.architecture.shared_shapes.items(), self.dtype)

    @property
    def cost(self) -> ModelCost:
        architecture, config = self.architecture, self.architecture.config
        return ModelCost(
            num_layers=architecture.num_layers,
            layer_bytes=self.layout.num_bytes,
            shared_bytes=self.shared_layout.num_bytes,
            kv_bytes_per_row=kv_bytes_per_row(
                architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, self.dtype.itemsize
            ),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=architecture.head_dim,
            vocab_size=architecture.vocab_size,
            dtype_bytes=self.dtype.itemsize,
        )


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
        target = _check_source(settings.model, "--model", settings, device)
        draft = None
        if settings.draft_model is not None:
            draft = _check_source(settings.draft_model, "--draft-model", settings, device)
            sizes = (target.architecture.vocab_size, draft.architecture.vocab_size)
            check_same_vocabulary(target.codec, draft.codec, sizes, "--draft-model")
        plan = _plan(settings, device, target, draft)
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


def _check_source(name: str, flag: str, settings: EngineSettings, device: Device) -> _Source:
    """Config, tokenizer, headers and index of one model, checked against each other."""
    folder = locate_model(name, flag)
    architecture = read_architecture(folder)
    checkpoint = open_checkpoint(folder)
    check_weights(architecture, checkpoint)
    dtype = _dtype(settings.dtype, architecture, checkpoint, device)
    codec = open_codec(folder)
    if codec is not None and codec.num_tokens > architecture.vocab_size:
        raise ModelError(
            f"the tokenizer numbers {codec.num_tokens} tokens, the model's embedding has {architecture.vocab_size}",
            where=str(folder),
            cure="use the tokenizer files that belong to this model",
        )
    return _Source(
        folder=folder,
        architecture=architecture,
        checkpoint=checkpoint,
        codec=codec,
        dtype=dtype,
        layout=LayerLayout.pack(architecture.layer_shapes.items(), dtype),
    )


def _dtype(name: str, architecture: Architecture, checkpoint: Checkpoint, device: Device) -> torch.dtype:
    """auto: the checkpoint's own on a GPU, float32 on the CPU, where 16-bit arithmetic is slow or emulated."""
    if name != "auto":
        return {
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
            "float32": torch.float32,
            "float64": torch.float64,
        }[name]
    if device.torch_device.type == "cpu":
        return torch.float32
    first = next(iter(architecture.layer_shapes))
    return checkpoint.tensors[f"{architecture.prefix}.0.{first}"].dtype


def _plan(settings: EngineSettings, device: Device, target: _Source, draft: _Source | None) -> Plan:
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
    host_budget = settings.host_memory_bytes
    if host_budget is None:
        host_budget = max(available_bytes() - HOST_RESERVE_BYTES, 0)
    return plan_run(
        settings,
        tree,
        target.cost,
        draft.cost if draft else None,
        expected_tokens_per_pass=expected_tokens,
        max_positions=target.architecture.max_positions,
        device_budget_bytes=device_budget,
        host_budget_bytes=host_budget,
    )


class _Counter:
    """Adds up bytes read for a progress callback that wants totals."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._read_bytes = progress, total_bytes, 0

    def __call__(self, num_bytes: int) -> None:
        self._read_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)


def _bytes_to_read(source: _Source, plan: Plan) -> int:
    prefix, disk = source.architecture.prefix, plan.placement.disk
    on_disk = tuple(f"{prefix}.{layer}." for layer in disk)
    tensors = source.checkpoint.tensors
    wanted = source.architecture.expected_tensors
    return sum(tensors[name].num_bytes for name in wanted if not (on_disk and name.startswith(on_disk)))


def _load_streamed(
    device: Device, source: _Source, plan: Plan, counter: _Counter, stack: ExitStack
) -> tuple[CausalLM, LayerStream, WeightStore]:
    shared = _load_shared(device, source, counter)
    cache = _cache(device, source, plan.context_rows)
    store = WeightStore(device, source.checkpoint, source.layout, source.architecture.prefix, plan.placement)
    stack.callback(store.close)
    store.load(counter)
    stream = LayerStream(device, store, plan.num_slots)
    stack.callback(stream.close)
    model = CausalLM(source.architecture, device, source.dtype, shared, stream, cache)
    return model, stream, store


def _load_draft(
    device: Device, source: _Source, plan: Plan, vocab_size: int, counter: _Counter, stack: ExitStack
) -> ModelDrafter:
    """The draft stays on the device whole."""
    shared = _load_shared(device, source, counter)
    num_layers = source.architecture.num_layers
    everything = Placement(num_layers=num_layers, resident=frozenset(range(num_layers)))
    store = WeightStore(device, source.checkpoint, source.layout, source.architecture.prefix, everything)
    stack.callback(store.close)
    store.load(counter)
    weights = ResidentWeights([store.resident[layer] for layer in range(num_layers)])
    cache = _cache(device, source, plan.context_rows)
    model = CausalLM(source.architecture, device, source.dtype, shared, weights, cache)
    return ModelDrafter(model, device, vocab_size)


def _load_shared(device: Device, source: _Source, counter: _Counter) -> Weights:
    """The tensors outside the decoder layers, in one device buffer."""
    layout, checkpoint = source.shared_layout, source.checkpoint
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


def _cache(device: Device, source: _Source, rows: int) -> KVCache:
    architecture = source.architecture
    return KVCache(
        device,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        capacity=rows,
        dtype=source.dtype,
    )


def _memory_of(device: Device, store: WeightStore) -> Callable[[], Memory]:
    return lambda: Memory(
        device_peak_bytes=device.peak_bytes(),
        host_weights_bytes=store.host_bytes,
        host_pinned_bytes=store.pinned_bytes,
    )
