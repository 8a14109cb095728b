"""What a run has to know of its machine: the profile that it is given, or a quick look at what it is about to do."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from ..config import EngineSettings, SamplingKind
from ..device import Device, device_of, open_device
from ..planner.hardware import HardwareProfile, TaskTimes
from ..planner.hardware_file import find_hardware
from ..planner.memory import Budgets
from ..planner.tree_flag import read_acceptances
from ..planner.workload import context_tokens
from ..source import ModelSource
from ..weights.checkpoint import Checkpoint
from . import QUICK, Effort, Subject, measure_hardware, own_threads
from .models import measure_model
from .stopwatch import Stopwatch


def look_at_machine(
    settings: EngineSettings,
    device: Device,
    budgets: Budgets,
    target: ModelSource,
    drafts: Sequence[ModelSource],
    stack: ExitStack,
) -> HardwareProfile:
    """The profile that `settings` name, or a quick look. Until `stack` is closed a CPU computes with threads of its own."""
    if device.torch_device.type == "cpu":
        stack.enter_context(own_threads(_subjects(target, drafts), _effort(settings)))
    if settings.profile is not None:
        return find_hardware(settings.profile)
    may_need_disk = budgets.host_bytes is not None and target.model.cost.stored_bytes > budgets.host_bytes
    disk = target.checkpoint if may_need_disk else None
    return measure_machine(settings, target, drafts, sampling_kinds=sampling_kinds_of(settings), disk=disk)


def measure_host_drafts(
    hardware: HardwareProfile, settings: EngineSettings, target: ModelSource, drafts: Sequence[ModelSource]
) -> HardwareProfile:
    """`hardware` with the times of `drafts` that compute on the CPU, beside a device that has `target`."""
    if not drafts:
        return hardware
    subjects = [Subject(role="draft", model=draft.model) for draft in drafts]
    kinds, vocab_size = sampling_kinds_of(settings), target.model.cost.vocab_size
    effort = replace(_effort(settings), sampling_kinds=kinds)
    nothing = TaskTimes(task="draw", sampling=kinds[0], vocab_size=vocab_size, rows=(1,), task_s=(0.0,))
    cpu = open_device("cpu")
    try:
        found = [replace(measure_model(Stopwatch(cpu, effort), one, nothing), role="host draft") for one in subjects]
    finally:
        cpu.close()
    return replace(hardware, models=(*hardware.models, *found))


def sampling_kinds_of(settings: EngineSettings) -> tuple[SamplingKind, ...]:
    """Of a run, first the one by which drafts draw."""
    return tuple(dict.fromkeys((settings.draft_sampling, settings.sampling)))


def measure_machine(
    settings: EngineSettings,
    target: ModelSource,
    drafts: Sequence[ModelSource],
    *,
    sampling_kinds: tuple[SamplingKind, ...],
    disk: Checkpoint | None = None,
) -> HardwareProfile:
    """A quick look at this machine with the layers that `settings` will run, on a device of its own: what measuring allocates
    is gone when it returns. `sampling_kinds` begin with the one by which drafts draw; `disk` is a checkpoint to read from."""
    acceptances = read_acceptances(settings)
    own = device_of(settings)
    try:
        return measure_hardware(
            own,
            _subjects(target, drafts),
            replace(_effort(settings), sampling_kinds=sampling_kinds),
            link_bytes_per_s=settings.emulate_link_bytes_per_s,
            disk=disk,
            acceptance=acceptances[0] if acceptances else None,
        )
    finally:
        own.close()


def _subjects(target: ModelSource, drafts: Sequence[ModelSource]) -> list[Subject]:
    return [Subject(role="target", model=target.model), *(Subject(role="draft", model=draft.model) for draft in drafts)]


def _effort(settings: EngineSettings) -> Effort:
    return replace(QUICK, contexts=(context_tokens(settings),))
