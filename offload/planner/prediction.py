"""Pure: what a round consists of, and how long it takes under one placement of the layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.optimizer import expected_tokens
from tree.shape import TreeShape

from ..weights.placement import Placement
from .cost import ModelCost
from .hardware import ModelTimes, TaskTimes
from .memory import MemoryPlan
from .timeline import PartTimes, RoundTimes, steady_round

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CATCH_UP_ROWS = 2  # what a draft reads before its first level: the new root, and an accepted leaf it has not seen


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOption:
    """A draft that may be used, how often the target accepts it, and how long its levels take."""

    name: str
    cost: ModelCost
    times: ModelTimes
    acceptance: Acceptance

    def level_s(self, rows: npt.ArrayLike) -> Floats:
        """Seconds of one level's forward over `rows` nodes, drawing their children included."""
        return self.cost.equivalent_layers * self.times.layer(rows) + self.times.rest(rows)

    def beside(self, workload: "Workload", placement: Placement) -> "DraftOption":
        """The same where the target's layers lie so. Those that are resident as they compute serve the draft of a base, too,
        and take it as long as they take the target."""
        raw = placement.resident - placement.coded
        if not self.cost.is_base or not raw:
            return self
        layers = self.cost.layers
        share = sum([layers[layer].num_parameters for layer in raw]) / sum([layer.num_parameters for layer in layers])
        rows = tuple(sorted({*self.times.rows, *workload.times.rows}))
        layer_s = (1 - share) * self.times.layer(rows) + share * workload.times.layer(rows)
        rest_s = self.times.rest(rows)
        times = replace(self.times, rows=rows, layer_s=tuple(layer_s.tolist()), rest_s=tuple(rest_s.tolist()))
        return replace(self, times=times)

    def draft_s(self, expanded: Ints) -> Floats:
        """Seconds to grow trees with so many expanded nodes on each level: [..., levels] to [...]. The first level finds
        threads asleep, after a verdict was waited for."""
        levels = self.level_s(np.maximum(expanded, 1))
        levels[..., 0] = self.level_s(CATCH_UP_ROWS) + self.times.wake_s
        return np.asarray(np.where(expanded > 0, levels, 0.0).sum(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What does not depend on the choice: the target, the rates, and what memory allows.

    `decode_s` are the seconds of decoding each layer in a pass, 0 for those that are stored as they compute; empty where all
    are. `memory(draft, nodes, slots, coded)` raises FitError where nothing fits; it is tried with each of `codings`: whether
    resident layers stay coded. `doubts` is what has to be said about the times.
    """

    target: ModelCost
    times: ModelTimes
    verify: TaskTimes
    link_bytes_per_s: float
    disk_bytes_per_s: float
    disk_is_assumed: bool = False
    decode_s: tuple[float, ...] = ()
    decode_is_assumed: bool = False
    move_bytes_per_s: float = np.inf  # of host memory; counts where some could not be pinned, which is measured then
    doubts: tuple[str, ...] = ()
    codings: tuple[bool, ...] = (False,)
    memory: Callable[[DraftOption | None, int, int, bool], MemoryPlan]

    def after_s(self, nodes: npt.ArrayLike) -> Floats:
        """Seconds after the last layer of a pass over a tree of so many nodes: head, verification."""
        return self.times.rest(nodes) + self.verify.at(nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A target as it would be stored, and the drafts that may run beside it so."""

    workload: Workload
    drafts: tuple[DraftOption, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of one steady round and its parts. pass_s is a pass alone, weights arriving and being used; in a round part of
    it hides under the rest, and exposed_pass_s is what is left of it after drafting. compute_s is the layers' part, of which
    decode_s makes their parameters."""

    expected_tokens: float
    pass_s: float
    exposed_pass_s: float
    compute_s: float
    decode_s: float = 0.0
    draft_s: float
    after_s: float
    round_s: float

    @property
    def s_per_token(self) -> float:
        return self.round_s / self.expected_tokens


def predict(workload: Workload, memory: MemoryPlan, num_nodes: int, draft_s: float, expected_tokens: float) -> Prediction:
    """The round of one plan with its parts."""
    nodes, after_s = np.full(2, num_nodes), float(workload.after_s(num_nodes))
    # Passes back to back with nothing between them, and rounds.
    times = rounds(workload, memory, nodes, np.array([0.0, draft_s]), np.array([0.0, after_s]))
    decode_s = sum(workload.decode_s[layer] for layer in memory.placement.decoded) if workload.decode_s else 0.0
    return Prediction(
        expected_tokens=expected_tokens,
        pass_s=float(times.round_s[0]),
        exposed_pass_s=float(times.pass_s[1]),
        compute_s=float(workload.target.equivalent_layers * workload.times.layer(num_nodes)) + decode_s,
        decode_s=decode_s,
        draft_s=draft_s,
        after_s=after_s,
        round_s=float(times.round_s[1]),
    )


def rounds(workload: Workload, memory: MemoryPlan, nodes: Ints, draft_s: Floats, after_s: Floats) -> RoundTimes:
    """Steady rounds of trees of so many nodes under one placement, [C] each."""
    layers = workload.target.layers
    parts = PartTimes(
        copy_s=[layer.stored_bytes / workload.link_bytes_per_s for layer in layers],
        read_s=[layer.stored_bytes / workload.disk_bytes_per_s for layer in layers],
        move_s=[layer.stored_bytes / workload.move_bytes_per_s for layer in layers],
        before_s=draft_s,
        layer_s=_compute_s(workload, nodes),
        decode_s=workload.decode_s,
        after_s=after_s,
        wake_s=workload.times.wake_s,
    )
    return steady_round(memory.placement, memory.num_slots, parts)


def _compute_s(workload: Workload, nodes: Ints) -> list[Floats]:
    """Seconds of each layer over so many nodes, [C] each. A layer of another kind than was measured takes as much longer as it
    has more parameters."""
    common, common_s = workload.target.common_layer, workload.times.layer(nodes)  # [C]
    return [
        common_s if layer is common else common_s * (layer.num_parameters / common.num_parameters)
        for layer in workload.target.layers
    ]


def predict_tree(workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption | None) -> Prediction:
    """The round of `shape`, grown by `draft`; without one it is the root alone."""
    if draft is None:
        return predict(workload, memory, 1, 0.0, 1.0)
    draft_s = float(draft.beside(workload, memory.placement).draft_s(expanded_per_level(shape)))
    return predict(workload, memory, shape.num_nodes, draft_s, expected_tokens(shape, draft.acceptance))


def expanded_per_level(shape: TreeShape) -> Ints:
    """How many nodes of each level have children."""
    return np.array([len(nodes) for nodes in shape.expanded], dtype=np.int64)
