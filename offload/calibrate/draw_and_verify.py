"""Seconds of what a tree takes beside its models: drawing the children of a level, and verifying."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tree.acceptance import Acceptance
from tree.draft import grow
from tree.verify import verify

from ..config import SamplingKind
from ..planner.hardware import Task, TaskTimes
from .draft_levels import PARAMS, growing_levels, peaked_logits, planned_tree
from .stopwatch import Stopwatch, Work
from .tables import rising, table_of


class _Ready:
    """A draft model whose logits are at hand: what is left of growing a tree is the drawing."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def begin(self) -> torch.Tensor:
        return self._logits[:1]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(parents)]


def measure_drawing(watch: Stopwatch, vocab_size: int, sampling: SamplingKind) -> TaskTimes:
    """Seconds from a level's logits to its children, by number of nodes that have any."""

    def drawing(num_rows: int) -> Work:
        logits = peaked_logits(watch.device, num_rows, vocab_size)
        return growing_levels(watch.device, _Ready(logits), num_rows, vocab_size, sampling)

    # A root cannot have more children than there are tokens.
    rows = [num_rows for num_rows in watch.effort.rows if num_rows <= vocab_size]
    return _task_times(watch, "draw", drawing, rows, vocab_size, sampling)


def measure_verification(watch: Stopwatch, vocab_size: int, sampling: SamplingKind, acceptance: Acceptance) -> TaskTimes:
    """Seconds from logits to an accepted path on the host, by number of nodes: of the trees that a planner makes for
    `acceptance`, with children that were drawn. It takes a step for every rank of every level, so the shape counts."""
    device, params = watch.device, PARAMS[sampling]
    generator = torch.Generator(device.torch_device).manual_seed(0)
    trees = {num_nodes: planned_tree(acceptance, num_nodes, vocab_size) for num_nodes in watch.effort.rows}

    def verification(num_nodes: int) -> Work:
        logits = peaked_logits(device, num_nodes, vocab_size)
        draft = grow(_Ready(logits), 0, trees[num_nodes], params, generator, sampled=sampling != "greedy")
        return Work(partial(verify, draft, logits, params, generator, method="traversal"))

    # Where the acceptance holds no larger tree, none will be verified.
    rows = [num_nodes for num_nodes, shape in trees.items() if shape.num_nodes == num_nodes]
    return _task_times(watch, "verify", verification, rows, vocab_size, sampling)


def _task_times(
    watch: Stopwatch, task: Task, work: Callable[[int], Work], rows: Sequence[int], vocab_size: int, sampling: SamplingKind
) -> TaskTimes:
    def seconds_at(num_rows: int) -> list[float]:
        with watch.device.translated():
            return watch.seconds([work(num_rows)])

    measured, (task_s,) = table_of(rows, seconds_at, watch.effort)
    return TaskTimes(task=task, sampling=sampling, vocab_size=vocab_size, rows=measured, task_s=rising(task_s))
