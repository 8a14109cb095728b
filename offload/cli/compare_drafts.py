"""`profile acceptance --compare`: which draft is worth most on a machine. Each is decoded with, so that its acceptance is its
own, and planned for alone."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tree.acceptance import Acceptance

from ..config import EngineSettings, seconds_text
from ..errors import OffloadError, UsageError
from .acceptance import write_json
from .signals import leaving_at_once
from .terminal import say

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..planner.draft_law import DraftTerms
    from ..planner.plan import Plan
    from ..planner.prediction import Workload
    from .profile import Measurement

SCHEMA_VERSION = 1
NGRAM = "n-gram"  # as a draft: what the text has said before, and no model
NGRAM_TREE = "64:dynamic"  # as many nodes as the planner gives them
RESERVE_BYTES = 2**30  # of the memory of a device that is not here, as `plan` has it


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one draft: its terms and the acceptance that they rest on, or what went wrong with it."""

    name: str
    terms: "DraftTerms | None" = None
    acceptance: dict[str, object] | None = None
    plain_s_per_token: float | None = None
    workload: "Workload | None" = None
    error: OffloadError | None = None


def run(arguments: argparse.Namespace, drafts: list[str], settings: EngineSettings, measurement: "Measurement") -> int:
    """`settings` are those of the target. A draft's error is told, and the next one is looked at; when none is left it is
    raised, the first one's."""
    if len(drafts) < 2 or settings.acceptances:
        raise UsageError(
            f"{len(drafts)} drafts and {len(settings.acceptances)} acceptance files: nothing to compare",
            where="--compare",
            cure="name two --draft-model or more, such as self and n-gram; their acceptance is measured",
        )
    verdicts: list[Verdict] = []
    for name in drafts:
        verdicts.append(_verdict(name, settings, measurement, verdicts, quiet=arguments.quiet))
    if all(verdict.terms is None for verdict in verdicts) and verdicts[0].error is not None:
        raise verdicts[0].error
    document = to_json(settings, verdicts)
    if arguments.output:
        write_json(Path(arguments.output), document)
    print(json.dumps(document) if arguments.json else "\n".join(table(verdicts)))
    return 0


def _alone(settings: EngineSettings, name: str, tree: str) -> EngineSettings:
    """The same with one draft."""
    if name == NGRAM:
        return replace(settings, tree=NGRAM_TREE, ngram=("on",))  # finds have no shape that is known beforehand
    return replace(settings, tree=tree, draft_models=(name,))


def _verdict(
    name: str, settings: EngineSettings, measurement: "Measurement", earlier: list[Verdict], *, quiet: bool
) -> Verdict:
    seen = next((verdict.workload for verdict in earlier if verdict.workload is not None), None)
    try:
        return _measured(name, _alone(settings, name, measurement.tree), measurement, seen, quiet=quiet)
    except OffloadError as error:
        say(f"{name}: {error.what}")
        return Verdict(name, error=error)


def _measured(
    name: str, settings: EngineSettings, measurement: "Measurement", seen: "Workload | None", *, quiet: bool
) -> Verdict:
    """`seen` is the target as an earlier draft's look at this machine has it, so that no noise of it is between them."""
    with leaving_at_once():
        from ..planner.draft_law import terms_of
    if not quiet:
        say(f"{name}:")
    with measurement.opened(settings) as engine:
        if name == NGRAM:  # its tokens are known of these texts, where finds may be none, and of no acceptance by rank
            tokens, plan, fallbacks = measurement.decoded(engine).tokens_per_pass, engine.plan, engine.loop.fallbacks
            assert fallbacks is not None
            terms = replace(terms_of(name, plan), tokens_per_pass=tokens, s_per_token=plan.prediction.round_s / tokens)
            return Verdict(name, terms, None, plan.autoregressive_s_per_token, fallbacks.workload)
        document = measurement.document(engine, settings)
        plan, workload = _plan(engine, settings, Acceptance.from_json(document), seen)
    return Verdict(name, terms_of(name, plan), document, plan.autoregressive_s_per_token, workload)


def _plan(
    engine: "Engine", settings: EngineSettings, acceptance: Acceptance, seen: "Workload | None"
) -> "tuple[Plan, Workload]":
    """What would run with a draft of such acceptance: on this machine, or on the one that --profile names."""
    from ..planner.hardware_file import find_hardware
    from ..planner.memory import Budgets
    from ..planner.plan import plan_run
    from ..planner.prediction import Offer
    from ..planner.workload import make_option, make_workload

    made, fallbacks = engine.plan, engine.loop.fallbacks
    assert fallbacks is not None and fallbacks.draft is not None
    workload, draft, budgets = fallbacks.workload, fallbacks.draft, fallbacks.budgets
    wanted = replace(fallbacks.settings, tree="auto", needs_tree=True)
    if settings.profile is not None:
        hardware = find_hardware(settings.profile)
        device_bytes = settings.gpu_memory_bytes
        if device_bytes is None and hardware.device_memory_bytes is not None:
            device_bytes = max(hardware.device_memory_bytes - RESERVE_BYTES, 0)
        host_bytes = settings.host_memory_bytes or hardware.host_memory_bytes
        budgets = Budgets(device_bytes=device_bytes, host_bytes=host_bytes, replays=hardware.device_type != "cpu")
        positions = made.max_positions
        workload = make_workload(wanted, workload.target, hardware, budgets, max_positions=positions)
        draft = make_option(wanted, hardware, draft.name, draft.cost, acceptance)
    elif seen is not None:
        workload = replace(workload, times=seen.times, verify=seen.verify, link_bytes_per_s=seen.link_bytes_per_s)
    offers = [Offer(workload=workload, drafts=(replace(draft, acceptance=acceptance),))]
    return plan_run(wanted, None, offers, max_positions=made.max_positions, budgets=budgets), workload


def plain_s_per_token(verdicts: list[Verdict]) -> float | None:
    """Without a draft; what is kept for one may be in the way, so it is the quickest of them all."""
    return min((one.plain_s_per_token for one in verdicts if one.plain_s_per_token is not None), default=None)


def winner(verdicts: list[Verdict]) -> Verdict | None:
    """The least seconds per token; None where plain decoding is quicker than all."""
    plain_s = plain_s_per_token(verdicts)
    known = [verdict for verdict in verdicts if verdict.terms is not None]
    best = min(known, key=lambda verdict: verdict.terms.s_per_token if verdict.terms else 0.0, default=None)
    if best is None or best.terms is None or plain_s is None:
        return best
    return best if best.terms.s_per_token < plain_s else None


def to_json(settings: EngineSettings, verdicts: list[Verdict]) -> dict[str, object]:
    """The object of docs/cli.md."""
    best = winner(verdicts)
    return {
        "schema_version": SCHEMA_VERSION,
        "target": Path(settings.model).name,
        "machine": settings.profile or "this machine",
        "plain_s_per_token": plain_s_per_token(verdicts),
        "winner": best.name if best is not None else None,
        "drafts": [_draft_json(verdict) for verdict in verdicts],
    }


def _draft_json(verdict: Verdict) -> dict[str, object]:
    if verdict.terms is None:
        return {"name": verdict.name, "error": verdict.error.what if verdict.error is not None else None}
    law = {"draft_s": verdict.terms.draft_s, "law_s_per_token": verdict.terms.law_s_per_token}
    return {**asdict(verdict.terms), **law, "acceptance": verdict.acceptance}


def table(verdicts: list[Verdict]) -> list[str]:
    """In markdown, the quickest first; below it the winner."""
    columns = ("draft", "tokens/pass", "levels", "level s", "hidden s", "pass s", "s/token", "nothing hidden", "limited by")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return [*lines, *_rows(verdicts), "", *_conclusion(verdicts)]


def _rows(verdicts: list[Verdict]) -> Iterator[str]:
    known = [(verdict.name, verdict.terms) for verdict in verdicts if verdict.terms is not None]
    for name, terms in sorted(known, key=lambda one: one[1].s_per_token):
        seconds = (terms.level_s, terms.hidden_s, terms.pass_s, terms.s_per_token, terms.law_s_per_token)
        cells = [name, f"{terms.tokens_per_pass:.2f}", str(terms.levels), *map(seconds_text, seconds), terms.limit]
        yield "| " + " | ".join(cells) + " |"
    for verdict in verdicts:
        if verdict.error is not None:
            yield f"| {verdict.name} | {verdict.error.what} |" + " |" * 7


def _conclusion(verdicts: list[Verdict]) -> Iterator[str]:
    best, plain_s = winner(verdicts), plain_s_per_token(verdicts)
    plain = f"; without a draft {seconds_text(plain_s)}" if plain_s is not None else ""
    if best is not None and best.terms is not None:
        yield f"best: {best.name}, {seconds_text(best.terms.s_per_token)} s/token{plain}"
    elif plain_s is not None:
        yield f"none of them pays: {seconds_text(plain_s)} s/token without a draft"
