"""Pure: what a run needs in memory and takes in time, from shapes and rates. Bytes and seconds; no device is asked."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..coding.workspace import WORKSPACE_BYTES

GIB = 2**30
# A decoder takes at most 32 bytes for each weight of the one parameter that it works on, and no parameter has much more than a
# third of a layer's. Of large ones it makes pieces.
WORKSPACE_BYTES_PER_PARAMETER = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One decoder layer. `stored_bytes` is what link, host and disk hold of it. `computed_bytes` is what its parameters take
    on the device: a resident layer takes as much, unless it stays coded, as it is stored. `scratch_bytes` is what the device
    needs to decode it while it runs, 0 where it is stored as it computes. `base_bytes` is what stays on the device of it
    while the rest comes and goes, 0 without a base; a layer that is resident as it computes needs none of that. Every row of a
    pass is multiplied with `num_parameters` numbers."""

    stored_bytes: int
    computed_bytes: int
    num_parameters: int
    kv_bytes_per_row: int
    scratch_bytes: int = 0
    base_bytes: int = 0

    @property
    def is_decoded(self) -> bool:
        return self.scratch_bytes > 0


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Sizes of one model in the dtype it runs in. Layers that are equal are one object, in each of their places.
    `outside_bytes` is what lies outside the layers: embedding, norm, head. `num_masks` is how many kinds of layers there are by
    what their attention sees: all, or a window. `weights` is what people call how they are stored: "float16", "FP8".
    `is_base`: it is the draft that the base of a target's layers is. They are on the device for the target, too, and where a
    layer of the target is resident as it computes, that one serves in its place.
    Without slots: a search asks for the same sums thousands of times."""

    layers: tuple[LayerCost, ...]
    outside_bytes: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int
    num_masks: int = 1
    weights: str = ""
    is_base: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def common_layer(self) -> LayerCost:
        """The kind of layer that there are most of. Times of a layer are times of this one."""
        return Counter(self.layers).most_common(1)[0][0]

    @cached_property
    def equivalent_layers(self) -> float:
        """How many layers of the common kind take as long to compute as all that there are."""
        return sum([layer.num_parameters for layer in self.layers]) / self.common_layer.num_parameters

    @cached_property
    def stored_bytes(self) -> int:
        """Of all layers, on disk or in host memory."""
        return sum([layer.stored_bytes for layer in self.layers])

    @cached_property
    def computed_bytes(self) -> int:
        """Of all layers, on the device."""
        return sum([layer.computed_bytes for layer in self.layers])

    @cached_property
    def base_bytes(self) -> int:
        """Of the base of all layers."""
        return sum([layer.base_bytes for layer in self.layers])

    @cached_property
    def slot_bytes(self) -> int:
        """Of a buffer that any layer fits in, on its way: the largest stored layer."""
        return max([layer.stored_bytes for layer in self.layers])

    @property
    def is_decoded(self) -> bool:
        """Whether any layer is stored otherwise than it computes."""
        return self.scratch_bytes > 0

    @cached_property
    def scratch_bytes(self) -> int:
        """Of the device memory in which layers are decoded in a pass, one at a time."""
        return max([layer.scratch_bytes for layer in self.layers])

    @cached_property
    def workspace_bytes(self) -> int:
        """What a decoder takes besides while it runs."""
        num_parameters = max([layer.num_parameters for layer in self.layers if layer.is_decoded], default=0)
        return min(WORKSPACE_BYTES, WORKSPACE_BYTES_PER_PARAMETER * num_parameters)

    @cached_property
    def largest_kv_bytes_per_row(self) -> int:
        """Keys and values of one token in the layer that has most of them."""
        return max([layer.kv_bytes_per_row for layer in self.layers])

    @cached_property
    def kv_bytes_per_row(self) -> int:
        """Keys and values of one token in all layers: 327,680 bytes for Llama-2-70B in float16."""
        return sum([layer.kv_bytes_per_row for layer in self.layers])


def stored_bytes(model: ModelCost, layers: Iterable[int]) -> int:
    """Of some layers, by number, on link, host and disk."""
    return sum([model.layers[layer].stored_bytes for layer in layers])


def computed_bytes(model: ModelCost, layers: Iterable[int]) -> int:
    """Of the parameters of some layers, by number, on the device."""
    return sum([model.layers[layer].computed_bytes for layer in layers])


def base_bytes(model: ModelCost, layers: Iterable[int]) -> int:
    """Of the base of some layers, by number, on the device."""
    return sum([model.layers[layer].base_bytes for layer in layers])


def kv_bytes_per_row(num_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Keys and values of one token in one layer."""
    return 2 * num_kv_heads * head_dim * dtype_bytes


def layer_flops(layer: LayerCost, rows: int) -> float:
    """Multiplications and additions of one layer's matrices: two per parameter and row."""
    return 2.0 * rows * layer.num_parameters


def attention_flops(model: ModelCost, rows: int, context_rows: int) -> float:
    """Of scores and their weighted sums in one layer, over cached and new rows."""
    return 4.0 * rows * (rows + context_rows) * model.num_heads * model.head_dim


def activation_bytes(model: ModelCost, rows: int, context_rows: int) -> int:
    """Working memory of one pass over `rows` rows that sees `context_rows` rows at most, its own among them: the widest of
    three moments of a layer. Besides what each names, the masks, the embedded tokens and the layer's input are alive."""
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    kv_heads = model.largest_kv_bytes_per_row // (2 * model.dtype_bytes)  # times their size
    # Normed input; queries, keys, values; queries times cosine, turned by half, and that times sine.
    rotation = rows * (3 * hidden + 4 * heads + 2 * kv_heads)
    # Normed input; queries and output; keys and values repeated for all heads; the mask as kernels want it: additive, padded.
    attention = rows * (3 * hidden + 2 * heads + 2 * context_rows) + 2 * context_rows * heads
    # Residual and normed input; gate, up, and their product.
    mlp = rows * (4 * hidden + 3 * model.intermediate_size)
    tables = 2 * rows * model.head_dim
    masks = model.num_masks * rows * context_rows
    return masks + (max(rotation, attention, mlp) + tables) * model.dtype_bytes


def logits_bytes(model: ModelCost, tree_nodes: int, num_texts: int = 1) -> int:
    """Of a tree of each text: logits in the model's dtype, and the draft's probabilities in float32. Of one text at a time:
    what verification makes of them, in float32."""
    numbers = tree_nodes * model.vocab_size
    return num_texts * numbers * (model.dtype_bytes + 4) + numbers * 4


def recording_bytes(model: ModelCost, rows: int, context_rows: int) -> int:
    """Of passes of fixed shapes of at most `rows` rows: mask and logits of the widest, and the working memory of recordings,
    which is theirs alone. It comes in pieces that a later, larger need cannot join: those of activations and of logits, and as
    much again for narrower passes that were recorded before."""
    logits = rows * model.vocab_size * model.dtype_bytes
    inputs = rows * (4 * 8 + model.num_masks * context_rows)
    return inputs + logits + 2 * (activation_bytes(model, rows, context_rows) + logits)


def base_draft(model: ModelCost) -> ModelCost:
    """The draft that the base of a model, which has one, is: as many numbers in fewer bytes, and embedding and head are the
    model's own."""
    layers = {
        layer: replace(layer, stored_bytes=layer.base_bytes, computed_bytes=layer.base_bytes, scratch_bytes=0, base_bytes=0)
        for layer in set(model.layers)
    }
    return replace(model, layers=tuple([layers[layer] for layer in model.layers]), outside_bytes=0, is_base=True)


def ledger_lines(ledger: Mapping[str, int], budget_bytes: int) -> str:
    """The sum that shows why something does not fit: `embedding and head 1.00 + 2 slots 3.19 + ... = 7.30 GiB > 6.00 GiB`.
    In one unit, in which the sum is not all zeros."""
    total_bytes = sum(ledger.values())
    unit, unit_bytes = ("GiB", GIB) if total_bytes >= GIB // 10 else ("KiB", 2**10)
    parts = " + ".join(f"{name} {num_bytes / unit_bytes:.3f}" for name, num_bytes in ledger.items() if num_bytes)
    return f"{parts} = {total_bytes / unit_bytes:.3f} {unit} > {budget_bytes / unit_bytes:.3f} {unit}"


def size_text(num_bytes: int) -> str:
    """As a flag takes it, rounded up."""
    return f"{-(-num_bytes // 2**20)}MiB"
