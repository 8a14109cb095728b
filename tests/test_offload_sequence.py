"""How the rows of a pass are shared out among texts: nobody who writes waits for a prompt, and every prompt gets on."""

from hypothesis import given
from hypothesis import strategies as st

from offload.engine.sequence import Share, share_rows

UNREAD = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def shares(unread: list[int], tree_rows: int, most_rows: int) -> tuple[Share | None, ...]:
    return share_rows(unread, tree_rows, most_rows, [None] * len(unread))


def rows_of(share: Share | None, tree_rows: int) -> int:
    return 0 if share is None else share.unread + tree_rows * share.has_tree


@given(unread=UNREAD, tree_rows=st.integers(1, 9), most_rows=st.integers(10, 60))
def test_a_pass_has_no_more_rows_than_it_may_and_moves_somebody(unread: list[int], tree_rows: int, most_rows: int) -> None:
    made = shares(unread, tree_rows, most_rows)
    assert 0 < sum(rows_of(share, tree_rows) for share in made) <= most_rows
    for rows, share in zip(unread, made, strict=True):
        assert share is None or share.unread <= rows
        assert share is None or not share.has_tree or share.unread == rows  # a tree stands behind all that was committed
        assert share is None or share.has_tree or share.unread > 0


@given(unread=UNREAD, tree_rows=st.integers(1, 9), most_rows=st.integers(10, 60))
def test_who_has_read_all_gets_a_tree_before_any_prompt_is_read(unread: list[int], tree_rows: int, most_rows: int) -> None:
    made = shares(unread, tree_rows, most_rows)
    writing = [share for rows, share in zip(unread, made, strict=True) if rows == 0]
    served = [share for share in writing if share is not None]
    assert len(served) == min(len(writing), most_rows // tree_rows)
    if len(served) < len(writing):
        assert most_rows - tree_rows * len(served) < tree_rows


@given(unread=UNREAD, tree_rows=st.integers(1, 9), most_rows=st.integers(10, 60), limit=st.integers(10, 20))
def test_passes_bring_every_text_to_its_tree(unread: list[int], tree_rows: int, most_rows: int, limit: int) -> None:
    """Texts that got their tree leave; the others go on."""
    left = list(unread)
    for _ in range(sum(unread) + len(unread)):
        made = share_rows(left, tree_rows, most_rows, [limit, *[None] * (len(left) - 1)])
        assert rows_of(made[0], tree_rows) <= limit
        left = [
            rows - (share.unread if share is not None else 0)
            for rows, share in zip(left, made, strict=True)
            if share is None or not share.has_tree
        ]
        if not left:
            return
    raise AssertionError(f"{left} rows are never read")


def test_one_text_reads_its_prompt_in_passes_as_wide_as_may_be_and_the_rest_with_the_tree() -> None:
    assert shares([9], 4, 13) == (Share(9, True),)
    assert shares([10], 4, 13) == (Share(10, False),)
    assert shares([100], 4, 13) == (Share(13, False),)


def test_a_prompt_takes_the_room_that_the_writers_leave() -> None:
    assert shares([100, 0, 0], 4, 20) == (Share(12, False), Share(0, True), Share(0, True))
    assert shares([100, 0, 100], 4, 8) == (Share(4, False), Share(0, True), None)
