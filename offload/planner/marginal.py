"""Pure: what one more level of a draft and one more row of the target's pass cost, in tokens.

A round that takes longer by some seconds must bring as many tokens more as were made in that time otherwise: that is when the
ratio of both stays as it is (Dinkelbach's condition for the least seconds per token).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tree.shape import TreeShape

from .memory import MemoryPlan
from .prediction import DraftOption, Prediction, TreeKind, Workload, drafting_of, rounds

if TYPE_CHECKING:
    from .plan import Plan

# Of what the condition says: what is predicted of tokens and seconds is off at first, and a level too few loses all that would
# have come below it, where one too many loses a part of its seconds.
WARY = 0.5
MORE = 0.25  # of the nodes of a tree: the step over which what a row costs is looked at


def least_gain(
    workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption, kind: TreeKind, made: Prediction
) -> float:
    """Tokens that one more level of the draft must bring. What hides under the stream costs nothing."""
    draft = draft.beside(workload, memory.placement)
    drafting = drafting_of(draft, shape, workload.target.vocab_size, kind)
    rows = max(shape.num_nodes // max(shape.num_levels, 1), 1)
    draft_s = np.array([made.draft_s, made.draft_s + float(draft.level_s(rows))])
    nodes, ahead = np.full(2, shape.num_nodes), (drafting.ahead_steps, drafting.ahead_s)
    round_s = rounds(workload, memory, nodes, draft_s, workload.after_s(nodes), ahead).round_s
    return max(float(round_s[1] - round_s[0]), 0.0) / made.s_per_token


def least_value(workload: Workload, memory: MemoryPlan, num_nodes: int, made: Prediction) -> float:
    """Tokens that one more row of the target's pass must bring, beside a tree of so many nodes."""
    more = max(round(MORE * num_nodes), 1)
    nodes = np.array([num_nodes, num_nodes + more])
    round_s = rounds(workload, memory, nodes, np.full(2, made.draft_s), workload.after_s(nodes)).round_s
    return min(max(float(round_s[1] - round_s[0]), 0.0) / more / made.s_per_token, 1.0)


def with_bounds(made: "Plan", workload: Workload, draft: DraftOption | None, memory: MemoryPlan) -> "Plan":
    """`made` with what dynamic trees of a draft have to be worth: others are as they are."""
    if draft is None:
        return made
    if not made.dynamic or made.tree.num_nodes == 1:
        return replace(made, least_gain=0.0, least_value=0.0)
    return replace(
        made,
        least_gain=WARY * least_gain(workload, memory, made.tree, draft, made.kind, made.prediction),
        least_value=WARY * least_value(workload, memory, made.tree.num_nodes, made.prediction),
    )
