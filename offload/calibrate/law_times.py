"""Seconds of what a tree takes beside its models: drawing the children of a level, and verifying."""

from collections.abc import Callable
from functools import partial

import torch

from tree.draft import grow
from tree.shape import TreeShape
from tree.verify import verify

from ..config import LawKind
from ..device import Device
from ..planner.hardware import LawTimes, Task
from .effort import Effort, Work, rising, table_of, typical_s
from .growing import BRANCHING, PARAMS, growth, peaked_logits


class _Ready:
    """A draft model whose logits are at hand: what is left of growing a tree is the drawing."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def begin(self, shape: TreeShape) -> torch.Tensor:
        return self._logits[:1]

    def expand(self, nodes: tuple[int, ...], token_ids: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(nodes)]


def measure_drawing(device: Device, vocab_size: int, effort: Effort, law_kind: LawKind) -> LawTimes:
    """Seconds from a level's logits to its children, by number of nodes that have any."""

    def drawing(num_rows: int) -> Work:
        return growth(device, _Ready(peaked_logits(device, num_rows, vocab_size)), num_rows, vocab_size, law_kind)

    return _law_times(device, "draw", drawing, vocab_size, effort, law_kind)


def measure_verification(device: Device, vocab_size: int, effort: Effort, law_kind: LawKind) -> LawTimes:
    """Seconds from logits to an accepted path on the host, of trees whose children were drawn, by number of nodes."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    params = PARAMS[law_kind]

    def verification(num_nodes: int) -> Work:
        width = min(vocab_size, BRANCHING)
        shape = TreeShape((-1, *(node // width for node in range(num_nodes - 1))))
        logits = peaked_logits(device, num_nodes, vocab_size)
        draft = grow(_Ready(logits), 0, shape, params, generator, sampled=law_kind != "greedy")
        return Work(partial(verify, draft, logits, params, generator, method="traversal"))

    return _law_times(device, "verify", verification, vocab_size, effort, law_kind)


def _law_times(
    device: Device, task: Task, work: Callable[[int], Work], vocab_size: int, effort: Effort, law_kind: LawKind
) -> LawTimes:
    def seconds_at(num_rows: int) -> list[float]:
        with device.translated():
            return typical_s(device, [work(num_rows)], effort)

    rows = [num_rows for num_rows in effort.rows if num_rows <= vocab_size]  # a root cannot have more children
    measured, (task_s,) = table_of(rows, seconds_at, effort)
    return LawTimes(task=task, law=law_kind, vocab_size=vocab_size, rows=measured, task_s=rising(task_s))
