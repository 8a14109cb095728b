"""Sampled text of the real engine has the target's law: chi-square over whole continuations, several rounds each."""

from collections import Counter
from pathlib import Path

import pytest

from exactness import LENGTH, TREE, VOCAB_SIZE, chi_square, exact_probabilities, run, save_pair
from tree.sampling import SamplingParams

TEXTS = 150  # bench_exactness.py asks the same of 2e5 rounds
ALPHA = 1e-5  # per case; seeds are fixed, so a green test stays green


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("verifier", "temperature", "top_p"),
    [
        ("traversal", 1.0, 1.0),
        ("rejection", 1.5, 0.8),
        pytest.param("traversal", 0.6, 0.9, marks=pytest.mark.slow),
        pytest.param("sample", 0.3, 1.0, marks=pytest.mark.slow),
    ],
)
def test_sampled_text_has_the_law_of_the_target(
    pair: tuple[Path, Path], verifier: str, temperature: float, top_p: float
) -> None:
    """False-alarm probability 1e-5 a case."""
    outcome = run(*pair, verifier, SamplingParams(temperature=temperature, top_p=top_p), TEXTS, seed=0)
    assert outcome.rounds > outcome.texts, f"{TREE} must need more than one round"
    assert outcome.p_value > ALPHA, outcome


def test_the_chi_square_test_can_fail(pair: tuple[Path, Path]) -> None:
    """Negative control: text of the draft is told from the target's, and so is text of another temperature."""
    target, draft = pair
    target_law = exact_probabilities(target, SamplingParams(temperature=1.0))
    assert len(target_law) == VOCAB_SIZE**LENGTH
    for model, temperature in [(draft, 1.0), (target, 0.6)]:
        drawn_from = exact_probabilities(model, SamplingParams(temperature=temperature))
        drawn = Counter({text: round(probability * TEXTS) for text, probability in drawn_from.items()})
        assert chi_square(drawn, target_law, sum(drawn.values()))[0] < ALPHA
