"""Rows in pieces, so that a decoder stays within WORKSPACE_BYTES, and columns in groups that share a scale."""

from collections.abc import Iterator
from typing import Final

import torch

from .workspace import WORKSPACE_BYTES

# Of a piece on a processor, whose caches should hold it.
CPU_WORKSPACE_BYTES: Final = 2 * 2**20


def row_chunks(num_rows: int, row_bytes: int, *, device_type: str, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover `num_rows` rows in order. Each takes all the rows whose workspace, `row_bytes` for a row, stays within
    WORKSPACE_BYTES, on a "cpu" within what its caches hold: a multiple of `multiple`, not none. The last is shorter."""
    workspace_bytes = CPU_WORKSPACE_BYTES if device_type == "cpu" else WORKSPACE_BYTES
    step = max(workspace_bytes // max(row_bytes, 1) // multiple, 1) * multiple
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def by_group(values: torch.Tensor, group: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Views of `values`, [rows, columns], as [rows, groups, columns of a group], and which groups they are: all that are of
    `group` columns, then the last if it is cut short."""
    num_whole, rest = divmod(values.shape[1], group)
    if num_whole:
        yield values[:, : num_whole * group].unflatten(1, (num_whole, group)), slice(num_whole)
    if rest:
        yield values[:, num_whole * group :].unsqueeze(1), slice(num_whole, num_whole + 1)
