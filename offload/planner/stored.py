"""Pure: what is stored of a model's layers, where that is not what they compute with. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]

ALIGNMENT_BYTES = 256  # as weights/layout.py, which imports torch; a test holds both to the same sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a model's weights are stored. `name` is what people call it. `layers` has, for each decoder layer, the bytes in a
    slot of those parameters that are packed or coded, by name; the others are stored as they compute. `is_estimated`: by bits
    per weight, and not as files have it."""

    name: str
    layers: tuple[Mapping[str, int], ...] = field(hash=False)
    is_estimated: bool = True


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def aligned_bytes(sizes: Iterable[int], itemsize: int) -> int:
    """Of tensors of so many elements, one after another."""
    return sum(aligned(size * itemsize) for size in sizes)


def by_bits(name: str, tensors: Shapes, num_layers: int, bits: float) -> Stored:
    """Of equal layers of `tensors`, {name: shape}, whose matrices take `bits` a weight, all that belongs to them included."""
    layer = {tensor: matrix_bytes(shape, bits) for tensor, shape in tensors.items() if len(shape) == 2}
    return Stored(name=name, layers=(layer,) * num_layers)


def matrix_bytes(shape: tuple[int, ...], bits: float) -> int:
    rows, columns = shape
    return aligned(round(rows * columns * bits / 8))
