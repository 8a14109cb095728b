"""`plan`: what would run and how fast, for a machine and models that need not be here. No torch, no GPU, no weights."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import parse_rate, parse_size
from ..errors import FitError, UsageError
from .flags_to_settings import check_writable
from .plan_notes import noted, other_flags
from .plan_question import MACHINE, MODEL, Question, read_question
from .plan_screen import json_document, refusal_document, screen, sweep_lines, verdict_lines
from .terminal import say

if TYPE_CHECKING:
    pass

SWEEP_POINTS = 24
SWEPT = ("gpu-memory", "host-memory", "link")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    question = read_question(arguments)
    _say_assumed(arguments, question)
    if arguments.sweep:
        return _sweep(arguments, question)
    if arguments.compare_drafts:
        return _compare(arguments, question)
    try:
        made = noted(question.answer(question.tree), question)
    except FitError as error:
        if arguments.json:
            print(json.dumps(refusal_document(error)))
        raise
    if arguments.draw:
        from .draw import draw_tree

        draw_tree(Path(arguments.draw), made, question.chosen_draft(made))
    if arguments.json:
        print(json.dumps(json_document(made, question)))
        return 0
    from ..planner.advice import wins

    found = wins(
        made,
        question.budgets,
        lambda budgets: replace(question, budgets=budgets).answer(made.tree),
        other_flags(made, question),
    )
    print(screen(made, question, found))
    return 0


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


def _say_assumed(arguments: argparse.Namespace, question: Question) -> None:
    """Tell stderr which model and machine were not named, once nothing can be wrong with the flags any more."""
    if arguments.quiet:
        return
    if arguments.model is None:
        drafts = question.settings.draft_models
        say(f"no --model given: {MODEL} with {drafts[0] if drafts else 'no draft'}")
    if arguments.profile is None:
        say(f"no --profile given: the published figures of {MACHINE}; `profile hardware` measures this machine")


def _compare(arguments: argparse.Namespace, question: Question) -> int:
    from ..planner.advice import compare_drafts
    from ..planner.plan import SLOTS

    if not question.settings.draft_models:
        raise UsageError("no draft to compare", where="--compare-drafts", cure="name one or more --draft-model")
    verdicts = compare_drafts(question.offers, SLOTS)
    plain_s = question.answer_without_drafts().prediction.s_per_token
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
                    "points": [{"value": value, **json_document(made, question)} for value, made in points],
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
