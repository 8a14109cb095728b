"""Pure: which layer goes to which slot, and when. A schedule is a tuple of steps that can be printed.

The streamed layers form a cycle that runs on across passes: fetch number f brings layer streamed[f mod n] into slot f mod S.
As soon as a slot's layer has been used, the slot takes the layer S fetches ahead, which at the end of a pass belongs to the
next one. So the link works while the round's end (verification, drafting) computes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy `layer` into `slot`, once the slot's last user is done."""

    layer: int
    slot: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Use `layer`, from `slot`, or where it lies (None) when it is resident."""

    layer: int
    slot: int | None


Step = Fetch | Compute


def first_fetches(streamed: tuple[int, ...], num_slots: int) -> tuple[Fetch, ...]:
    """Fill the slots before the first pass."""
    return tuple(Fetch(streamed[fetch % len(streamed)], fetch) for fetch in range(num_slots if streamed else 0))


def pass_steps(num_layers: int, streamed: tuple[int, ...], num_slots: int, pass_number: int) -> tuple[Step, ...]:
    """All steps of pass `pass_number` (0, 1, ...): every layer computed in order, and as many fetches as streamed layers.

    The steps depend on `pass_number` only through the slot that the cycle has reached, so they repeat with a period of at
    most `num_slots` passes.
    """
    steps: list[Step] = []
    use = pass_number * len(streamed)
    slots = {layer: (use + order) % num_slots for order, layer in enumerate(streamed)}
    for layer in range(num_layers):
        slot = slots.get(layer)
        steps.append(Compute(layer, slot))
        if slot is not None:
            steps.append(Fetch(streamed[(use + num_slots) % len(streamed)], slot))
            use += 1
    return tuple(steps)
