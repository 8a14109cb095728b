"""What a pass is given: the tokens of its rows, where they stand in their texts, and who sees whom."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..device import Device
from .attention import Block, Masks, pass_mask, window_mask
from .kv_cache import Segment


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """The rows of one sequence in a pass: committed tokens `prefix`, and right behind them n >= 0 nodes of a tree.

    segment: holds the rows before; no other part of the pass has it.
    prefix: continues the committed rows; empty where rows are pending.
    node_ids: [n] int64, on the host or on the device.
    depths: [n]; a node of depth d stands d positions behind the first token that is neither committed nor in `prefix`.
    tree_mask: [n, M] bool on the device, M >= n; the M - n leading columns are the pending rows, which are earlier nodes.
    num_logits: how many of the part's last rows have logits; 0 for none.
    """

    segment: Segment
    prefix: Sequence[int]
    node_ids: torch.Tensor
    depths: Sequence[int]
    tree_mask: torch.Tensor
    num_logits: int

    @property
    def num_rows(self) -> int:
        return len(self.prefix) + len(self.depths)

    @property
    def positions(self) -> list[int]:
        """Of its rows in the text."""
        length, root = self.segment.length, self.segment.length + len(self.prefix)
        return [*range(length, root), *(root + depth for depth in self.depths)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PassInputs:
    """All on the device. N rows, those of one part behind those of another."""

    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    counted_prompts: torch.Tensor | None  # [N] int64; of each row's segment, for who has to know
    masks: Masks
    logit_rows: int | torch.Tensor  # which rows have logits: the last so many (>= 1), or those of an index, int64


def pass_inputs(
    device: Device, parts: Sequence[Part], windows: Collection[int | None], *, counts_prompts: bool = True
) -> PassInputs:
    """Of a pass over `parts`, at least one, by layers whose attention has one of `windows` (None: it has none)."""
    numbers = [number for part in parts for number in part.positions]
    positions = device.upload(torch.tensor(numbers, dtype=torch.int64))  # [N]
    token_ids, counted, blocks, begin = list[torch.Tensor](), list[torch.Tensor](), list[dict[int | None, Block]](), 0
    for part in parts:
        if part.prefix:
            token_ids.append(device.upload(torch.tensor(part.prefix, dtype=torch.int64)))
        if part.depths:
            token_ids.append(device.upload(part.node_ids))
        if counts_prompts:
            counted.append(torch.full((part.num_rows,), part.segment.counted_prompt, device=positions.device))
        rows = slice(begin, begin + part.num_rows)
        blocks.append(_blocks(device, part, rows, positions[rows], windows))
        begin = rows.stop
    return PassInputs(
        token_ids=_joined(token_ids),
        positions=positions,
        counted_prompts=_joined(counted) if counted else None,
        masks={window: tuple(block[window] for block in blocks) for window in windows},
        logit_rows=_logit_rows(parts, positions.device),
    )


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _blocks(
    device: Device, part: Part, rows: slice, positions: torch.Tensor, windows: Collection[int | None]
) -> dict[int | None, Block]:
    segment, masks = part.segment, dict[int | None, torch.Tensor]()
    seen = pass_mask(segment.rows, len(part.prefix), part.tree_mask)  # [1, 1, n, T]
    bounded = [window for window in windows if window is not None]
    if bounded:
        pending = device.upload(torch.tensor(segment.pending_positions, dtype=torch.int64))
        key_positions = torch.cat([torch.arange(segment.length, device=positions.device), pending, positions])  # [T]
        masks = {window: window_mask(seen, positions, key_positions, window) for window in bounded}
    keys = slice(segment.start, segment.start + segment.rows + part.num_rows)
    return {window: Block(rows, keys, masks.get(window, seen)) for window in windows}


def _logit_rows(parts: Sequence[Part], device: torch.device) -> int | torch.Tensor:
    if len(parts) == 1 and parts[0].num_logits:
        return parts[0].num_logits
    ends, end = list[torch.Tensor](), 0
    for part in parts:
        end += part.num_rows
        ends.append(torch.arange(end - part.num_logits, end, device=device))
    return torch.cat(ends)
