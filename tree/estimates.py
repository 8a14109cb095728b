"""How probable children are to be part of the text, by what a draft knows before they are taken; learned from verdicts.

A drawn child goes by how sure the draft is and by its rank: never by its value, which nobody may look at before it is in the
tree (docs/losslessness.md, section 8). A chosen one goes by its draft probability, a found one by its bin.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .acceptance import Acceptance

Floats = npt.NDArray[np.float64]

MAX_CHILDREN = 16  # of one node, from a model
# Largest probabilities of a draft that are counted together, up to each of these; and probabilities of chosen children.
BANDS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.97, 0.99, 1.0)
BINS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
PRIOR_WEIGHT = 8.0  # cases that what is assumed counts for
DECAY = 0.998  # of all counts, a verdict


class Estimates:
    """Learns from verdicts, one text after another; its numbers depend on verdicts of earlier rounds alone.

    acceptance: what is assumed before anything was counted; None for nothing known.
    """

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        self._bins = _Ratios(np.array([_middle(BINS, bin) for bin in range(len(BINS))]))
        self._hazards = _Ratios(np.array([_hazards(acceptance, _middle(BANDS, band)) for band in range(len(BANDS))]))
        self._found: dict[tuple[int, int], _Ratios] = {}
        self._refresh()

    # -- what is believed -------------------------------------------------------------------------------------------------

    def chosen(self, probabilities: Floats) -> Floats:
        """How probable children are to be the next token, by their draft probabilities [n, K] in descending order: [n, K]."""
        shares = self._by_bin[np.searchsorted(BINS, np.minimum(probabilities, 1.0))]
        return np.asarray(np.minimum.accumulate(shares, axis=1))

    def drawn(self, tops: Floats, most: int) -> Floats:
        """How probable it is that the child of each rank is the accepted one, below nodes where the largest probability of the
        draft is `tops` [n]: [n, most], not increasing."""
        return self._by_rank[np.searchsorted(BANDS, np.minimum(tops, 1.0)), :most]

    def found(self, source: int, bin: int, prior: float) -> float:
        """How probable a find of a bin of a source is to be the next token. `prior`: what the source says itself."""
        return float(self._found_ratios(source, bin, prior).means)

    @property
    def first(self) -> float:
        """How probable the best child of a node of which nothing is known is to be the next token."""
        return 0.7

    # -- what verdicts say ------------------------------------------------------------------------------------------------

    def count_chosen(self, probabilities: Sequence[float], hit: int | None) -> None:
        """At a node of the text, the draft's candidates had these probabilities, and the one at place `hit` came."""
        bins = np.searchsorted(BINS, np.minimum(probabilities, 1.0))
        np.add.at(self._bins.tried, bins, 1.0)
        if hit is not None:
            self._bins.hits[bins[hit]] += 1.0

    def count_drawn(self, top: float, num_tried: int, entered: bool) -> None:
        """At an accepted node, `num_tried` drawn children were offered; the last was accepted if `entered`."""
        band = int(np.searchsorted(BANDS, min(top, 1.0)))
        self._hazards.tried[band, :num_tried] += 1.0
        if entered:
            self._hazards.hits[band, num_tried - 1] += 1.0

    def count_found(self, source: int, bin: int, prior: float, hit: bool) -> None:
        """At a node of the text, a find of this bin came true or not."""
        ratios = self._found_ratios(source, bin, prior)
        ratios.tried += 1.0
        ratios.hits += float(hit)

    def end_verdict(self) -> None:
        """All of a verdict was counted: believe it, and let what came before count a little less."""
        for ratios in (self._bins, self._hazards, *self._found.values()):
            ratios.hits *= DECAY
            ratios.tried *= DECAY
        self._refresh()

    def _found_ratios(self, source: int, bin: int, prior: float) -> "_Ratios":
        return self._found.setdefault((source, bin), _Ratios(np.array(prior)))

    def _refresh(self) -> None:
        self._by_bin = np.maximum.accumulate(self._bins.means)  # a larger probability is worth no less
        hazards = self._hazards.means
        reached = np.cumprod(np.hstack([np.ones((len(BANDS), 1)), 1.0 - hazards[:, :-1]]), axis=1)
        self._by_rank = np.minimum.accumulate(hazards * reached, axis=1)


class _Ratios:
    """Hits among tries, in the mean over cases that were counted and cases that are assumed."""

    def __init__(self, prior: Floats) -> None:
        self.prior, self.hits, self.tried = prior, np.zeros_like(prior), np.zeros_like(prior)

    @property
    def means(self) -> Floats:
        return np.asarray((PRIOR_WEIGHT * self.prior + self.hits) / (PRIOR_WEIGHT + self.tried))


def _middle(edges: tuple[float, ...], place: int) -> float:
    return ((edges[place - 1] if place else 0.0) + edges[place]) / 2


def _hazards(acceptance: Acceptance | None, top: float) -> list[float]:
    """How often the child of each rank is accepted when those before it were not, where the draft's largest probability is
    about `top`."""
    vector: tuple[float, ...] = (0.6, 0.12, 0.06, 0.03)
    shift = 0.5 * (top - 0.6)
    if acceptance is not None:
        contexts = [context for context in acceptance.contexts if top <= context.top]
        vector = contexts[0].acceptance if contexts else acceptance.vector(0)
        shift = 0.0 if contexts else shift
    hazards, left = [], 1.0
    for share in vector[:MAX_CHILDREN]:
        hazards.append(min(max(share / left if left > 0 else 0.0, 0.01), 0.99))
        left -= share
    hazards += [min(hazards[-1], 0.1)] * (MAX_CHILDREN - len(hazards))
    hazards[0] = min(max(hazards[0] + shift, 0.05), 0.98)
    return hazards
