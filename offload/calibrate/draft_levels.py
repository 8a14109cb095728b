"""One level after another of a tree, as rounds grow them, to be timed: a model's forward and the drawing that follows it take
turns, and neither finds its data in the caches where a loop of its own would have left them."""

from collections.abc import Mapping, Sequence

import torch

from tree.acceptance import Acceptance
from tree.draft import TreeModel, grow
from tree.optimizer import best_tree
from tree.sampling import SamplingParams
from tree.shape import TreeShape

from ..config import SamplingKind
from ..device import Device, Ticket
from ..planner.search import MAX_LEVELS
from .stopwatch import Work

PARAMS: Mapping[SamplingKind, SamplingParams] = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.6),
    "nucleus": SamplingParams(temperature=0.6, top_p=0.9),
}
LOGITS_STD = 4.0  # of models that know something: a nucleus has tens of tokens
BRANCHING = 8  # children of a node that has many
MOST_LEVELS, MOST_NODES = 4, 256  # of a tree that is grown to be timed, below its root's children; one level at least


class _FromFirstLevel:
    """A tree model that remembers when it was asked for the first level: reading the root is not of it."""

    def __init__(self, device: Device, model: TreeModel) -> None:
        self._device, self._model = device, model
        self.began: Ticket | None = None

    def begin(self) -> torch.Tensor:
        return self._model.begin()

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        self.began = self.began or self._device.mark()
        return self._model.expand(parents, token_ids)


def growing_levels(device: Device, model: TreeModel, rows: int, vocab_size: int, sampling: SamplingKind) -> Work:
    """Growing one level after another of `rows` nodes with children, at most `vocab_size`, through `model`."""
    shape = tree_of_levels(rows, vocab_size)
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def run() -> Ticket | None:
        timed = _FromFirstLevel(device, model)
        grow(timed, 0, shape, PARAMS[sampling], generator, sampled=sampling != "greedy")
        return timed.began

    return Work(run, num_levels(rows))


def tree_of_levels(rows: int, vocab_size: int) -> TreeShape:
    """A root with `rows` children, and below them levels of which as many nodes have children: the first of them BRANCHING,
    the others one."""
    parents, first = [-1, *[0] * rows], 1
    for _ in range(num_levels(rows)):
        begin_next = len(parents)
        parents += [*[first] * min(BRANCHING, vocab_size), *range(first + 1, first + rows)]
        first = begin_next
    return TreeShape(tuple(parents))


def planned_tree(acceptance: Acceptance, num_nodes: int, vocab_size: int) -> TreeShape:
    """The tree that a planner makes of `num_nodes` nodes where nothing speaks against deep ones; less of it where `acceptance`
    knows no more ranks."""
    return best_tree(acceptance, num_nodes, MAX_LEVELS, max_branching=vocab_size)


def peaked_logits(device: Device, rows: int, vocab_size: int) -> torch.Tensor:
    """[rows, vocab_size] float32 on the device."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    return LOGITS_STD * torch.randn(rows, vocab_size, device=device.torch_device, generator=generator)


def num_levels(rows: int) -> int:
    """How many levels below the root's children."""
    return min(max(MOST_NODES // rows, 1), MOST_LEVELS)
