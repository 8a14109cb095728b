"""Shapes that tests name and nothing else needs."""

from collections.abc import Sequence

from hypothesis import strategies as st

from tree.shape import TreeShape


def chain(num_levels: int) -> TreeShape:
    """One node per level, root included: `num_levels` - 1 draft tokens in a row."""
    return TreeShape(tuple(range(-1, num_levels - 1)))


def from_widths(widths: Sequence[int]) -> TreeShape:
    """Every node of level l has `widths[l]` children: (k,) * d is the full k-ary tree with d draft levels."""
    parents, level = [-1], range(1)
    for width in widths:
        parents += [node for node in level for _ in range(width)]
        level = range(level.stop, len(parents))
    return TreeShape(tuple(parents))


@st.composite
def shapes(draw: st.DrawFn) -> TreeShape:
    """Any, of up to 60 nodes."""
    parents = [-1]
    for node in range(1, draw(st.integers(1, 60))):
        parents.append(draw(st.integers(max(0, parents[-1]), node - 1)))
    return TreeShape(tuple(parents))
