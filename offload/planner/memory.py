"""Pure: what a run keeps where. Every byte on the device and on the host has a name, and the names sum to the budgets.

The tree's size and the number of slots are given; as many layers become resident as the rest leaves room for.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tree.blocks import block_bytes

from ..config import EngineSettings
from ..errors import FitError
from ..model.buckets import widest_pass
from ..weights.placement import RING_BUFFERS, Placement, spread_evenly
from .cost import (
    ModelCost,
    activation_bytes,
    computed_bytes,
    ledger_lines,
    logits_bytes,
    recording_bytes,
    size_text,
    stored_bytes,
)

DEFAULT_TEXT_TOKENS = 4096
# A prompt pass costs a whole stream of the weights, so chunks are as large as activations in this share of memory allow.
ACTIVATION_SHARE = 8
CHUNK_ROWS = (4096, 2048, 1024, 512, 256, 128, 64)
MIN_SLOTS, MAX_AUTO_SLOTS = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that a run may take; None is unbounded. `shared`: the device's memory is the host's (a CPU), so what lies on
    the device counts against host_bytes, too. `replays`: the device records passes of the draft, which takes memory."""

    device_bytes: int | None
    host_bytes: int | None
    shared: bool = False
    replays: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where everything lives. Ledgers are bytes by named part. There is room for `max_sequences` texts at once, each of at most
    `context_rows` rows: prompt, new tokens and tree. `pass_rows` is the most rows of one pass, of all texts together."""

    placement: Placement
    num_slots: int
    max_sequences: int
    context_rows: int
    pass_rows: int
    device_ledger: Mapping[str, int]
    host_ledger: Mapping[str, int]


def plan_memory(
    settings: EngineSettings,
    target: ModelCost,
    draft: ModelCost | None,
    tree_nodes: int,
    num_slots: int | None,
    *,
    max_positions: int,
    budgets: Budgets,
) -> MemoryPlan:
    """For a tree of `tree_nodes` nodes and `num_slots` slots (None: as many as help, of MIN_SLOTS to MAX_AUTO_SLOTS).
    Raises FitError when the budgets cannot hold the slots, one ring of host buffers, or the context asked for."""
    text_tokens = min(max_positions, settings.text_tokens or DEFAULT_TEXT_TOKENS)
    context_rows = settings.max_context or text_tokens + tree_nodes - 1
    if tree_nodes + 1 > context_rows:
        raise FitError(
            f"a tree of {tree_nodes} nodes leaves no room in a context of {context_rows} rows",
            where="--max-context, --tree",
            cure="raise --max-context or take a smaller tree",
        )
    rows = {"max_sequences": settings.max_sequences, "tree_nodes": tree_nodes, "context_rows": context_rows}
    others = device_ledger(target, draft, **rows, pass_rows=0, replays=budgets.replays)
    pass_rows = _pass_rows(settings, target, tree_nodes, context_rows, others, budgets.device_bytes)
    fixed = device_ledger(target, draft, **rows, pass_rows=pass_rows, replays=budgets.replays)
    num_resident, num_slots = _residency(settings, target, fixed, num_slots, budgets)
    resident = spread_evenly(num_resident, target.num_layers)
    ledger = {**fixed, **layers_ledger(target, resident, num_slots)}
    _check_device(ledger, budgets.device_bytes)
    host_bytes = budgets.host_bytes
    if host_bytes is not None and budgets.shared:
        host_bytes = max(host_bytes - sum(ledger.values()), 0)
    placement = _place(target, resident, host_bytes, shared=budgets.shared)
    return MemoryPlan(
        placement=placement,
        num_slots=num_slots,
        max_sequences=settings.max_sequences,
        context_rows=context_rows,
        pass_rows=pass_rows,
        device_ledger=ledger,
        host_ledger=host_ledger(target, placement, shared=budgets.shared),
    )


def device_ledger(
    target: ModelCost,
    draft: ModelCost | None,
    *,
    max_sequences: int,
    tree_nodes: int,
    context_rows: int,
    pass_rows: int,
    replays: bool,
) -> dict[str, int]:
    """Bytes by named part of all that a run keeps on the device but the target's layers. Texts share a pass and draft, draw and
    verify one after another. Activations of a pass are gone when tokens are drawn or verified, and the other way round: one
    memory for both."""
    drawing = block_bytes(tree_nodes, target.vocab_size)
    cache_rows = max_sequences * context_rows
    return {
        "embedding, norm and head": target.outside_bytes,
        "key/value cache": target.kv_bytes_per_row * cache_rows,
        "draft model": draft.outside_bytes + draft.computed_bytes if draft else 0,
        "draft key/value cache": draft.kv_bytes_per_row * cache_rows if draft else 0,
        "draft recordings": recording_bytes(draft, widest_pass(tree_nodes), context_rows) if draft and replays else 0,
        "tree mask": tree_nodes**2,
        "logits and laws": logits_bytes(target, tree_nodes, max_sequences),
        "activations": max(activation_bytes(target, pass_rows, context_rows), drawing) if pass_rows else 0,
    }


def layers_ledger(target: ModelCost, resident: Collection[int], num_slots: int) -> dict[str, int]:
    """Bytes of the target's layers on the device, where `num_slots` is 0 if nothing is streamed. Streamed layers that are not
    stored as they compute are decoded into one scratch."""
    ledger = {
        f"{len(resident)} resident layers": computed_bytes(target, resident),
        f"{num_slots} slots": num_slots * target.slot_bytes,
    }
    if num_slots and target.scratch_bytes:
        ledger["decoded layer"] = target.scratch_bytes
    return ledger


def host_ledger(target: ModelCost, placement: Placement, *, shared: bool) -> dict[str, int]:
    """Bytes of the target's layers on the host; `shared` as in Budgets. A device with memory of its own may pin less than there
    is. Until that is known, the memory of the two largest host layers is such that a ring could take it over."""
    pinned = [layer for layer in placement.host if layer not in placement.pageable]
    ledger = {"pinned layers": stored_bytes(target, pinned)}
    if placement.pageable:
        ledger["pageable layers"] = stored_bytes(target, placement.pageable)
    if placement.through_ring:
        ledger["bounce ring"] = ring_bytes(target)
    elif not shared:
        largest = sorted([target.layers[layer].stored_bytes for layer in placement.host])[-RING_BUFFERS:]
        if (spare_bytes := len(largest) * target.slot_bytes - sum(largest)) > 0:
            ledger["spare for a ring"] = spare_bytes
    return ledger


def ring_bytes(target: ModelCost) -> int:
    """Of the host buffers that layers pass through when the device cannot copy them from where they lie."""
    return RING_BUFFERS * target.slot_bytes


def _pass_rows(
    settings: EngineSettings,
    target: ModelCost,
    tree_nodes: int,
    context_rows: int,
    others: Mapping[str, int],
    budget: int | None,
) -> int:
    """Rows of the largest chunk that takes its share at most, and nothing from what must be there: a chunk is never the
    reason why a budget is refused. There are rows for the trees of all texts, and one more of each."""
    least, most = settings.max_sequences * (tree_nodes + 1), settings.max_sequences * context_rows
    num_resident = min(settings.resident_layers or 0, target.num_layers)
    num_slots = (settings.slots or MIN_SLOTS) if num_resident < target.num_layers else 0
    layers = layers_ledger(target, spread_evenly(num_resident, target.num_layers), num_slots)
    needed = sum(others.values()) + sum(layers.values())
    room = None if budget is None else min(budget // ACTIVATION_SHARE, budget - needed)
    for rows in CHUNK_ROWS:
        if rows >= least and (room is None or activation_bytes(target, rows, context_rows) <= room):
            return min(rows, most)
    return least


def _residency(
    settings: EngineSettings, target: ModelCost, fixed: Mapping[str, int], num_slots: int | None, budgets: Budgets
) -> tuple[int, int]:
    """(resident layers, slots): what the user said, the rest as many residents as the budget leaves room for."""
    layers = target.num_layers
    num_slots = settings.slots or num_slots
    if settings.resident_layers is not None:
        if settings.resident_layers > layers:
            raise FitError(
                f"{settings.resident_layers} resident layers asked for, the model has {layers}",
                where="--resident-layers",
                cure=f"give at most {layers}",
            )
        return settings.resident_layers, (num_slots or MIN_SLOTS) if settings.resident_layers < layers else 0
    if budgets.device_bytes is None:
        return 0, num_slots or MAX_AUTO_SLOTS
    room = budgets.device_bytes - sum(fixed.values())
    if room >= target.computed_bytes:
        return layers, 0
    room -= target.scratch_bytes
    if budgets.shared:
        room -= ring_bytes(target)  # what does not fit comes from disk through the same memory
    num_slots = num_slots or min(max(room // target.slot_bytes, MIN_SLOTS), MAX_AUTO_SLOTS)
    sizes = [layer.computed_bytes for layer in target.layers]
    room = max(room - num_slots * target.slot_bytes, 0)
    num_resident = min(room // min(sizes), layers - 1)  # at most; where layers are equal, just so many
    while sum([sizes[layer] for layer in spread_evenly(num_resident, layers)]) > room:
        num_resident -= 1
    return num_resident, num_slots


def _check_device(ledger: Mapping[str, int], budget: int | None) -> None:
    if budget is not None and sum(ledger.values()) > budget:
        raise FitError(
            ledger_lines(ledger, budget),
            where="--gpu-memory",
            cure=f"allow at least {size_text(sum(ledger.values()))}, or lower --max-context, --tree, --resident-layers",
        )


def _place(target: ModelCost, resident: frozenset[int], budget: int | None, *, shared: bool) -> Placement:
    """Host layers as the budget allows; the others on disk, spread evenly so that reading never pauses."""
    placement = Placement(num_layers=target.num_layers, resident=resident)
    streamed = placement.streamed
    if budget is None or sum(host_ledger(target, placement, shared=shared).values()) <= budget:
        return placement
    room = budget - ring_bytes(target)
    if room < 0:
        raise FitError(
            ledger_lines({f"a ring of {RING_BUFFERS} layers for reading from disk": ring_bytes(target)}, budget),
            where="--host-memory",
            cure=f"allow at least {size_text(ring_bytes(target))}",
        )
    sizes = [target.layers[layer].stored_bytes for layer in streamed]
    excess = sum(sizes) - room
    num_disk = -(-excess // max(sizes))  # at least; where layers are equal, just so many
    while sum([sizes[order] for order in spread_evenly(num_disk, len(sizes))]) < excess:
        num_disk += 1
    chosen = spread_evenly(num_disk, len(sizes))
    disk = frozenset(layer for order, layer in enumerate(streamed) if order in chosen)
    return Placement(num_layers=target.num_layers, resident=resident, disk=disk)
