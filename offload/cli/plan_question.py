"""What `plan` is asked: the models, the machine and the settings that its flags mean. No torch."""

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..config import EngineSettings, base_of_draft, check_draft_passes, sampling_kind
from ..errors import ModelError, UsageError
from ..planner.tree_flag import read_acceptances, read_tree
from .flags_to_settings import plan_flags

if TYPE_CHECKING:
    from tree.acceptance import Acceptance
    from tree.spec import TreeRequest

    from ..planner.hardware import HardwareProfile
    from ..planner.memory import Budgets
    from ..planner.plan import Plan
    from ..planner.prediction import DraftOption, Offer
    from ..planner.shapes import ModelShape

MODEL, DRAFT, MACHINE = "llama-2-70b", "llama-2-7b", "rtx-4090"
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
RESERVE_BYTES = 2**30  # of a device's memory when no budget is given: context, workspaces, fragmentation
VOCABULARY_PADDING = 0.01  # families pad one vocabulary differently; the tokenizers are compared when a pair is loaded


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a plan follows from. `targets` is the target as each offer would have it stored, `drafts` are models of their
    own: they are offered beside the first one. Without slots: what is offered is asked for several times."""

    settings: EngineSettings
    targets: tuple["ModelShape", ...]
    drafts: tuple["ModelShape", ...]
    hardware: "HardwareProfile"
    tree: "TreeRequest | None"
    budgets: "Budgets"
    dtype_bytes: int

    def answer(self, tree: "TreeRequest | None") -> "Plan":
        return self._planned(tree, self.offers)

    def answer_without_drafts(self) -> "Plan":
        return self._planned(None, [replace(offer, drafts=()) for offer in self.offers])

    def _planned(self, tree: "TreeRequest | None", offers: list["Offer"]) -> "Plan":
        from ..planner.plan import plan_run

        max_positions = self.targets[0].max_positions
        return plan_run(self.settings, tree, offers, max_positions=max_positions, budgets=self.budgets)

    @cached_property
    def offers(self) -> list["Offer"]:
        """One for each of the targets."""
        return [self._offer(target, with_drafts=place == 0) for place, target in enumerate(self.targets)]

    def _offer(self, target: "ModelShape", *, with_drafts: bool) -> "Offer":
        from ..planner.cost import base_draft
        from ..planner.prediction import Offer
        from ..planner.workload import make_option, make_workload

        cost, drafts = target.cost(self.dtype_bytes), iter(self.drafts)
        found: list[DraftOption] = []
        for name, acceptance in zip(self.settings.draft_models, read_acceptances(self.settings), strict=True):
            if (kind := base_of_draft(name)) is None:
                draft = next(drafts)
                if with_drafts:
                    found.append(self._option(draft, acceptance))
            elif cost.base_bytes:
                own = base_draft(cost)
                found.append(make_option(self.settings, self.hardware, f"self:{kind}", own, acceptance))
        workload = make_workload(self.settings, cost, self.hardware, self.budgets, max_positions=self.targets[0].max_positions)
        return Offer(workload=workload, drafts=tuple(found))

    def _option(self, draft: "ModelShape", acceptance: "Acceptance") -> "DraftOption":
        """`draft` where --draft-device has it. UsageError on the CPU of a machine of which nobody has measured it there."""
        from ..planner.workload import make_option

        cost = draft.cost(self.dtype_bytes)
        on_host = self.settings.draft_device == "cpu" and self.hardware.device_type != "cpu"
        if on_host and not self.hardware.knows(cost, "host draft"):
            raise UsageError(
                f"nobody has measured {draft.name} on the CPU of {self.hardware.device_name}",
                where="--draft-device cpu",
                cure="leave it out: generate measures such a draft when it loads it",
            )
        return make_option(self.settings, self.hardware, draft.name, cost, acceptance, on_host=on_host)

    def chosen_draft(self, made: "Plan") -> "DraftOption | None":
        """What `made` drafts with."""
        return self.offers[made.offer].drafts[made.draft] if made.draft is not None else None


def read_question(arguments: argparse.Namespace) -> Question:
    """What the flags ask. UsageError, ModelError and CheckpointError as the flags deserve."""
    from ..planner.hardware_file import find_hardware
    from ..planner.memory import Budgets
    from ..planner.offered import offered_targets
    from ..planner.shapes import find_shape
    from ..planner.what_if import with_weights

    settings = replace(_settings(arguments), sampling=sampling_kind(arguments.temperature), context_tokens=arguments.context)
    tree = read_tree(settings.tree, has_draft=bool(settings.draft_models), ngram=settings.ngram)
    target = find_shape(settings.model, "--model")
    target = target if arguments.weights is None else with_weights(target, arguments.weights)
    targets = offered_targets(settings, target)
    drafts = tuple(find_shape(name, "--draft-model") for name in settings.other_drafts)
    for draft in drafts:
        if abs(draft.vocab_size / target.vocab_size - 1) > VOCABULARY_PADDING:
            raise ModelError(
                f"the draft's vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}",
                where=f"--draft-model {draft.name}",
                cure="use a draft model of the same family: it must share the target's tokenizer",
            )
    hardware = find_hardware(settings.profile or MACHINE)
    rates = {"flops_per_s": arguments.flops, "disk_bytes_per_s": arguments.disk, "link_bytes_per_s": arguments.link}
    hardware = replace(hardware, **{name: rate for name, rate in rates.items() if rate is not None})
    device_bytes = settings.gpu_memory_bytes
    anything = settings.profile is None and settings.resident_layers is not None  # on whatever machine they fit
    if device_bytes is None and hardware.device_memory_bytes is not None and not anything:
        device_bytes = max(hardware.device_memory_bytes - RESERVE_BYTES, 0)
    replays = hardware.device_type != "cpu"
    check_draft_passes(settings.draft_passes, replays, hardware.device_name)
    host_bytes = settings.host_memory_bytes if settings.host_memory_bytes is not None else hardware.host_memory_bytes
    return Question(
        settings=settings,
        targets=targets,
        drafts=drafts,
        hardware=hardware,
        tree=tree,
        budgets=Budgets(device_bytes=device_bytes, host_bytes=host_bytes, replays=replays and settings.draft_passes != "eager"),
        dtype_bytes=DTYPE_BYTES[target.dtype if settings.dtype == "auto" else settings.dtype],
    )


def _settings(arguments: argparse.Namespace) -> EngineSettings:
    model, draft_model = arguments.model, arguments.draft_model
    if model is None:
        model, draft_model = MODEL, [DRAFT] if draft_model is None else draft_model
    return EngineSettings.parse(model=model, draft_model=draft_model, acceptance=arguments.acceptance, **plan_flags(arguments))
