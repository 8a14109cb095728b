"""One sequence in one pass: its rows, what the target's logits say of them, and what is committed of it."""

from dataclasses import dataclass

import torch

from tree.draft import DraftTree
from tree.logprobs import ScoredToken, score_tokens
from tree.shape import TreeShape
from tree.verify import Method, Verdict, verify

from ..device import Device
from ..errors import NumericError
from ..model.causal_lm import PartOutput
from ..model.masks import tree_mask
from ..model.pass_inputs import Part
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Judged:
    """What the target's logits say of a turn; `verdict` is None without a tree. `features` [len(path), D] are those of the
    accepted rows, None unless the drafter wants them."""

    prompt_scores: tuple[ScoredToken, ...]
    verdict: Verdict | None = None
    scores: tuple[ScoredToken, ...] = ()
    features: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A pass reads the next `unread` committed tokens of `sequence`, and behind them its tree; None if it only reads."""

    sequence: Sequence
    unread: int
    draft: DraftTree | None

    @property
    def num_nodes(self) -> int:
        return self.draft.shape.num_nodes if self.draft is not None else 0

    @property
    def num_scored(self) -> int:
        """Rows whose logits score the prompt's tokens behind them."""
        return self.unread if self.sequence.scores_prompt else 0

    def part(self, device: Device) -> Part:
        """Its rows of the pass."""
        segment, draft = self.sequence.segment, self.draft
        shape = draft.shape if draft is not None else TreeShape.root_only()
        return Part(
            segment=segment,
            prefix=self.sequence.token_ids[segment.length : segment.length + self.unread],
            node_ids=draft.token_ids if draft is not None else torch.zeros(0, dtype=torch.int64),
            depths=shape.depths[: self.num_nodes],
            tree_mask=tree_mask(shape, device)[: self.num_nodes, : self.num_nodes],
            num_logits=self.num_scored + self.num_nodes,
        )

    def judge(self, output: PartOutput, method: Method, device: Device) -> Judged | NumericError:
        """Waits for the device once for a tree, and once more for each kind of scores. NumericError for NaN or Inf logits."""
        sequence, num_scored = self.sequence, self.num_scored
        begin, num_top = sequence.segment.length + 1, sequence.scoring.num_top if sequence.scoring is not None else 0
        scored_ids = sequence.token_ids[begin : begin + num_scored]  # each is predicted by the row before it
        try:
            prompt_scores = score_tokens(output.logits[:num_scored], scored_ids, num_top) if num_scored else ()
            if self.draft is None:
                return Judged(prompt_scores)
            logits = output.logits[num_scored:]  # [N, V]
            verdict = verify(self.draft, logits, sequence.params, sequence.generator, method=method)
        except FloatingPointError as error:
            return NumericError(
                str(error),
                where=f"pass over {self.num_nodes or self.unread} nodes after {len(sequence.token_ids)} tokens",
                cure="check the weights with `verify --full`; try --dtype bfloat16 or float32 if float16 overflowed",
            )
        if sequence.scoring is None and output.features is None:
            return Judged(prompt_scores, verdict)
        path = device.upload(torch.tensor(verdict.path))
        return Judged(
            prompt_scores,
            verdict,
            scores=score_tokens(logits.index_select(0, path), verdict.token_ids, num_top) if sequence.scoring else (),
            features=output.features[num_scored:].index_select(0, path) if output.features is not None else None,
        )

    def commit(self, judged: Judged) -> None:
        """Keep what was read and accepted. Takes no memory on the device, so that what is begun here is ended here."""
        sequence, unread, verdict = self.sequence, self.unread, judged.verdict
        sequence.prompt_scores += judged.prompt_scores
        if verdict is None:
            sequence.segment.commit(range(unread))
            return
        sequence.token_ids.extend(verdict.token_ids)  # before the rows: after an interruption, they may lag but not lead
        sequence.tokens_left -= len(verdict.token_ids)
        sequence.segment.commit([*range(unread), *(unread + node for node in verdict.path)])
        if sequence.draft is not None:
            sequence.draft.follow(verdict.path, verdict.token_ids, judged.features)
        sequence.segment.grown(len(sequence.token_ids))
