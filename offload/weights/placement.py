"""Which layer lives where: on the device, in host memory, or on disk. What the device cannot copy at its full rate goes through
a ring of host buffers. Numbers only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RING_BUFFERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which of `num_layers` layers live where. The rest is in host memory, `pageable` those of it that the device would not
    pin. `coded` are resident layers that lie on the device as they are stored, and are decoded in every pass. `borrowed`,
    {borrower: owner}: layers in host memory that have none of their own, as their bytes are the owner's."""

    num_layers: int
    resident: frozenset[int]
    coded: frozenset[int] = frozenset()
    disk: frozenset[int] = frozenset()
    pageable: frozenset[int] = frozenset()
    borrowed: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        layers = frozenset(range(self.num_layers))
        assert self.resident <= layers and self.disk <= layers and not self.resident & self.disk
        assert self.coded <= self.resident
        assert self.pageable <= layers - self.resident - self.disk

    @property
    def streamed(self) -> tuple[int, ...]:
        return tuple([layer for layer in range(self.num_layers) if layer not in self.resident])

    @property
    def decoded(self) -> tuple[int, ...]:
        """In every pass, if they are not stored as they compute."""
        return tuple([layer for layer in range(self.num_layers) if layer in self.coded or layer not in self.resident])

    @property
    def host(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.streamed if layer not in self.disk)

    @property
    def host_owners(self) -> tuple[int, ...]:
        """The layers that have host memory of their own."""
        return tuple(layer for layer in self.host if layer not in self.borrowed)

    @property
    def through_ring(self) -> tuple[int, ...]:
        """In the order in which a pass streams them."""
        return tuple(sorted(self.disk | self.pageable))


def spread_evenly(num_chosen: int, num_layers: int) -> frozenset[int]:
    """`num_chosen` of `num_layers` layers, as far from each other as can be, so that neither the link waits for a run of
    resident layers to compute, nor compute for a run of layers that take long to come."""
    assert 0 <= num_chosen <= num_layers
    return frozenset([-(-part * num_layers // num_chosen) - 1 for part in range(1, num_chosen + 1)])  # the last of equal parts


def shared_out(num_steps: int, layers: Sequence[int]) -> dict[int, int]:
    """How many of `num_steps` steps of other work are done before each of these layers: as evenly as can be. None where there
    are no layers."""
    if not layers:
        return {}
    whole, rest = divmod(num_steps, len(layers))
    more = spread_evenly(rest, len(layers)) if rest else frozenset()
    return {layer: whole + (order in more) for order, layer in enumerate(layers)}


def spread_order(num_layers: int) -> tuple[int, ...]:
    """All layers, in an order of which every end is spread about evenly: layers that differ in their last bit lie far apart.
    What is pinned of layers in this order, and what is not, can then be any number of them."""
    num_bits = (num_layers - 1).bit_length()
    return tuple(sorted(range(num_layers), key=lambda layer: int(f"{layer:0{num_bits}b}"[::-1], 2)))
