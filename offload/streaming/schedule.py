"""Pure: which layer goes to which slot, and when. A schedule is a tuple of steps that can be printed.

The streamed layers form a cycle that runs on across passes: fetch number f brings layer streamed[f mod n] into slot f mod S.
As soon as a slot's layer has been used, the slot takes the layer S fetches ahead, which at the end of a pass belongs to the
next one. So the link works while the round's end (verification, drafting) computes.

A layer that is not stored as it computes is decoded out of its slot first. The slot is free then, and its next copy is queued
before the layer is computed.
"""

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy `layer` into `slot`, once the slot's last user is done."""

    layer: int
    slot: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Use `layer`, from `slot`, or where its parameters lie (None) when they are resident or were decoded."""

    layer: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class Decode:
    """Make the parameters of `layer` out of what `slot` holds of it, or the device keeps of it (None), in the one scratch
    memory. The slot is free then."""

    layer: int
    slot: int | None


Action = Fetch | Decode | Compute


def first_fetches(streamed: tuple[int, ...], num_slots: int) -> tuple[Fetch, ...]:
    """Fill the slots before the first pass."""
    return tuple(Fetch(streamed[fetch % len(streamed)], fetch) for fetch in range(num_slots if streamed else 0))


def pass_steps(
    num_layers: int, streamed: tuple[int, ...], num_slots: int, pass_number: int, decoded: Set[int] = frozenset()
) -> tuple[Action, ...]:
    """All steps of pass `pass_number` (0, 1, ...): every layer computed in order, and as many fetches as streamed layers.
    Those in `decoded` are decoded first.

    The steps depend on `pass_number` only through the slot that the cycle has reached, so they repeat with a period of at
    most `num_slots` passes.
    """
    steps: list[Action] = []
    use = pass_number * len(streamed)
    slots = {layer: (use + order) % num_slots for order, layer in enumerate(streamed)}
    for layer in range(num_layers):
        slot = slots.get(layer)
        if slot is None:
            steps += (Decode(layer, None), Compute(layer, None)) if layer in decoded else (Compute(layer, None),)
            continue
        fetch = Fetch(streamed[(use + num_slots) % len(streamed)], slot)
        steps += (Decode(layer, slot), fetch, Compute(layer, None)) if layer in decoded else (Compute(layer, slot), fetch)
        use += 1
    return tuple(steps)
