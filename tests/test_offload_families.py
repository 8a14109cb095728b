"""Every causal language model that transformers has and we do not refuse: its logits are transformers' own at every node of a
tree, so each sees its path and nothing else, behind cached rows. What we would compute otherwise has to be refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import TINY_SIZES, VOCAB_SIZE, reference_model
from offload.errors import CheckpointError, ModelError
from offload.model.architecture import Architecture, architecture_of
from offload.model.attention import pass_mask
from test_offload_model import open_target, tree_logits
from tree.shape import TreeShape

MOST_PARAMETERS = 2_000_000  # where a composite config keeps the sizes of a real model in spite of ours
LEAST_FAMILIES = 30  # that run; fewer would mean that the test tests nothing
SIZES = {**TINY_SIZES, "max_position_embeddings": 64, "sliding_window": 64}
CACHED, PREFIX = [3, 14, 15, 92, 65, 35], [8, 9]
SHAPE = TreeShape.from_widths([2, 3, 1])


def accepted(family: str) -> Architecture | None:
    """None where we refuse it, where transformers does not take such sizes, or where they are not what it builds."""
    try:
        architecture = architecture_of(AutoConfig.for_model(family, **SIZES), family)
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
    with open_target(folder, max_context=64) as model, torch.no_grad():
        tree_logits(model, CACHED[:-1], CACHED[-1:], TreeShape.root_only())
        model.cache.commit(range(len(CACHED)))
        model.cache.poison_tail()
        logits = tree_logits(model, PREFIX, tokens, SHAPE)
        for node in range(SHAPE.num_nodes):
            path = [*CACHED, *PREFIX, *(tokens[ancestor] for ancestor in SHAPE.path(node))]
            expected = reference(torch.tensor([path])).logits[0, -1]
            if not (logits[node] - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1):
                return f"node {node}: {(logits[node] - expected).abs().max()}"
    return None


@pytest.mark.slow
def test_every_family_that_is_not_refused_computes_what_transformers_computes(tmp_path_factory: pytest.TempPathFactory) -> None:
    wrong, ran = {}, []
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        architecture = accepted(family)
        if architecture is None:
            continue
        folder = tmp_path_factory.mktemp(family)
        save_random(architecture.config, folder)
        try:
            found = differs(folder)
        except CheckpointError:  # files whose names are others than the model's: refused as well
            continue
        ran.append(family)
        if found is not None:
            wrong[family] = found
    assert not wrong, wrong
    assert len(ran) >= LEAST_FAMILIES, ran


def test_the_comparison_finds_a_node_that_sees_more_than_its_path(
    models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models(max_position_embeddings=64)
    assert differs(folder) is None

    def all_see_all(cached_rows: int, causal_rows: int, tree_mask: torch.Tensor) -> torch.Tensor:
        return pass_mask(cached_rows, causal_rows, torch.ones_like(tree_mask))

    monkeypatch.setattr("test_offload_model.pass_mask", all_see_all)
    assert (differs(folder) or "").startswith("node 0")
