"""Pure: what a round consists of, and how long it takes under one placement of the layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tree.acceptance import Acceptance
from tree.aim import LEAST_STEP_ROWS, MOST_STEP_ROWS, STEPS_OF_A_TREE
from tree.dynamic_growth import dynamic_growth
from tree.optimizer import expected_tokens
from tree.shape import TreeShape

from ..weights.placement import Placement, shared_out
from .cost import ModelCost
from .hardware import ModelTimes, TaskTimes
from .memory import MemoryPlan
from .timeline import PartTimes, RoundTimes, steady_round

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Of the work that goes into a tree, what a tree grown ahead for as many steps turns out to have done, before it was seen in
# a run. At ends that differ by one token in two or so, growth was of no use (trees that grow to 4 to 16 times their size meet
# the end in 0.35 to 0.64 of all rounds).
FORESEEN = 0.5
MOST_LEVELS = 64  # of a tree
CATCH_UP_ROWS = 2  # what a draft reads before its first level: the new root, and an accepted leaf it has not seen


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOption:
    """A draft that may be used, how often the target accepts it, and how long its levels take. `foreseen` is the share of its
    work that growing ahead does, in as many steps as a tree takes; a step takes `ahead_times` as long as a level of as many
    nodes. `on_host`: it computes there, and takes nothing from the device."""

    name: str
    cost: ModelCost
    times: ModelTimes
    acceptance: Acceptance
    foreseen: float = FORESEEN
    ahead_times: float = 1.0
    on_host: bool = False

    @property
    def device_cost(self) -> ModelCost | None:
        """What it keeps on the target's device, if anything."""
        return None if self.on_host else self.cost

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

    def draft_s(self, expanded: Ints | Floats) -> Floats:
        """Seconds to grow trees with so many expanded nodes on each level, or on average, of trees that differ: [..., levels]
        to [...]. The first level finds threads asleep, after a verdict was waited for."""
        levels = self.level_s(np.maximum(expanded, 1))
        levels[..., 0] = self.level_s(CATCH_UP_ROWS) + self.times.wake_s
        return np.asarray((np.minimum(expanded, 1) * levels).sum(axis=-1))

    def ahead_s(self, num_nodes: npt.ArrayLike) -> Floats:
        """Seconds of a step ahead, of trees of so many nodes."""
        rows = np.clip(np.asarray(num_nodes) // STEPS_OF_A_TREE, LEAST_STEP_ROWS, MOST_STEP_ROWS)
        return np.asarray(self.ahead_times * self.level_s(rows))

    def hidden(self, num_steps: Floats, ahead_steps: npt.ArrayLike) -> Floats:
        """The share of trees of so many steps that is grown already, when so many steps were taken ahead."""
        return np.asarray(self.foreseen * np.minimum(ahead_steps / np.maximum(num_steps, 1), 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What does not depend on the choice: the target, the rates, and what memory allows.

    `decode_s` are the seconds of decoding each layer in a pass, 0 for those that are stored as they compute; empty where all
    are. `draws`: children are drawn at random. `grows_ahead`: drafts may go on while layers stream. `memory(draft, nodes,
    slots, coded)` raises FitError where nothing fits; it is tried with each of `codings`: whether resident layers stay coded.
    `doubts` is what has to be said about the times.
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
    draws: bool = False
    grows_ahead: bool = False
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
    decode_s makes their parameters. draft_s is what of drafting is waited for; hidden_draft_s was done while the pass before
    streamed."""

    expected_tokens: float
    pass_s: float
    exposed_pass_s: float
    compute_s: float
    decode_s: float = 0.0
    draft_s: float
    hidden_draft_s: float = 0.0
    after_s: float
    round_s: float

    @property
    def s_per_token(self) -> float:
        return self.round_s / self.expected_tokens


@dataclass(frozen=True, slots=True)
class TreeKind:
    """What there is to say of trees besides a shape: whether each has its own, and how many steps are taken ahead in a pass."""

    dynamic: bool = False
    ahead_steps: int = 0


STATIC = TreeKind()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How trees of one kind are grown: the tokens that they are expected to bring, seconds and steps of a tree from its root
    on, of which `hidden` is done before, by `ahead_steps` steps of `ahead_s` seconds in each pass."""

    tokens: float = 1.0
    draft_s: float = 0.0
    hidden: float = 0.0
    ahead_steps: int = 0
    ahead_s: float = 0.0


def predict(workload: Workload, memory: MemoryPlan, num_nodes: int, drafting: Drafting) -> Prediction:
    """The round of one plan with its parts."""
    nodes, after_s = np.full(2, num_nodes), float(workload.after_s(num_nodes))
    waited_s = drafting.draft_s * (1 - drafting.hidden)
    # Passes back to back with nothing between them, and rounds.
    ahead = drafting.ahead_steps, np.array([0.0, drafting.ahead_s])
    times = rounds(workload, memory, nodes, np.array([0.0, waited_s]), np.array([0.0, after_s]), ahead)
    decode_s = sum(workload.decode_s[layer] for layer in memory.placement.decoded) if workload.decode_s else 0.0
    return Prediction(
        expected_tokens=drafting.tokens,
        pass_s=float(times.round_s[0]),
        exposed_pass_s=float(times.pass_s[1]),
        compute_s=float(workload.target.equivalent_layers * workload.times.layer(num_nodes)) + decode_s,
        decode_s=decode_s,
        draft_s=waited_s,
        hidden_draft_s=drafting.draft_s * drafting.hidden,
        after_s=after_s,
        round_s=float(times.round_s[1]),
    )


def rounds(
    workload: Workload,
    memory: MemoryPlan,
    nodes: Ints,
    draft_s: Floats,
    after_s: Floats,
    ahead: tuple[int, npt.ArrayLike] = (0, 0.0),
) -> RoundTimes:
    """Steady rounds of trees of so many nodes under one placement, [C] each. `ahead`: steps that are taken ahead in a pass, and
    seconds of one."""
    layers, (num_steps, step_s) = workload.target.layers, ahead
    steps = shared_out(num_steps, memory.placement.streamed) if num_steps else {}
    parts = PartTimes(
        copy_s=[layer.stored_bytes / workload.link_bytes_per_s for layer in layers],
        read_s=[layer.stored_bytes / workload.disk_bytes_per_s for layer in layers],
        move_s=[layer.stored_bytes / workload.move_bytes_per_s for layer in layers],
        before_s=draft_s,
        layer_s=_compute_s(workload, nodes),
        decode_s=workload.decode_s,
        ahead_s=[steps.get(layer, 0) * np.asarray(step_s) for layer in range(len(layers))] if steps else (),
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


def predict_tree(
    workload: Workload, memory: MemoryPlan, shape: TreeShape, draft: DraftOption | None, kind: TreeKind = STATIC
) -> Prediction:
    """The round of `shape`, or of dynamic trees of as many nodes, grown by `draft`; without one it is the root alone."""
    if draft is None:
        return predict(workload, memory, 1, Drafting())
    drafting = drafting_of(draft.beside(workload, memory.placement), shape, workload.target.vocab_size, kind)
    return predict(workload, memory, shape.num_nodes, drafting)


def drafting_of(draft: DraftOption, shape: TreeShape, vocab_size: int, kind: TreeKind) -> Drafting:
    """How `draft` grows them. Dynamic trees are as `shape`, where acceptance was not counted by context."""
    tokens = tokens_of(shape, draft.acceptance, vocab_size, kind.dynamic)
    expanded = expanded_of(draft, shape, vocab_size, kind)
    num_steps = np.minimum(expanded, 1).sum()
    return Drafting(
        tokens=tokens,
        draft_s=float(draft.draft_s(expanded)),
        hidden=float(draft.hidden(num_steps, kind.ahead_steps)),
        ahead_steps=kind.ahead_steps,
        ahead_s=float(draft.ahead_s(shape.num_nodes)) if kind.ahead_steps else 0.0,
    )


def expanded_of(draft: DraftOption, shape: TreeShape, vocab_size: int, kind: TreeKind) -> Ints | Floats:
    """How many nodes of each level the draft runs; in the mean, of trees that differ."""
    if not kind.dynamic or not draft.acceptance.contexts:
        return expanded_per_level(shape)
    grown = dynamic_growth(draft.acceptance, MOST_LEVELS, vocab_size).within(shape.num_levels)
    return np.asarray(grown.expanded(np.array([shape.num_nodes]))[0])


def tokens_of(shape: TreeShape, acceptance: Acceptance, vocab_size: int, dynamic: bool) -> float:
    """Tokens that a pass is expected to bring."""
    if not dynamic or not acceptance.contexts:
        return expected_tokens(shape, acceptance)
    grown = dynamic_growth(acceptance, MOST_LEVELS, vocab_size).within(shape.num_levels)
    return float(grown.expected_tokens(np.array([shape.num_nodes]))[0])


def expanded_per_level(shape: TreeShape) -> Ints:
    """How many nodes of each level have children."""
    return np.array([len(nodes) for nodes in shape.expanded], dtype=np.int64)
