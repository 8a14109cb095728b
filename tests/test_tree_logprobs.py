"""Scores of tokens are torch's log-softmax, for any block size and dtype, and a token's value is that of its entry in top."""

import math

import pytest
import torch

from tree import blocks, sampling
from tree.logprobs import score_tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_entries", [1, 40, 1 << 24])
def test_scores_are_log_softmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_entries: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", block_entries)
    logits = (torch.randn(7, 13, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    token_ids = [int(row.argmax()) if number % 2 else number for number, row in enumerate(logits)]
    expected = logits.double().log_softmax(-1)
    for number, scored in enumerate(score_tokens(logits, token_ids, 4)):
        assert scored.token_id == token_ids[number]
        assert scored.logprob == pytest.approx(float(expected[number, scored.token_id]), abs=1e-5)
        assert [value for _, value in scored.top] == sorted((value for _, value in scored.top), reverse=True)
        assert {token_id for token_id, _ in scored.top} == set(
            sampling.top_k_tokens(logits[number : number + 1], 4)[0].tolist()
        )
        if number % 2:  # the greedy token: lm-eval compares with ==
            assert scored.top[0] == (scored.token_id, scored.logprob)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (scored,) = score_tokens(torch.zeros(1, 3), [2], 20)
    assert scored.top == tuple((token_id, pytest.approx(-math.log(3))) for token_id in range(3))
    assert score_tokens(torch.zeros(1, 3), [2], 0)[0].top == ()
    assert score_tokens(torch.zeros(0, 3), [], 5) == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.zeros(2, 3)
    logits[1] = bad
    with pytest.raises(FloatingPointError, match="NaN or"):
        score_tokens(logits, [0, 1], 1)


def test_rows_and_tokens_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) for 1 tokens"):
        score_tokens(torch.zeros(2, 3), [0], 1)
