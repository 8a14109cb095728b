"""Blocks cover every row once and keep to their bound; working on one takes no more memory than is said."""

from collections.abc import Sequence
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tree import blocks, sampling
from tree.blocks import BLOCK_ENTRIES, BLOCK_ENTRY_BYTES, block_bytes, row_blocks
from tree.draft import grow
from tree.residual import chances_of
from tree.sampling import SamplingParams
from tree.shape import TreeShape


@pytest.mark.parametrize(("num_rows", "row_entries"), [(0, 5), (1, 5), (7, BLOCK_ENTRIES // 3), (3, BLOCK_ENTRIES * 2)])
def test_blocks_cover_every_row_once(num_rows: int, row_entries: int) -> None:
    blocks = list(row_blocks(num_rows, row_entries))
    assert [row for block in blocks for row in block] == list(range(num_rows))
    assert all(len(block) == 1 or len(block) * row_entries <= BLOCK_ENTRIES for block in blocks)
    largest = max((len(block) * row_entries for block in blocks), default=0)
    assert largest * BLOCK_ENTRY_BYTES <= block_bytes(num_rows, row_entries) <= max(BLOCK_ENTRIES, largest) * BLOCK_ENTRY_BYTES


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile take at a time. What an operation needs for itself alone is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._made: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._made[id(tensor)] = tensor
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._made.values()}
        self.num_bytes = max(self.num_bytes, sum(storages.values()))
        return result


@pytest.mark.parametrize("params", [SamplingParams(0.8), SamplingParams(0.8, top_p=0.9), SamplingParams(0.8, 50, 0.9)], ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_working_on_a_block_takes_what_the_plan_is_told(
    params: SamplingParams, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nuclei by sorting, as on a GPU, and in blocks of a tenth of a level."""
    num_children, vocab_size = 40, 512
    shape = TreeShape((-1, *[0] * num_children, *range(1, num_children + 1)))
    table = torch.randn(vocab_size, vocab_size)
    monkeypatch.setattr(sampling, "_nucleus", sampling._nucleus_by_sorting)
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 4 * vocab_size)
    generator = torch.Generator().manual_seed(0)
    with Peak() as drawing:
        drafted = grow(Table(table), 0, shape, params, generator, sampled=sampled)
    logits = table[drafted.token_ids]
    with Peak() as weighing:
        chances_of(drafted, logits, params, traversal=True)
    row_bytes, indices_bytes = 4 * vocab_size, 16 * 2**10
    most_bytes = block_bytes(num_children, vocab_size) + indices_bytes
    laws_bytes = shape.num_nodes * row_bytes if sampled else 0
    assert drawing.num_bytes <= laws_bytes + num_children * row_bytes + most_bytes  # the draft's logits of a level
    assert weighing.num_bytes <= (1 + num_children) * row_bytes + most_bytes  # residual laws


class Table:
    """A draft whose logits are a row of a table [V, V]."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def begin(self) -> torch.Tensor:
        return self._table[[0]]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        return self._table[token_ids]
