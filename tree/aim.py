"""What a planner tells a drafter. Needs neither numpy nor torch."""

from dataclasses import dataclass

from .acceptance import Acceptance
from .shape import TreeShape

# Rows of one pass of a draft at most: wider ones are not recorded as CUDA graphs (offload/model/buckets.py, whose number is the
# same). A step ahead has a part of the nodes of a tree, and no fewer than there are at once for nothing.
MOST_STEP_ROWS, LEAST_STEP_ROWS, STEPS_OF_A_TREE = 256, 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What trees are to be like, as a planner has it.

    shape: of every tree; of dynamic ones, which have shapes of their own, the most nodes and a shape that is common.
    dynamic: whether a tree is shaped by what the draft believes of this text.
    acceptance: how often children are accepted, before anything has been counted.
    least_gain: tokens that one more pass of the draft must be expected to bring; one that brings less does not pay.
    least_value: how probable a node must be to be worth its row in the target's pass.
    """

    shape: TreeShape
    dynamic: bool = False
    acceptance: Acceptance | None = None
    least_gain: float = 0.0
    least_value: float = 0.0
