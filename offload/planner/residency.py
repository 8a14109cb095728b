"""Pure: which of the target's layers stay on the device, as what, and what they take beside those that are streamed."""

from collections.abc import Collection
from dataclasses import dataclass

from ..config import EngineSettings
from ..errors import FitError
from ..weights.placement import RING_BUFFERS, spread_evenly
from .cost import ModelCost, base_bytes, computed_bytes, stored_bytes

MIN_SLOTS, MAX_AUTO_SLOTS = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """`coded` are those of the `resident` layers that lie there as they are stored, and are decoded in every pass. `num_slots`
    is 0 if nothing is streamed."""

    resident: frozenset[int]
    coded: frozenset[int] = frozenset()
    num_slots: int


def layers_ledger(target: ModelCost, resident: Collection[int], num_slots: int, coded: Collection[int] = ()) -> dict[str, int]:
    """Bytes of the target's layers on the device; arguments as in Residency. All that passes decode goes into one scratch. The
    base is there of every layer that does not lie there as it computes."""
    raw = [layer for layer in resident if layer not in coded]
    ledger = {f"{len(raw)} resident layers": computed_bytes(target, raw)}
    if target.base_bytes and (others := set(range(target.num_layers)).difference(raw)):
        ledger[f"base of {len(others)} layers"] = base_bytes(target, others)
    if coded:
        ledger[f"{len(coded)} coded resident layers"] = stored_bytes(target, coded)
    ledger[f"{num_slots} slots"] = num_slots * target.slot_bytes
    if target.is_decoded and (num_slots or coded):
        ledger["decoded layer"] = target.scratch_bytes
        ledger["decoder's workspace"] = target.workspace_bytes
    return ledger


def residency(
    settings: EngineSettings, target: ModelCost, room: int | None, num_slots: int | None, *, shared: bool, coded: bool
) -> Residency:
    """What the user said; for the rest, as many residents as there is `room` for, in bytes. None is unbounded: then nobody said
    how much there is, and nothing is resident. `num_slots` None: as many as help. `shared` as in Budgets. `coded`: residents
    stay as they are stored, so that there are more of them; where all are, as many as have room are decoded for good."""
    num_layers, num_slots = target.num_layers, settings.slots or num_slots
    coded = coded and target.is_decoded and room is not None
    if settings.resident_layers is not None:
        if settings.resident_layers > num_layers:
            raise FitError(
                f"{settings.resident_layers} resident layers asked for, the model has {num_layers}",
                where="--resident-layers",
                cure=f"give at most {num_layers}",
            )
        if settings.resident_layers < num_layers:
            resident = spread_evenly(settings.resident_layers, num_layers)
            return Residency(resident=resident, coded=_decoded(target, resident, coded), num_slots=num_slots or MIN_SLOTS)
    elif room is None:
        return Residency(resident=frozenset(), num_slots=num_slots or MAX_AUTO_SLOTS)
    everything = frozenset(range(num_layers))
    if room is None or room >= target.computed_bytes or (settings.resident_layers == num_layers and not coded):
        return Residency(resident=everything, num_slots=0)
    room -= target.scratch_bytes + target.workspace_bytes + target.base_bytes
    if coded and (room >= target.stored_bytes or settings.resident_layers == num_layers):
        more = [layer.computed_bytes - layer.stored_bytes - layer.base_bytes for layer in target.layers]
        raw = _most(room - target.stored_bytes, more)
        return Residency(resident=everything, coded=_decoded(target, everything - raw, coded), num_slots=0)
    if shared:
        room -= RING_BUFFERS * target.slot_bytes  # what does not fit comes from disk through the same memory
    num_slots = num_slots or min(max(room // target.slot_bytes, MIN_SLOTS), MAX_AUTO_SLOTS)
    sizes = [layer.stored_bytes if coded else layer.computed_bytes - layer.base_bytes for layer in target.layers]
    resident = _most(room - num_slots * target.slot_bytes, sizes)
    return Residency(resident=resident, coded=_decoded(target, resident, coded), num_slots=num_slots)


def _decoded(target: ModelCost, layers: Collection[int], coded: bool) -> frozenset[int]:
    return frozenset([layer for layer in layers if target.layers[layer].is_decoded]) if coded else frozenset()


def _most(room: int, sizes: list[int]) -> frozenset[int]:
    """As many layers of those `sizes` as there is room for, but not all; spread evenly."""
    room, least = max(room, 0), max(min(sizes), 1)
    num_chosen = min(room // least, len(sizes) - 1)  # at most; where layers are equal, just so many
    while sum([sizes[layer] for layer in spread_evenly(num_chosen, len(sizes))]) > room:
        num_chosen -= 1
    return spread_evenly(num_chosen, len(sizes))
