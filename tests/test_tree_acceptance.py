import json
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest

from shapes import chain, from_widths
from tree.acceptance import Acceptance, AcceptanceCounter, Context
from tree.shape import TreeShape

# Branching differs between nodes, and thins out where ranks are high: the case in which naive frequencies are biased.
UNEVEN = TreeShape((-1, 0, 0, 0, 1, 1, 2, 4))


def outcomes(shape: TreeShape, vector: tuple[Fraction, ...]) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """Every path with its probability, if child k of an accepted node is the accepted one with probability vector[k]."""
    reach = [Fraction(1)]
    for node in range(1, shape.num_nodes):
        reach.append(reach[shape.parents[node]] * vector[shape.ranks[node]])
    for node in range(shape.num_nodes):
        yield shape.path(node), reach[node] * (1 - sum(vector[: shape.num_children[node]]))


def count_in_proportion(counter: AcceptanceCounter, shape: TreeShape, vector: tuple[Fraction, ...]) -> None:
    weighted = list(outcomes(shape, vector))
    scale = math.lcm(*(probability.denominator for _, probability in weighted))
    for path, probability in weighted:
        for _ in range(int(probability * scale)):
            counter.add(shape, path)


# -- counting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [UNEVEN, from_widths((3, 3)), from_widths((3,))])
def test_counts_in_proportion_give_the_exact_acceptance(shape: TreeShape) -> None:
    vector = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
    counter = AcceptanceCounter()
    count_in_proportion(counter, shape, vector)
    assert counter.to_acceptance("exact").levels[0] == pytest.approx([float(p) for p in vector])
    assert counter.to_acceptance("exact").source == "exact"


def test_acceptance_may_differ_by_level() -> None:
    counter = AcceptanceCounter()
    shape = from_widths((2, 1))
    for path in [(0, 1, 3), (0, 1), (0, 2, 4), (0,)]:  # level 0: 2 of 4, then 1 of 2 left; level 1: 2 of 3
        counter.add(shape, path)
    levels = counter.to_acceptance("", per_level=True).levels
    assert levels == (pytest.approx([0.5, 0.25]), pytest.approx([2 / 3]))
    pooled = counter.to_acceptance("").levels
    assert pooled == (pytest.approx([4 / 7, 3 / 7 * 1 / 2]),)


def test_levels_that_were_hardly_tried_share_the_last_vector() -> None:
    counter = AcceptanceCounter()
    shape = chain(5)
    for end in (0, 1, 1, 2, 2, 2, 3, 4):  # level 0: 7 of 8; 1: 5 of 7; 2: 2 of 5; 3: 1 of 2
        counter.add(shape, shape.path(end))
    levels = counter.to_acceptance("", per_level=True, least_tried=5).levels
    assert levels == (pytest.approx([7 / 8]), pytest.approx([5 / 7]), pytest.approx([3 / 7]))
    assert counter.to_acceptance("", per_level=True, least_tried=9).levels == (pytest.approx([15 / 22]),)
    assert len(counter.to_acceptance("", per_level=True).levels) == 4


def test_a_rank_is_tried_only_where_the_child_exists_and_is_reached() -> None:
    counter = AcceptanceCounter()
    counter.add(chain(2), (0,))  # rejects its only child: says nothing of rank 1
    counter.add(from_widths((2,)), (0, 1))  # accepts rank 0: rank 1 is not reached
    assert counter.to_acceptance("").levels == ((0.5,),)


@pytest.mark.parametrize("per_level", [False, True])
def test_nothing_tried_gives_no_acceptance(per_level: bool) -> None:
    counter = AcceptanceCounter()
    counter.add(TreeShape.root_only(), (0,))
    with pytest.raises(ValueError, match="empty"):
        counter.to_acceptance("", per_level=per_level)


@pytest.mark.parametrize("path", [(), (1,), (0, 4), (0, 99), (0, 1, 1)])
def test_what_is_no_path_is_refused(path: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"path from the root|not in a tree"):
        AcceptanceCounter().add(UNEVEN, path)


# -- value and file ------------------------------------------------------------------------------------------------------


def test_the_last_vector_holds_for_deeper_levels() -> None:
    acceptance = Acceptance(((0.9,), (0.5, 0.2)))
    assert [acceptance.vector(level) for level in range(4)] == [(0.9,), (0.5, 0.2), (0.5, 0.2), (0.5, 0.2)]


@pytest.mark.parametrize("acceptance", [Acceptance(((0.5, 0.25),), "one"), Acceptance(((0.5,), (0.25, 0.5)), "two")])
def test_json_round_trip(acceptance: Acceptance) -> None:
    assert Acceptance.from_json(acceptance.to_json()) == acceptance
    assert Acceptance.from_json(json.dumps({**acceptance.to_json(), "measured_at": "2026-11-21"})) == acceptance


def test_one_vector_is_written_as_one_list() -> None:
    assert Acceptance(((0.5, 0.25),), "s").to_json() == {"schema_version": 1, "acceptance": [0.5, 0.25], "source": "s"}


def test_rounded_files_may_exceed_one_by_a_millionth() -> None:
    assert Acceptance(((0.5, 0.5000005),)).levels == ((0.5, 0.5000005),)


@pytest.mark.parametrize(
    ("acceptance", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([[0.5], []], "level 1 is empty"),
        ([0.5, -0.1], "child 1 is -0.1"),
        ([float("nan")], "child 0 is nan"),
        ([float("inf")], "child 0 is inf"),
        ([0.6, 0.5], "sums to 1.100000"),
        ([[0.5], [0.9, 0.2]], "level 1 sums to 1.100000"),
        ([0.5, [0.2]], "must be numbers, or lists of numbers"),
        ([[0.5], 0.2], "must be numbers, or lists of numbers"),
        ([[[0.5]]], "must be numbers, or lists of numbers"),
        (["0.5"], "must be numbers"),
        ([True], "must be numbers"),
        ([None], "must be numbers"),
        (0.5, '"acceptance" must be a list, not float'),
        (None, '"acceptance" must be a list, not NoneType'),
    ],
)
def test_bad_acceptance_is_refused(acceptance: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Acceptance.from_json({"schema_version": 1, "acceptance": acceptance, "source": "test"})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([0.5], "a JSON object, not list"),
        ({"acceptance": [0.5]}, "schema_version is None, expected 1"),
        ({"schema_version": 1, "acceptance": [0.5], "source": 3}, '"source" must be a string'),
        ("nonsense", "must be JSON"),
    ],
)
def test_bad_documents_are_refused(document: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Acceptance.from_json(document)


# -- by how sure the draft was -----------------------------------------------------------------------------------------------


def test_contexts_part_what_was_counted_by_how_sure_the_draft_was() -> None:
    counter, shape = AcceptanceCounter(), from_widths((2, 1))
    unknown = math.nan
    for path in [(0, 1, 3), (0, 1), (0, 2, 4), (0,)]:
        counter.add(shape, path, [0.9, 0.2, unknown, 0.99, 0.99])  # the root is sure, its first child is not
    contexts = counter.to_acceptance("").contexts
    assert [context.top for context in contexts] == [0.3, 1.0]
    assert [context.share for context in contexts] == pytest.approx([2 / 6, 4 / 6])
    assert contexts[0].acceptance == pytest.approx((1 / 2,)) and contexts[1].acceptance == pytest.approx((1 / 2, 1 / 4))


def test_contexts_survive_json() -> None:
    contexts = (Context(0.5, 0.25, (0.5, 0.25)), Context(1.0, 0.75, (0.9,)))
    acceptance = Acceptance(((0.8, 0.1),), "here", contexts)
    assert Acceptance.from_json(json.dumps(acceptance.to_json())) == acceptance
    assert "contexts" not in Acceptance(((0.8, 0.1),)).to_json()


@pytest.mark.parametrize(
    ("contexts", "fault"),
    [
        ({}, "must be a list"),
        ([1], "context 0 must be an object"),
        ([{"top": 1, "share": 1}], "context 0 must be an object"),
        ([{"top": "1", "share": 1, "acceptance": [0.5]}], '"top" of context 0'),
        ([{"top": 1, "share": True, "acceptance": [0.5]}], '"share" of context 0'),
        ([{"top": 0.5, "share": 1, "acceptance": [0.5]}], '"top" of 1'),
        ([{"top": 1, "share": 0.5, "acceptance": [0.5]}], "not to 1"),
        ([{"top": 1, "share": 1, "acceptance": [0.5, 0.6]}], "acceptance of context 0 sums"),
        ([{"top": 1, "share": 1, "acceptance": []}], "acceptance of context 0 is empty"),
        ([{"top": 0.7, "share": 0.5, "acceptance": [0.5]}, {"top": 0.6, "share": 0.5, "acceptance": [0.5]}], "must ascend"),
        ([{"top": 1, "share": 2, "acceptance": [0.5]}], "outside"),
    ],
)
def test_contexts_of_a_file_are_checked(contexts: object, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Acceptance.from_json({"schema_version": 1, "acceptance": [0.5], "contexts": contexts})
