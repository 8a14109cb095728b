"""Pure: how many steps a draft can take for later trees while layers stream, without a layer being late for it."""

import numpy as np
import numpy.typing as npt

from tree.shape import TreeShape

from .memory import MemoryPlan
from .prediction import DraftOption, TreeKind, Workload, drafting_of, rounds

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DELAY = 0.01  # of a round, by which steps ahead may make it longer
SAFETY = 0.8  # of the time in which nothing is computed that may be used: what was measured is not exact
MOST_TIMES = 2  # as many steps ahead as a tree takes, at most


def idle_s(workload: Workload, memory: MemoryPlan, nodes: Ints) -> Floats:
    """Seconds of a pass over so many nodes in which compute waits for layers, and may be used: [C] to [C]."""
    streamed = [workload.target.layers[layer] for layer in memory.placement.streamed]
    copies_s = sum(layer.stored_bytes for layer in streamed) / workload.link_bytes_per_s
    on_disk = [workload.target.layers[layer] for layer in memory.placement.disk]
    reads_s = sum(layer.stored_bytes for layer in on_disk) / workload.disk_bytes_per_s
    decode_s = sum(workload.decode_s[layer] for layer in memory.placement.decoded) if workload.decode_s else 0.0
    compute_s = workload.target.equivalent_layers * workload.times.layer(nodes) + decode_s + workload.after_s(nodes)
    return np.asarray(SAFETY * np.maximum(max(copies_s, reads_s) - compute_s, 0.0))


def most_ahead(workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption) -> int:
    """The most steps that a draft of dynamic trees can take ahead in each pass. 0 where nothing is streamed, or all that is
    waited for is compute."""
    if not workload.grows_ahead or not memory.placement.streamed or shape.num_nodes == 1:
        return 0
    draft = draft.beside(workload, memory.placement)
    nodes = np.array([shape.num_nodes])
    step_s = float(draft.ahead_s(shape.num_nodes))
    fewest, most = 0, min(int(idle_s(workload, memory, nodes)[0] / step_s), MOST_TIMES * shape.num_levels)
    after_s, drafting = workload.after_s(nodes), drafting_of(draft, shape, workload.target.vocab_size, TreeKind(True, most))
    waited_s = np.array([drafting.draft_s * (1 - drafting.hidden)])  # the same for all: only what steps take is compared

    def round_s(num_steps: int) -> float:
        return float(rounds(workload, memory, nodes, waited_s, after_s, (num_steps, step_s)).round_s[0])

    least_s = round_s(0)
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if round_s(middle) <= least_s * (1 + DELAY):
            fewest = middle
        else:
            most = middle - 1
    return most
