"""Log-probabilities that a model gives to tokens of a text, before temperature and top-k, top-p. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import row_blocks
from .sampling import top_k_tokens
from .transfer import index_tensor, to_host


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What of a text to score: new tokens, and with `prompt` those of the prompt, too, each with the log-probabilities of
    the `num_top` most probable tokens in its place."""

    num_top: int = 0
    prompt: bool = False


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """Natural logarithms. `top` pairs token ids with log-probabilities, the most probable first; equal ones by token id. A
    token that is in `top` has the same float there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score_tokens(logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[ScoredToken, ...]:
    """Row i of `logits` [N, V], any float dtype, is the model's prediction of `token_ids`[i]. Computed in float32 (float64
    logits in float64), in blocks of rows, with one wait for the device. FloatingPointError if a row holds NaN or +inf."""
    if logits.ndim != 2 or logits.shape[0] != len(token_ids):
        raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(token_ids)} tokens")
    if not token_ids:
        return ()
    num_top = min(num_top, logits.shape[1])
    wanted = index_tensor(token_ids, logits.device)[:, None]
    columns, values = [], []
    for block in row_blocks(*logits.shape):
        rows = logits[block.start : block.stop]
        chosen = wanted[block.start : block.stop]
        if num_top:
            chosen = torch.cat([chosen, top_k_tokens(rows, num_top)], dim=1)
        columns.append(chosen)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        values.append(rows.log_softmax(-1).gather(-1, chosen))
    host_ids, host_values = to_host(torch.cat(columns).flatten(), torch.cat(values).flatten())
    if any(value != value for value in host_values):
        raise FloatingPointError("a row of logits holds NaN or +inf, or no finite entry")
    pairs = [(int(token_id), value) for token_id, value in zip(host_ids, host_values, strict=True)]
    starts = range(0, len(pairs), 1 + num_top)
    return tuple(ScoredToken(*pairs[start], tuple(pairs[start + 1 : start + 1 + num_top])) for start in starts)
