"""The loop: grow trees, run one pass over them, verify, commit. The only place where tree and machine run together.

Knows token ids, not text; owns no memory. Streaming text, stop handling and benchmarks all consume its results.
"""

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from tree.draft import Drafter, DraftTree
from tree.logprobs import ScoredToken, Scoring
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import Method, Verdict

from ..device import Device
from ..errors import NumericError, OutOfMemoryError
from ..model.causal_lm import CausalLM, PartOutput
from ..planner.fallback import Fallbacks, out_of_memory
from ..planner.plan import Plan
from ..report.stats import PassStats
from ..report.trace import Trace
from ..streaming.stream import LayerStream, PassProgress
from .ahead import AheadTimes, GrowthAhead
from .pass_times import pass_times
from .sequence import Sequence, share_rows
from .sessions import Sessions, host_limit_bytes
from .turn import Judged, Turn

logger = logging.getLogger(__name__)
# Scoring a prompt needs logits of all its rows, of which a plan has room for a tree's. This is what a pass may take for them.
SCORED_LOGITS_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a pass over a tree of `shape` brought one sequence: new tokens, in order; `verdict` as the verifier gave it.
    `scores` are those of the tokens, `prompt_scores` those of the prompt's but the first; empty unless asked for. `tops` are
    the tree's; to read them is to wait for the device."""

    shape: TreeShape
    token_ids: tuple[int, ...]
    verdict: Verdict
    stats: PassStats
    tops: torch.Tensor | None = None
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


Outcome = StepResult | NumericError | None  # of one sequence in one pass; None while its prompt is being read


class DecodeLoop:
    """Passes over any number of sequences at a time. `join` begins one, `run_pass` goes on with those that it is given. Owns no
    memory but the copies that `sessions` keeps of earlier sequences."""

    def __init__(
        self,
        device: Device,
        target: CausalLM,
        stream: LayerStream,
        drafter: Drafter | None,
        sessions: Sessions,
        plan: Plan,
        *,
        method: Method,
        trace: Trace | None = None,
        fallbacks: Fallbacks | None = None,
    ) -> None:
        self._device, self._target, self._stream, self._drafter = device, target, stream, drafter
        self.sessions, self._plan, self._method, self._trace, self.fallbacks = sessions, plan, method, trace, fallbacks
        self._may_grow_ahead = True
        self._ahead_times = AheadTimes()  # of the last pass

    @property
    def plan(self) -> Plan:
        """What runs now: the plan given, less what had to be given up since."""
        return self._plan

    def follow(self, plan: Plan, fallbacks: Fallbacks) -> None:
        """Go on under `plan`, between two passes: another tree, in the memory of the present plan."""
        if self._drafter is not None:
            self._drafter.aim(plan.aim, plan.pass_rows)
        self._plan, self.fallbacks = self._allowed(plan), fallbacks

    def seeded(self, seed: int) -> torch.Generator:
        """Randomness for one text."""
        return torch.Generator(self._device.torch_device).manual_seed(seed)

    def join(
        self,
        text: Tokens[int],
        prompt_tokens: int,
        params: SamplingParams,
        generator: torch.Generator,
        scoring: Scoring | None,
        *,
        tokens_left: int,
        repeatable: bool = False,
        before: object = None,
        beside: Iterable[Sequence] = (),
    ) -> Sequence:
        """Begin with `text`, or go on from it, to at most `tokens_left` tokens more; its first `prompt_tokens` are a prompt.
        The sequences `beside` it keep their places, any other is lost. What its segment holds needs no pass, as an earlier
        sequence began with it; a prompt that is to be scored needs them all. `scoring` changes no token; `repeatable` and
        `before` as in `tree.draft.Drafter.start`."""
        with self._device.translated():
            place = self.sessions.take(text, prompt_tokens, [sequence.place for sequence in beside])
            if scoring is not None and scoring.prompt:
                place.segments[0].truncate(0)
            draft = None
            if self._drafter is not None:
                draft = self._drafter.start(place.number, text, prompt_tokens, repeatable=repeatable, before=before)
        return Sequence(
            place,
            draft,
            params=params,
            generator=generator,
            scoring=scoring,
            tokens_left=tokens_left,
            repeatable=repeatable,
        )

    def run_pass(self, sequences: Tokens[Sequence]) -> tuple[Outcome, ...]:
        """One pass for all `sequences`; what it brought each of them. A pass that the device has no memory for is taken back
        and run again with less, as `fallbacks` has it. OutOfMemoryError when that comes to an end; DeviceError when the device
        is lost. After an error the sequences are of no use; their places are right."""
        with self._device.translated():
            if all(sequence.start_s is None for sequence in sequences):  # where the last pass was waited for
                self._device.renew_clock()
            start_s, turn = time.monotonic(), 0
            while True:
                randomness = [sequence.generator.get_state() for sequence in sequences]
                try:
                    with self._device.translated():
                        return self._try_pass(sequences, start_s)
                except OutOfMemoryError as error:
                    # The error itself would keep all that the pass has computed: its traceback holds the frames.
                    kind, reason = type(error), error.what
                for sequence, state in zip(sequences, randomness, strict=True):
                    sequence.generator.set_state(state)
                    sequence.segment.truncate(sequence.segment.length)
                turn = self._retry_with_less(sum(sequence.unread for sequence in sequences), turn, kind, reason)

    def progress(self) -> PassProgress:
        """How far the pass under way, or the last one, has come; any thread may ask."""
        return self._stream.progress()

    # -- the parts of a pass --------------------------------------------------------------------------------------------

    def _try_pass(self, sequences: Tokens[Sequence], start_s: float) -> tuple[Outcome, ...]:
        self._stream.prefetch()
        turns = self._take_turns(sequences)
        outputs = self._run_target(turns)
        # One host sync for each tree; nothing is committed before the last, as memory may run out until then.
        judged = [turn.judge(output, self._method, self._device) for turn, output in zip(turns, outputs, strict=True)]
        verified_s = time.monotonic()
        failed = {turn.sequence: one for turn, one in zip(turns, judged, strict=True) if isinstance(one, NumericError)}
        done = [(turn, one) for turn, one in zip(turns, judged, strict=True) if isinstance(one, Judged)]
        for turn, one in done:
            turn.commit(one)
        if failed:
            self.sessions.forget()  # what led there is not to be built upon
        results = self._results(done, start_s, verified_s)
        return tuple(failed.get(sequence) or results.get(sequence) for sequence in sequences)

    def _take_turns(self, sequences: Tokens[Sequence]) -> list[Turn]:
        """Who takes part, with how many rows of what was committed, and with a tree."""
        tree = self._plan.tree
        unread, limits = [one.unread for one in sequences], [self._row_limit(one) for one in sequences]
        shares = share_rows(unread, tree.num_nodes, self._plan.pass_rows, limits)
        return [
            Turn(sequence, share.unread, self._grow(sequence) if share.has_tree else None)
            for sequence, share in zip(sequences, shares, strict=True)
            if share is not None
        ]

    def _row_limit(self, sequence: Sequence) -> int | None:
        if not sequence.scores_prompt:
            return None
        row_bytes = 4 * self._target.architecture.vocab_size  # as float32, which is what they are scored in
        return max(SCORED_LOGITS_BYTES // row_bytes, self._plan.tree.num_nodes + 1)

    def _grow(self, sequence: Sequence) -> DraftTree:
        num_levels = min(sequence.tokens_left, self._target.rope.room(len(sequence.token_ids)))
        if sequence.draft is None or num_levels == 1 or self._plan.tree.num_nodes == 1:
            return DraftTree.root_only(self._device.upload(torch.tensor(sequence.token_ids[-1:])))
        sampled = self._method != "sample" and not sequence.params.greedy
        num_nodes = self._plan.tree.num_nodes
        return sequence.draft.grow(num_nodes, num_levels, sequence.params, sequence.generator, sampled=sampled)

    def _run_target(self, turns: Tokens[Turn]) -> tuple[PartOutput, ...]:
        growing = [turn.sequence for turn in turns if turn.draft is not None and turn.sequence.draft is not None]
        ahead = self._growth_ahead(growing)
        self._ahead_times = ahead.times
        ahead.begin()
        with self._device.first() if self._plan.ahead_steps else nullcontext():
            outputs = self._target.forward(
                [turn.part(self._device) for turn in turns],
                before_layer=ahead.before_layer,
                feature_layers=self._drafter.feature_layers if self._drafter is not None else (),
            )
        ahead.finish()
        for sequence, num_nodes in zip(growing, ahead.nodes, strict=True):
            sequence.ahead_nodes = num_nodes
        if ahead.failed is not None:
            self._grow_no_more_ahead(ahead.failed.what)
        if self._trace is not None:
            for start_s, end_s in ahead.times.spans:
                self._trace.add("draft ahead", "step", start_s, end_s)
        return outputs

    def _growth_ahead(self, growing: Tokens[Sequence]) -> GrowthAhead:
        """A text that is to be repeated has the steps that it would have alone; others share what a pass has time for."""
        steps = self._plan.ahead_steps
        shares = [steps if sequence.repeatable else -(-steps // len(growing)) for sequence in growing]
        drafts = [sequence.draft for sequence in growing if sequence.draft is not None]
        return GrowthAhead(self._device, drafts, shares, self._stream.placement)

    def _grow_no_more_ahead(self, reason: str) -> None:
        self._may_grow_ahead = False
        note = "drafts do not grow ahead any more, as there is no memory for it"
        self._plan = replace(self._plan, ahead_steps=0, notes=(*self._plan.notes, note))
        logger.warning("%s (%s)", note, reason)

    def _results(self, done: Tokens[tuple[Turn, Judged]], start_s: float, verified_s: float) -> dict[Sequence, StepResult]:
        """For who got tokens; the others remember since when they wait, and what has been streamed for them."""
        results: dict[Sequence, StepResult] = {}
        times = None
        for turn, judged in done:
            sequence = turn.sequence
            since_s = start_s if sequence.start_s is None else sequence.start_s
            num_bytes = sequence.bytes_read + self._stream.bytes_per_pass
            if turn.draft is None or judged.verdict is None:
                sequence.start_s, sequence.bytes_read = since_s, num_bytes
                continue
            times = times or pass_times(self._device, self._stream, self._ahead_times, self._trace, start_s, verified_s)
            results[sequence] = StepResult(
                shape=turn.draft.shape,
                token_ids=judged.verdict.token_ids,
                verdict=judged.verdict,
                tops=turn.draft.tops,
                stats=times.stats(since_s, turn, judged.verdict, num_bytes),
                scores=judged.scores,
                prompt_scores=sequence.prompt_scores,
            )
            sequence.start_s, sequence.bytes_read, sequence.prompt_scores = None, 0, ()
            if sequence.scoring is not None:  # the prompt is scored once, also where a family reads it again later
                sequence.scoring = replace(sequence.scoring, prompt=False)
        return results

    def _allowed(self, plan: Plan) -> Plan:
        return plan if self._may_grow_ahead else replace(plan, ahead_steps=0)

    # -- when memory runs out -------------------------------------------------------------------------------------------

    def _retry_with_less(self, prompt_rows: int, turn: int, kind: type[OutOfMemoryError], reason: str) -> int:
        """Go on with less, as `fallbacks` has it from `turn` on; returns the turn after it. `kind` when nothing is left."""
        old = self._plan
        found = self.fallbacks.relief(old, prompt_rows, turn) if self.fallbacks is not None else None
        if found is None or self.fallbacks is None:
            raise out_of_memory(old, kind, reason, self._device.name, self._device.free_bytes())
        plan, turn = found
        if plan.placement != old.placement:
            self._target.let_go()
            self._stream.evict(plan.placement, plan.num_slots)
            plan, self.fallbacks = self.fallbacks.as_placed(plan, self._stream.placement, self._stream.measure_move())
            self.sessions.limit(host_limit_bytes(plan))
        if self._drafter is not None:
            self._drafter.aim(plan.aim, plan.pass_rows)
        self._plan = self._allowed(plan)
        logger.warning("%s (%s)", "; ".join(note for note in plan.notes if note not in old.notes), reason)
        return turn
