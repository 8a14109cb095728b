"""From a draft's logits to the children that its nodes may have: the most probable tokens, or tokens that are drawn.

One transfer brings all of a step to the host. Knows nothing of trees but which children a node has already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import row_blocks
from .sampling import SamplingParams, sample_without_replacement, to_probabilities, top_k_tokens
from .transfer import index_tensor, to_host

UNTEMPERED = SamplingParams(temperature=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Possible children of n nodes that were run, K each, in the order in which they are to be taken.

    token_ids, probabilities: [n][K], of the row without what was taken, not renormalised. tops: [n], the largest probability of
    the whole row, and left: [n], of what was not taken. taken: [n][...], the probabilities of the tokens that were taken. rows:
    [n, V], what drawn children were drawn from: 0 at taken tokens, not renormalised. None if they were chosen.
    """

    token_ids: list[list[int]]
    probabilities: list[list[float]]
    tops: list[float]
    left: list[float]
    taken: list[list[float]]
    rows: Tensor | None


def candidates_of(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    most: int,
    taken: Sequence[Sequence[int]],
    *,
    sampled: bool,
) -> Candidates:
    """At most `most` children below each row of `logits` [n, V], none of them among the `taken` ones [n][...].

    sampled: K tokens are drawn without replacement under `params`, in one race a row: how many of them are used must not depend
    on what they are. Otherwise they are the most probable ones. Waits for the device once.
    """
    num_rows, vocab_size = logits.shape
    branching = min(most, vocab_size - max(map(len, taken), default=0))
    numbers = [(row, token_id) for row, token_ids in enumerate(taken) for token_id in token_ids]
    places = tuple(index_tensor([number[axis] for number in numbers], logits.device) for axis in (0, 1))
    law = params if sampled else UNTEMPERED
    rows, columns = [], list[list[Tensor]]()
    for block in row_blocks(num_rows, vocab_size):
        part = slice(block.start, block.stop)
        rows.append(to_probabilities(logits[part], law))
    probabilities = rows[0] if len(rows) == 1 else torch.cat(rows)  # [n, V]
    tops = probabilities.amax(-1)
    struck = probabilities[places]  # [T]
    ranking = logits
    left = tops
    if numbers:
        probabilities[places] = 0.0
        left = probabilities.amax(-1)
        lowest = torch.finfo(logits.dtype).min  # above that of what was taken, even where the draft rules a token out
        ranking = logits.clamp(min=lowest).index_put(places, logits.new_tensor(-torch.inf))
    for block in row_blocks(num_rows, vocab_size):
        part = slice(block.start, block.stop)
        if sampled:
            tokens = sample_without_replacement(probabilities[part], branching, generator, ranking=ranking[part])
        else:
            tokens = top_k_tokens(ranking[part], branching)
        columns.append([tokens.flatten(), probabilities[part].gather(-1, tokens).flatten()])
    token_columns, share_columns = (torch.cat(parts) for parts in zip(*columns, strict=True))
    tokens_host, shares_host, tops_host, left_host, struck_host = to_host(token_columns, share_columns, tops, left, struck)
    struck_by_row: list[list[float]] = [[] for _ in range(num_rows)]
    for (row, _), share in zip(numbers, struck_host, strict=True):
        struck_by_row[row].append(share)
    starts = range(0, num_rows * branching, branching) if branching else [0] * num_rows
    return Candidates(
        token_ids=[list(map(int, tokens_host[start : start + branching])) for start in starts],
        probabilities=[shares_host[start : start + branching] for start in starts],
        tops=tops_host,
        left=left_host,
        taken=struck_by_row,
        rows=probabilities if sampled else None,
    )
