"""The loop: grow a tree, run one pass over it, verify, commit. The only place where tree and machine run together.

Knows token ids, not text; owns no memory. Streaming text, stop handling and benchmarks all consume its rounds.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tree.draft import DraftTree, grow
from tree.logprobs import ScoredToken, Scoring, score_tokens
from tree.sampling import SamplingParams
from tree.shape import TreeShape
from tree.verify import Method, Verdict, verify

from .device import Device, Ticket
from .errors import NumericError
from .model.attention import pass_mask
from .model.causal_lm import CausalLM
from .model.drafter import ModelDrafter
from .planner.plan import Plan
from .sessions import Sessions, host_limit_bytes
from .stats import PassStats
from .streaming.stream import LayerStream, LayerTiming, layer_timings
from .trace import Trace

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
    first: bool
    scores: tuple[ScoredToken, ...] = ()
    prompt_scores: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rows:
    """One pass's input: token ids, positions, mask, all on the device."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


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
        plan: Plan,
        *,
        method: Method,
        trace: Trace | None = None,
    ) -> None:
        self._device, self._target, self._stream, self._drafter = device, target, stream, drafter
        self._plan, self._method, self._trace = plan, method, trace
        caches = [target.cache, *([drafter.cache] if drafter is not None else [])]
        self.sessions = Sessions(caches, max_bytes=host_limit_bytes(plan))
        self._committed: list[int] = []
        self._first = True
        self._params = SamplingParams()
        self._scoring: Scoring | None = None
        self._prompt_scores: tuple[ScoredToken, ...] = ()
        self._generator = torch.Generator(device.torch_device)
        self._masks: dict[TreeShape, torch.Tensor] = {}

    def start(self, prompt: Sequence[int], params: SamplingParams, seed: int, scoring: Scoring | None = None) -> int:
        """Begin with `prompt` and fresh randomness. Returns how many of its tokens need no pass, as an earlier sequence began
        with them; a prompt that is to be scored needs them all. `scoring` changes no token."""
        num_reused = self.sessions.resume(self._committed, prompt)
        if scoring is not None and scoring.prompt:
            num_reused = 0
            self._target.cache.truncate(0)
        self._params, self._first = params, True
        self._scoring, self._prompt_scores = scoring, ()
        self._generator.manual_seed(seed)
        if self._drafter is not None:
            self._drafter.restart(prompt)
        return num_reused

    def run_round(self, max_tokens: int) -> StepResult:
        """One round that can emit at most `max_tokens` tokens (>= 1). Raises NumericError for NaN or Inf logits."""
        start_s = time.monotonic()
        first, self._first = self._first, False
        self._stream.prefetch()
        extra_bytes = self._read_ahead_of_tree()
        shape = self._plan.tree.truncated(max_tokens) if self._drafter is not None else TreeShape.root_only()
        draft = self._grow(shape)
        drafted = self._device.mark()
        logits, cached = self._run_target(draft)
        verdict = self._verify(draft, logits)  # the round's one host sync, but for scoring
        scores = self._score(verdict, logits)
        verified_s = time.monotonic()
        self._commit(verdict, cached)
        return StepResult(
            shape=shape,
            token_ids=verdict.token_ids,
            verdict=verdict,
            stats=self._stats(cached + shape.num_nodes, len(verdict.token_ids), extra_bytes, start_s, drafted, verified_s),
            first=first,
            scores=scores,
            prompt_scores=self._prompt_scores if first else (),
        )

    # -- the four parts of a round --------------------------------------------------------------------------------------

    def _read_ahead_of_tree(self) -> int:
        """Pass over prompt tokens that do not fit into one pass with the tree; returns the bytes streamed for them."""
        cache, streamed = self._target.cache, 0
        most_rows = self._rows_per_pass()
        while len(self._committed) - 1 - cache.length > most_rows - self._plan.tree.num_nodes:
            chunk = self._committed[cache.length :][: min(most_rows, len(self._committed) - 1 - cache.length)]
            rows = self._rows(chunk, torch.zeros(0, dtype=torch.int64), None)
            logits = self._target.forward(rows.token_ids, rows.positions, rows.mask, len(chunk) if self._scores_prompt else 1)
            self._score_prompt(logits, len(chunk))
            cache.commit(range(len(chunk)))
            streamed += self._stream.bytes_per_pass
        return streamed

    def _grow(self, shape: TreeShape) -> DraftTree:
        root = self._committed[-1]
        if self._drafter is None or shape.num_nodes == 1:
            token_ids = self._device.upload(torch.tensor([root]))
            return DraftTree(shape, token_ids, None)
        sampled = self._method != "sample" and not self._params.greedy
        return grow(self._drafter, root, shape, self._params, self._generator, sampled=sampled)

    def _run_target(self, draft: DraftTree) -> tuple[torch.Tensor, int]:
        """Logits [N, V] of the tree's nodes, and how many committed tokens the pass read before them."""
        prefix = self._committed[self._target.cache.length : -1]
        rows = self._rows(prefix, draft.token_ids, draft.shape)
        num_scored = len(prefix) if self._scores_prompt else 0
        logits = self._target.forward(rows.token_ids, rows.positions, rows.mask, num_scored + draft.shape.num_nodes)
        self._score_prompt(logits[:num_scored], len(prefix))
        return logits[num_scored:], len(prefix)

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
            start = self._target.cache.length + 1
            with self._numeric(num_rows):
                token_ids = self._committed[start : start + num_rows]
                self._prompt_scores += score_tokens(logits, token_ids, self._scoring.num_top)

    def _score(self, verdict: Verdict, logits: torch.Tensor) -> tuple[ScoredToken, ...]:
        if self._scoring is None:
            return ()
        return score_tokens(logits[list(verdict.path)], verdict.token_ids, self._scoring.num_top)

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

    # -- inputs and numbers ---------------------------------------------------------------------------------------------

    def _rows(self, prefix: Sequence[int], nodes: torch.Tensor, shape: TreeShape | None) -> _Rows:
        """`prefix` continues the cache; the tree's root comes right behind it."""
        cached = self._target.cache.length
        depths = torch.tensor(shape.depths if shape else (), dtype=torch.int64)
        positions = torch.cat([torch.arange(cached, cached + len(prefix)), cached + len(prefix) + depths])
        prefix_ids = self._device.upload(torch.tensor(prefix, dtype=torch.int64))
        return _Rows(
            torch.cat([prefix_ids, self._device.upload(nodes)]),
            self._device.upload(positions),
            pass_mask(cached, len(prefix), self._tree_mask(shape)),
        )

    def _tree_mask(self, shape: TreeShape | None) -> torch.Tensor:
        """[N, N] bool on the device; N = 0 for no tree. Uploaded once per shape: a run uses a handful of them."""
        if shape is None:
            return torch.zeros(0, 0, dtype=torch.bool, device=self._device.torch_device)
        if shape not in self._masks:
            self._masks[shape] = self._device.upload(torch.from_numpy(shape.ancestor_mask.copy()))
        return self._masks[shape]

    def _stats(
        self, num_rows: int, num_tokens: int, extra_bytes: int, start_s: float, drafted: Ticket, verified_s: float
    ) -> PassStats:
        """Numbers of the round that began at `start_s`, asked for after its host sync."""
        log = self._stream.log
        assert log is not None
        timings = layer_timings(self._device, log)
        drafted_s = self._device.interval(drafted).end_s
        computed_s = timings[-1].compute.end_s
        end_s = time.monotonic()
        if self._trace is not None:
            self._record(self._trace, timings, (start_s, drafted_s, computed_s, verified_s, end_s))
        return PassStats(
            num_rows=num_rows,
            emitted_tokens=num_tokens,
            bytes_streamed=self._stream.bytes_per_pass + extra_bytes,
            draft_s=drafted_s - start_s,
            pass_s=computed_s - drafted_s,
            verify_s=end_s - computed_s,
            round_s=end_s - start_s,
            stall_s=sum(timing.stall_s for timing in timings),
            stall_by_layer_s=tuple(timing.stall_s for timing in timings),
            copied_s=sum(timing.copy.end_s - timing.copy.start_s for timing in timings if timing.copy),
        )

    def _record(self, trace: Trace, timings: list[LayerTiming], times_s: tuple[float, ...]) -> None:
        start_s, drafted_s, computed_s, verified_s, end_s = times_s
        trace.add("draft", "draft", start_s, drafted_s)
        for timing in timings:
            trace.add("compute", f"layer {timing.layer}", timing.compute.start_s, timing.compute.end_s)
            if timing.copy is not None:
                trace.add("link", f"layer {timing.layer}", timing.copy.start_s, timing.copy.end_s)
        for read in self._stream.take_disk_reads():
            trace.add("disk", f"layer {read.layer}", read.start_s, read.end_s)
        trace.add("verify", "verify", computed_s, max(verified_s, computed_s))
        trace.add("verify", "commit", verified_s, end_s)
