"""How probable children are to be part of the text, by what a draft knows before they are taken; learned from verdicts.

A slot whose child is to be drawn goes by how sure the draft is and by its rank: never by the child's value, which nobody may
look at before it is in the tree (docs/losslessness.md, section 8). Then it goes by its own draft probability. A found one goes
by its bin. A chosen one goes by the draft's probabilities, made sharper: a small draft is far less sure than a greedy target,
whose next token is certain. How much so is learned, as the exponent under which what came was most likely; what that leaves to
be corrected is counted by bins. Until some nodes were counted, what is assumed of a rank speaks for it, too.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .acceptance import CONTEXT_TOPS, Acceptance

Floats = npt.NDArray[np.float64]

MAX_CHILDREN = 16  # of one node, from a model
# What is counted together, up to each of these: largest probabilities of a draft, ranks, probabilities of drawn children, and
# sharpened ones of chosen children.
BANDS = CONTEXT_TOPS
RANKS = (0, 1, 3, 7, MAX_CHILDREN - 1)
OWN = (0.003, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0)
BINS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
EXPONENTS = np.array([1.0, 1.25, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.5, 8.0, 11.0, 16.0, 24.0, 40.0])
ASSUMED_EXPONENT = 3.0  # a small draft and a greedy target; a handful of tokens suffice to change it
ASSUMED_BEST = 0.7  # of the best child of a node, where nothing says more
LEAST_LIKELY = 1e-3  # one token that nobody thought of does not decide what the exponent is
PRIOR_WEIGHT, DRAWN_PRIOR_WEIGHT = 8.0, 20.0  # cases that what is assumed counts for
ASSUMED_MIX = (0.3, 0.8, 0.6)  # of a constant, of what finds of its kind are worth, and of the draft's opinion; see docs/log.md
MIX_RATE = 0.02  # of learning that
ASSUMED_NODES = 20.0  # that what is assumed of chosen children counts for, beside the nodes where they were counted
DECAY = 0.998  # of all counts, a verdict
FIRST_WORTH = 0.1  # what nodes of trees to come are worth at least, before there was one


_CLASS_OF_RANK = [bisect_left(RANKS, rank) for rank in range(MAX_CHILDREN)]


class Estimates:
    """Learns from verdicts, one text after another; its numbers depend on earlier rounds alone.

    acceptance: what is assumed before anything was counted; None for nothing known.
    """

    def __init__(self, acceptance: Acceptance | None = None) -> None:
        middles = np.array([_middle(BINS, bin) for bin in range(len(BINS))])
        self._middles = np.array([0.0, *middles, 1.0])
        self._bins = _Ratios(middles)
        self._likelihood = -2.0 * np.abs(np.log(EXPONENTS / ASSUMED_EXPONENT))  # of each exponent, its logarithm
        hazards = np.array([_hazards(acceptance, top) for top in BANDS])  # [bands, rank classes]
        self._hazards = _Ratios(hazards, DRAWN_PRIOR_WEIGHT)
        mean = _hazards(Acceptance(acceptance.levels) if acceptance is not None else None, 1.0)
        self._own = _Ratios(np.repeat(np.array(mean)[:, None], len(OWN), axis=1), DRAWN_PRIOR_WEIGHT)
        self._found: dict[tuple[int, int], _Ratios] = {}
        self._mix = np.array(ASSUMED_MIX)
        self._assumed = _assumed(acceptance) if acceptance is not None else None  # [bands, MAX_CHILDREN]
        self._num_counted = 0.0  # nodes with chosen children
        self._best = _Ratios(np.array(max(acceptance.vector(0)[0] if acceptance is not None else 0.0, ASSUMED_BEST)))
        self._worth: dict[tuple[int, bool], float] = {}
        self._refresh()

    # -- what is believed -------------------------------------------------------------------------------------------------

    def chosen(self, probabilities: Floats, taken: Sequence[Sequence[float]] = ()) -> tuple[Floats, list[list[float]]]:
        """How probable tokens are to be the next one, by their draft probabilities [n, K] in descending order: [n, K], not
        increasing. The same of tokens that are `taken` [n][...], which are not among them."""
        shares, beside = _sharpened(probabilities, taken, EXPONENTS[self._exponent])
        shares = np.interp(shares, self._middles, self._by_bin)
        if self._assumed is not None and probabilities.shape[1]:
            assumed = self._assumed[np.searchsorted(BANDS, np.minimum(probabilities[:, 0], 1.0)), : probabilities.shape[1]]
            shares += (assumed - shares) * ASSUMED_NODES / (ASSUMED_NODES + self._num_counted)
        shares = np.minimum.accumulate(shares, axis=1)
        return shares, [np.interp(row, self._middles, self._by_bin).tolist() if row else [] for row in beside]

    def drawn(self, tops: Floats, most: int) -> Floats:
        """How probable it is that the child of each rank is accepted if those before it were not, below nodes where the largest
        probability of the draft is `tops` [n]: [n, most]."""
        return self._by_rank[np.searchsorted(BANDS, np.minimum(tops, 1.0)), :most]

    def taken(self, rank: int, probability: float) -> float:
        """The same of a child that is in the tree: it was drawn with this probability from what its earlier siblings left."""
        return self._by_own[_CLASS_OF_RANK[rank]][bisect_left(OWN, min(probability, 1.0))]

    def found(self, source: int, bin: int, prior: float) -> float:
        """How probable a find of a bin of a source is to be the next token. `prior`: what the source says itself."""
        return float(self._found_ratios(source, bin, prior).means)

    def mixed(self, found: float, drafted: float) -> float:
        """How probable a find is to be the next token that is `found` so often, and that the draft thinks so probable."""
        return 1.0 / (1.0 + math.exp(-float(self._mix @ _features(found, drafted))))

    @property
    def best(self) -> float:
        """How probable the best child of a node of which nothing is known is to be the next token."""
        return float(self._best.means)

    def worth(self, most: int, *, sampled: bool) -> float:
        """What the last node of a tree of `most` nodes will be worth."""
        return self._worth.get((most, sampled), FIRST_WORTH)

    # -- what came --------------------------------------------------------------------------------------------------------

    def count_chosen(self, probabilities: Sequence[float], hit: int | None) -> None:
        """At a node of the text, the draft's candidates had these probabilities, and the one at place `hit` came."""
        rows, self._num_counted = np.array([probabilities]), self._num_counted + 1.0
        shares = _sharpened(rows.repeat(len(EXPONENTS), axis=0), (), EXPONENTS[:, None])[0]  # [exponents, K]
        bins = np.searchsorted(BINS, np.minimum(shares[self._exponent], 1.0))
        np.add.at(self._bins.tried, bins, 1.0)
        if hit is not None:
            self._bins.hits[bins[hit]] += 1.0
        came = shares[:, hit] if hit is not None else 1.0 - shares.sum(axis=1)
        self._likelihood = DECAY * self._likelihood + np.log(np.maximum(came, LEAST_LIKELY))
        self._count_best(float(np.interp(shares[self._exponent, 0], self._middles, self._by_bin)))

    def count_drawn(self, top: float, probabilities: Sequence[float], entered: bool) -> None:
        """At an accepted node, children were offered that had been drawn with these probabilities, each from what the earlier
        ones left; the last was accepted if `entered`."""
        band, last = bisect_left(BANDS, min(top, 1.0)), len(probabilities) - 1
        for rank, probability in enumerate(probabilities):
            hit, rank_class = float(entered and rank == last), _CLASS_OF_RANK[rank]
            for ratios, place in ((self._hazards, band), (self._own, bisect_left(OWN, min(probability, 1.0)))):
                cell = (band, rank_class) if ratios is self._hazards else (rank_class, place)
                ratios.tried[cell] += 1.0
                ratios.hits[cell] += hit
        self._count_best(float(self._by_rank[band, 0]))

    def count_found(self, source: int, bin: int, prior: float, hit: bool) -> None:
        """At a node of the text, a find of this bin came true or not."""
        ratios = self._found_ratios(source, bin, prior)
        ratios.tried += 1.0
        ratios.hits += float(hit)

    def count_mixed(self, found: float, drafted: float, hit: bool) -> None:
        """At a node of the text, a find that was thought so probable by both came true or not."""
        self._mix += MIX_RATE * (float(hit) - self.mixed(found, drafted)) * _features(found, drafted)

    def end_verdict(self) -> None:
        """All of a verdict was counted: believe it, and let what came before count a little less."""
        for ratios in (self._bins, self._hazards, self._own, self._best, *self._found.values()):
            ratios.hits *= DECAY
            ratios.tried *= DECAY
        self._num_counted *= DECAY
        self._refresh()

    def count_worth(self, most: int, worth: float, *, sampled: bool) -> None:
        """The last node of a tree of `most` nodes was worth this much: believe the mean over rounds, of logarithms."""
        before, worth = self._worth.get((most, sampled)), max(worth, 1e-9)
        self._worth[most, sampled] = worth if before is None else before**0.7 * worth**0.3

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _found_ratios(self, source: int, bin: int, prior: float) -> "_Ratios":
        return self._found.setdefault((source, bin), _Ratios(np.array(prior)))

    def _count_best(self, share: float) -> None:
        self._best.tried += 1.0
        self._best.hits += share

    def _refresh(self) -> None:
        self._exponent = int(self._likelihood.argmax())
        self._by_bin = np.array([0.0, *np.maximum.accumulate(self._bins.means), 1.0])  # the more, the more
        self._by_rank = self._hazards.means[:, _CLASS_OF_RANK]  # [bands, ranks]
        self._by_own: list[list[float]] = self._own.means.tolist()


def _features(found: float, drafted: float) -> Floats:
    """What finds are judged by: a constant, and both opinions as logarithms of odds."""
    odds = [math.log(share / (1.0 - share)) for share in (min(max(it, 1e-4), 1 - 1e-4) for it in (found, drafted))]
    return np.array([1.0, *odds])


class _Ratios:
    """Hits among tries, in the mean over cases that were counted and cases that are assumed."""

    def __init__(self, prior: Floats, weight: float = PRIOR_WEIGHT) -> None:
        self.prior, self.weight, self.hits, self.tried = prior, weight, np.zeros_like(prior), np.zeros_like(prior)

    @property
    def means(self) -> Floats:
        return np.asarray((self.weight * self.prior + self.hits) / (self.weight + self.tried))


def _sharpened(
    probabilities: Floats, taken: Sequence[Sequence[float]], exponent: float | Floats
) -> tuple[Floats, list[list[float]]]:
    """Probabilities to the power of `exponent`, renormalised: [n, K] in descending order, and those of the tokens `taken`
    [n][...]. Of the other tokens nothing is known but their mass and that none is more probable than the last; they are taken
    to be all as probable as that."""
    tops = probabilities[:, :1] if probabilities.shape[1] else np.ones((len(probabilities), 1))
    mass = np.array([sum(row) for row in taken]) if taken else np.zeros(len(probabilities))
    tops = np.maximum(np.maximum(tops, np.array([[max(row, default=0.0)] for row in taken])) if taken else tops, 1e-30)
    last = np.maximum(probabilities[:, -1:], 1e-30) / tops if probabilities.shape[1] else np.ones_like(tops)
    others = np.maximum(1.0 - probabilities.sum(axis=1, keepdims=True) - mass[:, None], 0.0) / tops * last ** (exponent - 1.0)
    powers = (probabilities / tops) ** exponent
    beside = [[float((share / top) ** exponent) for share in row] for row, top in zip(taken, tops[:, 0].tolist(), strict=False)]
    total = powers.sum(axis=1, keepdims=True) + others
    if taken:
        total = total + np.array([[sum(row)] for row in beside])
    totals = total[:, 0].tolist()
    return powers / total, [[share / whole for share in row] for row, whole in zip(beside, totals, strict=False)]


def _middle(edges: tuple[float, ...], place: int) -> float:
    return ((edges[place - 1] if place else 0.0) + edges[place]) / 2


def _assumed(acceptance: Acceptance) -> Floats:
    """How probable the child of each rank is to be the accepted one, by band: [bands, MAX_CHILDREN]."""
    assumed = np.zeros((len(BANDS), MAX_CHILDREN))
    for band, top in enumerate(BANDS):
        contexts = [context.acceptance for context in acceptance.contexts if top <= context.top]
        vector = (contexts[0] if contexts else acceptance.vector(0))[:MAX_CHILDREN]
        assumed[band, : len(vector)] = vector
    return assumed


def _hazards(acceptance: Acceptance | None, top: float) -> list[float]:
    """How often a child of each class of ranks is accepted when those before it were not, where the draft's largest probability
    is at most `top`: as was counted there, or anywhere."""
    vector: tuple[float, ...] = (0.6, 0.12, 0.06, 0.03)
    if acceptance is not None:
        contexts = [context for context in acceptance.contexts if top <= context.top]
        vector = contexts[0].acceptance if contexts else acceptance.vector(0)
    hazards, left = [], 1.0
    for share in vector[:MAX_CHILDREN]:
        hazards.append(min(max(share / left if left > 0 else 0.0, 0.01), 0.99))
        left -= share
    hazards += [min(hazards[-1], 0.1)] * (MAX_CHILDREN - len(hazards))
    firsts = (0, *(last + 1 for last in RANKS[:-1]))
    return [sum(hazards[first : last + 1]) / (last + 1 - first) for first, last in zip(firsts, RANKS, strict=True)]
