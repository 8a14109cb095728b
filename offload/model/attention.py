"""Attention over a cached prefix and a tree, registered with transformers' attention interface, and the masks it takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ..errors import ModelError
from .transformers_api import register_attention

ATTENTION = "treestream"
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias")  # what some models pass to attention besides queries, keys, values


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, C], key and value [1, K, T, C], attention_mask [1, 1, N, T] bool, True where a row may look.

    Keys and values are repeated for grouped queries: with a mask, the memory-efficient CUDA kernels take equal head counts
    only, and the fallback would materialise H x N x T scores. Returns [1, N, H, C]. ModelError for an architecture that
    asks for more than this.
    """
    unknown = [name for name in _NOT_COMPUTED if others.get(name) is not None]
    if unknown:
        raise ModelError(
            f"this architecture's attention uses {unknown[0]}, which would be left out",
            where=type(module).__name__,
            cure="use a dense decoder such as Llama, Mistral, Qwen2 or Qwen3",
        )
    assert attention_mask is not None and attention_mask.dtype == torch.bool
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    with _no_cudnn():
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


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
