"""From logits to probabilities, and from probabilities to tokens. The same transform serves the draft and the target.

Probabilities are float32, and float64 where logits are. Noise is float64 everywhere: float32 noise has steps of 2**-24,
which distorts the tail of a vocabulary where most tokens are rarer than that. No function here waits for the device.
Rows are independent of each other, and callers give a block of them at a time (`tree.blocks`): some need 48 bytes an entry.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Within these bounds neither a temperature nor its reciprocal leaves float32's range: -inf logits never become NaN.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30

# How many of a row's most probable tokens are looked at, first and next, before the row is sorted whole.
NUCLEUS_SIZES = (256, 4096)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are to be sampled: temperature (0 is greedy), then top-k, then top-p. ValueError for bad values."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature = self.temperature
        if not (temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
            raise ValueError(f"temperature must be 0 (greedy) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], not {temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None for no limit, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")

    @property
    def greedy(self) -> bool:
        """The first largest logit has all the probability."""
        return self.temperature == 0


def to_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [..., V] of the next token, from logits [..., V] of any float dtype. Each row must hold a finite maximum.

    top-k keeps exactly k tokens and top-p the smallest set whose mass within those reaches p (the crossing token is
    kept, so at least one); equal logits are kept in order of token id. Dropped tokens have probability exactly 0.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if params.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(~_top_k_mask(scaled, params.top_k), -math.inf)
    probabilities = scaled.softmax(-1)
    return probabilities if params.top_p == 1 else _nucleus(probabilities, params.top_p)


def sample(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of `probabilities` [..., V] -> int64 [...]. A token of probability 0 never wins."""
    return _race(probabilities, generator).argmax(-1)


def sample_without_replacement(probabilities: Tensor, k: int, generator: torch.Generator, *, ranking: Tensor) -> Tensor:
    """k distinct tokens per row of `probabilities` [n, V], in draw order -> int64 [n, k].

    Draw j is from its row restricted to the tokens not yet drawn and renormalised, as long as that has any mass: the k best
    of one exponential race are a sample without replacement, in order. Once all tokens of positive probability are drawn
    (`support_sizes` of them) the next one is certain: the undrawn token with the largest `ranking` [n, V], the raw draft
    logits (docs/losslessness.md). Both rules are what `tree.residual` assumes of drawn children. A row need not sum to 1.
    """
    _check_enough_tokens(probabilities, k)
    keys = _race(probabilities, generator)
    fallback = ranking.double()
    fallback = fallback - fallback.amax(-1, keepdim=True) - 1.0  # negative, so below every key of the support
    return torch.where(probabilities > 0, keys, fallback).topk(k, dim=-1).indices


def support_sizes(probabilities: Tensor) -> Tensor:
    """Tokens of positive probability per row: int64 [...]."""
    return (probabilities > 0).sum(-1)


def top_k_tokens(logits: Tensor, k: int) -> Tensor:
    """The k most probable tokens per row of `logits` [n, V], best first; equal logits by token id -> int64 [n, k]."""
    _check_enough_tokens(logits, k)
    return _top_k_ids(logits, k)


def _race(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Keys [..., V] float64, probability over Exp(1) noise. The largest key of a row is at token x with the probability of x;
    a key of 0 never wins."""
    noise = torch.rand(probabilities.shape, generator=generator, dtype=torch.float64, device=probabilities.device)
    # 1 - u has 53 bits in (0, 1], so u = 0 is the only draw without noise; half a step stands in for it.
    noise = noise.clamp_(min=2.0**-54).neg_().log1p_().neg_()
    return probabilities / noise


def _top_k_mask(values: Tensor, k: int) -> Tensor:
    """True at the k largest of each row [..., V]; of equal values at the threshold, those with the lowest ids."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, _top_k_ids(values, k), True)


def _top_k_ids(values: Tensor, k: int) -> Tensor:
    """Token ids of the k largest of each row [..., V], largest first, equal values by token id -> int64 [..., k]."""
    if values.dtype == torch.float64:
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # topk leaves the order of equals open, so there must be none: value and id in one integer. A float's bits are in the order
    # of the floats where it is positive, and in the opposite one where it is negative; 0 comes in both.
    bits = (values.float() + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64).bitwise_left_shift_(32)
    keys += torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    return keys.topk(k, dim=-1).indices


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [..., V] restricted to the smallest set of the most probable tokens whose mass reaches top_p."""
    if probabilities.device.type == "cpu":
        return _nucleus_of_leading(probabilities, top_p)
    return _nucleus_by_sorting(probabilities, top_p)  # asking which rows are done would wait for the device


def _nucleus_by_sorting(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ordered[..., 1:].masked_fill_(_dropped(ordered, top_p), 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    return torch.empty_like(ordered).scatter_(-1, token_ids, ordered)


def _nucleus_of_leading(probabilities: Tensor, top_p: float) -> Tensor:
    """The same, bit for bit, but no more of a row is sorted than its nucleus needs: a tenth of the time on a CPU."""
    vocab_size = probabilities.shape[-1]
    rows = probabilities.reshape(math.prod(probabilities.shape[:-1]), vocab_size)
    kept, result = torch.zeros_like(rows), torch.zeros_like(rows)
    pending, ends = torch.arange(len(rows)), []
    for size in (*(size for size in NUCLEUS_SIZES if size < vocab_size), vocab_size):
        leading, token_ids = _leading(rows if len(pending) == len(rows) else rows[pending], size)
        dropped = _dropped(leading, top_p)
        least = leading.gather(-1, dropped.logical_not().sum(-1, keepdim=True))  # kept
        # All its equals must be in sight: of these, those with the lowest ids are kept.
        done = (leading[:, -1] < least[:, 0]) | (size == vocab_size)
        leading[:, 1:].masked_fill_(dropped, 0.0)
        kept[pending[done], :size] = leading[done]
        ends.append((pending[done, None], token_ids[done]))
        pending = pending[~done]
        if not len(pending):
            break
    kept_sum = kept.sum(-1, keepdim=True)  # of whole rows, zeros included: float sums depend on the length
    for row, token_ids in ends:
        result[row, token_ids] = kept[row[:, 0], : token_ids.shape[1]] / kept_sum[row[:, 0]]
    return result.view_as(probabilities)


def _dropped(ordered: Tensor, top_p: float) -> Tensor:
    """Which of `ordered` [..., 1:], largest first, lie beyond the nucleus. A token stays if the mass before it is short of
    top_p: cumulative sums, shifted by one; the first is always kept."""
    return ordered.cumsum(-1)[..., :-1] >= top_p


def _leading(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [n, V] and their token ids, [n, k] each: largest first, equal values by token id. Which
    of the equals at the threshold are among them is undefined."""
    if k == values.shape[-1]:
        return values.sort(dim=-1, descending=True, stable=True)
    token_ids = values.topk(k, dim=-1, sorted=False).indices.sort(-1).values  # no order among equals: sort by id, then
    ordered, order = values.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)  # stably by value
    return ordered, token_ids.gather(-1, order)


def _check_enough_tokens(rows: Tensor, k: int) -> None:
    if k > rows.shape[-1]:
        raise ValueError(f"{k} distinct children cannot be drawn from a vocabulary of {rows.shape[-1]} tokens")
