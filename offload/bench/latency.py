"""Engines side by side: the same weights, dtype, prompts and lengths, each engine in its own process, in one run."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..config import EngineSettings, counted
from ..demo import TARGET
from ..errors import UsageError
from ..report.report import environment
from .case_and_outcome import Case, Outcome, as_error
from .engines import why_not
from .launch import run_isolated
from .machine import describe_gpu, describe_host, uses_gpu
from .prompts import Prompt
from .summary import by_category, summarise

SCHEMA_VERSION = 1
INTERRUPTED = "interrupted"
DEEPSPEED_WARMUP = 3  # tokens until its prefetcher has seen a whole pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRequest:
    """`max_seconds` is for all engines together; what one leaves over goes to those after it."""

    settings: EngineSettings
    engines: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    runs: int
    warmup: int
    max_seconds: float
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    trace: str | None = None

    def case(self, engine: str, max_seconds: float) -> Case:
        """Baselines copy through no emulated link, on the CPU where ours emulates one."""
        settings = self.settings
        if engine not in ("ours", "plain") and settings.emulate_link_bytes_per_s is not None:
            settings = replace(settings, emulate_link_bytes_per_s=None, device="cpu")
        return Case(
            engine=engine,
            settings=settings,
            prompts=self.prompt_ids,
            max_new_tokens=self.max_new_tokens,
            runs=self.runs,
            warmup=max(self.warmup, DEEPSPEED_WARMUP) if engine.startswith("deepspeed") else self.warmup,
            max_seconds=max_seconds,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            trace=self.trace if engine == "ours" else None,
        )


def measure_latency(request: LatencyRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The document that `bench --json` prints; after Ctrl-C, of the engines that had ended. UsageError when the time does not
    allow one pass of ours."""
    host, gpu = describe_host(), describe_gpu()  # before we make the machine busy
    end_s = time.monotonic() + request.max_seconds
    outcomes: list[Outcome] = []
    for number, engine in enumerate(request.engines):
        share_s = (end_s - time.monotonic()) / (len(request.engines) - number)
        try:
            outcome = run_engine(request, engine, share_s, on_gpu=uses_gpu(request.settings))
        except KeyboardInterrupt:
            outcomes += [Outcome(engine=left, reason=INTERRUPTED) for left in request.engines[number:]]
            break
        outcomes.append(outcome)
        say(f"{engine}: {_progress(outcome)}")
        if engine == "ours" and outcome.error is not None:
            raise as_error(outcome.error)
        if outcome.least_s is not None:
            raise UsageError(
                f"{request.max_seconds:g} s leave {share_s:.3g} s to {engine}; "
                f"loading, warm-up and one pass take it {outcome.least_s:.3g} s",
                where="--max-seconds",
                cure=f"give at least {outcome.least_s * len(request.engines) * 1.1:.0f}, or fewer baselines",
            )
    return _document(request, outcomes, host, gpu)


def run_engine(request: LatencyRequest, engine: str, max_seconds: float, *, on_gpu: bool) -> Outcome:
    reason = why_not(engine, on_gpu=on_gpu)
    if reason is None and max_seconds <= 0:
        reason = "no time was left"
    if reason is not None:
        return Outcome(engine=engine, reason=reason)
    return run_isolated(request.case(engine, max_seconds), patient=engine in ("ours", "plain"))


def _document(request: LatencyRequest, outcomes: list[Outcome], host: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    settings = request.settings
    device = next((outcome.facts["device"] for outcome in outcomes if "device" in outcome.facts), settings.device)
    categories = [prompt.category for prompt in request.prompts]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "latency",
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": host,
        "gpu": gpu,
        "model": describe_model(settings),
        "request": {
            "engines": list(request.engines),
            "prompts": len(request.prompts),
            **{name: getattr(request, name) for name in _ASKED},
            "settings": {**asdict(settings), **_names(settings)},
        },
        "runs": [record for outcome in outcomes for record in outcome.to_json()],
        "facts": {outcome.engine: outcome.facts for outcome in outcomes},
        "summary": summarise(outcomes, greedy=request.temperature == 0),
        "interrupted": any(outcome.reason == INTERRUPTED for outcome in outcomes),
        "categories": by_category(outcomes, categories) if len(set(categories)) > 1 else [],
        "environment": environment(device),
    }


_ASKED = ("max_new_tokens", "runs", "warmup", "max_seconds", "temperature", "top_k", "top_p", "seed")


def describe_model(settings: EngineSettings) -> dict[str, Any]:
    """Models by name, not by path: the document may travel."""
    scale = settings.model.startswith("scale:")
    names = _names(settings)
    return {
        "target": names["model"],
        "draft": ", ".join(_name(name) for name in settings.draft_models) or None,
        "dtype": settings.dtype,
        "scale": SCALE_NOTE if scale else None,
        "emulated_link_bytes_per_s": settings.emulate_link_bytes_per_s,
    }


def _names(settings: EngineSettings) -> dict[str, object]:
    """The settings that are files, by name."""
    return {
        "model": _name(settings.model),
        "draft_models": [_name(name) for name in settings.draft_models],
        "acceptances": [_name(name) for name in settings.acceptances],
        "profile": _name(settings.profile) if settings.profile is not None else None,
        "tree": _name(settings.tree),
    }


def _name(model: str) -> str:
    path = Path(model).resolve()
    return f"demo-{path.name}" if path.parent == TARGET.parent else path.name


SCALE_NOTE = "real work of this shape, an easy language: the bundled demo target's function at the size of a large model"


def _progress(outcome: Outcome) -> str:
    times = [sample.s_per_token for sample in outcome.samples if sample.s_per_token is not None]
    measured = f"{sorted(times)[len(times) // 2]:.3g} s/token in {counted(len(times), 'sample')}" if times else "no figure"
    return f"{measured} ({outcome.reason})" if outcome.reason else measured
