"""Pure: from outcomes to the rows of a table. Percentiles, speedups with their spread, whether the tokens are the same."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

from .case_and_outcome import Outcome, tokens_by_prompt

RESAMPLES = 2000
REFERENCES = ("transformers", "plain", "accelerate", "accelerate-disk", "ours")  # whose tokens count, the first that ran


def summarise(outcomes: Sequence[Outcome], *, greedy: bool) -> list[dict[str, Any]]:
    """One row an engine, fields as in docs/cli.md. `speedup` is plain decoding's median s/token over the row's; `ours_by`
    the row's over ours. Intervals are 95 %, by bootstrap over samples, None for a single one."""
    by_name = {outcome.engine: outcome for outcome in outcomes}
    reference = next((by_name[name] for name in REFERENCES if name in by_name and by_name[name].ran), None)
    plain, ours = by_name.get("plain"), by_name.get("ours")
    return [_row(outcome, _alike(plain, outcome), _alike(ours, outcome), reference if greedy else None) for outcome in outcomes]


def _alike(other: Outcome | None, outcome: Outcome) -> Outcome | None:
    """`other`, unless only one of the two went over an emulated link: then their ratio says how slow that link was chosen."""
    if other is None or bool(other.facts.get("emulated_link")) != bool(outcome.facts.get("emulated_link")):
        return None
    return other


def _row(outcome: Outcome, plain: Outcome | None, ours: Outcome | None, reference: Outcome | None) -> dict[str, Any]:
    times = s_per_token(outcome)
    passes = [tokens for sample in outcome.samples for tokens in sample.pass_tokens]
    facts = outcome.facts
    row: dict[str, Any] = {
        "engine": outcome.engine,
        "samples": len(times),
        "reason": outcome.reason,
        "s_per_token_p50": percentile(times, 50),
        "s_per_token_p90": percentile(times, 90),
        "first_token_s_p50": percentile([s.first_token_s for s in outcome.samples if s.first_token_s is not None], 50),
        "load_s": outcome.load_s,
        "tokens_per_pass": statistics.fmean(passes) if passes else None,
        "speedup": ratio(s_per_token(plain) if plain else [], times),
        "speedup_interval": bootstrap(s_per_token(plain) if plain else [], times),
        "ours_by": ratio(times, s_per_token(ours) if ours else []),
        "ours_by_interval": bootstrap(times, s_per_token(ours) if ours else []),
        "identical_tokens": _identical(outcome, reference),
        "link_utilisation": facts.get("link_utilisation"),
        "device_peak_bytes": facts.get("device_peak_bytes"),
        "host_peak_bytes": facts.get("host_peak_bytes"),
    }
    return {**row, **_physics(outcome, row["s_per_token_p50"])}


def _physics(outcome: Outcome, measured_s: float | None) -> dict[str, Any]:
    """The floor, which is bytes per pass / link rate / tokens per pass, and what the planner predicted. Both are at the tokens
    per pass that were measured, without first passes, whose time is left out, too."""
    facts = outcome.facts
    bytes_per_pass, rate = facts.get("bytes_per_pass"), facts.get("link_bytes_per_s")
    later = [tokens for sample in outcome.samples for tokens in sample.pass_tokens[1:]]
    tokens = statistics.fmean(later) if later else None
    floor_s = bytes_per_pass / rate / tokens if bytes_per_pass and rate and tokens else None
    round_s = facts.get("plan", {}).get("predicted_round_s")
    predicted_s = round_s / tokens if round_s and tokens else None
    return {
        "floor_s_per_token": floor_s,
        "over_floor": measured_s / floor_s if measured_s and floor_s else None,
        "predicted_s_per_token": predicted_s,
        "over_predicted": measured_s / predicted_s if measured_s and predicted_s else None,
    }


def s_per_token(outcome: Outcome) -> list[float]:
    return [sample.s_per_token for sample in outcome.samples if sample.s_per_token is not None]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest."""
    if not values:
        return None
    ordered, position = sorted(values), (len(values) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float | None:
    """Of the medians."""
    return statistics.median(slow) / statistics.median(fast) if slow and fast else None


def bootstrap(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of `ratio` over resampled samples; the same one for the same numbers."""
    if len(slow) < 2 or len(fast) < 2:
        return None
    generator = random.Random(0)
    ratios = sorted(
        statistics.median(generator.choices(slow, k=len(slow))) / statistics.median(generator.choices(fast, k=len(fast)))
        for _ in range(RESAMPLES)
    )
    return ratios[round(RESAMPLES * 0.025)], ratios[round(RESAMPLES * 0.975) - 1]


def _identical(outcome: Outcome, reference: Outcome | None) -> bool | None:
    """Whether all texts are the reference's, as far as both go. None when there is nothing to compare."""
    if reference is None or not outcome.ran:
        return None
    expected = tokens_by_prompt(reference)
    pairs = [(s.token_ids, expected[s.prompt]) for s in outcome.samples if s.prompt in expected]
    return all(list(found[: len(right)]) == list(right[: len(found)]) for found, right in pairs) if pairs else None


def by_category(outcomes: Sequence[Outcome], categories: Sequence[str]) -> list[dict[str, Any]]:
    """Median s/token and tokens per pass of each engine in each category of prompts."""
    rows = []
    for category in dict.fromkeys(categories):
        for outcome in outcomes:
            samples = [sample for sample in outcome.samples if categories[sample.prompt] == category]
            times = [sample.s_per_token for sample in samples if sample.s_per_token is not None]
            passes = [tokens for sample in samples for tokens in sample.pass_tokens]
            if times:
                row = {"category": category, "engine": outcome.engine, "s_per_token_p50": percentile(times, 50)}
                rows.append({**row, "tokens_per_pass": statistics.fmean(passes), "samples": len(times)})
    return rows
