"""Turns "auto" into numbers, once, before anything is loaded: which layer lives where, slots, context, rows per pass.

Pure: budgets come in as numbers, a frozen Plan goes out, or a FitError that shows the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tree.shape import TreeShape

from ..config import EngineSettings
from ..errors import FitError
from ..streaming.schedule import spread_evenly
from ..weights.placement import RING_BUFFERS, Placement
from .cost import ModelCost, activation_bytes, ledger_lines, logits_bytes, size_text

DEFAULT_TEXT_TOKENS = 4096
# A prompt pass costs a whole stream of the weights, so chunks are as large as activations in this share of memory allow.
ACTIVATION_SHARE = 8
CHUNK_ROWS = (4096, 2048, 1024, 512, 256, 128, 64)
MIN_SLOTS, MAX_AUTO_SLOTS = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every decision of a run. Ledgers are bytes by named part; `context_rows` counts prompt, new tokens and tree."""

    placement: Placement
    num_slots: int
    tree: TreeShape
    context_rows: int
    pass_rows: int
    max_positions: int
    bytes_per_pass: int
    device_ledger: Mapping[str, int]
    device_budget_bytes: int | None
    host_ledger: Mapping[str, int]
    host_budget_bytes: int | None
    expected_tokens_per_pass: float = 1.0
    link_bytes_per_s: float | None = None

    @property
    def text_tokens(self) -> int:
        """Most tokens of prompt and answer together: what the rows leave beside the tree, and the model has positions for."""
        return min(self.context_rows - self.tree.num_nodes + 1, self.max_positions)

    @property
    def predicted_pass_s(self) -> float | None:
        """Streaming time of one pass; None when nothing is streamed or the link was not measured."""
        if not self.bytes_per_pass or self.link_bytes_per_s is None:
            return None
        return self.bytes_per_pass / self.link_bytes_per_s

    @property
    def predicted_s_per_token(self) -> float | None:
        """Streaming alone, at the acceptance that the tree was planned with."""
        pass_s = self.predicted_pass_s
        return None if pass_s is None else pass_s / self.expected_tokens_per_pass

    def to_json(self) -> dict[str, object]:
        return {
            "predicted_pass_s": self.predicted_pass_s,
            "predicted_round_s": self.predicted_pass_s,
            "predicted_s_per_token": self.predicted_s_per_token,
            "expected_tokens_per_pass": self.expected_tokens_per_pass,
            "link_bytes_per_s": self.link_bytes_per_s,
            "context_rows": self.context_rows,
            "pass_rows": self.pass_rows,
            "device_bytes": dict(self.device_ledger),
            "device_budget_bytes": self.device_budget_bytes,
            "host_bytes": dict(self.host_ledger),
            "host_budget_bytes": self.host_budget_bytes,
        }


def plan_run(
    settings: EngineSettings,
    tree: TreeShape,
    target: ModelCost,
    draft: ModelCost | None,
    *,
    expected_tokens_per_pass: float = 1.0,
    max_positions: int,
    device_budget_bytes: int | None,
    host_budget_bytes: int | None,
) -> Plan:
    """The plan for `settings` within the budgets (None: unbounded). Raises FitError when they cannot hold even two slots,
    one ring of host buffers, or the context asked for."""
    context_rows = settings.max_context or min(max_positions, DEFAULT_TEXT_TOKENS) + tree.num_nodes - 1
    if tree.num_nodes + 1 > context_rows:
        raise FitError(
            f"a tree of {tree.num_nodes} nodes leaves no room in a context of {context_rows} rows",
            where="--max-context, --tree",
            cure="raise --max-context or take a smaller tree",
        )
    fixed = {
        "embedding, norm and head": target.shared_bytes,
        "key/value cache": target.kv_bytes_per_row * context_rows,
        "draft model": draft.shared_bytes + draft.num_layers * draft.layer_bytes if draft else 0,
        "draft key/value cache": draft.kv_bytes_per_row * context_rows if draft else 0,
        "logits": logits_bytes(target, tree.num_nodes),
    }
    pass_rows = _pass_rows(settings, target, tree, context_rows, fixed, device_budget_bytes)
    fixed["activations"] = activation_bytes(target, pass_rows, context_rows)
    num_resident, num_slots = _residency(settings, target, fixed, device_budget_bytes)
    resident = spread_evenly(num_resident, target.num_layers)
    ledger = {
        **fixed,
        f"{num_resident} resident layers": num_resident * target.layer_bytes,
        f"{num_slots} slots": num_slots * target.layer_bytes,
    }
    _check_device(ledger, device_budget_bytes)
    placement, host_ledger = _host(target, resident, host_budget_bytes)
    return Plan(
        placement=placement,
        num_slots=num_slots,
        tree=tree,
        context_rows=context_rows,
        pass_rows=pass_rows,
        max_positions=max_positions,
        bytes_per_pass=len(placement.streamed) * target.layer_bytes,
        device_ledger=ledger,
        device_budget_bytes=device_budget_bytes,
        host_ledger=host_ledger,
        host_budget_bytes=host_budget_bytes,
        expected_tokens_per_pass=expected_tokens_per_pass,
    )


def _pass_rows(
    settings: EngineSettings,
    target: ModelCost,
    tree: TreeShape,
    context_rows: int,
    others: Mapping[str, int],
    budget: int | None,
) -> int:
    """Rows of the largest chunk that takes its share at most, and nothing from what must be there: a chunk is never the
    reason why a budget is refused."""
    least = tree.num_nodes + 1
    num_resident = min(settings.resident_layers or 0, target.num_layers)
    num_layers = num_resident + ((settings.slots or MIN_SLOTS) if num_resident < target.num_layers else 0)
    needed = sum(others.values()) + num_layers * target.layer_bytes
    room = None if budget is None else min(budget // ACTIVATION_SHARE, budget - needed)
    for rows in CHUNK_ROWS:
        if rows >= least and (room is None or activation_bytes(target, rows, context_rows) <= room):
            return min(rows, context_rows)
    return min(least, context_rows)


def _residency(settings: EngineSettings, target: ModelCost, fixed: Mapping[str, int], budget: int | None) -> tuple[int, int]:
    """(resident layers, slots): what the user said, the rest as many residents as the budget leaves room for."""
    layers, layer_bytes = target.num_layers, target.layer_bytes
    if settings.resident_layers is not None:
        if settings.resident_layers > layers:
            raise FitError(
                f"{settings.resident_layers} resident layers asked for, the model has {layers}",
                where="--resident-layers",
                cure=f"give at most {layers}",
            )
        slots = settings.slots or MIN_SLOTS
        return settings.resident_layers, slots if settings.resident_layers < layers else 0
    room = None if budget is None else budget - sum(fixed.values())
    if room is None:
        return 0, settings.slots or MAX_AUTO_SLOTS
    if room >= layers * layer_bytes:
        return layers, 0
    slots = settings.slots or min(max(room // layer_bytes, MIN_SLOTS), MAX_AUTO_SLOTS)
    return min(max(room // layer_bytes - slots, 0), layers - 1), slots


def _check_device(ledger: Mapping[str, int], budget: int | None) -> None:
    if budget is not None and sum(ledger.values()) > budget:
        raise FitError(
            ledger_lines(ledger, budget),
            where="--gpu-memory",
            cure=f"allow at least {size_text(sum(ledger.values()))}, or lower --max-context, --tree, --resident-layers",
        )


def _host(target: ModelCost, resident: frozenset[int], budget: int | None) -> tuple[Placement, dict[str, int]]:
    """Host layers as the budget allows; the others on disk, spread evenly so that reading never pauses."""
    placement = Placement(num_layers=target.num_layers, resident=resident)
    streamed = placement.streamed
    if budget is None or len(streamed) * target.layer_bytes <= budget:
        return placement, {"pinned layers": len(streamed) * target.layer_bytes}
    ring_bytes = RING_BUFFERS * target.layer_bytes
    num_host = (budget - ring_bytes) // target.layer_bytes
    if num_host < 0:
        raise FitError(
            ledger_lines({f"a ring of {RING_BUFFERS} layers for reading from disk": ring_bytes}, budget),
            where="--host-memory",
            cure=f"allow at least {size_text(ring_bytes)}",
        )
    chosen = spread_evenly(len(streamed) - num_host, len(streamed))
    disk = frozenset(layer for order, layer in enumerate(streamed) if order in chosen)
    placement = Placement(num_layers=target.num_layers, resident=resident, disk=disk)
    return placement, {"pinned layers": num_host * target.layer_bytes, "disk ring": ring_bytes}
