"""Pure: what a run needs in memory and takes in time, from shapes and rates. Bytes and seconds; no device is asked."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Bytes of one model in the dtype it runs in."""

    num_layers: int
    layer_bytes: int
    shared_bytes: int
    kv_bytes_per_row: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int


def kv_bytes_per_row(num_layers: int, num_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Keys and values of one token: 327,680 bytes for Llama-2-70B in float16."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype_bytes


def layer_flops(model: ModelCost, rows: int) -> float:
    """Multiplications and additions of one layer's matrices: two per weight and row."""
    return 2.0 * rows * model.layer_bytes / model.dtype_bytes


def attention_flops(model: ModelCost, rows: int, context_rows: int) -> float:
    """Of scores and their weighted sums in one layer, over cached and new rows."""
    return 4.0 * rows * (rows + context_rows) * model.num_heads * model.head_dim


def activation_bytes(model: ModelCost, rows: int, context_rows: int) -> int:
    """Working memory of one pass over `rows` rows that sees `context_rows` rows at most, its own among them: the widest of
    three moments of a layer. Besides what each names, the mask, the embedded tokens and the layer's input are alive."""
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    kv_heads = model.kv_bytes_per_row // (2 * model.num_layers * model.dtype_bytes)
    # Normed input; queries, keys, values; queries times cosine, turned by half, and that times sine.
    rotation = rows * (3 * hidden + 4 * heads + 2 * kv_heads)
    # Normed input; queries and output; keys and values repeated for all heads; the mask as kernels want it: additive, padded.
    attention = rows * (3 * hidden + 2 * heads + 2 * context_rows) + 2 * context_rows * heads
    # Residual and normed input; gate, up, and their product.
    mlp = rows * (4 * hidden + 3 * model.intermediate_size)
    tables = 2 * rows * model.head_dim
    return rows * context_rows + (max(rotation, attention, mlp) + tables) * model.dtype_bytes


def logits_bytes(model: ModelCost, tree_nodes: int) -> int:
    """Of the tree's rows: logits in the model's dtype, and in float32 the draft's laws and the residual laws."""
    return tree_nodes * model.vocab_size * (model.dtype_bytes + 8)


def recording_bytes(model: ModelCost, rows: int, context_rows: int) -> int:
    """Of passes of fixed shapes of at most `rows` rows: mask and logits of the widest, and the working memory of recordings,
    which is theirs alone. It comes in pieces that a later, larger need cannot join: those of activations and of logits, and as
    much again for narrower passes that were recorded before."""
    logits = rows * model.vocab_size * model.dtype_bytes
    inputs = rows * (3 * 8 + context_rows)
    return inputs + logits + 2 * (activation_bytes(model, rows, context_rows) + logits)


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
