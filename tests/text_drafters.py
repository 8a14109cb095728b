"""Drafters without a model: small, real, for any vocabulary, and with shapes that depend on the text.

TextDrafter mixes drawn and chosen children. FeatureDrafter follows what the target computed. Both go by what is known before a
child is drawn, so the text is the target's own. Neither knows a device: trees are on that of the generator.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tree.aim import Aim
from tree.draft import DraftTree
from tree.sampling import SamplingParams, sample_without_replacement, to_probabilities
from tree.shape import TreeShape

MOST_NODES = 8  # until `aim` says otherwise

# From a row of probabilities [V], and of logits [V] for when nothing is left of it, to a token.
Draw = Callable[[Tensor, Tensor, torch.Generator], int]


def draw_token(probabilities: Tensor, logits: Tensor, generator: torch.Generator) -> int:
    """As `tree.draft.grow` draws, on the generator's device."""
    rows, ranking = (row[None].to(generator.device) for row in (probabilities, logits))
    return int(sample_without_replacement(rows, 1, generator, ranking=ranking))


class TextDrafter:
    """Chooses what followed a token the last time it came, and draws from a row that depends on the token alone.

    How many children a node has, in which order, and where growth ends depends on the node's own token, on the text and on
    earlier siblings. num_ahead: how often `grow_ahead` was called, for all texts together. aimed: what `aim` was told.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, vocab_size: int, *, draw: Draw = draw_token) -> None:
        self.vocab_size, self.draw = vocab_size, draw
        self.contexts: dict[int, TextContext] = {}  # by place
        self.aimed: list[tuple[TreeShape, int]] = []
        self.num_ahead = 0

    @property
    def most_nodes(self) -> int:
        return self.aimed[-1][0].num_nodes if self.aimed else MOST_NODES

    def aim(self, aim: Aim, max_rows: int) -> None:
        self.aimed.append((aim.shape, max_rows))

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> "TextContext":
        assert 0 < prompt_tokens <= len(token_ids)
        self.contexts[place] = TextContext(self, list(token_ids))
        return self.contexts[place]

    def logits(self, token_id: int) -> Tensor:
        """[V] float64, of the token after `token_id`."""
        return 2 * torch.cos((token_id + 1.0) * torch.arange(1, self.vocab_size + 1, dtype=torch.float64))


class TextContext:
    """A text of a TextDrafter. trees: all that were grown, those of rounds that were taken back included."""

    def __init__(self, drafter: TextDrafter, text: list[int]) -> None:
        self._drafter, self.text = drafter, text
        self.trees: list[DraftTree] = []

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        vocab_size, most = self._drafter.vocab_size, min(max_nodes, self._drafter.most_nodes)
        parents, token_ids, drawn, depths, rows = [-1], [self.text[-1]], [False], [0], []
        for node, token_id in enumerate(token_ids):  # which grow
            logits = self._drafter.logits(token_id)
            rows.append(to_probabilities(logits, params))
            siblings: list[int] = []
            for is_drawn in plan_children(token_id) if depths[node] + 1 < max_levels else ():
                if len(token_ids) == most or len(siblings) == vocab_size:
                    break
                if is_drawn:
                    left, ranking = rows[node].clone(), logits.clone()
                    left[siblings], ranking[siblings] = 0.0, -torch.inf
                    chosen = self._drafter.draw(left, ranking, generator) if sampled else int(ranking.argmax())
                elif (chosen := self._followed(token_id)) in (None, *siblings):
                    continue
                siblings.append(chosen)
                parents.append(node)
                token_ids.append(chosen)
                drawn.append(is_drawn and sampled)
                depths.append(depths[node] + 1)
        probabilities = torch.stack(rows).to(generator.device) if any(drawn) else None  # [N, V]
        ids = torch.tensor(token_ids, device=generator.device)
        self.trees.append(DraftTree(TreeShape(tuple(parents)), ids, probabilities, tuple(drawn)))
        return self.trees[-1]

    def grow_ahead(self) -> int:
        self._drafter.num_ahead += 1
        return 0

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        assert features is None and len(path) == len(token_ids)
        assert list(token_ids[:-1]) == self.trees[-1].token_ids[list(path[1:])].tolist()
        self.text.extend(token_ids)

    def leave(self) -> None:
        pass

    def _followed(self, token_id: int) -> int | None:
        """What came after `token_id` the last time, if it did."""
        pairs = zip(reversed(self.text[:-1]), reversed(self.text[1:]), strict=True)
        return next((after for before, after in pairs if before == token_id), None)


def plan_children(token_id: int) -> tuple[bool, ...]:
    """Whether each child is drawn, below a node of `token_id`; chosen children come first, last, or between."""
    return ((False, True), (True, False), (True, False, True))[token_id % 3]


class FeatureDrafter:
    """Wants outputs of the target's `feature_layers`, and remembers them: what it proposes is a function of the last ones.

    Before a text's first verdict there are none, and it proposes the root alone. All children are chosen.
    """

    def __init__(self, vocab_size: int, feature_layers: tuple[int, ...] = (0, 1)) -> None:
        self.vocab_size, self.feature_layers = vocab_size, feature_layers
        self.contexts: dict[int, FeatureContext] = {}  # by place
        self.most_nodes = MOST_NODES
        self.num_ahead = 0

    def aim(self, aim: Aim, max_rows: int) -> None:
        self.most_nodes = aim.shape.num_nodes

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> "FeatureContext":
        self.contexts[place] = FeatureContext(self, list(token_ids))
        return self.contexts[place]


class FeatureContext:
    """A text of a FeatureDrafter. features: what `follow` brought, a tensor a round."""

    def __init__(self, drafter: FeatureDrafter, text: list[int]) -> None:
        self._drafter, self.text = drafter, text
        self.features: list[Tensor] = []

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """A chain of one or two tokens, which the features name."""
        if not self.features:
            return DraftTree.root_only(torch.tensor(self.text[-1:], device=generator.device))
        number = int(100 * float(self.features[-1][-1].double().abs().sum()))
        num_nodes = min(2 + number % 2, max_nodes, max_levels, self._drafter.most_nodes)
        chain = [(number + level) % self._drafter.vocab_size for level in range(1, num_nodes)]
        token_ids = torch.tensor([self.text[-1], *chain], device=generator.device)
        return DraftTree(TreeShape(tuple(range(-1, num_nodes - 1))), token_ids, None, (False,) * num_nodes)

    def grow_ahead(self) -> int:
        self._drafter.num_ahead += 1
        return 0

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        assert features is not None and features.ndim == 2
        assert len(features) == len(path) == len(token_ids) and features.shape[1] % len(self._drafter.feature_layers) == 0
        self.features.append(features)
        self.text.extend(token_ids)

    def leave(self) -> None:
        pass
