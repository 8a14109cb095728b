"""The nodes of a growing tree, and the order in which a verifier is offered them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Find:
    """A source, by its place, that proposed a token; in which bin, and how good the source says that such finds are."""

    source: int
    bin: int
    prior: float


@dataclass(slots=True, eq=False)
class Node:
    """A token in a growing tree.

    value: the estimated probability that the text runs through it. rank: which of its parent's candidates it is, and `find` who
    proposed it besides, or alone: then rank is -1. comes_last: whether no sibling is drawn from a row that has its token.
    run: its place in the model, -1 of the root; None if the model has not run it. row: where its children's probabilities are.
    top: the draft's largest probability after it; `left` that of what its found children leave of the row, renormalised.
    drawn_with: the probability that it had, if it was drawn. drafted: what the draft thinks a find is worth of its parent, -1
    if it was not asked. ahead: whether it was there before its round began.

    Of its candidates, `num_taken` have become children; the others are its slots, to be taken in order. token_ids and
    probabilities [K], and shares [K], what each is worth of `rest` of the node's value. Where children are drawn, the rest is
    what those before a slot are expected to leave, and `mass` is what is left to draw from. `beside`: tokens that are no
    candidates as they were found, and the draft's probabilities of those that it was asked about.
    """

    parent: "Node | None"
    token_id: int
    depth: int
    value: float
    rank: int = -1
    drawn: bool = False
    comes_last: bool = False
    find: Find | None = None
    run: int | None = None
    row: int = -1
    top: float = float("nan")
    left: float = 0.0
    drawn_with: float = 0.0
    drafted: float = -1.0
    rest: float = 1.0
    mass: float = 1.0
    submitted: bool = False
    ahead: bool = False
    children: list["Node"] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    num_taken: int = 0
    beside: dict[int, float] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether it may have one child more."""
        return self.num_taken < len(self.shares)

    @property
    def urgency(self) -> float:
        """What it is worth to run it; of one that was run, what its next child is worth."""
        if self.run is None:
            return self.value
        return self.value * self.rest * self.shares[self.num_taken] if self.is_open else 0.0

    def path(self) -> list[int]:
        """Tokens from below the root to its own."""
        token_ids, node = list[int](), self
        while node.parent is not None:
            token_ids.append(node.token_id)
            node = node.parent
        return token_ids[::-1]


def breadth_first(root: Node) -> Iterator[Node]:
    level = [root]
    while level:
        yield from level
        level = [child for node in level for child in _offered(node.children)]


def _offered(children: Sequence[Node]) -> list[Node]:
    """Those that are verified, in the order in which they are offered: as they came, but for chosen ones whose tokens siblings
    were not drawn from. Those come last, by value: there they are worth the most (docs/losslessness.md, section 6)."""
    shown = [child for child in children if child.submitted]
    if len(shown) > 1:
        shown.sort(key=lambda child: -child.value if child.comes_last else -2.0)
    return shown
