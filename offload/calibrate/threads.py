"""How many threads compute on a CPU. Two that wait for each other at every small operation lose more on a busy machine than
they win on an idle one, so the number is measured, and a core is left to the copies."""

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import torch

from ..device import Device, open_device
from .effort import Effort
from .models import Subject
from .short_model import MORE_LAYERS, short_models
from .stopwatch import Stopwatch, Work

SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # who sets one of these has chosen
TURNS = 5
LEAST_WIN = 0.1  # by which more threads must be quicker: what they lose when others want the cores is more
TREE_ROWS, LEVEL_ROWS, NUM_LEVELS = 128, 8, 8  # of a round as it may be: a pass over a tree, and levels of a draft


def thread_choices(allowed: int, num_cores: int) -> tuple[int, ...]:
    """Numbers worth trying where a caller allows `allowed` threads, ascending: powers of two, and all cores but the one
    that copies."""
    most = max(min(allowed, num_cores - 1), 1)
    return tuple(sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}))


def quickest(seconds: Mapping[int, float]) -> int:
    """The number of threads to take, of those that `seconds` has: more of them only where they win LEAST_WIN."""
    best, *others = sorted(seconds)
    for more in others:
        if seconds[more] < seconds[best] * (1 - LEAST_WIN):
            best = more
    return best


@contextmanager
def own_threads(subjects: Sequence[Subject], effort: Effort) -> Iterator[None]:
    """While entered, torch computes on the CPU with as many threads as suit `subjects`, never more than it had. What had been
    set comes back, unless somebody has set another number meanwhile."""
    before = torch.get_num_threads()
    if any(os.environ.get(name) for name in SAID_BY):
        yield
        return
    chosen = choose_threads(subjects, effort)
    torch.set_num_threads(chosen)
    try:
        yield
    finally:
        if torch.get_num_threads() == chosen:
            torch.set_num_threads(before)


def choose_threads(subjects: Sequence[Subject], effort: Effort) -> int:
    """The number of threads to compute with. Leaves torch's as it is."""
    before = torch.get_num_threads()
    choices = thread_choices(before, len(os.sched_getaffinity(0)))
    if len(choices) == 1:
        return choices[0]
    brief = replace(effort, rows=(LEVEL_ROWS, TREE_ROWS), contexts=effort.contexts[:1], repeats=1, point_s=0.0)
    seen_s: dict[int, list[float]] = {num_threads: [] for num_threads in choices}
    try:
        with ExitStack() as stack:
            device = stack.enter_context(closing(open_device("cpu", None)))
            watch = Stopwatch(device, brief)
            parts = [_part_of_a_round(device, subject, brief, stack) for subject in subjects]
            for _ in range(TURNS):  # in turns: what others do to the machine meets all of them
                for num_threads in choices:
                    torch.set_num_threads(num_threads)
                    seen_s[num_threads].append(sum(times * watch.seconds([work])[0] for work, times in parts))
    finally:
        torch.set_num_threads(before)
    return quickest({num_threads: statistics.median(seen) for num_threads, seen in seen_s.items()})


def _part_of_a_round(device: Device, subject: Subject, effort: Effort, stack: ExitStack) -> tuple[Work, float]:
    """What a round does with one model, on a few of its layers, and how often that is in a round."""
    few, more = short_models(device, subject.model, subject.role, effort)
    stack.enter_context(closing(few))
    stack.enter_context(closing(more))
    cost, context_rows = subject.model.cost, effort.contexts[0]
    rows, times = (TREE_ROWS, 1) if subject.role == "target" else (min(LEVEL_ROWS, cost.vocab_size), NUM_LEVELS)
    return more.work(rows, context_rows, effort.sampling_kinds[0]), times * cost.num_layers / MORE_LAYERS
