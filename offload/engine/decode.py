"""The loop: grow a tree, run one pass over it, verify, commit. The only place where tree and machine run together.

Knows token ids, not text; owns no memory. Streaming text, stop handling and benchmarks all consume its rounds.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tree.draft import DraftTree, grow
from tree.logprobs import ScoredToken, Scoring, score_tokens
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import Method, Verdict, verify

from ..device import Device
from ..errors import NumericError, OutOfMemoryError
from ..model.causal_lm import CausalLM
from ..model.drafter import ModelDrafter
from ..model.masks import TreeMasks
from ..planner.fallback import Fallbacks, out_of_memory
from ..planner.plan import Plan
from ..report.stats import PassStats
from ..report.trace import Trace
from ..streaming.stream import LayerStream, PassProgress
from .inputs import PassInputs, pass_inputs
from .round_stats import round_stats
from .sessions import Sessions, host_limit_bytes

logger = logging.getLogger(__name__)
# Scoring a prompt needs logits of all its rows, of which a plan has room for a tree's. This is what a pass may take for them.
SCORED_LOGITS_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one pass over `shape` brought: new tokens, in order; `verdict` as the verifier gave it; statistics. `scores` are
    those of the tokens, `prompt_scores` those of the prompt's tokens but the first; both empty unless asked for."""

    shape: TreeShape
    token_ids: tuple[int, ...]
    verdict: Verdict
    stats: PassStats
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


class DecodeLoop:
    """Rounds over one sequence at a time. `start` begins a sequence, `run_round` extends it by one pass. Owns no memory but
    the copies that `sessions` keeps of earlier sequences.

    The root of a round's tree is the last committed token; its target keys and values are not computed yet. So the target's
    cache holds all committed tokens but the last, or fewer before the first pass, which then reads the rest of the prompt
    together with the first tree: one stream of the weights saved.
    """

    def __init__(
        self,
        device: Device,
        target: CausalLM,
        stream: LayerStream,
        drafter: ModelDrafter | None,
        masks: TreeMasks,
        plan: Plan,
        *,
        method: Method,
        trace: Trace | None = None,
        fallbacks: Fallbacks | None = None,
    ) -> None:
        self._device, self._target, self._stream, self._drafter, self._masks = device, target, stream, drafter, masks
        self._plan, self._method, self._trace, self.fallbacks = plan, method, trace, fallbacks
        caches = [target.cache, *([drafter.cache] if drafter is not None else [])]
        ropes = [target.rope, *([drafter.rope] if drafter is not None else [])]
        self.sessions = Sessions(caches, ropes, max_bytes=host_limit_bytes(plan))
        self._committed: list[int] = []
        self._params = SamplingParams()
        self._scoring: Scoring | None = None
        self._prompt_scores: tuple[ScoredToken, ...] = ()

    @property
    def plan(self) -> Plan:
        """What runs now: the plan given, less what had to be given up since."""
        return self._plan

    def follow(self, plan: Plan, fallbacks: Fallbacks) -> None:
        """Go on under `plan`, between two rounds: another tree, in the memory of the present plan."""
        if self._drafter is not None:
            self._drafter.follow(plan.tree)
        self._plan, self.fallbacks = plan, fallbacks

    def seeded(self, seed: int) -> torch.Generator:
        """Randomness for one text."""
        return torch.Generator(self._device.torch_device).manual_seed(seed)

    def start(
        self,
        text: Sequence[int],
        prompt_tokens: int,
        params: SamplingParams,
        generator: torch.Generator,
        scoring: Scoring | None,
    ) -> int:
        """Begin with `text`, or go on from it; its first `prompt_tokens` are a prompt. Returns how many of its tokens need no
        pass, as an earlier sequence began with them; a prompt that is to be scored needs them all. `scoring` changes no
        token."""
        with self._device.translated():
            num_reused = self.sessions.resume(self._committed, text, prompt_tokens)
        if scoring is not None and scoring.prompt:
            num_reused = 0
            self._target.cache.truncate(0)
        self._params, self._generator = params, generator
        self._scoring, self._prompt_scores = scoring, ()
        self._target.begin_text(prompt_tokens, len(text))
        if self._drafter is not None:
            self._drafter.restart(text, prompt_tokens)
        return num_reused

    def run_round(self, max_tokens: int) -> StepResult:
        """One round that can emit at most `max_tokens` tokens (>= 1). One that the device has no memory for is taken back and
        run again with less, as `fallbacks` has it. OutOfMemoryError when that comes to an end; NumericError for NaN or Inf
        logits; DeviceError when the device is lost."""
        with self._device.translated():
            self._device.renew_clock()
            return self._run_round(max_tokens)

    def _run_round(self, max_tokens: int) -> StepResult:
        start_s, turn = time.monotonic(), 0
        while True:
            # What a round changes before it is certain.
            randomness, draft_rows = self._generator.get_state(), self._drafter.cache.length if self._drafter else 0
            try:
                with self._device.translated():
                    return self._try_round(max_tokens, start_s)
            except OutOfMemoryError as error:
                # The error itself would keep all that the pass has computed: its traceback holds the frames.
                kind, reason = type(error), error.what
            self._take_back(randomness, draft_rows)
            turn = self._give_up(turn, kind, reason)

    def _try_round(self, max_tokens: int, start_s: float) -> StepResult:
        self._stream.prefetch()
        extra_bytes = self._read_ahead_of_tree()
        max_tokens = min(max_tokens, self._target.rope.room(len(self._committed)))
        shape = self._plan.tree.truncated(max_tokens) if self._drafter is not None else TreeShape.root_only()
        draft = self._grow(shape)
        logits, cached = self._run_target(draft)
        verdict = self._verify(draft, logits)  # the round's one host sync, but for scoring
        scores = self._score(verdict, logits)
        verified_s = time.monotonic()
        self._commit(verdict, cached)
        prompt_scores, self._prompt_scores = self._prompt_scores, ()
        if self._scoring is not None:  # the prompt is scored once, also where a family reads it again later
            self._scoring = replace(self._scoring, prompt=False)
        return StepResult(
            shape=shape,
            token_ids=verdict.token_ids,
            verdict=verdict,
            stats=round_stats(
                self._device,
                self._stream,
                self._trace,
                num_rows=cached + shape.num_nodes,
                num_tokens=len(verdict.token_ids),
                extra_bytes=extra_bytes,
                start_s=start_s,
                verified_s=verified_s,
            ),
            scores=scores,
            prompt_scores=prompt_scores,
        )

    # -- when memory runs out -------------------------------------------------------------------------------------------

    @property
    def _prompt_rows(self) -> int:
        """Committed tokens that the next pass reads besides its tree, or passes before it."""
        return len(self._committed) - 1 - self._target.cache.length

    def _take_back(self, randomness: torch.Tensor, draft_rows: int) -> None:
        """Undo what a failed round did, but for prompt rows that were read: they are right, and need no second pass."""
        self._generator.set_state(randomness)
        self._target.cache.truncate(self._target.cache.length)
        self._prompt_scores = self._prompt_scores[: self._target.cache.length]
        if self._drafter is not None:
            self._drafter.cache.truncate(draft_rows)

    def _give_up(self, turn: int, kind: type[OutOfMemoryError], reason: str) -> int:
        """Go on with less, as `fallbacks` has it from `turn` on; returns the turn after it. `kind` when nothing is left."""
        old = self._plan
        found = self.fallbacks.relief(old, self._prompt_rows, turn) if self.fallbacks is not None else None
        if found is None or self.fallbacks is None:
            raise out_of_memory(old, kind, reason, self._device.name, self._device.free_bytes())
        plan, turn = found
        if plan.placement != old.placement:
            self._target.let_go()
            self._stream.evict(plan.placement, plan.num_slots)
            plan, self.fallbacks = self.fallbacks.as_placed(plan, self._stream.placement, self._stream.measure_move())
            self.sessions.limit(host_limit_bytes(plan))
        if self._drafter is not None:
            self._drafter.limit(plan.pass_rows, plan.tree)
        self._plan = plan
        logger.warning("%s (%s)", "; ".join(note for note in plan.notes if note not in old.notes), reason)
        return turn

    def progress(self) -> PassProgress:
        """How far the pass under way, or the last one, has come; any thread may ask."""
        return self._stream.progress()

    # -- the four parts of a round --------------------------------------------------------------------------------------

    def _read_ahead_of_tree(self) -> int:
        """Pass over prompt tokens that do not fit into one pass with the tree; returns the bytes streamed for them."""
        cache, streamed, most_rows = self._target.cache, 0, self._rows_per_pass()
        while self._prompt_rows > most_rows - self._plan.tree.num_nodes:
            chunk = self._committed[cache.length :][: min(most_rows, self._prompt_rows)]
            rows = self._inputs(chunk, torch.zeros(0, dtype=torch.int64), self._plan.tree, 0)
            logits = self._target.forward(rows.token_ids, rows.positions, rows.mask, len(chunk) if self._scores_prompt else 1)
            self._score_prompt(logits, len(chunk))
            cache.commit(range(len(chunk)))
            streamed += self._stream.bytes_per_pass
        return streamed

    def _grow(self, shape: TreeShape) -> DraftTree:
        root = self._committed[-1]
        if self._drafter is None or shape.num_nodes == 1:
            return DraftTree.root_only(self._device.upload(torch.tensor([root])))
        sampled = self._method != "sample" and not self._params.greedy
        return grow(self._drafter, root, shape, self._params, self._generator, sampled=sampled)

    def _run_target(self, draft: DraftTree) -> tuple[torch.Tensor, int]:
        """Logits [N, V] of the tree's nodes, and how many committed tokens the pass read before them."""
        prefix = self._committed[self._target.cache.length : -1]
        rows = self._inputs(prefix, draft.token_ids, draft.shape, draft.shape.num_nodes)
        num_scored = len(prefix) if self._scores_prompt else 0
        logits = self._target.forward(rows.token_ids, rows.positions, rows.mask, num_scored + draft.shape.num_nodes)
        self._score_prompt(logits[:num_scored], len(prefix))
        return logits[num_scored:], len(prefix)

    def _inputs(self, prefix: Sequence[int], node_ids: torch.Tensor, shape: TreeShape, num_nodes: int) -> PassInputs:
        """`prefix` continues the cache; the first `num_nodes` of `shape` come right behind it."""
        mask = self._masks.of(shape, num_nodes)
        return pass_inputs(self._device, self._target.cache.length, prefix, node_ids, shape.depths[:num_nodes], mask)

    @property
    def _scores_prompt(self) -> bool:
        return self._scoring is not None and self._scoring.prompt

    def _rows_per_pass(self) -> int:
        if not self._scores_prompt:
            return self._plan.pass_rows
        row_bytes = 4 * self._target.architecture.vocab_size  # as float32, which is what they are scored in
        return min(self._plan.pass_rows, max(SCORED_LOGITS_BYTES // row_bytes, self._plan.tree.num_nodes + 1))

    def _score_prompt(self, logits: torch.Tensor, num_rows: int) -> None:
        """The last pass read `num_rows` tokens of the prompt behind the cached ones; each predicts the token after it."""
        if self._scoring is not None and self._scoring.prompt:
            with self._numeric(num_rows):
                token_ids = self._committed[self._target.cache.length + 1 :][:num_rows]
                self._prompt_scores += score_tokens(logits, token_ids, self._scoring.num_top)

    def _score(self, verdict: Verdict, logits: torch.Tensor) -> tuple[ScoredToken, ...]:
        if self._scoring is None:
            return ()
        path = self._device.upload(torch.tensor(verdict.path))
        return score_tokens(logits.index_select(0, path), verdict.token_ids, self._scoring.num_top)

    def _verify(self, draft: DraftTree, logits: torch.Tensor) -> Verdict:
        with self._numeric(draft.shape.num_nodes):
            return verify(draft, logits, self._params, self._generator, method=self._method)

    @contextmanager
    def _numeric(self, num_rows: int) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            self.sessions.forget()  # what led here is not to be built upon
            raise NumericError(
                str(error),
                where=f"pass over {num_rows} nodes after {len(self._committed)} tokens",
                cure="check the weights with `verify --full`; try --dtype bfloat16 or float32 if float16 overflowed",
            ) from error

    def _commit(self, verdict: Verdict, num_prefix: int) -> None:
        self._committed.extend(verdict.token_ids)  # before the caches: after an interruption, they may lag but not lead
        self._target.cache.commit([*range(num_prefix), *(num_prefix + node for node in verdict.path)])
        if self._drafter is not None:
            self._drafter.commit(verdict.path)
            self._drafter.extend_context(verdict.token_ids)
        self._target.start_over_if_outgrown(len(self._committed))
        self.sessions.grown(len(self._committed))
