"""Pure: acceptance as a run has counted it, beside what was believed before."""

from dataclasses import replace

from tree.acceptance import Acceptance, AcceptanceCounter, Context
from tree.shape import TreeShape

from .prediction import tokens_of

BELIEVED_NODES = 48  # accepted nodes that what was believed before counts as, for each vector
ENOUGH_NODES = 300  # before contexts are believed where there were none
MOST_TIMES = 32.0  # by which an acceptance is scaled at most
MOST_ACCEPTED = 0.99  # of an acceptance that is scaled up: some of the children are refused


def learned(believed: Acceptance, counter: AcceptanceCounter, num_nodes: int) -> Acceptance:
    """`believed` as far as it was not counted: `counter` has seen verdicts that accepted `num_nodes` nodes."""
    if num_nodes == 0:
        return believed
    counted = counter.to_acceptance("counted", per_level=len(believed.levels) > 1, least_tried=BELIEVED_NODES)
    share = num_nodes / (num_nodes + BELIEVED_NODES)
    levels = tuple(_mixed(vector, counted.vector(level), share) for level, vector in enumerate(believed.levels))
    contexts = _contexts(believed.contexts, counted.contexts, num_nodes)
    return replace(believed, levels=levels, contexts=contexts)


def scaled_acceptance(
    acceptance: Acceptance, shape: TreeShape, tokens: float, *, vocab_size: int = 1 << 30, dynamic: bool = False
) -> Acceptance:
    """`acceptance` times a factor by which a pass over `shape`, or a dynamic tree of its size, has `tokens` tokens, or as near
    to it as there is one."""
    least, most = 1 / MOST_TIMES, MOST_TIMES
    for _ in range(12 if dynamic and acceptance.contexts else 30):
        factor = (least * most) ** 0.5
        if tokens_of(shape, _times(acceptance, factor), vocab_size, dynamic) < tokens:
            least = factor
        else:
            most = factor
    return _times(acceptance, factor)


def _contexts(believed: tuple[Context, ...], counted: tuple[Context, ...], num_nodes: int) -> tuple[Context, ...]:
    if not believed:
        return counted if num_nodes >= ENOUGH_NODES else ()
    seen = {context.top: context for context in counted}
    mixed, total = [], num_nodes / (num_nodes + BELIEVED_NODES)
    for context in believed:
        found = seen.get(context.top)
        nodes = found.share * num_nodes if found is not None else 0.0
        share = (1 - total) * context.share + total * (found.share if found is not None else 0.0)
        weight = nodes / (nodes + BELIEVED_NODES)
        vector = _mixed(context.acceptance, found.acceptance, weight) if found is not None else context.acceptance
        mixed.append((context.top, share, vector))
    whole = sum(share for _, share, _ in mixed)
    return tuple(Context(top, share / whole, vector) for top, share, vector in mixed)


def _mixed(believed: tuple[float, ...], counted: tuple[float, ...], share: float) -> tuple[float, ...]:
    """`counted` counts as `share` of the whole. Ranks that nobody tried have of what the others leave as much as believed."""
    tried = min(len(counted), len(believed))
    left, was_left = 1.0 - sum(counted[:tried]), 1.0 - sum(believed[:tried])
    times = left / was_left if was_left > 0 else 0.0
    whole = (*counted[:tried], *(times * one for one in believed[tried:]))
    return tuple((1 - share) * old + share * new for old, new in zip(believed, whole, strict=True))


def _times(acceptance: Acceptance, factor: float) -> Acceptance:
    def scaled(vector: tuple[float, ...]) -> tuple[float, ...]:
        most = max(sum(vector), MOST_ACCEPTED)
        return tuple(factor * probability * most / max(factor * sum(vector), most) for probability in vector)

    contexts = tuple(replace(context, acceptance=scaled(context.acceptance)) for context in acceptance.contexts)
    return replace(acceptance, levels=tuple(map(scaled, acceptance.levels)), contexts=contexts)
