"""The result of a generation, as Python values, as the JSON of docs/cli.md, and as the line that ends a run."""

import functools
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import rate_text, seconds_text
from .deviation import Deviation
from .deviation import deviation as find_deviation
from .stats import PassStats, RunStats

if TYPE_CHECKING:  # a plan places weights, so it knows torch; commands that only name a commit need not wait for it
    from ..planner.plan import Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes, as measured at the end of a run. `device_peak_bytes` on the CPU device counts what went through the device:
    weights, slots and caches, not activations; `device_base_bytes` of it are what stays of layers that come and go.
    `host_shared_layers` of a scale model borrow another layer's memory."""

    device_peak_bytes: int
    host_weights_bytes: int
    host_pinned_bytes: int
    host_sessions_bytes: int = 0  # keys and values of conversations that other requests have put aside
    host_shared_layers: int = 0
    device_base_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How the target's weights are stored: of that model, and no other, a text is exact. `name` is what people call it;
    `layers` are the formats of each decoder layer's packed or coded tensors."""

    name: str
    layers: tuple[frozenset[str], ...]

    @property
    def is_coded(self) -> bool:
        return any(self.layers)

    def codecs(self, streamed: Iterable[int]) -> dict[str, int]:
        """How many of the layers `streamed` have tensors in each format; in "none" those that travel as they compute."""
        counts = Counter(name for layer in streamed for name in self.layers[layer] or {"none"})
        return dict(sorted(counts.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    text: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: RunStats
    plan: "Plan"
    verifier: str
    memory: Memory
    emulated_link: bool
    device_name: str
    weights: Weights

    @property
    def link_utilisation(self) -> float | None:
        """Streamed bytes over what the link, at the rate measured when the model was loaded, could have carried."""
        rate, peak = self.stats.link_bytes_per_s, self.plan.link_bytes_per_s
        return rate / peak if rate and peak else None

    def to_json(self) -> dict[str, object]:
        """The object that `--json` prints; field by field in docs/cli.md."""
        stats, plan = self.stats, self.plan
        s_per_token = stats.s_per_token
        return {
            "schema_version": SCHEMA_VERSION,
            "text": self.text,
            "prompt_token_ids": list(self.prompt_token_ids),
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "timing": {
                "load_s": stats.load_s,
                "reused_tokens": stats.reused_tokens,
                "first_token_s": stats.first_token_s,
                "decode_s": stats.decode_s,
                "s_per_token": s_per_token,
                "tokens_per_s": 1 / s_per_token if s_per_token else None,
            },
            "speculation": {
                "tree_nodes": plan.tree.num_nodes,
                "tree_levels": plan.tree.num_levels,
                "nodes_per_pass": stats.nodes_per_pass,
                "verifier": self.verifier,
                "passes": len(stats.passes),
                "tokens_per_pass": stats.tokens_per_pass,
                "accepted_per_pass": [one.emitted_tokens for one in stats.passes],
                "ngram_tokens": sum(one.ngram_tokens for one in stats.passes),
                "foreseen_nodes": sum(one.foreseen_nodes for one in stats.passes),
                "wasted_nodes": stats.wasted_nodes,
            },
            "streaming": {
                "streamed_layers": len(plan.placement.streamed),
                "resident_layers": len(plan.placement.resident),
                "disk_layers": len(plan.placement.disk),
                "slots": plan.num_slots,
                "bytes_per_pass": plan.bytes_per_pass,
                "raw_bytes_per_pass": plan.raw_bytes_per_pass,
                "codecs": self.weights.codecs(plan.placement.streamed),
                "link_bytes_per_s": stats.link_bytes_per_s,
                "link_peak_bytes_per_s": plan.link_bytes_per_s,
                "link_utilisation": self.link_utilisation,
                "stall_s": stats.stall_s,
                "emulated_link": self.emulated_link,
            },
            "memory": {
                "device_peak_bytes": self.memory.device_peak_bytes,
                "device_base_bytes": self.memory.device_base_bytes,
                "host_weights_bytes": self.memory.host_weights_bytes,
                "host_pinned_bytes": self.memory.host_pinned_bytes,
                "host_sessions_bytes": self.memory.host_sessions_bytes,
                "host_shared_layers": self.memory.host_shared_layers,
            },
            "plan": {**plan.to_json(), "deviation": deviation.text() if (deviation := self.deviation) else None},
            "environment": {**environment(self.device_name), "weights": self.weights.name},
        }

    def line(self) -> str:
        """`256 tokens in 201 s | 0.79 s/token | first token 6.1 s | 7.9 tokens/pass of 768 nodes | link 24.6 GB/s ...` Scripts
        read it: its words and units are always the same."""
        stats = self.stats
        parts = [f"{len(self.token_ids)} tokens in {seconds_text(stats.first_token_s + stats.decode_s)} s"]
        if stats.s_per_token is not None:
            parts.append(f"{seconds_text(stats.s_per_token)} s/token{self._predicted()}")
        reused = f" ({stats.reused_tokens} of {len(self.prompt_token_ids)} prompt tokens reused)" if stats.reused_tokens else ""
        parts.append(f"first token {seconds_text(stats.first_token_s)} s{reused}")
        if stats.tokens_per_pass is not None:
            parts.append(f"{stats.tokens_per_pass:.1f} tokens/pass of {self._nodes()} nodes")
        parts.append(self._link())
        parts.append(f"device {_gib(self.memory.device_peak_bytes)} GiB")
        return " | ".join(parts)

    @property
    def deviation(self) -> "Deviation | None":
        """Where the prediction was off by more than a tenth, and why. It was made for the whole tree: passes over what was left
        of it near the end of the text say nothing, nor do those before the plan was changed."""
        plan, first = self.plan, max(self.stats.passes_before_plan, 1)
        steady = [one for one in self.stats.passes[first:] if _is_whole(one, plan)]
        return find_deviation(plan.prediction, steady, plan.bytes_per_pass, plan.link_bytes_per_s)

    def _nodes(self) -> int:
        mean = self.stats.nodes_per_pass
        return self.plan.tree.num_nodes if not self.plan.dynamic or mean is None else round(mean)

    def _predicted(self) -> str:
        predicted_s = self.plan.prediction.s_per_token
        return f" (predicted {seconds_text(predicted_s)})"

    def _link(self) -> str:
        rate, share = self.stats.link_bytes_per_s, self.link_utilisation
        if not self.plan.placement.streamed:
            return "nothing streamed, all layers resident"
        name = "emulated link" if self.emulated_link else "link"
        if not rate or share is None:
            return f"{name}: one pass only"
        return f"{name} {rate_text(rate)}, {share * 100:.0f} % of peak"


def _is_whole(one: PassStats, plan: "Plan") -> bool:
    """Whether a pass was over a tree as planned, and nothing else. Dynamic ones are as large as they happen to be."""
    return one.num_rows == one.num_nodes if plan.dynamic else one.num_rows >= plan.tree.num_nodes


def environment(device_name: str) -> dict[str, object]:
    return {
        "device": device_name,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "commit": git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def git_commit() -> str | None:
    """The commit of the clone this runs from, with "+" when it has changes; None outside a clone."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _gib(num_bytes: int) -> str:
    """Digits that show a small model, and no exponent for whoever reads the number."""
    gib = num_bytes / 2**30
    return f"{gib:.{1 if gib >= 10 else 2 if gib >= 0.1 else 4}f}"
