"""Pure: one tensor of the small model into its place in the wide one's. The drawing is in geometry.py."""

from collections.abc import Callable

import torch

from .geometry import Geometry

Place = Callable[[Geometry, torch.Tensor, torch.Tensor], None]


def place(geometry: Geometry, name: str, small: torch.Tensor | None, wide: torch.Tensor, tile: torch.Tensor) -> None:
    """Fill `wide` (any float dtype): what reads the residual stream with values of `tile`, the rest with zeros, gains with
    their scale; then `small` (float32) into its place. None: the layer has no counterpart and writes nothing."""
    parts = name.split(".")
    kind = parts[-2]
    if parts[-1] == "bias":
        assert small is None, "the small model has no biases"
        wide.zero_()
        return
    if kind in _READS:
        _repeat(tile, wide)
    elif kind in _WRITES:
        wide.zero_()
    else:
        wide.fill_(geometry.gain)
    if small is not None:
        (_READS | _WRITES).get(kind, _place_gain)(geometry, small.double(), wide)


def _repeat(tile: torch.Tensor, wide: torch.Tensor) -> None:
    flat = wide.view(-1)
    whole = flat.numel() // tile.numel() * tile.numel()
    flat[:whole].view(-1, tile.numel()).copy_(tile)
    flat[whole:].copy_(tile[: flat.numel() - whole])


def _place_gain(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    num = geometry.small.hidden
    wide[:num] = small * geometry.gain
    wide[num : geometry.copies * num] = 0


def _place_queries(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    heads = tuple(enumerate(geometry.query_heads))
    _place_heads(geometry, heads, small * geometry.query_scale, wide)


def _place_keys_or_values(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    _place_heads(geometry, geometry.kv_heads, small, wide)


def _place_heads(geometry: Geometry, heads: tuple[tuple[int, int], ...], small: torch.Tensor, wide: torch.Tensor) -> None:
    """[heads * head_dim, hidden]. The wide heads' other dimensions are zero: they would add to the scores."""
    small_heads = small.view(-1, geometry.small.head_dim, geometry.small.hidden)
    wide_heads = wide.view(-1, geometry.wide.head_dim, geometry.wide.hidden)
    dims = torch.tensor(geometry.head_dims)
    for head, wide_head in heads:
        wide_heads[wide_head].zero_()
        wide_heads[wide_head, dims, : geometry.small.hidden] = small_heads[head].to(wide.dtype)


def _place_attention_output(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    """[hidden, heads * head_dim]"""
    small_heads = small.view(geometry.small.hidden, -1, geometry.small.head_dim)
    wide_heads = wide.view(geometry.wide.hidden, -1, geometry.wide.head_dim)
    dims = torch.tensor(geometry.head_dims)
    for rows in _copies(geometry):
        for head, wide_head in enumerate(geometry.query_heads):
            wide_heads[rows, wide_head].index_copy_(1, dims, small_heads[:, head].to(wide.dtype))


def _place_block(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    """Neurons, and rows of the vocabulary in the head."""
    wide[: small.shape[0], : small.shape[1]] = small


def _place_mlp_output(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    for rows in _copies(geometry):
        wide[rows, : small.shape[1]] = small


def _place_embedding(geometry: Geometry, small: torch.Tensor, wide: torch.Tensor) -> None:
    for columns in _copies(geometry):
        wide[:, columns] = small


def _copies(geometry: Geometry) -> list[slice]:
    num = geometry.small.hidden
    return [slice(copy * num, (copy + 1) * num) for copy in range(geometry.copies)]


_READS: dict[str, Place] = {
    "q_proj": _place_queries,
    "k_proj": _place_keys_or_values,
    "v_proj": _place_keys_or_values,
    "gate_proj": _place_block,
    "up_proj": _place_block,
    "lm_head": _place_block,
}
_WRITES: dict[str, Place] = {
    "o_proj": _place_attention_output,
    "down_proj": _place_mlp_output,
    "embed_tokens": _place_embedding,
}
