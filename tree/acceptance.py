"""How often the k-th child of an accepted node is the accepted one: value, file format, counting.

Knows no tree but its shape, and needs neither numpy nor torch.
"""

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .shape import TreeShape

SCHEMA_VERSION = 1
SUM_TOLERANCE = 1e-6  # files are rounded
# Accepted nodes are counted apart by how sure the draft was there: its largest probability is at most one of these.
CONTEXT_TOPS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.0)


@dataclass(frozen=True, slots=True)
class Context:
    """Acceptance below those accepted nodes at which the draft's largest probability is at most `top`, and above that of the
    context before; they are `share` of all accepted nodes."""

    top: float
    share: float
    acceptance: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Positional acceptance (Sequoia, arXiv 2402.12374, definition 3.1).

    levels[l][k]: the unconditional probability that, below an accepted node of level l (the root's is 0), child k is the
    accepted one; a vector's missing rest is rejection. The last vector holds for all deeper levels, so one vector means the
    same acceptance everywhere. Vectors may be non-monotone, as measured ones are. `contexts`, ascending by `top` up to 1,
    part the same by how sure the draft was; () where that was not counted. ValueError for an empty vector, an entry outside
    [0, 1], or a sum above 1.
    """

    levels: tuple[tuple[float, ...], ...]
    source: str = ""
    contexts: tuple[Context, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("acceptance is empty: at least one probability is needed")
        for level, vector in enumerate(self.levels):
            _check_vector(f"acceptance of level {level}" if len(self.levels) > 1 else "acceptance", vector)
        _check_contexts(self.contexts)

    def vector(self, level: int) -> tuple[float, ...]:
        """Acceptance of the children of a node of `level`."""
        return self.levels[min(level, len(self.levels) - 1)]

    def to_json(self) -> dict[str, object]:
        """A document for `json.dumps`, one list if all levels share it."""
        vectors = [list(vector) for vector in self.levels]
        document: dict[str, object] = {
            "schema_version": SCHEMA_VERSION,
            "acceptance": vectors if len(vectors) > 1 else vectors[0],
            "source": self.source,
        }
        if self.contexts:
            document["contexts"] = [
                {"top": context.top, "share": context.share, "acceptance": list(context.acceptance)}
                for context in self.contexts
            ]
        return document

    @classmethod
    def from_json(cls, document: object) -> "Acceptance":
        """From a parsed document or from its text; fields it does not know are ignored. ValueError names the fault."""
        if isinstance(document, str):
            document = _parse_json(document)
        if not isinstance(document, Mapping):
            raise ValueError(f"an acceptance file holds a JSON object, not {type(document).__name__}")
        if document.get("schema_version") != SCHEMA_VERSION:
            found = document.get("schema_version")
            raise ValueError(f"acceptance schema_version is {found!r}, expected {SCHEMA_VERSION}")
        source = document.get("source", "")
        if not isinstance(source, str):
            raise ValueError(f'acceptance field "source" must be a string, not {type(source).__name__}')
        return cls(_levels_from_json(document.get("acceptance")), source, _contexts_from_json(document.get("contexts", [])))


class AcceptanceCounter:
    """Counts what passes accepted, by level and child rank, and by how sure the draft was where somebody knows.

    A child is tried when its parent was accepted and its earlier siblings were not, so a rank is estimated only from
    nodes that had such a child: trees of any shape, and of different shapes, give the same answer in expectation.
    """

    def __init__(self) -> None:
        self._tried: Counter[tuple[int, int]] = Counter()
        self._accepted: Counter[tuple[int, int]] = Counter()
        # The same by place in CONTEXT_TOPS and rank; and how many accepted nodes were counted in each.
        self._tried_where: Counter[tuple[int, int]] = Counter()
        self._accepted_where: Counter[tuple[int, int]] = Counter()
        self._nodes: Counter[int] = Counter()

    def add(self, shape: TreeShape, path: Sequence[int], tops: Sequence[float] | None = None) -> None:
        """Count one verdict: `path` are its accepted nodes in `shape`, the root first. `tops` [N]: the draft's largest
        probability at each node, NaN where nobody knows. ValueError for another path."""
        if not path or tuple(path) != shape.path(path[-1]):
            raise ValueError(f"{tuple(path)} is not a path from the root of this tree of {shape.num_nodes} nodes")
        for level, node in enumerate(path):
            entered = shape.ranks[path[level + 1]] if level + 1 < len(path) else None
            num_tried = shape.num_children[node] if entered is None else entered + 1
            self._tried.update((level, rank) for rank in range(num_tried))
            if entered is not None:
                self._accepted[level, entered] += 1
            if tops is not None and num_tried and tops[node] == tops[node]:
                context = bisect_left(CONTEXT_TOPS, min(tops[node], 1.0))
                self._nodes[context] += 1
                self._tried_where.update((context, rank) for rank in range(num_tried))
                if entered is not None:
                    self._accepted_where[context, entered] += 1

    def to_acceptance(self, source: str, *, per_level: bool = False, least_tried: int = 1) -> Acceptance:
        """Estimate, over all levels together or one vector per level; ends before the first rank or level never tried.

        per_level: the last vector is that of the first level whose successor's first child was tried less than `least_tried`
        times; it counts all deeper levels too. ValueError if nothing was tried.
        """
        num_levels = 1 + max((level for level, _ in self._tried), default=0)
        own = 0  # levels with a vector of their own; what is below them shares the next one
        while per_level and self._tried[own + 1, 0] >= least_tried:
            own += 1
        groups = [range(level, level + 1) for level in range(own)] + [range(own, num_levels)]
        vectors = tuple(_vector(self._tried, self._accepted, levels) for levels in groups)
        return Acceptance(vectors, source, self._contexts())

    def _contexts(self) -> tuple[Context, ...]:
        """Of those that were counted; the last reaches up to 1."""
        counted = [context for context in range(len(CONTEXT_TOPS)) if self._nodes[context]]
        tops = [*(CONTEXT_TOPS[context] for context in counted[:-1]), 1.0]
        return tuple(
            Context(
                top, self._nodes[context] / self._nodes.total(), _vector(self._tried_where, self._accepted_where, [context])
            )
            for context, top in zip(counted, tops, strict=False)
        )


def _vector(tried: Counter[tuple[int, int]], accepted: Counter[tuple[int, int]], groups: Sequence[int]) -> tuple[float, ...]:
    """p_k = h_k (1 - h_1) ... (1 - h_k-1) from the hazards h_k = accepted / tried of each rank, over these groups together; it
    ends before the first rank never tried."""
    vector: list[float] = []
    rejected = 1.0
    while num_tried := sum(tried[group, len(vector)] for group in groups):
        hazard = sum(accepted[group, len(vector)] for group in groups) / num_tried
        vector.append(rejected * hazard)
        rejected *= 1.0 - hazard
    return tuple(vector)


def _check_vector(name: str, vector: tuple[float, ...]) -> None:
    if not vector:
        raise ValueError(f"{name} is empty: at least one probability is needed")
    for rank, probability in enumerate(vector):
        if not 0 <= probability <= 1 + SUM_TOLERANCE:  # false for NaN
            raise ValueError(f"{name}: the probability of child {rank} is {probability}, outside [0, 1]")
    if math.fsum(vector) > 1 + SUM_TOLERANCE:
        raise ValueError(f"{name} sums to {math.fsum(vector):.6f}: at most 1 is possible, children exclude each other")


def _check_contexts(contexts: tuple[Context, ...]) -> None:
    if not contexts:
        return
    for place, context in enumerate(contexts):
        _check_vector(f"acceptance of context {place}", context.acceptance)
        below = contexts[place - 1].top if place else 0.0
        if not below < context.top <= 1:
            raise ValueError(f'"contexts" must ascend by "top" up to 1: context {place} is up to {context.top}, after {below}')
        if not 0 <= context.share <= 1 + SUM_TOLERANCE:
            raise ValueError(f"the share of context {place} is {context.share}, outside [0, 1]")
    if contexts[-1].top != 1:
        raise ValueError(f'"contexts" must end with a "top" of 1, not of {contexts[-1].top}')
    total = math.fsum(context.share for context in contexts)
    if abs(total - 1) > SUM_TOLERANCE * len(contexts):
        raise ValueError(f"the shares of contexts sum to {total:.6f}, not to 1")


def _parse_json(text: str) -> object:
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"an acceptance file must be JSON: {error}") from error
    return document


def _levels_from_json(value: object) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list):
        raise ValueError(f'acceptance field "acceptance" must be a list, not {type(value).__name__}')
    if value and all(isinstance(vector, list) for vector in value):
        return tuple(_vector_from_json(vector) for vector in value)
    return (_vector_from_json(value),)


def _contexts_from_json(value: object) -> tuple[Context, ...]:
    if not isinstance(value, list):
        raise ValueError(f'acceptance field "contexts" must be a list, not {type(value).__name__}')
    contexts = []
    for place, context in enumerate(value):
        if not isinstance(context, Mapping) or not isinstance(context.get("acceptance"), list):
            raise ValueError(f'context {place} must be an object with "top", "share" and a list "acceptance"')
        top, share = (_number(context.get(name), f'"{name}" of context {place}') for name in ("top", "share"))
        contexts.append(Context(top, share, _vector_from_json(context["acceptance"])))
    return tuple(contexts)


def _vector_from_json(vector: list[object]) -> tuple[float, ...]:
    what = "acceptance must be numbers, or lists of numbers: entry"
    return tuple(_number(probability, f"{what} {rank}") for rank, probability in enumerate(vector))


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r}, not a number" if what.startswith('"') else f"{what} is {value!r}")
    return float(value)
