import itertools
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from shapes import chain, from_widths
from tree.acceptance import Acceptance
from tree.optimizer import best_part, best_tree, expected_tokens, growth, isotonic
from tree.shape import TreeShape

# Sequoia paper, appendix E: Llama3-8B -> 70B-Instruct on CNN. Sums to 0.9928.
APPENDIX_E = (
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043, 0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014),
    *(0.0010, 0.0010, 0.0010, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006, 0.0004, 0.0004, 0.0005, 0.0006, 0.0004, 0.0003),
    *(0.0002, 0.0004, 0.0001),
)
CNN = Acceptance((APPENDIX_E,), "Sequoia appendix E")
TINY = Acceptance(((0.65, 0.2, 0.1, 0.05),), "UMbreLLa default")
# Measured on about 667 steps (Sequoia repository): not monotone, with zeros.
REPOSITORY = Acceptance(
    ((0.634183, 0.107946, 0.056972, 0.022489, 0.01949, 0.014993, 0.004498, 0.002999, 0.011994, 0.004498, 0.007496),)
)

# E[tokens] of the optimum by Sequoia's dynamic programme on APPENDIX_E (reference notes, sequoia.md 2.6).
GOLDEN_LEVELS = (4, 6, 8, 10, 12, 16, 18, 20, 24)
GOLDEN = {
    16: (3.4587, 4.1101, 4.3929, 4.5234, 4.5376, 4.5376, 4.5376, 4.5376, 4.5376),
    64: (3.7649, 4.8931, 5.4918, 5.7392, 5.8459, 5.9163, 5.9166, 5.9166, 5.9166),
    128: (3.8487, 5.1668, 5.9216, 6.3194, 6.4927, 6.5917, 6.6048, 6.6066, 6.6066),
    256: (3.9046, 5.3796, 6.3125, 6.8200, 7.0888, 7.2551, 7.2764, 7.2861, 7.2887),
    512: (3.9349, 5.5452, 6.6435, 7.2977, 7.6429, 7.9141, 7.9456, 7.9592, 7.9682),
    768: (3.9440, 5.6241, 6.8098, 7.5483, 7.9608, 8.2866, 8.3374, 8.3530, 8.3644),
    1024: (3.9483, 5.6723, 6.9208, 7.7190, 8.1815, 8.5476, 8.6092, 8.6331, 8.6458),
}


def random_vector(rng: np.random.Generator, length: int, *, monotone: bool, zeros: bool = False) -> tuple[float, ...]:
    vector = rng.dirichlet(np.full(length + 1, 0.7))[:-1]
    if zeros:
        vector[rng.random(length) < 0.3] = 0.0
    return tuple(sorted(vector.tolist(), reverse=True) if monotone else vector.tolist())


# -- oracles -------------------------------------------------------------------------------------------------------------


def optimum_by_dynamic_programme(acceptance: Acceptance, num_nodes: int, num_levels: int, branching: int) -> float:
    """Sequoia, algorithm 4: the best tree of exactly n nodes, by number of children of the root, then over all."""

    @cache
    def best_with(nodes: int, level: int, children: int) -> float:
        if children == 0:
            return 1.0 if nodes == 1 else -np.inf
        vector = acceptance.vector(level)
        if children > len(vector):
            return -np.inf
        options = (
            best_with(nodes - last, level, children - 1) + vector[children - 1] * best(last, level + 1)
            for last in range(1, nodes)
            if best(last, level + 1) > -np.inf  # 0 * inf would be NaN
        )
        return max(options, default=-np.inf)

    @cache
    def best(nodes: int, level: int) -> float:
        if level == num_levels:
            return -np.inf
        return max(best_with(nodes, level, children) for children in range(min(branching, nodes - 1) + 1))

    return best(num_nodes, 0)


def all_shapes(num_nodes: int, num_levels: int, branching: int) -> Iterator[TreeShape]:
    def extend(parents: tuple[int, ...]) -> Iterator[TreeShape]:
        if len(parents) == num_nodes:
            shape = TreeShape(parents)
            if shape.num_levels <= num_levels and shape.max_branching <= branching:
                yield shape
            return
        for parent in range(max(0, parents[-1]), len(parents)):
            yield from extend((*parents, parent))

    return extend((-1,))


# -- the optimum ---------------------------------------------------------------------------------------------------------


def test_published_vector_gives_the_golden_table() -> None:
    table = tokens_by_size_and_levels(CNN, 1024, 24)
    for num_nodes, values in GOLDEN.items():
        assert [table[num_nodes - 1, levels - 1] for levels in GOLDEN_LEVELS] == pytest.approx(values, abs=5e-4)  # smoothing


def test_768_nodes_in_18_levels_are_the_published_tree() -> None:
    shape = best_tree(CNN, 768, 18)
    assert expected_tokens(shape, CNN) == pytest.approx(8.3374, abs=1e-4)
    nodes_per_level = [1, 14, 31, 49, 63, 70, 82, 64, 69, 73, 86, 34, 25, 27, 29, 16, 17, 18]
    assert [len(level) for level in shape.levels] == nodes_per_level
    widest = [max(shape.num_children[node] for node in level) for level in shape.levels]
    assert widest == [14, 12, 12, 9, 9, 7, 7, 6, 5, 5, 4, 3, 3, 3, 2, 2, 2, 0]


def test_tiny_golden_values() -> None:
    golden = {(8, 3): 2.6975, (8, 4): 2.907125, (8, 5): 2.985631, (14, 3): 2.9375, (14, 4): 3.340625}
    golden |= {(14, 5): 3.469131, (14, 6): 3.52016, (14, 8): 3.530579}
    for (num_nodes, num_levels), value in golden.items():
        assert expected_tokens(best_tree(TINY, num_nodes, num_levels), TINY) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("monotone", [True, False])
def test_dynamic_programme_is_the_best_of_all_trees(monotone: bool) -> None:
    """The oracle against brute force, so that it may judge the optimizer."""
    rng = np.random.default_rng(1)
    for num_nodes in range(1, 8):
        for num_levels, branching in ((2, 6), (3, 3), (7, 2)):
            acceptance = Acceptance((random_vector(rng, 4, monotone=monotone, zeros=True),))
            values = [expected_tokens(shape, acceptance) for shape in all_shapes(num_nodes, num_levels, branching)]
            optimum = optimum_by_dynamic_programme(acceptance, num_nodes, num_levels, branching)
            if optimum > -np.inf:  # brute force may also grow children beyond the vector, which are worth nothing
                assert max(values) == pytest.approx(optimum, abs=1e-12)


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_best_first_is_the_dynamic_programme(num_vectors: int) -> None:
    rng = np.random.default_rng(2)
    for num_levels, branching in ((1, 3), (2, 9), (4, 2), (6, 5), (9, 3)):
        acceptance = Acceptance(tuple(random_vector(rng, 6, monotone=True, zeros=True) for _ in range(num_vectors)))
        for num_nodes in (1, 2, 3, 7, 16, 29):
            shape = best_tree(acceptance, num_nodes, num_levels, max_branching=branching)
            assert shape.num_levels <= num_levels and shape.max_branching <= branching
            optimum = optimum_by_dynamic_programme(acceptance, num_nodes, num_levels, branching)
            if optimum > -np.inf:
                assert shape.num_nodes == num_nodes
                assert expected_tokens(shape, acceptance) == pytest.approx(optimum, abs=1e-12)
            else:
                assert shape.num_nodes < num_nodes


@pytest.mark.parametrize("width", [1, 2, 3])
def test_with_bounded_levels_width_no_tree_is_better(width: int) -> None:
    """Against brute force over all small trees, with one vector and with one per level."""
    rng = np.random.default_rng(5)
    for num_nodes in range(1, 9):
        for num_levels, branching, num_vectors in ((3, 8, 1), (8, 2, 3), (5, 3, 2)):
            vectors = tuple(random_vector(rng, 8, monotone=True, zeros=True) for _ in range(num_vectors))
            acceptance = Acceptance(vectors)
            shape = best_tree(acceptance, num_nodes, num_levels, max_branching=branching, max_level_width=width)
            assert max(len(level) for level in shape.levels) <= width and shape.max_branching <= branching
            optimum = max(
                expected_tokens(other, acceptance)
                for size in range(1, num_nodes + 1)
                for other in all_shapes(size, num_levels, branching)
                if max(len(level) for level in other.levels) <= width
            )
            assert expected_tokens(shape, acceptance) == pytest.approx(optimum, abs=1e-12)
            assert shape.num_levels <= num_levels and shape.num_nodes <= num_nodes


def test_a_width_that_no_level_reaches_changes_nothing() -> None:
    shape = best_tree(CNN, 256, 12)
    widest = max(len(level) for level in shape.levels)
    assert best_tree(CNN, 256, 12, max_level_width=widest) == shape
    narrower = best_tree(CNN, 256, 12, max_level_width=widest - 1)
    assert narrower.num_nodes == 256 and max(len(level) for level in narrower.levels) == widest - 1
    assert 0 < expected_tokens(shape, CNN) - expected_tokens(narrower, CNN) < 0.01


def test_a_non_monotone_vector_costs_next_to_nothing() -> None:
    """Smoothing loses little against the optimum for the vector as measured, and never gains."""
    for num_nodes, num_levels in ((8, 4), (20, 5), (32, 6)):
        optimum = optimum_by_dynamic_programme(REPOSITORY, num_nodes, num_levels, 11)
        found = expected_tokens(best_tree(REPOSITORY, num_nodes, num_levels), REPOSITORY)
        assert optimum * 0.99 <= found <= optimum + 1e-12


# -- every size at once --------------------------------------------------------------------------------------------------


def tokens_by_size_and_levels(
    acceptance: Acceptance, num_nodes: int, num_levels: int, *, max_branching: int | None = None
) -> npt.NDArray[np.float64]:
    """E[tokens per pass] of the best tree of n nodes within l levels, at [n - 1, l - 1]."""
    grown, sizes = growth(acceptance, num_nodes, num_levels, max_branching=max_branching), np.arange(1, num_nodes + 1)
    return np.stack([grown.within(levels).expected_tokens(sizes) for levels in range(1, num_levels + 1)], axis=1)


@pytest.mark.parametrize("branching", [None, 2])
def test_one_growth_has_the_best_tree_of_each_size_and_number_of_levels(branching: int | None) -> None:
    acceptance = Acceptance(((0.7, 0.2, 0.05), (0.6, 0.1), (0.5, 0.3, 0.1, 0.1)))
    table = tokens_by_size_and_levels(acceptance, 40, 6, max_branching=branching)
    for num_nodes in (1, 2, 5, 17, 40):
        for num_levels in range(1, 7):
            shape = best_tree(acceptance, num_nodes, num_levels, max_branching=branching)
            assert table[num_nodes - 1, num_levels - 1] == pytest.approx(expected_tokens(shape, acceptance), abs=1e-12)


def test_tokens_rise_with_nodes_and_levels_and_are_concave_in_nodes() -> None:
    table = tokens_by_size_and_levels(CNN, 300, 20)
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert (np.diff(table, n=2, axis=0) <= 1e-12).all()
    assert (table[:, 0] == 1).all() and (table[0] == 1).all()
    assert table[:32, 1] == pytest.approx(1 + np.cumsum([0.0, *APPENDIX_E]), abs=2e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("bounds", [{}, {"max_level_width": 3}, {"max_branching": 2, "max_level_width": 7}])
@pytest.mark.parametrize("num_levels", [1, 2, 7, 40])
def test_growth_describes_the_best_tree_of_every_size(num_levels: int, bounds: dict[str, int]) -> None:
    """Ties, zeros, vectors per level; and sizes beyond what the bounds admit."""
    rng = np.random.default_rng(4)
    tied = Acceptance(((0.5, 0.25, 0.25), (0.25, 0.25, 0.25, 0.25), (0.5, 0.5)))
    smooth = Acceptance(tuple(random_vector(rng, 8, monotone=True, zeros=True) for _ in range(3)))
    sizes = np.arange(1, 131)
    for acceptance, grown_levels in itertools.product((tied, smooth, TINY), (num_levels, num_levels + 3)):
        grown = growth(acceptance, 130, grown_levels, **bounds).within(num_levels)
        tokens, expanded = grown.expected_tokens(sizes), grown.expanded(sizes)
        assert expanded.shape == (130, num_levels)
        for row, num_nodes in enumerate(range(1, 131)):
            shape = best_tree(acceptance, num_nodes, num_levels, **bounds)
            absent = [0] * (num_levels - shape.num_levels)
            nodes_per_level = np.bincount(grown.depths[:num_nodes], minlength=num_levels)
            assert shape.num_nodes == min(num_nodes, len(grown.values))
            assert tokens[row] == pytest.approx(expected_tokens(shape, acceptance), abs=1e-12)
            assert nodes_per_level.tolist() == [len(level) for level in shape.levels] + absent
            assert expanded[row].tolist() == [len(nodes) for nodes in shape.expanded] + absent


def test_what_is_expanded_is_known_for_any_sizes() -> None:
    grown = growth(CNN, 300, 12).within(9)
    sizes = np.array([1, 7, 8, 250, 300])
    assert (grown.expanded(sizes) == grown.expanded(np.arange(1, 301))[sizes - 1]).all()
    assert grown.expanded(sizes[:0]).shape == (0, 9)


# -- bounds, ties and bad input ------------------------------------------------------------------------------------------


def test_equal_values_go_to_the_shallower_and_earlier_node() -> None:
    assert best_tree(Acceptance(((0.5, 0.5),)), 5, 9).parents == (-1, 0, 0, 1, 1)
    assert best_tree(Acceptance(((1.0,),)), 4, 9) == chain(4)
    assert best_tree(Acceptance(((0.0, 0.0),)), 4, 9).parents == (-1, 0, 0, 1)


def test_a_tree_stops_where_bounds_leave_no_room() -> None:
    assert best_tree(CNN, 10, 1) == TreeShape.root_only()
    assert best_tree(CNN, 100, 2).num_nodes == 1 + len(APPENDIX_E)
    assert best_tree(TINY, 1000, 3).num_nodes == 1 + 4 + 16
    assert best_tree(CNN, 100, 30, max_branching=1) == chain(30)


def test_expected_tokens_of_given_shapes() -> None:
    assert expected_tokens(TreeShape.root_only(), CNN) == 1
    assert expected_tokens(chain(4), CNN) == pytest.approx(1 + 0.7732 + 0.7732**2 + 0.7732**3)
    assert expected_tokens(from_widths((6,)), TINY) == pytest.approx(2.0)  # ranks 4 and 5 are unknown
    assert expected_tokens(chain(3), Acceptance(((0.5,), (0.25,)))) == pytest.approx(1 + 0.5 + 0.125)


def test_the_best_part_of_a_best_tree_is_the_best_tree_of_its_size() -> None:
    for num_nodes in (1, 2, 13, 384, 768):
        assert best_part(best_tree(CNN, 768, 18), CNN, num_nodes) == best_tree(CNN, num_nodes, 18)


def test_no_part_of_a_tree_is_better_than_its_best_part() -> None:
    """All parts of random trees that keep the root, every kept node's parent and elder siblings."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        parents = sorted(int(rng.integers(0, node)) for node in range(1, 9))
        shape = TreeShape((-1, *(min(parent, node) for node, parent in enumerate(parents))))
        acceptance = Acceptance((random_vector(rng, 4, monotone=True),))
        for num_nodes in range(1, 10):
            part = best_part(shape, acceptance, num_nodes)
            best = max(expected_tokens(other, acceptance) for other in parts_of(shape, num_nodes))
            assert part.num_nodes == num_nodes and expected_tokens(part, acceptance) == pytest.approx(best)
    assert best_part(shape, acceptance, 100) == shape
    with pytest.raises(ValueError, match="at least its root"):
        best_part(shape, acceptance, 0)


def parts_of(shape: TreeShape, num_nodes: int) -> Iterator[TreeShape]:
    for others in itertools.combinations(range(1, shape.num_nodes), num_nodes - 1):
        kept = (0, *others)
        if all(shape.parents[node] in kept and (not shape.ranks[node] or node - 1 in kept) for node in others):
            yield TreeShape((-1, *(kept.index(shape.parents[node]) for node in others)))


@pytest.mark.parametrize(("bounds", "name"), [((0, 3, None), "nodes"), ((3, 0, None), "levels"), ((3, 3, 0), "children")])
def test_bounds_below_one_are_refused(bounds: tuple[int, int, int | None], name: str) -> None:
    with pytest.raises(ValueError, match=f"bounded by 0 {name}"):
        best_tree(CNN, bounds[0], bounds[1], max_branching=bounds[2])


def test_a_level_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="bounded by 0 nodes a level"):
        growth(CNN, 8, 4, max_level_width=0)


# -- smoothing -----------------------------------------------------------------------------------------------------------


def test_isotonic_keeps_what_is_monotone() -> None:
    assert isotonic((0.5, 0.3, 0.1)).tolist() == [0.5, 0.3, 0.1]


def test_isotonic_pools_violators() -> None:
    assert isotonic((0.4, 0.1, 0.3)).tolist() == pytest.approx([0.4, 0.2, 0.2])
    assert isotonic((0.1, 0.2, 0.6)).tolist() == pytest.approx([0.3, 0.3, 0.3])


def test_isotonic_is_the_nearest_non_increasing_vector() -> None:
    """Against random non-increasing vectors: none is nearer. And sums are kept."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        vector = rng.random(6)
        smooth = isotonic(vector.tolist())
        assert (np.diff(smooth) <= 0).all() and smooth.sum() == pytest.approx(vector.sum())
        others = np.sort(rng.random((2000, 6)), axis=1)[:, ::-1] * 0.3 + smooth * 0.7
        assert ((others - vector) ** 2).sum(axis=1).min() >= ((smooth - vector) ** 2).sum() - 1e-12


# -- time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [APPENDIX_E, (0.5,) + (0.0,) * 30, (1 / 31,) * 31], ids=["published", "zeros", "flat"])
def test_four_thousand_nodes_are_optimised_in_milliseconds(vector: tuple[float, ...]) -> None:
    """The bar is 50 ms on an idle core (20 ms when measured); the best of five has a margin for a busy one."""
    acceptance, times = Acceptance((vector,)), []
    for _ in range(5):
        start = time.perf_counter()
        assert best_tree(acceptance, 4096, 32).num_nodes == 4096
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25


def test_the_growth_of_four_thousand_nodes_takes_milliseconds() -> None:
    """The bar is 50 ms on an idle core; the best of five has a margin for a busy one."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(growth(CNN, 4096, 32).within(32).values) == 4096
        times.append(time.perf_counter() - start)
    assert min(times) < 0.25
