"""Our engine as a benchmark sees it, with its tree and without."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..assemble import open_engine
from ..device import cuda
from ..engine.engine import Engine
from ..report.report import Report
from ..report.trace import Trace
from .case_and_outcome import Case


class EngineDecoder:
    def __init__(self, engine: Engine, case: Case) -> None:
        self._engine, self._case = engine, case
        self._reports: list[Report] = []
        self.predicted_pass_s: float | None = engine.plan.prediction.pass_s

    def decode(self, prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> Iterator[tuple[int, ...]]:
        case = self._case
        self._engine.forget()  # every run reads its prompt anew
        generation = self._engine.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=case.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            seed=seed,
            ignore_eos=True,
        )
        for step in generation:
            yield step.token_ids
        self._reports.append(generation.result())

    def facts(self) -> dict[str, Any]:
        """The plan, memory, and the link over the last whole generation."""
        plan, memory = self._engine.plan, self._engine.memory()
        last = self._reports[-1] if self._reports else None
        return {
            "device": self._engine.device_name,
            "tree_nodes": plan.tree.num_nodes,
            "tree_levels": plan.tree.num_levels,
            "resident_layers": len(plan.placement.resident),
            "streamed_layers": len(plan.placement.streamed),
            "disk_layers": len(plan.placement.disk),
            "slots": plan.num_slots,
            "bytes_per_pass": plan.bytes_per_pass,
            "link_bytes_per_s": plan.link_bytes_per_s,
            "emulated_link": self._engine.emulated_link,
            "link_utilisation": last.link_utilisation if last else None,
            "stall_s": last.stats.stall_s if last else None,
            "pass_s": last.stats.median_pass_s if last else None,
            "draft_s": _median([one.draft_s for one in last.stats.passes]) if last else None,
            "verify_s": _median([one.verify_s for one in last.stats.passes]) if last else None,
            "plan": plan.to_json(),
            "device_peak_bytes": memory.device_peak_bytes,
            "host_weights_bytes": memory.host_weights_bytes,
            "host_shared_layers": memory.host_shared_layers,
        }


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


@contextmanager
def open_our_engine(case: Case) -> Iterator[EngineDecoder]:
    """`plain` is the same engine one token at a time, and without a draft: the memory is for resident layers."""
    settings = case.settings_for_it()
    if case.engine == "plain":
        settings = replace(settings, draft_models=(), tree="none", acceptances=())
    if settings.gpu_memory_bytes is not None and settings.device != "cpu" and cuda.is_available():
        cuda.cap_memory(settings.gpu_memory_bytes)
    trace = Trace() if case.trace else None
    with open_engine(settings, seed=case.seed, trace=trace) as engine:
        yield EngineDecoder(engine, case)
    if trace is not None and case.trace is not None:
        trace.save(Path(case.trace))
