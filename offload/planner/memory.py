"""Pure: what a run keeps where. Every byte on the device and on the host has a name, and the names sum to the budgets.

The tree's size and the number of slots are given; as many layers become resident as the rest leaves room for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tree.blocks import block_bytes

from ..config import EngineSettings
from ..errors import FitError
from ..model.buckets import MAX_ROWS, widest_pass
from ..weights.placement import RING_BUFFERS, Placement, spread_evenly
from .cost import ModelCost, activation_bytes, ledger_lines, logits_bytes, recording_bytes, size_text, stored_bytes
from .residency import MIN_SLOTS, layers_ledger, residency

DEFAULT_TEXT_TOKENS = 4096
# A prompt pass costs a whole stream of the weights, so chunks are as large as activations in this share of memory allow.
ACTIVATION_SHARE = 8
CHUNK_ROWS = (4096, 2048, 1024, 512, 256, 128, 64)
LEAST_AHEAD_ROWS, MOST_AHEAD_ROWS = 256, 512


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
    `context_rows` rows: prompt, new tokens and tree; the draft's cache has `ahead_rows` more for each. `pass_rows` is the most
    rows of one pass, of all texts together."""

    placement: Placement
    num_slots: int
    max_sequences: int
    context_rows: int
    pass_rows: int
    ahead_rows: int = 0
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
    coded: bool = False,
    may_follow: bool = True,
) -> MemoryPlan:
    """For a tree of `tree_nodes` nodes and `num_slots` slots (None: as many as help, of MIN_SLOTS to MAX_AUTO_SLOTS).
    `coded`: resident layers stay as they are stored, as far as there is no room for all that they compute with.
    `may_follow`: trees may be such that follow the text, if the settings have it so, which takes rows of the draft's cache.
    Raises FitError when the budgets cannot hold the slots, one ring of host buffers, or the context asked for."""
    text_tokens = min(max_positions, settings.text_tokens or DEFAULT_TEXT_TOKENS)
    context_rows = settings.max_context or text_tokens + tree_nodes - 1
    if tree_nodes + 1 > context_rows:
        raise FitError(
            f"a tree of {tree_nodes} nodes leaves no room in a context of {context_rows} rows",
            where="--max-context, --tree",
            cure="raise --max-context or take a smaller tree",
        )
    ahead_rows = rows_ahead(settings, tree_nodes) if draft is not None and may_follow else 0
    rows = {"max_sequences": settings.max_sequences, "tree_nodes": tree_nodes, "context_rows": context_rows}
    rows |= {"ahead_rows": ahead_rows}
    others = device_ledger(target, draft, **rows, pass_rows=0, replays=budgets.replays)
    pass_rows = _pass_rows(settings, target, tree_nodes, context_rows, others, budgets.device_bytes, coded)
    fixed = device_ledger(target, draft, **rows, pass_rows=pass_rows, replays=budgets.replays)
    room = None if budgets.device_bytes is None else budgets.device_bytes - sum(fixed.values())
    kept = residency(settings, target, room, num_slots, shared=budgets.shared, coded=coded)
    ledger = {**fixed, **layers_ledger(target, kept.resident, kept.num_slots, kept.coded)}
    _check_device(ledger, budgets.device_bytes)
    host_bytes = budgets.host_bytes
    if host_bytes is not None and budgets.shared:
        host_bytes = max(host_bytes - sum(ledger.values()), 0)
    placement = Placement(num_layers=target.num_layers, resident=kept.resident, coded=kept.coded)
    placement, on_host = _with_disk(target, placement, host_bytes, shared=budgets.shared)
    return MemoryPlan(
        placement=placement,
        num_slots=kept.num_slots,
        max_sequences=settings.max_sequences,
        context_rows=context_rows,
        pass_rows=pass_rows,
        ahead_rows=ahead_rows,
        device_ledger=ledger,
        host_ledger=on_host,
    )


def device_ledger(
    target: ModelCost,
    draft: ModelCost | None,
    *,
    max_sequences: int,
    tree_nodes: int,
    context_rows: int,
    pass_rows: int,
    ahead_rows: int = 0,
    replays: bool,
) -> dict[str, int]:
    """Bytes by named part of all that a run keeps on the device but the target's layers and their base. Texts share a pass and
    draft, draw and verify one after another. Activations of a pass are gone when tokens are drawn or verified, and the other
    way round: one memory for both, unless drafts grow ahead beside a pass, for which there are `ahead_rows`."""
    drawing = block_bytes(tree_nodes, target.vocab_size)
    cache_rows, draft_rows, draft_nodes = max_sequences * context_rows, context_rows + ahead_rows, tree_nodes + ahead_rows
    beside = max(drawing, activation_bytes(draft, min(draft_nodes, MAX_ROWS), draft_rows)) if draft and ahead_rows else 0
    return {
        "embedding, norm and head": target.outside_bytes,
        "key/value cache": target.kv_bytes_per_row * cache_rows,
        "draft model": draft.outside_bytes + draft.computed_bytes if draft and not draft.is_base else 0,
        "draft key/value cache": draft.kv_bytes_per_row * max_sequences * draft_rows if draft else 0,
        "draft recordings": recording_bytes(draft, widest_pass(tree_nodes), draft_rows) if draft and replays else 0,
        "tree mask": (max_sequences + 1) * tree_nodes**2,  # and what one is doubled from
        "draft mask": max_sequences * (draft_nodes + 1) * draft_nodes if draft else 0,
        "logits and laws": logits_bytes(target, tree_nodes, max_sequences),
        "activations": max(activation_bytes(target, pass_rows, context_rows), drawing) if pass_rows else 0,
        "draft activations": beside,
    }


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


def rows_ahead(settings: EngineSettings, tree_nodes: int) -> int:
    """What a draft's cache needs beside the rows of a tree: trees that follow the text run nodes that they do not submit, and
    go on growing while a pass runs. Others do neither."""
    is_dynamic = settings.tree == "auto" or settings.tree.endswith(":dynamic")
    return min(max(2 * tree_nodes, LEAST_AHEAD_ROWS), MOST_AHEAD_ROWS) if is_dynamic and tree_nodes > 1 else 0


def _pass_rows(
    settings: EngineSettings,
    target: ModelCost,
    tree_nodes: int,
    context_rows: int,
    others: Mapping[str, int],
    budget: int | None,
    coded: bool,
) -> int:
    """Rows of the largest chunk that takes its share at most, and nothing from what must be there: a chunk is never the
    reason why a budget is refused. There are rows for the trees of all texts, and one more of each."""
    least, most = settings.max_sequences * (tree_nodes + 1), settings.max_sequences * context_rows
    num_resident = min(settings.resident_layers or 0, target.num_layers)
    num_slots = (settings.slots or MIN_SLOTS) if num_resident < target.num_layers else 0
    resident = spread_evenly(num_resident, target.num_layers)
    layers = layers_ledger(target, resident, num_slots, resident if coded else ())
    needed = sum(others.values()) + sum(layers.values())
    room = None if budget is None else min(budget // ACTIVATION_SHARE, budget - needed)
    for rows in CHUNK_ROWS:
        if rows >= least and (room is None or activation_bytes(target, rows, context_rows) <= room):
            return min(rows, most)
    return least


def _check_device(ledger: Mapping[str, int], budget: int | None) -> None:
    if budget is not None and sum(ledger.values()) > budget:
        raise FitError(
            ledger_lines(ledger, budget),
            where="--gpu-memory",
            cure=f"allow at least {size_text(sum(ledger.values()))}, or lower --max-context, --tree, --resident-layers",
        )


def _with_disk(
    target: ModelCost, placement: Placement, budget: int | None, *, shared: bool
) -> tuple[Placement, dict[str, int]]:
    """Host layers as the budget allows; the others on disk, spread evenly so that reading never pauses. With it the ledger."""
    streamed, ledger = placement.streamed, host_ledger(target, placement, shared=shared)
    if budget is None or sum(ledger.values()) <= budget:
        return placement, ledger
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
    placement = replace(placement, disk=disk)
    return placement, host_ledger(target, placement, shared=shared)
