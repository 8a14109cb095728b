import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tree.sampling import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    SamplingParams,
    _nucleus_by_sorting,
    _nucleus_of_leading,
    sample,
    sample_without_replacement,
    support_sizes,
    to_probabilities,
    top_k_tokens,
)

# Expected counts of a chi-square statistic stay within mean + 6 standard deviations except with probability < 1e-6.
FIVE = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20261121)


def chi_square_excess(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """(Pearson's statistic - mean) / standard deviation; above 6 with probability < 1e-6 for 10 or more cells."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all()
    cells = expected > 0
    statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


# -- probabilities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(1.0, top_p=0.6), [0, 1]),
        (SamplingParams(1.0, top_p=0.64), [0, 1]),
        (SamplingParams(1.0, top_p=0.66), [0, 1, 2]),  # the token that crosses is kept
        (SamplingParams(1.0, top_p=0.8), [0, 1, 2]),
        (SamplingParams(1.0, top_p=1e-9), [0]),  # at least one
        (SamplingParams(1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        (SamplingParams(1.0, top_k=2), [0, 1]),
        (SamplingParams(1.0, top_k=9), [0, 1, 2, 3, 4]),
        (SamplingParams(1.0, top_k=3, top_p=0.7), [0, 1]),  # top-p counts within top-k: 0.65 of 0.85 reaches 0.7
    ],
    ids=str,
)
def test_truncation_keeps_and_renormalises(params: SamplingParams, kept: list[int]) -> None:
    expected = torch.zeros_like(FIVE)
    expected[kept] = FIVE[kept] / FIVE[kept].sum()
    order = torch.tensor([3, 0, 4, 1, 2])  # not sorted, so that indices are put back
    assert torch.allclose(to_probabilities(FIVE.log()[order], params), expected[order], rtol=0, atol=1e-12)


def test_temperature_acts_before_top_p() -> None:
    """At temperature 2 the five are nearly flat, and 0.6 needs three tokens instead of two."""
    tempered = (FIVE.log() / 2).softmax(-1)
    expected = torch.where(torch.arange(5) < 3, tempered, 0.0)
    assert torch.allclose(to_probabilities(FIVE.log(), SamplingParams(2.0, top_p=0.6)), expected / expected.sum(), atol=1e-12)


def test_equal_logits_are_kept_in_order_of_token_id() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert to_probabilities(logits, SamplingParams(1.0, top_k=2)).tolist() == [0, 0.5, 0.5, 0, 0]
    assert to_probabilities(logits, SamplingParams(1e-3, top_p=0.5)).tolist() == pytest.approx([0, 0.5, 0.5, 0, 0])
    assert to_probabilities(logits, SamplingParams()).tolist() == [0, 1, 0, 0, 0]
    assert to_probabilities(torch.zeros(100_000), SamplingParams(1.0, top_k=3)).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, MIN_TEMPERATURE, 1e-3, 1.0, 1e3, MAX_TEMPERATURE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_laws_are_finite_and_sum_to_one_at_any_temperature(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, -4.0, -math.inf], [6e4, -6e4, 6e4, -math.inf], [-math.inf, -math.inf, 5, 1]])
    for params in (SamplingParams(temperature), SamplingParams(temperature, 2, 0.9)):
        probabilities = to_probabilities(logits.to(dtype), params)
        assert probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(probabilities.sum(-1), torch.ones((), dtype=probabilities.dtype))
        assert (probabilities >= 0).all() and (probabilities[logits == -math.inf] == 0).all()


def test_without_truncation_the_law_is_a_softmax(rng: torch.Generator) -> None:
    logits = torch.randn(7, 11, generator=rng, dtype=torch.float64)
    assert torch.allclose(to_probabilities(logits, SamplingParams(0.7)), (logits / 0.7).softmax(-1), rtol=1e-12, atol=0)


def test_rows_are_independent_and_inputs_unchanged(rng: torch.Generator) -> None:
    logits = torch.randn(2, 3, 50, generator=rng)
    before = logits.clone()
    params = SamplingParams(0.8, top_k=20, top_p=0.9)
    probabilities = to_probabilities(logits, params)
    assert torch.equal(logits, before)
    for index in range(2):
        for row in range(3):
            assert torch.allclose(probabilities[index, row], to_probabilities(logits[index, row], params))


@given(st.integers(1, 12), st.floats(0.01, 0.999), st.integers(0, 10_000))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(size: int, top_p: float, seed: int) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=1)
    full, nucleus = to_probabilities(logits, SamplingParams(1.0)), to_probabilities(logits, SamplingParams(1.0, top_p=top_p))
    kept = nucleus > 0
    assert full[kept].sum() >= top_p - 1e-12
    assert full[kept].sum() - full[kept].min() < top_p + 1e-12
    assert not (~kept).any() or full[~kept].max() <= full[kept].min()


def rows_of_every_kind(vocab_size: int, rng: torch.Generator) -> torch.Tensor:
    """Laws [16, V]: peaked, flat, one-hot, long-tailed; ties by the hundred, at every threshold; zeros; mass short of 1."""
    noise = torch.randn(4, vocab_size, generator=rng)
    zipf = -1.5 * torch.arange(1, vocab_size + 1).log()
    rows = [
        *(noise * 9),
        *noise,
        *(zipf + noise).round(decimals=0),
        torch.zeros(vocab_size),
        noise[0].masked_fill(noise[0] < noise[0].median(), -math.inf),
    ]
    probabilities = torch.stack(rows).softmax(-1)
    return torch.cat([probabilities, probabilities[:1] * 0.5, torch.eye(vocab_size)[-1:]])


@pytest.mark.matrix
@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 4096, 4100, 9000])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1 - 1e-6])
def test_a_nucleus_without_a_full_sort_is_the_sorted_one_bit_for_bit(
    vocab_size: int, top_p: float, rng: torch.Generator
) -> None:
    for probabilities in (rows_of_every_kind(vocab_size, rng), rows_of_every_kind(vocab_size, rng).double()):
        assert torch.equal(_nucleus_of_leading(probabilities, top_p), _nucleus_by_sorting(probabilities, top_p))
    for shaped in (
        probabilities[0],
        probabilities.view(2, 8, vocab_size),
        probabilities[:0],
        probabilities.t().contiguous().t(),
    ):
        assert torch.equal(_nucleus_of_leading(shaped, top_p), _nucleus_by_sorting(shaped, top_p))


def test_a_row_of_nan_spoils_no_other_nucleus(rng: torch.Generator) -> None:
    probabilities = rows_of_every_kind(300, rng)
    probabilities[3] = math.nan
    others = torch.arange(len(probabilities)) != 3
    nucleus = _nucleus_of_leading(probabilities, 0.9)
    assert nucleus[3].isnan().all() and torch.equal(nucleus[others], _nucleus_by_sorting(probabilities, 0.9)[others])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_bad_parameters_are_refused_by_name(fields: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingParams(**fields)  # type: ignore[arg-type]


# -- sample --------------------------------------------------------------------------------------------------------------


def test_samples_have_the_law_of_their_row(rng: torch.Generator) -> None:
    """Chi-square of 1e5 draws in each of two rows of 12 tokens. False alarm: below 1e-5."""
    probabilities = torch.tensor([[0.3, 0, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01], [1 / 12] * 12])
    drawn = sample(probabilities[:, None].expand(2, 100_000, 12), rng)
    for row in range(2):
        assert chi_square_excess(drawn[row].bincount(minlength=12).double(), probabilities[row].double()) < 6


def test_a_token_of_probability_zero_never_wins(rng: torch.Generator) -> None:
    probabilities = torch.zeros(1000, 1000)
    probabilities[:, 7] = 1e-38
    assert (sample(probabilities, rng) == 7).all()


def test_rows_of_a_batch_are_independent(rng: torch.Generator) -> None:
    """Equal neighbours among 1e5 rows of a fair four-sided die: 1/4 within 6 sigma. False alarm: 2e-9."""
    drawn = sample(torch.full((100_000, 4), 0.25), rng)
    assert (drawn[1:] == drawn[:-1]).double().mean() == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / 1e5))


def test_the_same_seed_gives_the_same_tokens_and_another_does_not() -> None:
    probabilities = torch.full((100, 50), 0.02)
    first, second, other = (sample(probabilities, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_tail_of_a_large_vocabulary_is_sampled(rng: torch.Generator) -> None:
    """Zipf over 32000 tokens: first draws with probability below 1e-4 make 10.38 %; float16 noise gave 0.07 %.

    1500 draws, 5 sigma. False alarm: 6e-7.
    """
    zipf = 1 / torch.arange(1, 32_001, dtype=torch.float64)
    zipf /= zipf.sum()
    tail = float(zipf[zipf < 1e-4].sum())
    in_tail, num_draws = 0, 0
    for _ in range(15):
        probabilities = zipf.float().expand(100, -1)
        first = sample_without_replacement(probabilities, 2, rng, ranking=probabilities)[:, 0]
        in_tail, num_draws = in_tail + int((zipf[first] < 1e-4).sum()), num_draws + 100
    assert in_tail / num_draws == pytest.approx(tail, abs=5 * math.sqrt(tail * (1 - tail) / num_draws))


# -- without replacement -------------------------------------------------------------------------------------------------


def test_ordered_triples_have_the_law_of_sequential_draws(rng: torch.Generator) -> None:
    """q_a * q_b / (1 - q_a) * q_c / (1 - q_a - q_b) for all 60 triples of five tokens; 2e5 draws. False alarm: 1e-6."""
    probabilities = FIVE.expand(200_000, 5)
    drawn = sample_without_replacement(probabilities, 3, rng, ranking=probabilities)
    counts = (drawn[:, 0] * 25 + drawn[:, 1] * 5 + drawn[:, 2]).bincount(minlength=125).double()
    expected = torch.zeros(125, dtype=torch.float64)
    for a, b, c in permutations(range(5), 3):
        expected[a * 25 + b * 5 + c] = FIVE[a] * FIVE[b] / (1 - FIVE[a]) * FIVE[c] / (1 - FIVE[a] - FIVE[b])
    assert expected.sum() == pytest.approx(1.0)
    assert chi_square_excess(counts, expected) < 6


def test_exhausted_support_is_followed_by_the_ranking(rng: torch.Generator) -> None:
    """C11: no duplicates, the support first, then the largest logits among the rest, for certain."""
    logits = torch.tensor([5.0, 1.0, -math.inf, 3.0, 4.0, 2.0, -1.0, 0.0])
    params = SamplingParams(1.0, top_k=2)
    probabilities = to_probabilities(logits, params).expand(500, -1)
    assert support_sizes(probabilities).tolist() == [2] * 500
    drawn = sample_without_replacement(probabilities, 8, rng, ranking=logits.expand(500, -1))
    assert set(map(tuple, drawn[:, :2].tolist())) == {(0, 4), (4, 0)}
    assert (drawn[:, 2:] == torch.tensor([3, 5, 1, 7, 6, 2])).all()


def test_greedy_draws_are_the_ranking(rng: torch.Generator) -> None:
    logits = torch.randn(20, 30, generator=rng)
    drawn = sample_without_replacement(to_probabilities(logits, SamplingParams()), 5, rng, ranking=logits)
    assert torch.equal(drawn, top_k_tokens(logits, 5))


def test_more_children_than_tokens_are_refused(rng: torch.Generator) -> None:
    probabilities = torch.full((1, 4), 0.25)
    with pytest.raises(ValueError, match=r"5 distinct children .* vocabulary of 4"):
        sample_without_replacement(probabilities, 5, rng, ranking=probabilities)
    with pytest.raises(ValueError, match="5 distinct children"):
        top_k_tokens(probabilities, 5)


# -- top-k tokens and blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(size=st.integers(1, 40), data=st.data())
def test_top_k_tokens_are_sorted_by_logit_then_id(dtype: torch.dtype, size: int, data: st.DataObject) -> None:
    logits = [-math.inf, -2.0, -0.5, -1e-6, -0.0, 0.0, 1e-6, 0.5, 1.0, 2.0, 3e4]
    values = data.draw(st.lists(st.sampled_from(logits), min_size=size, max_size=size))
    k = data.draw(st.integers(1, size))
    expected = sorted(range(size), key=lambda token: (-values[token], token))[:k]
    assert top_k_tokens(torch.tensor([values], dtype=dtype), k).tolist() == [expected]


def test_top_k_tokens_stay_distinct_when_few_logits_are_finite() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, 4] = 1.0
    tokens = top_k_tokens(logits, 4)[0].tolist()
    assert tokens[0] == 4 and len(set(tokens)) == 4
