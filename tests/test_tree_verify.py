"""Verdicts: what holds for each of them, and the sampled part. Exact laws of the outcomes are in test_tree_exactness."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tree.blocks
import tree.draft
import tree.residual
import tree.verify
from shapes import chain, from_widths
from tree.draft import DraftTree, grow
from tree.residual import chances_of
from tree.sampling import SamplingParams, to_probabilities
from tree.shape import TreeShape
from tree.verify import METHODS, Method, Verdict, verify

UNEVEN = TreeShape((-1, 0, 0, 0, 1, 1, 3, 4))
UNIT = SamplingParams(1.0)
WORK_ON_ROWS = (
    (tree.draft, "to_probabilities"),
    (tree.draft, "sample_without_replacement"),
    (tree.draft, "top_k_tokens"),
    (tree.residual, "to_probabilities"),
    (tree.residual, "_offer"),
    (tree.verify, "to_probabilities"),
    (tree.verify, "sample"),
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@dataclass
class Markov:
    """A model whose logits depend on the last token alone: a TreeModel, and a target for whole trees."""

    table: torch.Tensor  # [V, V]
    root_token_id: int = 0

    def begin(self) -> torch.Tensor:
        return self.table[self.root_token_id][None]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        return self.table[token_ids]


def random_markov(seed: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Markov:
    generator = torch.Generator().manual_seed(seed)
    return Markov((torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64) * 1.5).to(dtype))


def random_case(
    seed: int, shape: TreeShape, vocabulary: int, params: SamplingParams, *, sampled: bool, dtype=torch.float64
) -> tuple[DraftTree, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    draft, target = random_markov(seed, vocabulary, dtype), random_markov(seed + 1, vocabulary, dtype)
    drafted = grow(draft, 0, shape, params, generator, sampled=sampled)
    return drafted, target.table[drafted.token_ids], generator


@st.composite
def shapes(draw: st.DrawFn) -> TreeShape:
    parents, width = [-1], [0] * 13
    for node in range(1, draw(st.integers(1, 12))):
        parents.append(draw(st.sampled_from([p for p in range(max(0, parents[-1]), node) if width[p] < 4])))
        width[parents[-1]] += 1
    return TreeShape(tuple(parents))


PARAMS = [SamplingParams(), SamplingParams(0.3), UNIT, SamplingParams(1.0, top_k=2), SamplingParams(0.9, 4, 0.8)]


# -- every verdict -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shapes(), st.sampled_from(METHODS), st.sampled_from(PARAMS), st.booleans(), st.integers(0, 9999))
def test_a_verdict_is_a_path_of_the_tree_and_one_token_of_the_target(
    shape: TreeShape, method: Method, params: SamplingParams, sampled: bool, seed: int
) -> None:
    drafted, logits, generator = random_case(seed, shape, 5, params, sampled=sampled)
    verdict = verify(drafted, logits, params, generator, method=method)
    end = verdict.path[-1]
    assert verdict.path == shape.path(end)
    assert len(verdict.token_ids) == len(verdict.path)
    assert list(verdict.token_ids[:-1]) == drafted.token_ids[list(verdict.path[1:])].tolist()
    rows = to_probabilities(logits, params)
    emitted = zip(verdict.path, verdict.token_ids, strict=True)
    assert all(rows[node, token_id] > 0 for node, token_id in emitted)
    assert 1.0 <= verdict.expected_tokens <= shape.num_levels + 1e-9
    if shape.num_children[end]:
        children = drafted.token_ids[list(shape.children(end))].tolist()
        assert method != "sample" or verdict.token_ids[-1] not in children


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(PARAMS[1:]), st.booleans(), st.booleans(), st.integers(0, 9999))
def test_weights_and_residuals_are_probabilities(
    shape: TreeShape, params: SamplingParams, traversal: bool, sampled: bool, seed: int
) -> None:
    drafted, logits, _ = random_case(seed, shape, 5, params, sampled=sampled)
    chances = chances_of(drafted, logits, params, traversal=traversal)
    assert chances.accept.dtype == torch.float64 and chances.accept[0] == 1
    assert (chances.accept >= 0).all() and (chances.accept <= 1).all()
    for node in range(shape.num_nodes):
        assert (chances.rows[node] >= 0) == (shape.num_children[node] > 0)
        if shape.num_children[node]:
            residual = chances.residuals[chances.rows[node]]
            assert (residual >= 0).all() and (residual[drafted.token_ids[list(shape.children(node))]] == 0).all()
            assert float(residual.sum()) == pytest.approx(1.0) or float(residual.sum()) == 0.0  # 0: never needed


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_modified(method: Method) -> None:
    drafted, logits, generator = random_case(3, UNEVEN, 6, UNIT, sampled=True)
    assert drafted.probabilities is not None
    before = [tensor.clone() for tensor in (drafted.token_ids, drafted.probabilities, logits)]
    verify(drafted, logits, UNIT, generator, method=method)
    assert all(map(torch.equal, before, (drafted.token_ids, drafted.probabilities, logits)))


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_the_verdict(method: Method) -> None:
    def verdicts(seed: int) -> list[Verdict]:
        drafted, logits, _ = random_case(4, UNEVEN, 6, UNIT, sampled=True)
        generator = torch.Generator().manual_seed(seed)
        return [verify(drafted, logits, UNIT, generator, method=method) for _ in range(12)]

    assert verdicts(1) == verdicts(1) != verdicts(2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_judged_in_float32(method: Method, dtype: torch.dtype) -> None:
    drafted, logits, generator = random_case(8, UNEVEN, 6, UNIT, sampled=True, dtype=dtype)
    probabilities = to_probabilities(random_markov(8, 6, dtype).table[drafted.token_ids].double(), UNIT)
    exact = replace(drafted, probabilities=probabilities)
    rough = verify(drafted, logits, UNIT, generator, method=method).expected_tokens
    fine = verify(exact, logits.double(), UNIT, generator, method=method).expected_tokens
    assert rough == pytest.approx(fine, abs=1e-5)


# -- greedy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampled", [False, True])
def test_greedy_rounds_emit_the_argmax_chain(method: Method, sampled: bool, rng: torch.Generator) -> None:
    target, draft = random_markov(1, 7), random_markov(2, 7)
    draft.table += 2 * target.table  # agrees often enough for long paths
    plain = [0]
    for _ in range(40):
        plain.append(int(target.table[plain[-1]].argmax()))
    text, lengths = [0], []
    while len(text) < 30:
        draft.root_token_id = text[-1]
        drafted = grow(draft, text[-1], UNEVEN, SamplingParams(), rng, sampled=sampled)
        verdict = verify(drafted, target.table[drafted.token_ids], SamplingParams(), rng, method=method)
        assert verdict.expected_tokens == len(verdict.path)
        text += verdict.token_ids
        lengths.append(len(verdict.path))
    assert text == plain[: len(text)]
    assert max(lengths) > 1


def test_greedy_ties_go_to_the_lowest_token_id(rng: torch.Generator) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    for child, expected in ((1, (1, 0)), (2, (1,))):
        drafted = DraftTree(chain(2), torch.tensor([0, child]), None, (False, False))
        assert verify(drafted, logits, SamplingParams(), rng, method="sample").token_ids == expected


# -- how much is accepted ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(PARAMS[1:]), st.integers(0, 9999))
def test_chosen_trees_are_accepted_equally_by_all_methods(shape: TreeShape, params: SamplingParams, seed: int) -> None:
    """R6: E = sum over nodes of the target's probability of their path."""
    drafted, logits, generator = random_case(seed, shape, 5, params, sampled=False)
    rows, reach = to_probabilities(logits, params), [1.0]
    for node in range(1, shape.num_nodes):
        reach.append(reach[shape.parents[node]] * float(rows[shape.parents[node], drafted.token_ids[node]]))
    for method in METHODS:
        verdict = verify(drafted, logits, params, generator, method=method)
        assert verdict.expected_tokens == pytest.approx(sum(reach), abs=1e-9)


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampled", [False, True])
def test_expected_tokens_is_the_mean_of_what_is_emitted(method: Method, sampled: bool) -> None:
    """400 verdicts on one tree, 5 sigma. False alarm: 6e-7 each."""
    drafted, logits, generator = random_case(27, UNEVEN, 4, UNIT, sampled=sampled)
    verdicts = [verify(drafted, logits, UNIT, generator, method=method) for _ in range(400)]
    lengths = torch.tensor([len(verdict.path) for verdict in verdicts], dtype=torch.float64)
    assert len({verdict.expected_tokens for verdict in verdicts}) == 1
    error = float(lengths.mean()) - verdicts[0].expected_tokens
    assert abs(error) <= 5 * float(lengths.std()) / math.sqrt(400)
    assert lengths.std() > 0.1


def test_traversal_accepts_more_than_rejection_from_sampled_chains() -> None:
    """On chains it is optimal (block verification); averaged over 60 drafts of five tokens."""
    totals = {
        method: sum(
            verify(
                *random_case(2 * seed, chain(6), 4, UNIT, sampled=True)[:2], UNIT, torch.Generator(), method=method
            ).expected_tokens
            for seed in range(60)
        )
        for method in METHODS
    }
    assert totals["traversal"] > totals["rejection"] > totals["sample"]


# -- numerics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["traversal", "rejection"])
@pytest.mark.parametrize("shape", [chain(4), from_widths((3, 3)), from_widths((6,))])
def test_a_draft_equal_to_the_target_bit_for_bit_never_ends_in_nan(
    method: Method, shape: TreeShape, rng: torch.Generator
) -> None:
    """Residuals vanish everywhere; the first child is accepted all the way down, and text goes on."""
    model = random_markov(6, 6, torch.float32)
    for params in (UNIT, SamplingParams(0.2), SamplingParams(1.0, 3, 0.7)):
        drafted = grow(model, 0, shape, params, rng, sampled=True)
        verdict = verify(drafted, model.table[drafted.token_ids], params, rng, method=method)
        assert len(verdict.path) == shape.num_levels
        assert verdict.expected_tokens == pytest.approx(shape.num_levels, abs=1e-5)


@pytest.mark.parametrize("method", ["traversal", "rejection"])
def test_near_ties_keep_weights_finite(method: Method) -> None:
    """P = Q (1 +- 1e-7) in float32: residuals are rounding noise."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        model = random_markov(seed, 8, torch.float32)
        drafted = grow(model, 0, from_widths((4, 2)), UNIT, generator, sampled=True)
        noise = 1e-7 * torch.randn(drafted.shape.num_nodes, 8, generator=generator)
        verdict = verify(drafted, model.table[drafted.token_ids] + noise, UNIT, generator, method=method)
        assert verdict.expected_tokens == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.8, 3, 0.9)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_logit_is_reported_with_the_first_node_that_has_one(
    value: float, params: SamplingParams, method: Method
) -> None:
    drafted, logits, generator = random_case(1, UNEVEN, 6, params, sampled=True)
    logits[5, 2] = logits[6, 0] = value
    with pytest.raises(FloatingPointError, match="node 5 of 8"):
        verify(drafted, logits, params, generator, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_finite_logit_is_reported_and_masked_tokens_are_not(method: Method) -> None:
    drafted, logits, generator = random_case(1, UNEVEN, 6, UNIT, sampled=True)
    logits[:, 3] = -math.inf
    assert verify(drafted, logits, UNIT, generator, method=method).token_ids
    logits[4] = -math.inf
    with pytest.raises(FloatingPointError, match="node 4 of 8 are not finite: -inf"):
        verify(drafted, logits, UNIT, generator, method=method)


@pytest.mark.parametrize("method", ["traversal", "rejection"])
def test_a_nan_to_draw_from_is_reported(method: Method) -> None:
    drafted, logits, generator = random_case(1, UNEVEN, 6, UNIT, sampled=True)
    assert drafted.probabilities is not None
    drafted.probabilities[1] = math.nan
    with pytest.raises(FloatingPointError, match=r"draft's probabilities at node [14] of 8, or at its parent, are not finite"):
        verify(drafted, logits, UNIT, generator, method=method)


def test_mismatched_arguments_are_refused() -> None:
    drafted, logits, generator = random_case(1, UNEVEN, 6, UNIT, sampled=True)
    with pytest.raises(ValueError, match=r"logits of shape \(7, 6\) for a tree of 8 nodes"):
        verify(drafted, logits[:7], UNIT, generator, method="sample")
    with pytest.raises(ValueError, match=r"draft probabilities of shape \(8, 6\) beside logits of shape \(8, 5\)"):
        verify(drafted, logits[:, :5], UNIT, generator, method="traversal")
    with pytest.raises(ValueError, match="unknown verification method 'typical'"):
        verify(drafted, logits, UNIT, generator, method="typical")  # type: ignore[arg-type]


# -- cost ----------------------------------------------------------------------------------------------------------------


class NoScalarReads(TorchDispatchMode):
    """Fails on operations that make the host wait for the device; counts all others."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        self.num_operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_growing_and_verifying_never_read_a_scalar_from_the_device(
    sampled: bool, params: SamplingParams, rng: torch.Generator
) -> None:
    model = random_markov(1, 6, torch.float32)
    with NoScalarReads():
        drafted = grow(model, 0, UNEVEN, params, rng, sampled=sampled)
        for method in METHODS:
            verify(drafted, model.table.index_select(0, drafted.token_ids), params, rng, method=method)


def with_chosen(drafted: DraftTree, *chosen: int) -> DraftTree:
    return replace(drafted, drawn=tuple(was and node not in chosen for node, was in enumerate(drafted.drawn)))


def test_only_a_step_that_mixes_drawn_and_chosen_children_takes_more_operations() -> None:
    """Nodes 4 and 6 are offered in one step, as first children of nodes 1 and 3; node 5 is offered alone."""
    drafted, logits, _ = random_case(3, UNEVEN, 6, UNIT, sampled=True)

    def operations(tree: DraftTree) -> int:
        with NoScalarReads() as counted:
            chances_of(tree, logits, UNIT, traversal=True)
        return counted.num_operations

    all_drawn = operations(drafted)
    assert operations(with_chosen(drafted, 5)) < all_drawn
    assert operations(with_chosen(drafted, 4, 6)) < all_drawn
    assert operations(with_chosen(drafted, 7)) < all_drawn
    assert operations(with_chosen(drafted, 4)) > all_drawn
    none_drawn = replace(drafted, probabilities=None, drawn=(False,) * 8)
    only_7_drawn = operations(with_chosen(drafted, *range(1, 7)))
    assert only_7_drawn - operations(none_drawn) == all_drawn - operations(with_chosen(drafted, 7))


@pytest.mark.parametrize("method", ["traversal", "rejection"])
def test_rows_that_nothing_was_drawn_from_are_not_looked_at(method: Method) -> None:
    """Not even where a sibling step draws from others: they may hold anything."""
    drafted, logits, _ = random_case(3, UNEVEN, 6, UNIT, sampled=True)
    mixed = with_chosen(drafted, 6)
    assert mixed.probabilities is not None
    spoilt = replace(mixed, probabilities=mixed.probabilities.clone())
    spoilt.probabilities[[3, 5]] = math.nan
    verdicts = [verify(tree, logits, UNIT, torch.Generator().manual_seed(1), method=method) for tree in (mixed, spoilt)]
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_blocks_of_rows_change_nothing_but_memory(
    method: Method, params: SamplingParams, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of one level in blocks: the same tree, chances and verdict, and never more rows at work than a block has."""
    shape = TreeShape((-1, *[0] * 5, *[1] * 3, *[2] * 2, *[3] * 4, *[4] * 2, 5, 6, 7, 8, 9))

    def outcome() -> tuple[DraftTree, torch.Tensor, Verdict]:
        drafted, logits, generator = random_case(9, shape, 8, params, sampled=sampled)
        chances = chances_of(drafted, logits, params, traversal=method == "traversal")
        ordered = chances.residuals[[row for row in chances.rows if row >= 0]]
        return (
            drafted,
            torch.cat([chances.accept, ordered.flatten()]),
            verify(drafted, logits, params, generator, method=method),
        )

    def most(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda rows, *rest, **named: (seen.append(len(rows)), function(rows, *rest, **named))[1]

    at_once, seen = outcome(), []
    monkeypatch.setattr(tree.blocks, "BLOCK_ENTRIES", 2 * 8 + 3)  # two rows
    for module, name in WORK_ON_ROWS:
        monkeypatch.setattr(module, name, most(getattr(module, name)))
    drafted, chances, verdict = outcome()
    assert torch.equal(drafted.token_ids, at_once[0].token_ids) and torch.equal(chances, at_once[1]) and verdict == at_once[2]
    assert drafted.probabilities is None or (
        at_once[0].probabilities is not None and torch.equal(drafted.probabilities, at_once[0].probabilities)
    )
    assert max(seen) == 2


# -- the law of the text, sampled ----------------------------------------------------------------------------------------


def decode(
    draft: Markov, target: Markov, length: int, method: Method, *, sampled: bool, generator: torch.Generator
) -> list[int]:
    text = [0]
    while len(text) <= length:
        draft.root_token_id = text[-1]
        drafted = grow(draft, text[-1], TreeShape((-1, 0, 0, 1)), UNIT, generator, sampled=sampled)
        text += verify(drafted, target.table[drafted.token_ids], UNIT, generator, method=method).token_ids
    return text[1 : length + 1]


def pair_excess(target: Markov, pairs: list[tuple[int, int]]) -> float:
    """Pearson's statistic of pairs against the target's law of two tokens, in standard deviations above its mean."""
    rows = to_probabilities(target.table, UNIT)
    expected = (rows[0][:, None] * rows).flatten() * len(pairs)
    size = len(rows)
    counts = torch.tensor([first * size + second for first, second in pairs]).bincount(minlength=size * size)
    freedom = size * size - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
def test_sampled_text_has_the_law_of_the_target_across_rounds(method: Method) -> None:
    """Chi-square of 500 texts of two tokens, nine cells. Above 7 standard deviations with probability below 1e-5."""
    target, draft = Markov(random_markov(21, 3).table / 2), random_markov(22, 3)
    generator = torch.Generator().manual_seed(99)
    texts = [decode(draft, target, 2, method, sampled=True, generator=generator) for _ in range(500)]
    assert pair_excess(target, [(first, second) for first, second in texts]) < 7


def repeats(method: Method, generators: Iterator[torch.Generator]) -> float:
    """How often the first token of a round is that of the round before, where law and draft never change."""
    flat = Markov(torch.zeros(4, 4))
    firsts = []
    for generator, _ in zip(generators, range(500), strict=False):
        drafted = grow(flat, 0, from_widths((2,)), UNIT, generator, sampled=True)
        firsts.append(verify(drafted, flat.table[drafted.token_ids], UNIT, generator, method=method).token_ids[0])
    return sum(before == after for before, after in pairwise(firsts)) / (len(firsts) - 1)


def fresh() -> Iterator[torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield generator


def stale() -> Iterator[torch.Generator]:
    """The mistake of Sequoia's code: noise drawn once and used in every round."""
    while True:
        yield torch.Generator().manual_seed(1)


@pytest.mark.matrix
@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_independent(method: Method) -> None:
    """Equal neighbours among 500 uniform tokens of four: 1/4 within 6 sigma (0.116). False alarm: 2e-9. Stale noise: 1."""
    assert repeats(method, fresh()) == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / 499))
    assert repeats(method, stale()) == 1.0
