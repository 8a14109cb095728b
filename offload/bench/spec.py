"""How much speculation yields: tokens per pass by tree, temperature and top-p, and acceptance by rank and level. Counts
passes of real decoding; knows no clock but its budget's."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tree.acceptance import AcceptanceCounter

from ..assemble import open_engine
from ..config import EngineSettings, counted
from ..engine.engine import Engine
from ..errors import UsageError
from ..report.report import environment
from .latency import SCHEMA_VERSION, describe_model
from .machine import describe_gpu, describe_host
from .prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRequest:
    """Every prompt is decoded `runs` times with every tree, temperature and top-p; greedily once, as runs would be equal."""

    settings: EngineSettings
    trees: tuple[str, ...]
    temperatures: tuple[float, ...]
    top_ps: tuple[float, ...]
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    runs: int
    max_seconds: float
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampling:
    temperature: float
    top_p: float


def parse_numbers(text: str, *, flag: str, least: float, most: float) -> tuple[float, ...]:
    """Of "0,0.6,1". UsageError naming `flag`."""
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"not numbers: {text!r}", where=flag, cure="write them like 0,0.6,1") from None
    if not all(least <= number <= most for number in numbers):
        raise UsageError(f"{text} is not within {least:g} and {most:g}", where=flag, cure="leave the others out")
    return numbers


def measure_acceptance(request: SpecRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The document of `bench spec`. What there is when the time is over is kept; `complete` says whether that is all."""
    end_s = time.monotonic() + request.max_seconds
    host = describe_host()
    rows: list[dict[str, Any]] = []
    complete, device = True, request.settings.device
    for tree in request.trees:
        with open_engine(replace(request.settings, tree=tree), seed=request.seed) as engine:
            device = engine.device_name
            for sampling in _samplings(request):
                row = _measure(engine, request, sampling, end_s)
                complete = complete and row.pop("complete")
                if row["passes"]:
                    rows.append({"tree": tree, "nodes": engine.plan.tree.num_nodes, **row})
                    way = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
                    say(f"{tree}, {way}: {row['tokens_per_pass']:.2f} tokens")
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "spec",
        "host": host,
        "gpu": describe_gpu(),
        "model": describe_model(request.settings),
        "request": {"prompts": len(request.prompts), "runs": request.runs, "max_new_tokens": request.max_new_tokens},
        "complete": complete,
        "runs": rows,
        "summary": rows,
        "environment": environment(device),
    }


def _samplings(request: SpecRequest) -> Iterator[_Sampling]:
    """Top-p changes nothing at temperature 0."""
    for temperature, top_p in product(request.temperatures, request.top_ps):
        if temperature > 0 or top_p == request.top_ps[0]:
            yield _Sampling(temperature=temperature, top_p=top_p if temperature > 0 else 1.0)


def _measure(engine: Engine, request: SpecRequest, sampling: _Sampling, end_s: float) -> dict[str, Any]:
    counter = AcceptanceCounter()
    texts: list[list[int]] = []  # tokens of each pass
    expected: list[float] = []
    by_category: dict[str, list[int]] = defaultdict(list)
    complete = True
    for run, number in product(range(request.runs if sampling.temperature > 0 else 1), range(len(request.prompts))):
        generation = engine.stream(
            request.prompt_ids[number],
            max_new_tokens=request.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed + run * len(request.prompts) + number,
            ignore_eos=True,
        )
        texts.append([])
        for step in generation:
            counter.add(step.shape, step.verdict.path, step.tops.tolist() if step.tops is not None else None)
            texts[-1].append(len(step.verdict.token_ids))
            expected.append(step.verdict.expected_tokens)
            by_category[request.prompts[number].category].append(texts[-1][-1])
            if time.monotonic() > end_s:
                complete = False
                break
        if not complete:
            break
    tokens = [count for text in texts for count in text]
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "verifier": "greedy" if sampling.temperature == 0 else engine.method,
        "passes": len(tokens),
        "tokens_per_pass": _mean(tokens),
        "tokens_per_pass_error": error_by_text(texts),
        "expected_tokens_per_pass": _mean(expected),
        "acceptance_by_rank": _vectors(counter, per_level=False)[0] if tokens else [],
        "acceptance_by_level": _vectors(counter, per_level=True) if tokens else [],
        "contexts": _contexts(counter),
        "categories": {category: _mean(counts) for category, counts in by_category.items()},
        "complete": complete,
    }


def _vectors(counter: AcceptanceCounter, *, per_level: bool) -> list[list[float]]:
    """Empty vectors when no pass had a tree."""
    try:
        return [list(vector) for vector in counter.to_acceptance("", per_level=per_level).levels]
    except ValueError:
        return [[]]


def _contexts(counter: AcceptanceCounter) -> object:
    """As an acceptance file has them; empty when no pass had a tree, or nobody knew how sure the draft was."""
    try:
        return counter.to_acceptance("").to_json().get("contexts", [])
    except ValueError:
        return []


def error_by_text(texts: Sequence[Sequence[int]]) -> float | None:
    """Standard error of tokens per pass, a ratio of sums. Passes of one text are alike, so texts are what is independent
    (Cochran, Sampling Techniques, 3rd ed., 6.3). None for fewer than two texts."""
    texts = [text for text in texts if text]
    if len(texts) < 2:
        return None
    passes = sum(len(text) for text in texts)
    ratio = sum(map(sum, texts)) / passes
    spread = sum((sum(text) - ratio * len(text)) ** 2 for text in texts)
    return math.sqrt(len(texts) / (len(texts) - 1) * spread) / passes


def _mean(values: list[int] | list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spec_table(document: dict[str, Any]) -> list[str]:
    """Tokens per pass, and the acceptance of the first ranks; below, what the first children of each level got."""
    model, request = document["model"], document["request"]
    prompts, length = counted(request["prompts"], "prompt"), counted(request["max_new_tokens"], "token")
    title = f"{model['target']}, draft {model['draft']}: {prompts} of {length}"
    columns = (
        "tree",
        "nodes",
        "temperature",
        "top-p",
        "tokens/pass",
        "passes",
        "accepted by rank 1, 2, ...",
        "first child by level",
    )
    lines = [
        title if document["complete"] else f"{title}; not complete, the time was over",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in document["summary"]:
        error = f" +- {row['tokens_per_pass_error']:.2f}" if row["tokens_per_pass_error"] is not None else ""
        ranks = " ".join(f"{value:.3f}" for value in row["acceptance_by_rank"][:6])
        levels = " ".join(f"{vector[0]:.2f}" for vector in row["acceptance_by_level"][:10] if vector)
        cells = [row["tree"], row["nodes"], f"{row['temperature']:g}", f"{row['top_p']:g}"]
        cells += [f"{row['tokens_per_pass']:.2f}{error}", row["passes"], ranks, levels]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines
