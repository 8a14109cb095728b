"""What a round asks of a drafter, the tree that it answers with, and growing one of a shape that is known beforehand.

Knows nothing of caches, masks or devices: drafters keep those. In `grow`, the children of a level are drawn in one batch, only
nodes that have children are run, and token ids stay tensors, so growing a tree never waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .aim import Aim
from .blocks import row_blocks
from .sampling import SamplingParams, sample_without_replacement, to_probabilities, top_k_tokens
from .shape import TreeShape
from .transfer import index_tensor


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no truth value to compare by
class DraftTree:
    """A grown tree: what `tree.verify` judges.

    shape: its own; nothing outside the drafter knows it before.
    token_ids: int64 [N] in node order, the root's first. Siblings are distinct, and offered to the verifier in order.
    probabilities: [R, V], the rows from which drawn children were drawn; other rows are not looked at. None if no node was
        drawn.
    drawn: [N]; whether a node was drawn at random, or chosen: a function of what was known before. False for the root.
    rows: [N]; the row of `probabilities` from which the drawn children of a node were drawn, anything for a node without. None
        where row v is that of node v.
    tops: float32 [N], on any device: how sure the draft was at each node that has children of a model, by the largest
        probability of the row that they were drawn from; of the draft's own, at temperature 1, if all were chosen. Anything at
        other nodes; None if nobody knows. Acceptance is counted by it.
    found: nodes whose tokens no model computed: they were found in a text.
    foreseen: how many nodes were grown while the target's last pass ran.

    A drawn child was drawn from its parent's row without the tokens of all earlier siblings, drawn or chosen, renormalised; a
    row of which nothing is left then is followed by a certain token, as in `sampling.sample_without_replacement`. ValueError
    where the fields contradict each other.
    """

    shape: TreeShape
    token_ids: Tensor
    probabilities: Tensor | None
    drawn: tuple[bool, ...]
    rows: tuple[int, ...] | None = None
    found: frozenset[int] = frozenset()
    foreseen: int = 0
    tops: Tensor | None = None

    def __post_init__(self) -> None:
        num_nodes = self.shape.num_nodes
        if self.token_ids.shape != (num_nodes,) or len(self.drawn) != num_nodes:
            found = f"{tuple(self.token_ids.shape)} token ids and {len(self.drawn)} marks of what was drawn"
            raise ValueError(f"{found} for a tree of {num_nodes} nodes")
        if self.tops is not None and self.tops.shape != (num_nodes,):
            raise ValueError(f"largest probabilities of shape {tuple(self.tops.shape)} for a tree of {num_nodes} nodes")
        if self.drawn[0]:
            raise ValueError("the root is the last committed token: it cannot be drawn")
        if self.probabilities is None and any(self.drawn):
            raise ValueError(f"node {self.drawn.index(True)} is drawn, but there are no probabilities that it was drawn from")
        if self.probabilities is not None and not any(self.drawn):
            raise ValueError("there are probabilities to draw from, but no node is drawn")
        if self.probabilities is not None:
            self._check_rows(self.probabilities)

    def _check_rows(self, probabilities: Tensor) -> None:
        num_nodes = self.shape.num_nodes
        if probabilities.ndim != 2 or (self.rows is None and len(probabilities) != num_nodes):
            raise ValueError(f"probabilities of shape {tuple(probabilities.shape)} for a tree of {num_nodes} nodes")
        if self.rows is None:
            return
        if len(self.rows) != num_nodes:
            raise ValueError(f"{len(self.rows)} numbers of rows for a tree of {num_nodes} nodes")
        for node, is_drawn in enumerate(self.drawn):
            if is_drawn and not 0 <= self.rows[self.shape.parents[node]] < len(probabilities):
                row = self.rows[self.shape.parents[node]]
                raise ValueError(f"node {node} is drawn from row {row} of {len(probabilities)} rows of probabilities")

    def row_of(self, node: int) -> int:
        """The row of `probabilities` from which the drawn children of `node` were drawn."""
        return node if self.rows is None else self.rows[node]

    @classmethod
    def root_only(cls, root: Tensor) -> "DraftTree":
        """Plain decoding: no speculation. `root`: int64 [1], the last committed token."""
        return cls(TreeShape.root_only(), root, None, (False,))


class DraftContext(Protocol):
    """One text, as its drafter knows it.

    A round is `grow`, a pass of the target in which `grow_ahead` is called, and `follow`.
    """

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """A tree below the last committed token, of at most `max_nodes` nodes and `max_levels` levels; both count the root and
        are at least 1.

        params: what the target's tokens are sampled with. A drafter may draw from any probabilities, if the tree holds them.
        generator: the text's own; the tree is on its device. Nothing else is random.
        sampled: whether the verifier gains from children that were drawn. If not, all should be chosen.

        The text is the target's own only if growth is previsible (docs/losslessness.md, section 8). Which node gets a child,
        how many children, what they are drawn from and when growth ends may depend on all that was known before a child was
        drawn: the text, ancestors, earlier siblings, other branches, probabilities. They never depend on the value of the
        drawn child itself, and a drawn child is never dropped, moved or replaced for what it is. Chosen children are free.

        May be called again without `follow` in between, as a round may be taken back: as if the first call had not been.
        """
        ...

    def grow_ahead(self) -> int:
        """One step of work for later trees, such as one pass of a draft model, or nothing: how many nodes it was worth. Called
        while the pass runs that verifies the last tree, as many times as its plan says.

        What is drawn here may become the next tree as far as it hangs below the next root, if that was no node of the last
        tree: what the verifier has looked at is not drawn at random any more (docs/losslessness.md, section 9).
        """
        ...

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        """The verdict on the last tree.

        path: accepted nodes, the root first.
        token_ids: the tokens committed: those of path[1:], and one of the target's own, which is the next root.
        features: [len(path), len(feature_layers) * D], outputs of those layers at the accepted nodes, side by side; None if
            the drafter wants none.
        """
        ...

    def leave(self) -> object:
        """What the trees of a text go on from that gives its place up, between rounds, and may come back: see `Drafter.start`.
        It lies in host memory, and holds nothing of the place or the drafter, which may be closed while it is kept."""
        ...


class Drafter(Protocol):
    """Proposes trees for any number of texts at once.

    Each text has a place, a small number. A text that starts in a place follows the one that was there.
    """

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the target whose outputs `DraftContext.follow` wants; () for none."""
        ...

    def aim(self, aim: Aim, max_rows: int) -> None:
        """What a planner has chosen: trees like these, and passes of at most `max_rows` rows, from here on. Called between
        rounds. A drafter with a mind of its own takes the number of nodes of the shape as the most that it may grow."""
        ...

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> DraftContext:
        """A text begins in `place`, or is taken up again. `token_ids` are committed, the first `prompt_tokens` of them a
        prompt; the last is the root of the first tree. repeatable: its trees depend on nothing but this text, its seed and
        what `aim` was told, so that a seed repeats it; others may build on what was counted of earlier texts.
        before: what `DraftContext.leave` said in the place that the text had; its trees go on as if it had never left."""
        ...


class TreeModel(Protocol):
    """What `grow` asks of a draft model: nodes below a text, run one after another. Logits are of any float dtype, on the
    device of the generator given to `grow`.

    Nodes are known by the order in which they were run since `begin`, from 0 on; -1 is the root, the last committed token.
    """

    def begin(self) -> Tensor:
        """Logits [1, V] at the root, of the token after the text. Forgets all nodes."""
        ...

    def expand(self, parents: Sequence[int], token_ids: Tensor) -> Tensor:
        """Run one node below each of `parents`, on `token_ids` int64 [n]: logits [n, V]. A parent may be of the same call, and
        before its child."""
        ...


class TextModel(TreeModel, Protocol):
    """The same of a text that goes on, round after round."""

    @property
    def num_nodes(self) -> int:
        """How many nodes it knows: those run since `begin`, and those that were kept. None, where it had to let go of them: as
        memory ran out, or the text has become so long that all is computed anew. Then `begin` comes next."""
        ...

    @property
    def room(self) -> int:
        """How many more nodes can be run."""
        ...

    def follow(self, token_ids: Sequence[int], accepted: Sequence[int], kept: Sequence[int] = ()) -> None:
        """The text goes on with `token_ids`. `accepted` are nodes that were run on the first of them, a path from the root.
        `kept`, ascending, are nodes below the last of `token_ids`, which is then among those accepted: they stay, as nodes
        0, 1, ...; all others are forgotten."""
        ...


def grow(
    model: TreeModel,
    root_token_id: int,
    shape: TreeShape,
    params: SamplingParams,
    generator: torch.Generator,
    *,
    sampled: bool,
) -> DraftTree:
    """A tree of `shape` below `root_token_id`; the model is not called for the root alone.

    sampled: children are drawn without replacement from the draft's probabilities under `params`. Otherwise all are chosen:
    child k is the k-th most probable token of the draft. ValueError if a node has more children than the vocabulary has tokens.
    """
    token_ids = torch.full((shape.num_nodes,), root_token_id, dtype=torch.int64, device=generator.device)
    probabilities: Tensor | None = None
    tops = torch.zeros(shape.num_nodes, device=generator.device)
    runs = {0: -1}  # of the nodes that were run, by the order of that
    for level, nodes in enumerate(shape.expanded[:-1]):
        rows = index_tensor(nodes, token_ids.device)  # [n]
        if level:
            logits = model.expand([runs[shape.parents[node]] for node in nodes], token_ids.index_select(0, rows))  # [n, V]
            runs |= {node: len(runs) - 1 + place for place, node in enumerate(nodes)}
        else:
            logits = model.begin()  # [1, V]
        branching = max(shape.num_children[node] for node in nodes)
        children = token_ids.new_empty(len(nodes), branching)  # [n, branching]
        for block in row_blocks(*logits.shape):
            part = slice(block.start, block.stop)
            if sampled:
                drawn_from = to_probabilities(logits[part], params)  # [n, V]
                if probabilities is None:
                    probabilities = drawn_from.new_zeros(shape.num_nodes, drawn_from.shape[-1])  # [N, V]
                probabilities.index_copy_(0, rows[part], drawn_from)
                tops.index_copy_(0, rows[part], drawn_from.amax(-1).float())
                children[part] = sample_without_replacement(drawn_from, branching, generator, ranking=logits[part])
            else:
                children[part] = top_k_tokens(logits[part], branching)
                tops.index_copy_(0, rows[part], _largest_probabilities(logits[part]))
        below = shape.levels[level + 1]
        token_ids[below.start : below.stop] = children.flatten().index_select(0, _kept_children(shape, nodes, children))
    drawn = (False, *(sampled,) * (shape.num_nodes - 1))
    return DraftTree(shape, token_ids, probabilities, drawn, tops=tops)


def _largest_probabilities(logits: Tensor) -> Tensor:
    """Of the tokens that each row of `logits` [n, V] stands for, at temperature 1: float32 [n]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _kept_children(shape: TreeShape, nodes: tuple[int, ...], children: Tensor) -> Tensor:
    """Where the first num_children of each node's row lie in the flattened `children` [len(nodes), branching]."""
    branching = children.shape[1]
    kept = [row * branching + rank for row, node in enumerate(nodes) for rank in range(shape.num_children[node])]
    return index_tensor(kept, children.device)
