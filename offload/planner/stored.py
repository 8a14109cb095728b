"""Pure: what is stored of a model's layers, where that is not what they compute with. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..coding.base_kinds import BaseKind

Shapes = Mapping[str, tuple[int, ...]]

ALIGNMENT_BYTES = 256  # as weights/layout.py, which imports torch; a test holds both to the same sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a model's weights are stored. `name` is what people call it. `layers` has, for each decoder layer, the bytes in a
    slot of those parameters that are packed or coded, by name; the others are stored as they compute. `bases` has the bytes on
    the device of those that have a base, and is empty without one; `base` is its kind. `codec`, of 16-bit weights that are
    coded: which, as `--codec` calls it. `is_estimated`: by bits per weight, and not as files have it."""

    name: str
    layers: tuple[Mapping[str, int], ...] = field(hash=False)
    bases: tuple[Mapping[str, int], ...] = field(default=(), hash=False)
    base: str = ""
    codec: str = ""
    is_estimated: bool = True

    def sizes(self, parameters: Mapping[str, int], layer: int, itemsize: int) -> tuple[int, int]:
        """(bytes in a slot, bytes of its base) of a layer with so many elements of its `parameters`. What has no base lies
        beside it as it is, and does not travel with what is coded beside one."""
        packed, bases = self.layers[layer], self.bases[layer] if self.bases else {}
        beside = bool(bases) and bool(packed) and self.codec == "residual"
        travel = [size for name, size in parameters.items() if name not in packed and (not beside or name in bases)]
        kept = [size for name, size in parameters.items() if name not in bases] if bases else []
        base_bytes = sum(bases.values()) + aligned_bytes(kept, itemsize)
        return sum(packed.values()) + aligned_bytes(travel, itemsize), base_bytes


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def aligned_bytes(sizes: Iterable[int], itemsize: int) -> int:
    """Of tensors of so many elements, one after another."""
    return sum(aligned(size * itemsize) for size in sizes)


def by_bits(name: str, tensors: Shapes, num_layers: int, bits: float, codec: str = "") -> Stored:
    """Of equal layers of `tensors`, {name: shape}, whose matrices take `bits` a weight, all that belongs to them included."""
    layer = {tensor: matrix_bytes(shape, bits) for tensor, shape in tensors.items() if len(shape) == 2}
    return Stored(name=name, layers=(layer,) * num_layers, codec=codec)


def beside_base(stored: Stored, tensors: Shapes, kind: BaseKind) -> Stored:
    """The same with a base of the matrices of its layers, which are equal, of `tensors`, {name: shape}."""
    layer = {tensor: base_bytes(shape, kind) for tensor, shape in tensors.items() if len(shape) == 2}
    return replace(stored, bases=(layer,) * len(stored.layers), base=kind.name)


def base_bytes(shape: tuple[int, ...], kind: BaseKind) -> int:
    """Of a matrix: codes, scales and zero points, as coding/base_layout.py lays them out."""
    rows, columns = shape
    num_groups = rows * -(-columns // kind.group)
    return aligned(rows * -(-columns * kind.bits // 8)) + aligned(2 * num_groups) + aligned(num_groups)


def matrix_bytes(shape: tuple[int, ...], bits: float) -> int:
    rows, columns = shape
    return aligned(round(rows * columns * bits / 8))
