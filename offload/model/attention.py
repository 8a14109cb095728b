"""Attention over cached rows and a tree, registered with transformers' attention interface, and the masks it takes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ModelError
from .transformers_api import carried, register_attention

ATTENTION = "treestream"
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias")  # what some models pass to attention besides queries, keys, values


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One sequence in a pass: its rows of the pass, the rows of the cache that it may look at, and which row looks where."""

    rows: slice
    keys: slice
    mask: torch.Tensor  # [1, 1, n, T] bool, True where a row may look


# Of a pass: the blocks of its sequences, by the window of a layer's attention (None: it has none).
Masks = Mapping[int | None, tuple[Block, ...]]


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Sequence by sequence, so that no row sees another sequence. Returns [1, N, H, C].

    query: [1, H, N, C], the rows of the pass. key, value: [1, K, rows, C], all rows of the cache.
    attention_mask: carries the `Masks` of the pass. sliding_window: the layer's own.

    ModelError for an architecture that asks for more than this, or does not hand the mask on.
    """
    if unknown := [name for name in _NOT_COMPUTED if others.get(name) is not None]:
        raise _not_computed(module, f"uses {unknown[0]}, which would be left out")
    masks: Masks | None = carried(attention_mask)
    if masks is None:
        raise _not_computed(module, "is not given the mask of the pass")
    try:
        blocks = masks[sliding_window]
    except KeyError:
        raise _not_computed(module, f"has a window of {sliding_window}, unlike when the model was looked at") from None
    outputs: list[torch.Tensor] = []  # [1, H, n, C] each
    for block in blocks:
        rows, keys = query[:, :, block.rows] if len(blocks) > 1 else query, block.keys
        outputs.append(_attend(rows, key[:, :, keys], value[:, :, keys], block.mask, scaling))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)  # [1, H, N, C]
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[1, H, n, C] of queries [1, H, n, C] over keys and values [1, K, T, C] under `mask` [1, 1, n, T].

    Keys and values are repeated for grouped queries: with a mask, the memory-efficient CUDA kernels take equal head counts
    only, and the fallback would materialise H x n x T scores.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # [1, H, T, C]
    with _no_cudnn():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _not_computed(module: torch.nn.Module, what: str) -> ModelError:
    return ModelError(
        f"this architecture's attention {what}",
        where=type(module).__name__,
        cure="use a dense decoder such as Llama, Mistral, Qwen2 or Qwen3",
    )


@contextmanager
def _no_cudnn() -> Iterator[None]:
    """Without cuDNN's attention, which comes first on some GPUs and is built anew for every length of the text: in every pass.
    The switch is the whole process's, and others in it may want that kernel, so it is put back."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def register() -> None:
    register_attention(ATTENTION, tree_attention)


def pass_mask(cached_rows: int, causal_rows: int, tree_mask: torch.Tensor) -> torch.Tensor:
    """Who sees whom in one pass: [1, 1, causal_rows + N, cached_rows + causal_rows + N] bool.

    Columns are the cached rows, then the rows of this pass. Rows are `causal_rows` committed tokens, then N nodes whose
    own part is `tree_mask` ([N, M] bool with M >= N; the M - N leading columns are the last of the cached rows):

                    cached      | earlier nodes | causal        | nodes
        causal rows    1              1            lower triangle    0
        nodes          1        tree_mask ......        1        tree_mask
    """
    nodes, columns = tree_mask.shape
    earlier = columns - nodes
    assert earlier <= cached_rows and not (earlier and causal_rows)
    rows = causal_rows + nodes
    mask = torch.ones(rows, cached_rows + rows, dtype=torch.bool, device=tree_mask.device)
    mask[:causal_rows, cached_rows:] = torch.ones_like(mask[:causal_rows, cached_rows:]).tril()
    mask[causal_rows:, cached_rows - earlier : cached_rows] = tree_mask[:, :earlier]
    mask[causal_rows:, cached_rows + causal_rows :] = tree_mask[:, earlier:]
    return mask[None, None]


def window_mask(mask: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor, window: int) -> torch.Tensor:
    """`mask` [1, 1, N, T] less what lies `window` positions or more before a row, [1, 1, N, T]: a window counts the row itself.

    Rows are at `positions` [N], columns at `key_positions` [T]: siblings stand at the same position, whatever their rows.
    """
    near = key_positions > (positions - window)[:, None]  # [N, T]
    return near[None, None].logical_and_(mask)
