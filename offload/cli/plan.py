"""`plan`: what would run and how fast, for a machine and models that need not be here. No torch, no GPU, no weights."""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineSettings, check_draft_passes, parse_rate, parse_size, sampling_kind
from ..errors import FitError, ModelError, UsageError
from ..planner.tree_flag import DEFAULT_ACCEPTANCE, read_acceptance, read_acceptances, read_tree
from .flags_to_settings import check_writable, plan_flags
from .plan_screen import json_document, refusal_document, screen, sweep_lines, verdict_lines
from .terminal import say

if TYPE_CHECKING:
    from tree.shape import TreeShape
    from tree.spec import OptimalTree

    from ..planner.hardware import HardwareProfile
    from ..planner.memory import Budgets
    from ..planner.plan import Plan
    from ..planner.prediction import DraftOption, Workload
    from ..planner.shapes import ModelShape

MODEL, DRAFT, MACHINE = "llama-2-70b", "llama-2-7b", "rtx-4090"
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
RESERVE_BYTES = 2**30  # of a device's memory when no budget is given: context, workspaces, fragmentation
VOCABULARY_PADDING = 0.01  # families pad one vocabulary differently; the tokenizers are compared when a pair is loaded
SWEEP_POINTS = 24
SWEPT = ("gpu-memory", "host-memory", "link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that a plan follows from."""

    settings: EngineSettings
    target: "ModelShape"
    drafts: tuple["ModelShape", ...]
    hardware: "HardwareProfile"
    tree: "TreeShape | OptimalTree | None"
    budgets: "Budgets"
    dtype_bytes: int

    def answer(self, tree: "TreeShape | OptimalTree | None") -> "Plan":
        from ..planner.plan import plan_run

        return plan_run(
            self.settings,
            tree,
            self.workload(),
            self.options(),
            max_positions=self.target.max_positions,
            budgets=self.budgets,
        )

    def workload(self) -> "Workload":
        from ..planner.plan import make_workload

        return make_workload(
            self.settings,
            self.target.cost(self.dtype_bytes),
            self.hardware,
            self.budgets,
            max_positions=self.target.max_positions,
        )

    def options(self) -> list["DraftOption"]:
        from ..planner.plan import make_option

        return [
            make_option(self.settings, self.hardware, draft.name, draft.cost(self.dtype_bytes), acceptance)
            for draft, acceptance in zip(self.drafts, read_acceptances(self.settings), strict=False)
        ]


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    question = _question(arguments)
    _say_assumed(arguments, question)
    if arguments.sweep:
        return _sweep(arguments, question)
    if arguments.compare_drafts:
        return _compare(arguments, question)
    try:
        made = _noted(question.answer(question.tree), question)
    except FitError as error:
        if arguments.json:
            print(json.dumps(refusal_document(error)))
        raise
    if arguments.draw:
        from .draw import draw_tree

        draw_tree(Path(arguments.draw), made, question.options())
    if arguments.json:
        print(json.dumps(json_document(made)))
        return 0
    from ..planner.advice import wins

    found = wins(made, question.budgets, lambda budgets: replace(question, budgets=budgets).answer(made.tree))
    print(screen(made, question.target, question.drafts, question.hardware, found))
    return 0


def _noted(made: "Plan", question: Question) -> "Plan":
    """Tells on which acceptance the plan rests, when nobody named one."""
    if made.draft is None or question.settings.acceptances:
        return made
    source = read_acceptance(DEFAULT_ACCEPTANCE).source
    return replace(
        made, notes=(*made.notes, f"acceptance is assumed, not this pair's ({source}): `profile acceptance` measures it")
    )


def _check(arguments: argparse.Namespace) -> None:
    """UsageError for flags that contradict each other or ask for files that cannot be written."""
    if sum(map(bool, (arguments.sweep, arguments.compare_drafts, arguments.draw))) > 1:
        raise UsageError("one of --sweep, --compare-drafts and --draw at a time", where="plan", cure="leave the others out")
    if arguments.plot and not arguments.sweep:
        raise UsageError("there is nothing to plot", where="--plot without --sweep", cure="name a --sweep")
    for flag, name, kinds in (
        ("--draw", arguments.draw, (".svg", ".png")),
        ("--plot", arguments.plot, (".svg", ".png", ".pdf")),
    ):
        if name is not None:
            if not name.endswith(kinds):
                raise UsageError(f"{name} is no picture", where=flag, cure=f"name a file that ends in {' or '.join(kinds)}")
            check_writable(flag, Path(name))


def _question(arguments: argparse.Namespace) -> Question:
    from ..planner.hardware_file import find_hardware
    from ..planner.memory import Budgets
    from ..planner.shapes import find_shape

    settings = replace(_settings(arguments), sampling=sampling_kind(arguments.temperature), context_tokens=arguments.context)
    tree = read_tree(settings.tree, has_draft=bool(settings.draft_models))
    target = find_shape(settings.model, "--model")
    drafts = tuple(find_shape(name, "--draft-model") for name in settings.draft_models)
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
        target=target,
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


def _say_assumed(arguments: argparse.Namespace, question: Question) -> None:
    """Tell stderr which model and machine were not named, once nothing can be wrong with the flags any more."""
    if arguments.quiet:
        return
    if arguments.model is None:
        say(f"no --model given: {MODEL} with {question.drafts[0].name if question.drafts else 'no draft'}")
    if arguments.profile is None:
        say(f"no --profile given: the published figures of {MACHINE}; `profile hardware` measures this machine")


def _compare(arguments: argparse.Namespace, question: Question) -> int:
    from ..planner.advice import compare_drafts
    from ..planner.plan import SLOTS

    if not question.drafts:
        raise UsageError("no draft to compare", where="--compare-drafts", cure="name one or more --draft-model")
    verdicts = compare_drafts(question.workload(), question.options(), SLOTS)
    plain_s = replace(question, drafts=()).answer(None).prediction.s_per_token
    if arguments.json:
        drafts = [{**_fields(verdict), "law_tokens_per_s": verdict.formula_tokens_per_s} for verdict in verdicts]
        print(json.dumps({"schema_version": 1, "autoregressive_s_per_token": plain_s, "drafts": drafts}))
    else:
        print("\n".join(verdict_lines(verdicts, plain_s)))
    return 0


def _fields(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}  # type: ignore[attr-defined]


def _sweep(arguments: argparse.Namespace, question: Question) -> int:
    name, values = parse_sweep(arguments.sweep)
    points = []
    for value in values:
        try:
            made = _with(question, name, value).answer(question.tree)
        except FitError:
            continue
        points.append((value, made))
    if not points:
        raise FitError(
            f"nothing fits between {values[0]:.3g} and {values[-1]:.3g} bytes", where="--sweep", cure="sweep further"
        )
    if arguments.plot:
        from .draw import plot_sweep

        plot_sweep(Path(arguments.plot), name, [(value, made.prediction.s_per_token) for value, made in points])
    if arguments.json:
        print(
            json.dumps(
                {
                    "schema_version": 1,
                    "resource": name,
                    "points": [{"value": value, **json_document(made)} for value, made in points],
                }
            )
        )
    else:
        print("\n".join(sweep_lines(name, points)))
    return 0


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """`gpu-memory=12GiB..80GiB`: the resource, and evenly spaced values in bytes or bytes per second. UsageError."""
    name, _, span = text.partition("=")
    low, dots, high = span.partition("..")
    if name not in SWEPT or not dots:
        raise UsageError(
            f"not a sweep: {text!r}", where="--sweep", cure=f"write it like gpu-memory=12GiB..80GiB; one of {', '.join(SWEPT)}"
        )
    parse = parse_rate if name == "link" else parse_size
    first, last = (float(parse(end, flag="--sweep")) for end in (low, high))
    if not 0 < first < last:
        raise UsageError(f"{low} is not below {high}", where="--sweep", cure="write the smaller end first")
    return name, [first + (last - first) * point / (SWEEP_POINTS - 1) for point in range(SWEEP_POINTS)]


def _with(question: Question, name: str, value: float) -> Question:
    if name == "link":
        return replace(question, hardware=replace(question.hardware, link_bytes_per_s=value))
    if name == "gpu-memory":
        return replace(question, budgets=replace(question.budgets, device_bytes=math.floor(value)))
    return replace(question, budgets=replace(question.budgets, host_bytes=math.floor(value)))
