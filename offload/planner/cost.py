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
    """Working memory of one pass over `rows` rows: the widest moment of a layer (residual, normed input, gate, up and their
    product; or queries, keys, values and scores' mask), and float32 logits. An upper estimate."""
    per_row = (4 * model.hidden_size + 3 * model.intermediate_size) * model.dtype_bytes
    mask = (rows + context_rows) * (1 + model.dtype_bytes)  # bool, and the additive form that attention kernels make of it
    return rows * (per_row + mask)


def logits_bytes(model: ModelCost, tree_nodes: int) -> int:
    """Logits of the tree's rows in the model's dtype, in float32, and one float32 law each."""
    return tree_nodes * model.vocab_size * (model.dtype_bytes + 8)


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


def stream_s(bytes_per_pass: int, link_bytes_per_s: float, disk_bytes: int, disk_bytes_per_s: float | None) -> float:
    """Seconds that weights take to arrive in one pass: the link carries all of them, the disk feeds its part of them."""
    disk_s = disk_bytes / disk_bytes_per_s if disk_bytes and disk_bytes_per_s else 0.0
    return max(bytes_per_pass / link_bytes_per_s, disk_s)
