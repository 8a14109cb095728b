"""Log-probabilities of prompt and answer are transformers' own, for every tree and chunk, and asking changes no token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import reference_model
from offload.engine import decode
from offload.engine.engine import Engine
from offload.engine.generation import Step
from test_offload_engine import open_tiny
from tree.logprobs import Scoring

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71, 8, 8, 41, 3, 90, 12, 7]


def steps_of(engine: Engine, scoring: Scoring | None, *, num_tokens: int = 12, temperature: float = 0.0) -> list[Step]:
    request = engine.admission.request(PROMPT, max_new_tokens=num_tokens, temperature=temperature, seed=3, scoring=scoring)
    return list(engine.run(request))


def reference_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference_model(folder)(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("tree", ["none", "4x3:kary"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_are_those_of_transformers_and_change_no_token(models: Models, tree: str, temperature: float) -> None:
    folder = models()
    with open_tiny(folder, models(num_layers=1, seed=1) if tree != "none" else None, tree=tree) as engine:
        plain = steps_of(engine, None, temperature=temperature)
        scored = steps_of(engine, Scoring(num_top=3, prompt=True), temperature=temperature)
    token_ids = [token_id for step in scored for token_id in step.token_ids]
    assert token_ids == [token_id for step in plain for token_id in step.token_ids]
    assert all(step.scores == () and step.prompt_scores == () for step in plain)
    scores = [*scored[0].prompt_scores, *(score for step in scored for score in step.scores)]
    assert [score.token_id for score in scores] == [*PROMPT, *token_ids][1:]
    assert all(step.prompt_scores == () for step in scored[1:])
    expected = reference_logprobs(folder, [*PROMPT, *token_ids])
    for row, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[row, score.token_id]), abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx(expected[row].topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("most_rows", [2, 5])
def test_a_long_prompt_is_scored_in_chunks(models: Models, monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
    folder = models()
    expected = reference_logprobs(folder, PROMPT)
    with open_tiny(folder, None) as engine:
        monkeypatch.setattr(decode, "SCORED_LOGITS_BYTES", most_rows * 4 * engine.admission.vocab_size)
        (step,) = steps_of(engine, Scoring(prompt=True), num_tokens=1)
        assert step.stats.bytes_streamed == -(-len(PROMPT) // most_rows) * engine.plan.bytes_per_pass
    values = [score.logprob for score in step.prompt_scores]
    assert values == pytest.approx([float(expected[row, PROMPT[row + 1]]) for row in range(len(PROMPT) - 1)], abs=1e-4)


def test_scoring_a_prompt_takes_one_pass(models: Models) -> None:
    with open_tiny(models(), models(num_layers=1, seed=1), tree="4x6:kary", resident_layers=0) as engine:
        (step,) = steps_of(engine, Scoring(prompt=True), num_tokens=1)
        assert step.stats.bytes_streamed == engine.plan.bytes_per_pass > 0
        assert (step.stats.num_rows, len(step.scores)) == (len(PROMPT), 1)


def test_a_scored_prompt_reuses_nothing_and_leaves_nothing_wrong_behind(models: Models) -> None:
    """Rows that were kept from an earlier request have no logits; and what scoring leaves in the cache may be gone on from."""
    folder = models()
    with open_tiny(folder, models(num_layers=1, seed=1)) as engine:
        plain = [step.token_ids for step in steps_of(engine, None)]
        scores = [steps_of(engine, Scoring(num_top=2, prompt=True))[0].prompt_scores for _ in range(2)]
        assert scores[0] == scores[1] and len(scores[0]) == len(PROMPT) - 1
        again = steps_of(engine, None)
        assert [token_id for step in again for token_id in step.token_ids] == [token_id for ids in plain for token_id in ids]
        assert again[0].stats.num_rows == engine.plan.tree.num_nodes  # this one did reuse
