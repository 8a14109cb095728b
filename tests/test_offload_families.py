"""Every causal language model that transformers has and we do not refuse: its logits are transformers' own at every node of a
tree, so each sees its path and nothing else, behind cached rows, beside another text. What we would compute otherwise has to be
refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import TINY_SIZES, VOCAB_SIZE, reference_model
from offload.coding.base_kinds import BASE_KINDS
from offload.errors import CheckpointError, ModelError
from offload.model import pass_inputs
from offload.model.architecture import Architecture, architecture_of
from offload.model.attention import pass_mask
from offload.model.base_model import base_architecture
from shapes import from_widths
from small_models import open_model, text_part, tree_part

MOST_PARAMETERS = 2_000_000  # where a composite config keeps the sizes of a real model in spite of ours
LEAST_FAMILIES, LEAST_WITH_WINDOWS = 30, 5  # that run; fewer would mean that the test tests nothing
SIZES = {**TINY_SIZES, "max_position_embeddings": 64}
WINDOWS = (64, 7)  # one that no text here fills, and one that all do, where a family has windows
CACHED, PREFIX = [3, 14, 15, 92, 65, 35], [8, 9]
SHAPE = from_widths([2, 3, 1])


def accepted(family: str, window: int) -> Architecture | None:
    """None where we refuse it, where transformers does not take such sizes, or where they are not what it builds."""
    try:
        config = AutoConfig.for_model(family, **SIZES, sliding_window=window, use_sliding_window=True, max_window_layers=1)
        architecture = architecture_of(config, family)
    except ModelError:
        return None
    except Exception:  # configurations raise anything
        return None
    num_parameters = sum(parameter.numel() for parameter in architecture.model.parameters())
    return architecture if num_parameters < MOST_PARAMETERS else None


def save_random(config: Any, folder: Path) -> None:
    """All parameters random, those too that families begin with zeros or ones."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.25 if parameter.dim() > 1 else 1 + noise * 0.2)
    model.save_pretrained(folder)


def differs(folder: Path) -> str | None:
    """The first node whose logits are not transformers'; None when all are."""
    reference = reference_model(folder)
    tokens = [7 * node % VOCAB_SIZE for node in range(SHAPE.num_nodes)]
    with open_model(folder, num_segments=2, segment_rows=64, passing=False) as model, torch.no_grad():
        other, segment = model.cache.segments
        for reading, text in ((other, CACHED[:2]), (segment, CACHED)):
            model.forward((text_part(reading, text, 1),))
            reading.commit(range(len(text)))
            reading.poison_tail()
        parts = (text_part(other, PREFIX, 1), tree_part(segment, PREFIX, tokens, SHAPE))
        beside, logits = (output.logits for output in model.forward(parts))
        expected = reference(torch.tensor([[*CACHED[:2], *PREFIX]])).logits[0, -1]
        if not (beside[0] - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1):
            return f"the other text: {(beside[0] - expected).abs().max()}"
        for node in range(SHAPE.num_nodes):
            path = [*CACHED, *PREFIX, *(tokens[ancestor] for ancestor in SHAPE.path(node))]
            expected = reference(torch.tensor([path])).logits[0, -1]
            if not (logits[node] - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1):
                return f"node {node}: {(logits[node] - expected).abs().max()}"
    return None


@pytest.mark.slow
def test_every_family_that_runs_drafts_with_a_base_of_its_own() -> None:
    """All its matrices are those of linear maps, which its layers call; what is not would be refused by name."""
    can, cannot = [], {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if (architecture := accepted(family, WINDOWS[0])) is not None:
            layers = enumerate(architecture.layer_shapes)
            matrices = {f"model.layers.{layer}.{name}" for layer, shapes in layers for name in shapes if len(shapes[name]) == 2}
            try:
                base_architecture(architecture, BASE_KINDS["int4"], matrices, kernels=False)
                can.append(family)
            except ModelError as error:
                cannot[family] = error.what
    assert cannot == {} and len(can) >= LEAST_FAMILIES


@pytest.mark.slow
def test_every_family_that_is_not_refused_computes_what_transformers_computes(tmp_path_factory: pytest.TempPathFactory) -> None:
    wrong, ran = {}, []
    for family, window in itertools.product(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), WINDOWS):
        architecture = accepted(family, window)
        if architecture is None or (window < max(WINDOWS) and set(architecture.windows) == {None}):
            continue
        folder = tmp_path_factory.mktemp(family)
        save_random(architecture.config, folder)
        try:
            found = differs(folder)
        except CheckpointError:  # files whose names are others than the model's: refused as well
            continue
        ran.append((family, window))
        if found is not None:
            wrong[family, window] = found
    assert not wrong, wrong
    assert len({family for family, _ in ran}) >= LEAST_FAMILIES, ran
    assert len([window for _, window in ran if window < max(WINDOWS)]) >= LEAST_WITH_WINDOWS, ran


def test_the_comparison_finds_a_node_that_sees_more_than_its_path(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models(max_position_embeddings=64)
    assert differs(folder) is None

    def all_see_all(cached_rows: int, causal_rows: int, tree_mask: torch.Tensor) -> torch.Tensor:
        return pass_mask(cached_rows, causal_rows, torch.ones_like(tree_mask))

    monkeypatch.setattr(pass_inputs, "pass_mask", all_see_all)
    assert (differs(folder) or "").startswith("node 0")
