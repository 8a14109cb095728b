"""Pure: memory for a larger tree than the one that was chosen, so that another can be chosen while a model runs."""

from tree.shape import TreeShape

from ..errors import FitError
from .memory import MemoryPlan
from .prediction import DraftOption, Prediction, TreeKind, Workload, predict_tree
from .search import Choice

ROOMS = (1024, 512, 256, 128, 64, 32, 16)  # nodes
COST = 0.01  # of the seconds per token, at most: layers that are not resident for it


def with_room(
    workload: Workload, draft: DraftOption, shape: TreeShape, kind: TreeKind, memory: MemoryPlan, prediction: Prediction
) -> tuple[int, MemoryPlan, Prediction]:
    """The most nodes that there is to be memory for beside `shape`, and how it runs then."""
    for room_nodes in ROOMS:
        if room_nodes <= shape.num_nodes:
            break
        roomy = _memory(workload, draft, room_nodes, memory)
        if roomy is not None:
            predicted = predict_tree(workload, roomy, shape, draft, kind)
            if predicted.s_per_token <= prediction.s_per_token * (1 + COST):
                return room_nodes, roomy, predicted
    return shape.num_nodes, memory, prediction


def reserve_memory(workload: Workload, speculative: Choice, plain: Choice) -> MemoryPlan | None:
    """That of the root alone with the draft of `speculative` beside it; None where the draft would take more than COST."""
    memory = _memory(workload, speculative.draft, 1, plain.memory)
    if memory is None:
        return None
    predicted = predict_tree(workload, memory, TreeShape.root_only(), None)
    return memory if predicted.s_per_token <= plain.s_per_token * (1 + COST) else None


def _memory(workload: Workload, draft: DraftOption | None, num_nodes: int, like: MemoryPlan) -> MemoryPlan | None:
    """With slots and resident layers as `like` has them."""
    try:
        return workload.memory(draft, num_nodes, like.num_slots, bool(like.placement.coded))
    except FitError:
        return None
