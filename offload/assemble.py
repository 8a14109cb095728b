"""From settings to a loaded Engine. Everything that can be refused is refused before the first weight byte is read."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from tree.draft import Drafter
from tree.source_drafter import SourceDrafter
from tree.sources import TokenSources

from .calibrate.measuring import look_at_machine, measure_host_drafts, measure_machine, sampling_kinds_of
from .config import EngineSettings, bytes_text
from .datastore.store import open_sources
from .device import Device, choose_passes, device_of
from .device.host import available_bytes
from .engine.admission import Admission
from .engine.decode import DecodeLoop
from .engine.engine import Engine
from .engine.loading import HOST_RESERVE_BYTES, Loaded, LoadProgress, ReadCounter, bytes_to_read, lend_memory, take_memory
from .engine.replanning import Replanner
from .engine.sessions import Sessions, host_limit_bytes
from .errors import DeviceError, FitError, reason
from .model.generation_config import read_generation_defaults
from .planner.fallback import Fallbacks
from .planner.hardware import HardwareProfile
from .planner.memory import Budgets
from .planner.plan import Plan, plan_run
from .planner.prediction import Offer
from .planner.tree_flag import read_acceptances, read_tree, resolve_method
from .planner.workload import make_option, make_workload
from .report.report import Memory, Weights
from .report.trace import Trace
from .source import Draft, ModelSource, open_drafts, open_target
from .text.tokenizer import Tokenizer, check_same_vocabulary
from .weights.store import WeightStore

logger = logging.getLogger(__name__)

Pair = tuple[ModelSource, list[Draft]]  # a target, and the drafts that may run beside it
CUDA_RESERVE_BYTES = 2**30  # context, kernels' workspaces, fragmentation


def open_engine(
    settings: EngineSettings,
    *,
    seed: int = 0,
    progress: LoadProgress | None = None,
    trace: Trace | None = None,
    device: Device | None = None,
    hardware: HardwareProfile | None = None,
    expect: Callable[[EngineSettings, Tokenizer | None, int], EngineSettings] | None = None,
    admit: Callable[[Admission], None] | None = None,
) -> Engine:
    """Load what `settings` name. Raises the errors of errors.py; nothing stays allocated after one.

    `device` takes the place of the one that the settings name; the engine closes it. `hardware` takes the place of the
    profile that they name, or of a quick measurement. `expect` adds to the settings what is known of the requests once
    there are a tokenizer and the number of positions that the model knows. `admit` is called when all is planned and no weight
    has been read, so that a request which cannot be finished is refused in time.
    """
    start_s = time.monotonic()
    with ExitStack() as stack:
        device = choose_passes(device, settings.draft_passes) if device else device_of(settings)
        stack.callback(device.close)
        stack.enter_context(device.translated())
        target, drafts = _models(settings, device, progress)
        sources = _token_sources(settings, target, stack)
        settings = expect(settings, target.tokenizer, target.architecture.max_positions) if expect is not None else settings
        host = _budgets(settings, device)  # where layers are equal, what exceeds the host's memory is borrowed, see lend_memory
        budgets = replace(host, host_bytes=None) if target.tensors.equal_layers else host
        looked_s = time.monotonic()
        hardware = hardware or look_at_machine(settings, device, budgets, target, _sources(drafts), stack)
        hardware = measure_host_drafts(hardware, settings, target, _sources(drafts, on_host=True))
        looked_s = time.monotonic() - looked_s
        plan, fallbacks, target, chosen = _plan(settings, hardware, budgets, _pairs(target, drafts))
        draft = chosen.source if chosen is not None else None
        admission = _admitted(target, plan, seed, admit)
        eos_token_ids = _ends_of_text(target)
        plan = lend_memory(target, plan, _left_for_layers(host, plan), may_refuse=not device.host_addressable)
        loaded = take_memory(device, target, draft, plan, fallbacks, stack, sources if settings.has_ngram else ())
        plan, fallbacks = _record(loaded, fallbacks, device)
        loaded.read(ReadCounter(progress, lambda plan: bytes_to_read(target, draft, plan)))
        plan, fallbacks = _see_placed(loaded, plan, fallbacks)
        plan = _with_link(settings, loaded, plan, device)
        method = resolve_method(settings.verifier)
        parts = loaded.target, loaded.stream, _drafter(loaded, plan, sources), _sessions(loaded, plan)
        loop = DecodeLoop(device, *parts, plan, method=method, trace=trace, fallbacks=fallbacks)
        close = partial(_close, device, stack.pop_all())
    return Engine(
        loop=loop,
        admission=admission,
        eos_token_ids=eos_token_ids,
        load_s=time.monotonic() - start_s,
        method=method,
        emulated_link=settings.emulate_link_bytes_per_s is not None,
        device_name=device.name,
        weights=Weights(name=target.model.weights, layers=target.model.formats),
        memory=_memory_of(device, loaded.store),
        close=close,
        replanner=_replanner(settings, target, chosen, looked_s),
        draft_place=chosen.place if chosen is not None else None,
    )


def _with_link(settings: EngineSettings, loaded: Loaded, plan: Plan, device: Device) -> Plan:
    """With what copies were measured to reach, and how small tensors travel."""
    link_bytes_per_s = settings.emulate_link_bytes_per_s or loaded.stream.measure_link()
    return replace(plan, link_bytes_per_s=link_bytes_per_s, small_uploads=device.small_uploads)


def _token_sources(settings: EngineSettings, target: ModelSource, stack: ExitStack) -> tuple[TokenSources, ...]:
    """What is looked up besides what a model drafts: the text, and the datastores that the settings name."""

    def digest() -> bytes | None:
        return target.tokenizer.vocabulary_digest() if target.tokenizer is not None else None

    return open_sources(settings.datastores, tokenizer=digest, vocab_size=target.architecture.vocab_size, stack=stack)


def _drafter(loaded: Loaded, plan: Plan, sources: Sequence[TokenSources]) -> Drafter | None:
    """Who drafts: a model, or sources alone."""
    return loaded.drafter or (SourceDrafter(sources, plan.aim) if plan.ngram else None)


def _sessions(loaded: Loaded, plan: Plan) -> Sessions:
    caches = [loaded.target.cache, *([loaded.drafter.cache] if loaded.drafter is not None else [])]
    return Sessions(caches, max_bytes=host_limit_bytes(plan))


def _admitted(target: ModelSource, plan: Plan, seed: int, admit: Callable[[Admission], None] | None) -> Admission:
    """What a model so planned will take, once whoever has a request has asked it."""
    admission = Admission(plan=plan, tokenizer=target.tokenizer, vocab_size=target.architecture.vocab_size, seed=seed)
    if admit is not None:
        admit(admission)
    return admission


def _ends_of_text(target: ModelSource) -> frozenset[int]:
    """Of the model's generation config, with a warning for what else that asks for."""
    defaults = read_generation_defaults(target.path, target.architecture.eos_token_ids)
    if (remark := defaults.warning()) is not None:
        logger.warning("%s", remark)
    return defaults.eos_token_ids


def _replanner(settings: EngineSettings, target: ModelSource, draft: Draft | None, measuring_s: float) -> Replanner | None:
    """None where there is nothing to choose, or where somebody has chosen."""
    if draft is None or settings.tree != "auto" or settings.fixed_plan:
        return None

    def measure() -> HardwareProfile:
        return measure_machine(settings, target, _sources([draft]), sampling_kinds=sampling_kinds_of(settings))

    return Replanner(measure, measuring_s)


def _models(settings: EngineSettings, device: Device, progress: LoadProgress | None) -> Pair:
    """The target, and drafts that speak its tokens."""
    device_type = device.torch_device.type
    target = open_target(settings, device_type, progress)
    drafts = open_drafts(settings, target, device_type, beside=not device.host_addressable)
    for draft in drafts:
        sizes = (target.architecture.vocab_size, draft.source.architecture.vocab_size)
        check_same_vocabulary(target.tokenizer, draft.source.tokenizer, sizes, "--draft-model")
    return target, drafts


def _sources(drafts: list[Draft], *, on_host: bool = False) -> list[ModelSource]:
    return [draft.source for draft in drafts if draft.on_host == on_host]


def _pairs(target: ModelSource, drafts: list[Draft]) -> list[Pair]:
    """What the planner may choose from. A base is worth its memory only if it drafts: other drafts, and none, run beside a
    target that has no base, where it need not have one."""
    own = [draft for draft in drafts if draft.source.model.drafts_from_base]
    others = [draft for draft in drafts if draft not in own]
    if target.plain is None:
        return [(target, drafts)]
    return [(target.plain, others), (target, own)]


def _budgets(settings: EngineSettings, device: Device) -> Budgets:
    """What the flags allow; else what is free, less a reserve. An emulated link is there to be used: without a budget of
    its own nothing is resident."""
    is_cpu = device.torch_device.type == "cpu"
    device_bytes, host_bytes = settings.gpu_memory_bytes, settings.host_memory_bytes
    if device_bytes is None and settings.emulate_link_bytes_per_s is None:
        device_bytes = max(device.free_bytes() - (HOST_RESERVE_BYTES if is_cpu else CUDA_RESERVE_BYTES), 0)
    if host_bytes is None:
        host_bytes = max(available_bytes() - HOST_RESERVE_BYTES, 0)
    shared = is_cpu and settings.host_memory_bytes is None
    if shared and device_bytes is not None:
        device_bytes = min(device_bytes, host_bytes)  # a CPU's device has no memory that the host has not
    return Budgets(device_bytes=device_bytes, host_bytes=host_bytes, shared=shared, replays=device.replays)


def _left_for_layers(budgets: Budgets, plan: Plan) -> int:
    """Host memory beside what the device takes of it, where they are one."""
    assert budgets.host_bytes is not None
    taken = sum(plan.device_ledger.values()) if budgets.shared else 0
    return max(budgets.host_bytes - taken, 0)


def _plan(
    settings: EngineSettings, hardware: HardwareProfile, budgets: Budgets, pairs: list[Pair]
) -> tuple[Plan, Fallbacks, ModelSource, Draft | None]:
    """The plan, what smaller ones follow from, and the pair that it is for."""
    tree = read_tree(settings.tree, has_draft=any(drafts for _, drafts in pairs), ngram=settings.ngram)
    max_positions, acceptances = pairs[0][0].architecture.max_positions, read_acceptances(settings)
    offers: list[Offer] = []
    for target, drafts in pairs:
        workload = make_workload(settings, target.model.cost, hardware, budgets, max_positions=max_positions)
        costs = [draft.source.model.cost for draft in drafts]
        options = [
            make_option(settings, hardware, draft.name, cost, acceptances[draft.place], on_host=draft.on_host)
            for draft, cost in zip(drafts, costs, strict=True)
        ]
        offers.append(Offer(workload=workload, drafts=tuple(options)))
    plan = plan_run(settings, tree, offers, max_positions=max_positions, budgets=budgets)
    offer, (target, drafts) = offers[plan.offer], pairs[plan.offer]
    option, draft = (offer.drafts[plan.draft], drafts[plan.draft]) if plan.draft is not None else (None, None)
    return plan, Fallbacks(settings=settings, workload=offer.workload, draft=option, budgets=budgets), target, draft


def _see_placed(loaded: Loaded, plan: Plan, fallbacks: Fallbacks) -> tuple[Plan, Fallbacks]:
    """With what the device refused to pin, which takes another way."""
    stream, store = loaded.stream, loaded.store
    placed, fallbacks = fallbacks.as_placed(plan, stream.placement, stream.measure_move())
    if placed is not plan:
        sizes = bytes_text(store.pinned_bytes), bytes_text(store.host_bytes)
        logger.warning("%s of %s of host memory could be pinned: %s", *sizes, placed.notes[-1])
    return placed, fallbacks


def _close(device: Device, held: ExitStack) -> None:
    """Whoever closes an engine may be another thread than whoever opened it."""
    with device.translated():
        held.close()


def _record(loaded: Loaded, fallbacks: Fallbacks, device: Device) -> tuple[Plan, Fallbacks]:
    """With the draft's passes recorded, before there are weights, as that takes memory, too. A driver that cannot leaves nobody
    without a way: they are launched one by one then, unless graphs were asked for, which is a DeviceError."""
    plan, drafter = loaded.plan, loaded.drafter
    if drafter is None:
        return plan, fallbacks
    why = ""
    try:
        with device.translated():
            drafter.prepare(plan.aim)
    except (RuntimeError, FitError) as error:
        why = reason(error).partition("\n")[0]
    if not why or plan.draft_passes == "eager":
        return plan, fallbacks
    if fallbacks.settings.draft_passes == "graphs":
        raise DeviceError(
            f"the draft's passes could not be recorded: {why}", where="--draft-passes graphs", cure="take eager, or auto"
        )
    drafter.record_nothing()
    note = f"the draft's passes are launched one by one, as they could not be recorded: {why}"
    logger.warning("%s", note)
    fallbacks = replace(fallbacks, budgets=replace(fallbacks.budgets, replays=False))
    return replace(plan, draft_passes="eager", notes=(*plan.notes, note)), fallbacks


def _memory_of(device: Device, store: WeightStore) -> Callable[[], Memory]:
    return lambda: Memory(
        device_peak_bytes=device.peak_bytes(),
        device_base_bytes=store.base_bytes,
        host_weights_bytes=store.host_bytes,
        host_pinned_bytes=store.pinned_bytes,
        host_shared_layers=len(store.placement.borrowed),
    )
