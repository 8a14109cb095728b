"""A loaded model pair that answers requests, a pass at a time: prompts in, text and numbers out."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import RLock
from time import monotonic
from types import TracebackType

from tree.logprobs import ScoredToken
from tree.shape import TreeShape
from tree.verify import Verdict

from ..errors import UsageError
from ..planner.plan import Plan
from ..report.report import Memory, Report
from ..report.stats import PassStats, RunStats
from ..streaming.stream import PassProgress
from ..text.incremental import TextStream
from .admission import Admission, Request
from .decode import DecodeLoop, StepResult
from .replanning import Replanner


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one pass over the tree `shape` added: tokens, and the text that has become final with them. `finish_reason` is
    None but at the end. Scores as in StepResult, of these tokens only."""

    shape: TreeShape
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    verdict: Verdict
    stats: PassStats
    scores: tuple[ScoredToken, ...]
    prompt_scores: tuple[ScoredToken, ...]


class Generation:
    """One request being answered: an iterator of Steps, one per pass. `result` may be asked for at any time.

    The engine is held for a pass and not between passes: other requests may be answered there, and this one goes on from the
    tokens that it has, with its own randomness. Any thread may ask for the next step.
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self._engine, self._request = engine, request
        self._text = TextStream(engine.tokenizer, request.stop, request.prompt) if engine.tokenizer is not None else None
        self.token_ids: list[int] = []
        self.finish_reason = "interrupted"
        self.stats = RunStats(load_s=engine.load_s)
        self._generator = engine.loop.seeded(request.seed)
        self._steps = self._run()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._engine.turn:
            return next(self._steps)

    @property
    def text(self) -> str | None:
        """The text so far; None when the model has no tokenizer."""
        return self._text.text if self._text is not None else None

    def stop(self) -> str:
        """End here, as after an interruption; the text that was held back for want of certainty."""
        with self._engine.turn:
            self._steps.close()
            return self._text.finish() if self._text is not None else ""

    def result(self) -> Report:
        return Report(
            text=self.text,
            prompt_token_ids=self._request.prompt,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
            plan=self._engine.plan,
            verifier="greedy" if self._request.params.greedy else self._engine.method,
            memory=self._engine.memory(),
            emulated_link=self._engine.emulated_link,
            device_name=self._engine.device_name,
        )

    def _run(self) -> Generator[Step, None, None]:
        loop, request, stats = self._engine.loop, self._request, self.stats
        start_s = previous_s = monotonic()
        while True:
            self._take_turn()
            replanner = self._engine.replanner
            if replanner is not None and not request.keeps_plan and replanner.consider(loop):
                stats.passes_before_plan = len(stats.passes)
            result = loop.run_round(request.max_new_tokens - len(self.token_ids))
            if replanner is not None:
                replanner.saw(loop.plan, result.stats)
            token_ids, text, reason = self._accept(result)
            now_s = monotonic()
            if not stats.passes:
                stats.first_token_s, stats.first_tokens = now_s - start_s, len(token_ids)
            else:
                stats.decode_s += now_s - previous_s
            previous_s = now_s
            stats.num_tokens += len(token_ids)
            stats.passes.append(result.stats)
            if reason is not None:
                self.finish_reason = reason
                yield self._step(result, token_ids, text + (self._text.finish() if self._text else ""), reason)
                return
            yield self._step(result, token_ids, text, None)

    def _take_turn(self) -> None:
        """Make this text the one that the engine holds, unless it is. UsageError when the engine has been closed."""
        engine, request, begun = self._engine, self._request, bool(self.stats.passes)
        engine.check_open()
        if engine.answering is self:
            return
        engine.answering = None  # until all is in place
        scoring = replace(request.scoring, prompt=False) if request.scoring and begun else request.scoring
        text = (*request.prompt, *self.token_ids)
        num_reused = engine.loop.start(text, len(request.prompt), request.params, self._generator, scoring)
        if not begun:
            self.stats.reused_tokens = num_reused
        engine.answering = self

    def _accept(self, result: StepResult) -> tuple[tuple[int, ...], str, str | None]:
        """Take tokens one by one until something ends the text, be it in the middle of the accepted path."""
        request, text, taken = self._request, "", 0
        reason = None
        for token_id in result.token_ids:
            self.token_ids.append(token_id)
            taken += 1
            if token_id in request.stop_token_ids:
                reason = "stop"
                break
            if self._text is not None:
                text += self._text.push(token_id)
                if self._text.stopped:
                    reason = "stop"
                    break
            if token_id in self._engine.eos_token_ids and not request.ignore_eos:
                reason = "eos"
                break
            if len(self.token_ids) == request.max_new_tokens:
                reason = "length"
                break
        return result.token_ids[:taken], text, reason

    def _step(self, result: StepResult, token_ids: tuple[int, ...], text: str, reason: str | None) -> Step:
        return Step(
            shape=result.shape,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            verdict=result.verdict,
            stats=result.stats,
            scores=result.scores[: len(token_ids)],
            prompt_scores=result.prompt_scores,
        )


class Engine:
    """Serves any number of requests, of any threads; each has its own seed, and answers as if it were the only one. A prompt
    that begins as an earlier request did is read from where they part. Close it, or use it as a context manager: it holds
    threads, device memory and pinned host memory.

    `turn` is held by whoever uses loop and memory, and never while a caller's own code runs, so nobody waits for ever. The
    loop holds one text at a time, that of `answering`.
    """

    def __init__(
        self,
        *,
        loop: DecodeLoop,
        admission: Admission,
        eos_token_ids: frozenset[int],
        load_s: float,
        method: str,
        emulated_link: bool,
        device_name: str,
        memory: Callable[[], Memory],
        close: Callable[[], None],
        replanner: Replanner | None = None,
    ) -> None:
        self.loop, self.admission, self.tokenizer = loop, admission, admission.tokenizer
        self.eos_token_ids, self.load_s = eos_token_ids, load_s
        self.method, self.emulated_link, self.device_name = method, emulated_link, device_name
        self._memory, self._close, self.replanner = memory, close, replanner
        self.turn = RLock()
        self.answering: Generation | None = None
        self._closed = False

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """What runs: as planned, or less, where memory turned out to be less, or with a tree that proved to be better."""
        return self.loop.plan

    def close(self) -> None:
        """Give back what the engine holds, after the pass under way. Texts that are not finished end with a UsageError."""
        self._closed = True
        with self.turn:
            self.forget()
            self._close()

    def check_open(self) -> None:
        """UsageError when the engine is closed."""
        if self._closed:
            raise UsageError("the engine is closed", where="Engine", cure="ask within the `with` block, or load it again")

    def forget(self) -> None:
        """Drop the keys and values of all earlier requests: the next starts cold, which is what a benchmark measures."""
        with self.turn:
            self.answering = None
            self.loop.sessions.forget()

    def progress(self) -> PassProgress:
        """How far the pass under way, or the last one, has come: what to show while an answer takes seconds a pass. Any thread
        may ask."""
        return self.loop.progress()

    def memory(self) -> Memory:
        return replace(self._memory(), host_sessions_bytes=self.loop.sessions.host_bytes)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Start answering `prompt` (text, or token ids); iterate over the result, one Step per pass.

        Raises UsageError or FitError for a request that could not be finished, before anything is computed.
        """
        return self.run(
            self.admission.request(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
            )
        )

    def run(self, request: Request) -> Generation:
        """Start answering a request that `admission` has made. UsageError when the engine is closed."""
        self.check_open()
        return Generation(self, request)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Report:
        """The whole answer, without other requests in between. Arguments and errors as in `stream`."""
        generation = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        with self.turn:
            for _ in generation:
                pass
            return generation.result()
