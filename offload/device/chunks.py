"""Pure: in which chunks a large piece of host memory is registered."""

from collections.abc import Callable, Sequence


def register_chunks(num_bytes: int, cuts: Sequence[int], most_bytes: int, register: Callable[[int, int], bool]) -> int:
    """Register [0, num_bytes) in chunks of at most `most_bytes` that end at `cuts` (ascending), so that no copy straddles two
    of them; returns how many leading bytes `register(start, end)` did. A chunk that it refuses is tried again by halves, down
    to what lies between two cuts, which may be more: where that is refused, the driver has no more to give."""
    start, ends = 0, [*(cut for cut in cuts if 0 < cut < num_bytes), num_bytes]
    while start < num_bytes:
        reached = max(sum(end - start <= most_bytes for end in ends), 1)
        end = ends[reached - 1]
        if register(start, end):
            start, ends = end, ends[reached:]
        elif reached == 1:
            break
        else:
            most_bytes = (end - start) // 2
    return start
