"""Chi-square of the engine's text against the target's exact probabilities, over every continuation of a few tokens."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offload.assemble import open_engine
from offload.config import EngineSettings
from planning import L40
from tree.sampling import SamplingParams, to_probabilities

VOCAB_SIZE = 6
LENGTH = 4  # more than a pass of the tree below can emit, so that every text takes at least two rounds
TREE = "2x2:kary"
PROMPT = [1, 4, 2]


@dataclass(frozen=True)
class Outcome:
    """`p_value` of the chi-square test with `degrees` degrees of freedom over `texts` texts of LENGTH tokens, made in
    `rounds` rounds."""

    p_value: float
    degrees: int
    texts: int
    rounds: int


def save_pair(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A target and a draft that disagree, with probabilities far from uniform."""
    for name, seed in (("target", 0), ("draft", 1)):
        config = AutoConfig.for_model(
            "llama",
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=None,
            initializer_range=0.5,
        )
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder / name)
    return folder / "target", folder / "draft"


def exact_probabilities(target: Path, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probability of each continuation of PROMPT by LENGTH tokens, by the chain rule over transformers' own logits."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
    texts = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
    rows = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
    with torch.no_grad():
        rows_of_text = to_probabilities(model(rows).logits[:, len(PROMPT) - 1 : -1], params)
    probabilities = rows_of_text.gather(-1, texts[..., None])[..., 0].prod(-1)
    return dict(zip(map(tuple, texts.tolist()), probabilities.tolist(), strict=True))


def run(target: Path, draft: Path | str, verifier: str, params: SamplingParams, texts: int, seed: int) -> Outcome:
    """Generate `texts` texts with seeds from `seed` on, and test them. `draft` may be a base of the target."""
    counts: Counter[tuple[int, ...]] = Counter()
    rounds = 0
    settings = EngineSettings(
        model=str(target), draft_models=(str(draft),), tree=TREE, verifier=verifier, device="cpu", resident_layers=0, slots=2
    )
    with open_engine(settings, hardware=L40) as engine:
        for number in range(texts):
            report = engine.generate(
                PROMPT,
                max_new_tokens=LENGTH,
                temperature=params.temperature,
                top_p=params.top_p,
                seed=seed + number,
                ignore_eos=True,
            )
            counts[report.token_ids] += 1
            rounds += len(report.stats.passes)
    p_value, degrees = chi_square(counts, exact_probabilities(target, params), texts)
    return Outcome(p_value, degrees, texts, rounds)


def chi_square(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float], total: int) -> tuple[float, int]:
    """(p-value, degrees of freedom). Rare outcomes are pooled until 5 are expected; an impossible one has p-value 0."""
    if any(exact[text] == 0 for text in counts):
        return 0.0, 0
    statistic, cells, pooled_count, pooled = 0.0, 0, 0, 0.0
    for text, probability in sorted(exact.items(), key=lambda item: item[1]):
        pooled, pooled_count = pooled + probability * total, pooled_count + counts[text]
        if pooled >= 5:
            statistic += (pooled_count - pooled) ** 2 / pooled
            cells, pooled, pooled_count = cells + 1, 0.0, 0
    degrees = max(cells - 1, 1)
    tail = torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), torch.tensor(statistic / 2).double())
    assert math.isfinite(statistic)
    return float(tail), degrees
