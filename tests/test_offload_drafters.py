"""Drafters that are no model of ours, through the whole loop: the text is the target's own, whatever shape its trees have."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import VOCAB_SIZE
from exactness import LENGTH, chi_square, exact_probabilities, save_pair
from exactness import PROMPT as PAIR_PROMPT
from fakes import DEVICES
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.engine.decode import DecodeLoop
from offload.engine.engine import Engine
from offload.engine.sessions import Sessions
from offload.planner.tree_flag import resolve_method
from planning import L40
from test_offload_engine import greedy
from text_drafters import FeatureDrafter, TextDrafter
from tree.draft import Drafter
from tree.sampling import SamplingParams

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 5, 9, 71, 5]


@contextmanager
def open_with(
    folder: Path,
    drafter: Drafter,
    kind: str = "cpu",
    verifier: str = "auto",
    device: Device | None = None,
    **changes: Any,
) -> Iterator[Engine]:
    """An engine whose trees come from `drafter`. It was planned with a model for a draft, for the room of a tree."""
    settings = EngineSettings(
        model=str(folder), draft_models=(str(folder),), tree="3x3:kary", device="cpu", dtype="float32", **changes
    )
    with open_engine(settings, device=device or DEVICES[kind](), hardware=L40) as engine:
        loop, plan = engine.loop, engine.plan
        drafter.aim(plan.aim, plan.pass_rows)
        sessions = Sessions([loop._target.cache], max_bytes=2**20)
        parts = loop._device, loop._target, loop._stream, drafter, sessions, plan
        engine.loop = DecodeLoop(*parts, method=resolve_method(verifier), fallbacks=loop.fallbacks)
        yield engine


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(DEVICES))
@pytest.mark.parametrize("verifier", ["traversal", "rejection", "sample"])
def test_trees_of_any_shape_give_the_greedy_text(models: Models, kind: str, verifier: str) -> None:
    folder, drafter = models(), TextDrafter(VOCAB_SIZE)
    shapes = set()
    with open_with(folder, drafter, kind, verifier, resident_layers=1, slots=2) as engine:
        for prompt in (PROMPT, PROMPT[:2], [3] * 40):
            steps = list(engine.stream(prompt, max_new_tokens=20))
            assert [token_id for step in steps for token_id in step.token_ids] == greedy(folder, prompt, 20)
            shapes |= {step.shape for step in steps}
            assert [step.stats.num_rows for step in steps[1:]] == [step.shape.num_nodes for step in steps[1:]]
        assert len(shapes) > 2 and max(shape.num_nodes for shape in shapes) <= engine.plan.tree.num_nodes


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("resident_layers", [0, 2, 3])
def test_a_drafter_may_go_on_growing_while_a_pass_runs(models: Models, at_once: bool, resident_layers: int) -> None:
    """As often as is planned, whatever the layers do."""
    folder, drafter = models(num_layers=3), TextDrafter(VOCAB_SIZE)
    expected = greedy(folder, PROMPT, 9)
    with open_with(folder, drafter, resident_layers=resident_layers) as engine:
        engine.loop._plan, engine.loop._device.at_once = replace(engine.plan, ahead_steps=4), at_once
        report = engine.generate(PROMPT, max_new_tokens=9, ignore_eos=True)
        assert list(report.token_ids[: len(expected)]) == expected
        assert drafter.num_ahead == 4 * len(report.stats.passes)


@pytest.mark.slow
@pytest.mark.parametrize("verifier", ["traversal", "rejection", "sample"])
def test_texts_of_mixed_trees_have_the_law_of_the_target(tmp_path: Path, verifier: str) -> None:
    """Chosen and drawn children, in shapes that depend on the text. False-alarm probability 1e-5; the seeds are fixed."""
    target, _ = save_pair(tmp_path)
    params, num_texts = SamplingParams(temperature=1.0), 250
    expected = exact_probabilities(target, params)
    vocab_size = 1 + max(token_id for text in expected for token_id in text)
    counts: Counter[tuple[int, ...]] = Counter()
    with open_with(target, TextDrafter(vocab_size), verifier=verifier) as engine:
        for seed in range(num_texts):
            report = engine.generate(PAIR_PROMPT, max_new_tokens=LENGTH, temperature=1.0, seed=seed, ignore_eos=True)
            counts[report.token_ids] += 1
    assert chi_square(counts, expected, num_texts)[0] > 1e-5


def hidden_states(folder: Path, text: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What each decoder layer puts out for `text` in transformers, [N, D] each; the last without its norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _module, _args, output: found.append((output[0] if isinstance(output, tuple) else output)[0])
        )
    with torch.no_grad():
        model(torch.tensor([list(text)]))
    return tuple(found)


@pytest.mark.parametrize("layers", [(0, 2), (1,)])
def test_a_drafter_that_wants_them_gets_the_features_of_the_accepted_rows(models: Models, layers: tuple[int, ...]) -> None:
    folder, drafter = models(num_layers=3), FeatureDrafter(VOCAB_SIZE, layers)
    with open_with(folder, drafter) as engine:
        report = engine.generate(PROMPT, max_new_tokens=12)
        assert list(report.token_ids) == greedy(folder, PROMPT, 12)
        features = torch.cat(drafter.contexts[0].features)  # [tokens, layers * D]
        text = drafter.contexts[0].text
    states = hidden_states(folder, text[:-1])
    expected = torch.cat([states[layer] for layer in layers], dim=1)[len(PROMPT) - 1 :]
    assert features.shape == expected.shape and torch.allclose(features, expected, atol=1e-4)
