"""Pure: which type llama.cpp gives to each matrix of a layer in the mixtures that people name, such as Q4_K_M.

Source: llama_tensor_get_type in llama.cpp's src/llama-quant.cpp, without an importance matrix, for the dense families that
planning knows; facts, none of its code. Published files of Llama 3.1 8B and 70B have the sizes that follow from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..coding.gguf_types import BLOCKS
from .stored import Shapes, Stored, aligned


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a matrix: the number of its layer, of how many, and how many query heads share a key/value head."""

    layer: int
    num_layers: int
    sharing: int


Rule = tuple[Callable[[_Place], bool], str]  # where it holds, and the type there


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixture:
    """The first rule of a matrix that holds says its type; `base` where none does."""

    base: str
    value: tuple[Rule, ...] = ()
    down: tuple[Rule, ...] = ()
    output: tuple[Rule, ...] = ()


def _everywhere(place: _Place) -> bool:
    return True


def _where_heads_share(place: _Place) -> bool:
    return place.sharing >= 4


def _more_bits(place: _Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = place.num_layers // 8
    return place.layer < eighth or place.layer >= 7 * place.num_layers // 8 or (place.layer - eighth) % 3 == 2


def _first(share: int) -> Callable[[_Place], bool]:
    return lambda place: place.layer < place.num_layers // share


def _before(layer: int) -> Callable[[_Place], bool]:
    return lambda place: place.layer < layer


_MIXTURES = {
    "Q2_K": _Mixture(
        base="Q2_K",
        value=((_where_heads_share, "Q4_K"), (_everywhere, "Q3_K")),
        down=((_everywhere, "Q3_K"),),
        output=((_everywhere, "Q3_K"),),
    ),
    "Q3_K_S": _Mixture(base="Q3_K"),
    "Q3_K_M": _Mixture(
        base="Q3_K",
        value=((_before(2), "Q5_K"), (_everywhere, "Q4_K")),
        down=((_first(16), "Q5_K"), (_everywhere, "Q4_K")),
        output=((_everywhere, "Q4_K"),),
    ),
    "Q3_K_L": _Mixture(
        base="Q3_K", value=((_everywhere, "Q5_K"),), down=((_everywhere, "Q5_K"),), output=((_everywhere, "Q5_K"),)
    ),
    "Q4_K_S": _Mixture(base="Q4_K", value=((_before(4), "Q5_K"),), down=((_first(8), "Q5_K"),)),
    "Q4_K_M": _Mixture(base="Q4_K", value=((_more_bits, "Q6_K"),), down=((_more_bits, "Q6_K"),)),
    "Q5_K_S": _Mixture(base="Q5_K"),
    "Q5_K_M": _Mixture(base="Q5_K", value=((_more_bits, "Q6_K"),), down=((_more_bits, "Q6_K"),)),
    "IQ4_NL": _Mixture(base="IQ4_NL", value=((_where_heads_share, "Q5_K"),), down=((_first(8), "Q5_K"),)),
    "IQ4_XS": _Mixture(base="IQ4_XS", value=((_where_heads_share, "Q5_K"),), down=((_first(8), "Q5_K"),)),
    **{name: _Mixture(base=name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q8_0")},
}
MIXTURES = tuple(_MIXTURES)

_RULED = {"self_attn.v_proj.weight": "value", "mlp.down_proj.weight": "down", "self_attn.o_proj.weight": "output"}
# Of matrices whose rows blocks of 256 weights do not make up.
_NARROW = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYERS_OF_70B = 80  # whose values get a bit more, as eight heads share them


def gguf_stored(mixture: str, tensors: Shapes, num_layers: int, sharing: int) -> Stored:
    """Of equal layers of `tensors`, {name: shape}, in one of MIXTURES; `sharing` query heads have one key/value head."""
    layers = [
        {
            name: _bytes(shape, _type_of(mixture, name, _Place(layer, num_layers, sharing)))
            for name, shape in tensors.items()
            if len(shape) == 2
        }
        for layer in range(num_layers)
    ]
    return Stored(name=f"GGUF {mixture}", layers=tuple(layers))


def _type_of(mixture: str, name: str, place: _Place) -> str:
    made = _MIXTURES[mixture]
    rules: tuple[Rule, ...] = getattr(made, _RULED[name]) if name in _RULED else ()
    found = next((kind for holds, kind in rules if holds(place)), made.base)
    is_70b = place.num_layers == _LAYERS_OF_70B and place.sharing > 1
    if is_70b and name == "self_attn.v_proj.weight" and found in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return found


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    rows, columns = shape
    if columns % BLOCKS[kind].num_weights:
        kind = _NARROW.get(kind, kind)
    if columns % BLOCKS[kind].num_weights:
        kind = "F16"
    block = BLOCKS[kind]
    return aligned(rows * columns // block.num_weights * block.num_bytes)
