"""Decoders work in pieces that cover all rows once and stay within their workspace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.coding.chunks import CPU_WORKSPACE_BYTES, row_chunks
from offload.coding.workspace import WORKSPACE_BYTES


@given(st.integers(0, 5000), st.integers(0, 2**22), st.sampled_from(["cpu", "cuda"]), st.sampled_from([1, 2, 8, 128]))
def test_pieces_cover_all_rows_in_order_and_stay_within_the_workspace(
    num_rows: int, row_bytes: int, device_type: str, multiple: int
) -> None:
    chunks = list(row_chunks(num_rows, row_bytes, device_type=device_type, multiple=multiple))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    limit = {"cpu": CPU_WORKSPACE_BYTES, "cuda": WORKSPACE_BYTES}[device_type]
    for chunk in chunks:
        size = chunk.stop - chunk.start
        assert size <= multiple or size * row_bytes <= limit
        assert size % multiple == 0 or chunk is chunks[-1]


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(10, WORKSPACE_BYTES), (10, 10 * WORKSPACE_BYTES)])
def test_rows_larger_than_the_workspace_come_one_by_one(num_rows: int, row_bytes: int) -> None:
    assert len(list(row_chunks(num_rows, row_bytes, device_type="cuda"))) == num_rows


def test_what_fits_is_one_piece() -> None:
    assert list(row_chunks(1024, 1024, device_type="cuda")) == [slice(0, 1024)]
