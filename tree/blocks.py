"""Pure: rows of a vocabulary's length, cut so that what works on them needs a bounded memory."""

from collections.abc import Iterator

# Rows are handled in blocks of about this many entries. An entry takes so many bytes at a time at most, where a nucleus is
# sorted for or tokens are drawn: 192 MiB for a block.
BLOCK_ENTRIES, BLOCK_ENTRY_BYTES = 1 << 22, 48


def row_blocks(num_rows: int, row_entries: int) -> Iterator[range]:
    """`num_rows` rows cut into ranges of at most BLOCK_ENTRIES entries, at least one row each."""
    step = max(1, BLOCK_ENTRIES // row_entries)
    for start in range(0, num_rows, step):
        yield range(start, min(start + step, num_rows))


def block_bytes(num_rows: int, row_entries: int) -> int:
    """What works on one block of `num_rows` rows at a time takes at most, besides its input and its result."""
    return min(num_rows * row_entries, max(BLOCK_ENTRIES, row_entries)) * BLOCK_ENTRY_BYTES
