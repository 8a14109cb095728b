"""A plan as people read it, in five seconds, and as its JSON."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..config import bytes_text, counted, rate_text, seconds_text
from ..errors import OffloadError
from .plan_question import Question

if TYPE_CHECKING:
    from ..planner.advice import DraftVerdict, Win
    from ..planner.plan import Plan

COLUMN = 40
SHOWN_WINS = 3


def json_document(made: "Plan", question: Question) -> dict[str, object]:
    """The object of `plan --json`, field by field in docs/cli.md."""
    placement, prediction = made.placement, made.prediction
    target, draft = question.targets[made.offer], question.chosen_draft(made)
    return {
        "schema_version": 1,
        "fits": True,
        "weights": target.weights,
        "codec": (target.stored.codec if target.stored is not None else "") or "none",
        "base": target.stored.base or None if target.stored is not None else None,
        "resident_layers": len(placement.resident),
        "coded_layers": len(placement.coded),
        "streamed_layers": len(placement.streamed),
        "disk_layers": len(placement.disk),
        "slots": made.num_slots,
        "bytes_per_pass": made.bytes_per_pass,
        "raw_bytes_per_pass": made.raw_bytes_per_pass,
        "link_bytes_per_s": made.link_bytes_per_s,
        "predicted_pass_s": prediction.pass_s,
        "predicted_compute_s": prediction.compute_s,
        "predicted_decode_s": prediction.decode_s,
        "predicted_draft_s": prediction.draft_s,
        "hidden_draft_s": prediction.hidden_draft_s,
        "predicted_round_s": prediction.round_s,
        "predicted_s_per_token": prediction.s_per_token,
        "autoregressive_s_per_token": made.autoregressive_s_per_token,
        "tree": {
            "nodes": made.tree.num_nodes,
            "levels": made.tree.num_levels,
            "dynamic": made.dynamic,
            "nodes_per_level": [len(level) for level in made.tree.levels],
            "expected_tokens_per_pass": prediction.expected_tokens,
        },
        "ahead_steps": made.ahead_steps,
        "draft": made.draft,
        "draft_model": draft.name if draft is not None else None,
        "draft_passes": made.draft_passes,
        "memory": {
            "device_bytes": dict(made.device_ledger),
            "device_budget_bytes": made.device_budget_bytes,
            "host_bytes": sum(made.host_ledger.values()),
            "host_ledger": dict(made.host_ledger),
            "host_budget_bytes": made.host_budget_bytes,
        },
        "notes": list(made.notes),
    }


def refusal_document(error: OffloadError) -> dict[str, object]:
    return {"schema_version": 1, "fits": False, "error": {"what": error.what, "where": error.where, "cure": error.cure}}


def screen(made: "Plan", question: Question, wins: Sequence["Win"]) -> str:
    target, hardware, chosen = question.targets[made.offer], question.hardware, question.chosen_draft(made)
    draft = chosen.name if chosen is not None else "no draft"
    layers = f"{counted(target.num_layers, 'layer')} x {target.layer_parameters / 1e6:.3g} M parameters in {target.weights}"
    lines = [
        f"{target.name}, {layers} | {draft} | {hardware.device_name}" + (" (published figures)" if hardware.published else ""),
        "",
        *_ledgers(made),
        "",
        *_verdict(made),
        *(f"note: {note}" for note in made.notes),
    ]
    for win in wins[:SHOWN_WINS]:
        less = 1 - win.s_per_token / made.prediction.s_per_token
        lines.append(f"win: {win.change}: {seconds_text(win.s_per_token)} s/token, {less * 100:.0f} % less")
    return "\n".join(lines)


def _ledgers(made: "Plan") -> list[str]:
    """Device on the left, host on the right, each with its sum and its budget."""
    left = _column("device", made.device_ledger, made.device_budget_bytes)
    right = _column("host", made.host_ledger, made.host_budget_bytes)
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    return [f"{one:<{COLUMN}}{other}".rstrip() for one, other in zip(left, right, strict=True)]


def _column(title: str, ledger: Mapping[str, int], budget_bytes: int | None) -> list[str]:
    of_budget = f" of {bytes_text(budget_bytes)}" if budget_bytes is not None else ""
    total = f"{title} {bytes_text(sum(ledger.values()))}{of_budget}"
    return [total, *(f"  {name:<26}{bytes_text(num_bytes):>11}" for name, num_bytes in ledger.items() if num_bytes)]


def _verdict(made: "Plan") -> list[str]:
    prediction, placement = made.prediction, made.placement
    if placement.streamed:
        rate = rate_text(made.link_bytes_per_s or 0.0)
        from_disk = f", {bytes_text(made.disk_bytes_per_pass)} of it from disk" if placement.disk else ""
        decoding = f", of it decoding {seconds_text(prediction.decode_s)} s" if prediction.decode_s else ""
        bound = "" if prediction.compute_s < prediction.pass_s else ", which is more than the link needs"
        first = (
            f"FITS. One pass streams {bytes_text(made.bytes_per_pass)}{from_disk}: {seconds_text(prediction.pass_s)} s "
            f"at {rate} (compute {seconds_text(prediction.compute_s)} s{decoding}{bound})"
        )
    else:
        first = f"FITS. Nothing is streamed: {seconds_text(prediction.pass_s)} s a pass"
    plain = made.autoregressive_s_per_token
    parts = [f"{seconds_text(plain)} s/token without a tree"] if plain is not None else []
    if made.tree.num_nodes > 1:
        hidden = f" and {seconds_text(prediction.hidden_draft_s)} s ahead" if made.ahead_steps else ""
        parts.append(
            f"{seconds_text(prediction.s_per_token)} s/token with a {'dynamic ' if made.dynamic else ''}tree of "
            f"{made.tree.num_nodes} nodes in {made.tree.num_levels} levels: {prediction.expected_tokens:.1f} tokens a pass, "
            f"draft {seconds_text(prediction.draft_s)} s{hidden}"
        )
    return [first, "  " + " | ".join(parts)]


def verdict_lines(verdicts: Sequence["DraftVerdict"], plain_s: float) -> list[str]:
    """One row a draft; the last column is what the formula of Decoding Speculative Decoding would give."""
    width = max(20, *(len(one.name) + 2 for one in verdicts))
    head = f"{'draft':<{width}}{'tree':>10}{'tokens/pass':>13}{'level s':>10}{'target s':>10}{'s/token':>10}{'by the law':>12}"
    rows = [
        f"{one.name:<{width}}{f'{one.num_nodes}x{one.num_levels}':>10}{one.expected_tokens:>13.2f}"
        f"{seconds_text(one.level_s):>10}{seconds_text(one.target_s):>10}{seconds_text(one.s_per_token):>10}"
        f"{seconds_text(1 / one.formula_tokens_per_s):>12}"
        for one in verdicts
    ]
    return [head, *rows, f"{'none':<{width}}{'1x1':>10}{1.0:>13.2f}{'':>10}{'':>10}{seconds_text(plain_s):>10}"]


def sweep_unit(name: str, most: float) -> tuple[str, float]:
    """(its name, its size) of the unit for a sweep of resource `name` that ends at `most`."""
    if name == "link":
        return ("GB/s", 1e9) if most >= 1e9 else ("MB/s", 1e6)
    return ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)


def sweep_lines(name: str, points: Sequence[tuple[float, "Plan"]]) -> list[str]:
    unit, scale = sweep_unit(name, points[-1][0])
    lines = [f"{f'{name} {unit}':>18}{'resident':>10}{'disk':>6}{'nodes':>7}{'levels':>8}{'s/token':>10}"]
    for value, made in points:
        lines.append(
            f"{value / scale:>18.2f}{len(made.placement.resident):>10}{len(made.placement.disk):>6}{made.tree.num_nodes:>7}"
            f"{made.tree.num_levels:>8}{made.prediction.s_per_token:>10.4g}"
        )
    return lines
