"""Trees of dozens of levels, as a draft that knows its target well is given: grown, judged, planned, drawn and run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from conftest import reference_model
from drafters import PROMPT, open_tiny
from fakes import RecordingDevice
from offload.device.cpu import CpuDevice
from shapes import chain
from tree.acceptance import Acceptance
from tree.draft import grow
from tree.draw import draw_svg
from tree.optimizer import best_tree, expected_tokens, growth
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.spec import OptimalTree, parse_tree_spec
from tree.verify import METHODS, Method, verify

Models = Callable[..., Path]
VOCABULARY = 11
DEEP = [chain(65), chain(201), TreeShape.chains(3, 90), best_tree(Acceptance(((0.95, 0.03),)), 128, 80)]


class Markov:
    """Logits depend on the last token alone."""

    def __init__(self, seed: int) -> None:
        self.table = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def begin(self) -> torch.Tensor:
        return self.table[:1]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        return self.table[token_ids]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", DEEP, ids=lambda shape: f"{shape.num_nodes}x{shape.num_levels}")
def test_a_draft_that_is_its_target_is_accepted_to_the_last_level(shape: TreeShape, method: Method) -> None:
    model, generator = Markov(1), torch.Generator().manual_seed(2)
    for params, sampled in ((SamplingParams(), False), (SamplingParams(temperature=0.6), True)):
        draft = grow(model, 0, shape, params, generator, sampled=sampled)
        verdict = verify(draft, model.table[draft.token_ids], params, generator, method=method)
        if method != "sample" or not sampled:  # which draws a token of the target's own
            assert len(verdict.token_ids) == shape.num_levels
            assert verdict.path == shape.path(verdict.path[-1])


def test_a_chain_ends_where_its_target_thinks_otherwise() -> None:
    model, params, generator = Markov(1), SamplingParams(), torch.Generator().manual_seed(2)
    draft = grow(model, 0, chain(80), params, generator, sampled=False)
    logits = model.table[draft.token_ids].clone()
    logits[57] = -logits[57]
    assert verify(draft, logits, params, generator, method="traversal").path == tuple(range(58))


def test_specifications_plans_and_pictures_go_as_deep() -> None:
    assert parse_tree_spec("48x48") == OptimalTree(48, 48) and parse_tree_spec("1x200:kary") == chain(201)
    sure = Acceptance(((0.98, 0.005),))
    assert best_tree(sure, 48, 48) == chain(48)
    assert expected_tokens(chain(48), sure) == pytest.approx((1 - 0.98**48) / 0.02)
    grown = growth(sure, 256, 64)
    assert grown.expected_tokens(torch.tensor([64]).numpy())[0] == pytest.approx(expected_tokens(chain(64), sure))
    assert best_tree(sure, 256, 64).num_levels == 64
    assert draw_svg(chain(100)).count("<circle") == 100


@pytest.mark.matrix
@pytest.mark.parametrize(("make", "tree"), [(CpuDevice, "1x100:kary"), (RecordingDevice, "2x60:kary")])
def test_an_engine_runs_trees_of_a_hundred_levels(models: Models, make: Callable[[], CpuDevice], tree: str) -> None:
    """A model that is its own draft: nearly every level is accepted, and the text is that of plain decoding."""
    folder = models(max_position_embeddings=512)
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        plain = reference_model(folder).generate(ids, do_sample=False, max_new_tokens=150, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    with open_tiny(folder, make(), max_context=300, tree=tree) as engine:
        found = engine.generate(PROMPT, max_new_tokens=150, ignore_eos=True)
        assert engine.plan.tree == parse_tree_spec(tree)
    assert list(found.token_ids) == plain[0, len(PROMPT) :].tolist()
    assert found.stats.tokens_per_pass > 30
