"""Pure: the few shapes that passes of a fixed shape have, and so how many rows the widest of a run has."""

MAX_ROWS = 256  # of one pass; beyond, computing takes longer than launching, and padding would cost more than it saves
CATCH_UP_ROWS = (1, 2)  # of a pass that reads what was accepted: the next root, behind a leaf that had no row
POWERS_UP_TO = 64  # buckets of new rows: powers of two, then multiples of this
LEAST_CACHED_ROWS = 512  # buckets of attended rows: powers of two from here to the cache's capacity


def width_bucket(num_rows: int) -> int:
    """The rows that a pass of `num_rows` is padded to."""
    if num_rows <= POWERS_UP_TO:
        return _power_of_two(num_rows)
    return -(-num_rows // POWERS_UP_TO) * POWERS_UP_TO


def width_buckets(most_rows: int) -> tuple[int, ...]:
    """Of all passes of at most `most_rows` rows, ascending."""
    return tuple(sorted({width_bucket(num_rows) for num_rows in range(1, most_rows + 1)}))


def rows_bucket(num_rows: int, capacity: int) -> int:
    """How many cached rows a pass attends to that needs the first `num_rows` of them."""
    return min(max(_power_of_two(num_rows), LEAST_CACHED_ROWS), capacity)


def rows_buckets(capacity: int) -> tuple[int, ...]:
    """All that `rows_bucket` can say, ascending."""
    powers = (LEAST_CACHED_ROWS << exponent for exponent in range(capacity.bit_length()))
    return (*(power for power in powers if power < capacity), capacity)


def widest_pass(tree_nodes: int) -> int:
    """Rows of the widest pass that is worth recording where no level has more than `tree_nodes`. One that catches up with
    what was accepted is recorded, however small the tree."""
    return width_bucket(max(min(tree_nodes, MAX_ROWS), *CATCH_UP_ROWS))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
