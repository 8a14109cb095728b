"""Which layer lives where: on the device, in host memory, or on disk behind a ring of host buffers. Numbers only."""

from dataclasses import dataclass

RING_BUFFERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which of `num_layers` layers live where. The rest is in host memory."""

    num_layers: int
    resident: frozenset[int]
    disk: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        layers = frozenset(range(self.num_layers))
        assert self.resident <= layers and self.disk <= layers and not self.resident & self.disk

    @property
    def streamed(self) -> tuple[int, ...]:
        return tuple([layer for layer in range(self.num_layers) if layer not in self.resident])

    @property
    def host(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.streamed if layer not in self.disk)
