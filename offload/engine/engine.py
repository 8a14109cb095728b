"""A loaded model pair that answers requests, some of them side by side: prompts in, text and numbers out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import RLock
from types import TracebackType

from ..errors import UsageError
from ..planner.plan import Plan
from ..report.report import Memory, Report, Weights
from ..streaming.stream import PassProgress
from . import sequence
from .admission import Admission, Request
from .decode import DecodeLoop, StepResult
from .generation import Generation
from .replanning import Counted, Replanner


class Engine:
    """Serves any number of requests, of any threads; each has its own seed, and answers as if it were the only one. A prompt
    that begins as an earlier request did is read from where they part. Close it, or use it as a context manager: it holds
    threads, device memory and pinned host memory.

    `turn` is held by whoever uses loop and memory, and never while a caller's own code runs, so nobody waits for ever. Whoever
    asks for the next step of an answer runs the pass that it takes. All texts that have a place take part, but those whose last
    outcome has not been asked for yet: a reader who is slow or gone is not run ahead of. Of more texts than the plan has places
    for, the one whose step was not asked for longest gives its place up, and comes back when it is asked for.
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
        weights: Weights,
        memory: Callable[[], Memory],
        close: Callable[[], None],
        replanner: Replanner | None = None,
        draft_place: int | None = None,
    ) -> None:
        self.loop, self.admission, self.tokenizer = loop, admission, admission.tokenizer
        self.eos_token_ids, self.load_s = eos_token_ids, load_s
        self.method, self.emulated_link, self.device_name, self.weights = method, emulated_link, device_name, weights
        self._memory, self._close, self.replanner = memory, close, replanner
        self.draft_place = draft_place  # of the draft in use among those that the settings name
        self.turn = RLock()
        self._live: dict[Generation, sequence.Sequence] = {}  # not asked for longest first
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
            self._live.clear()
            self.forget()
            self._close()

    def check_open(self) -> None:
        """UsageError when the engine is closed."""
        if self._closed:
            raise UsageError("the engine is closed", where="Engine", cure="ask within the `with` block, or load it again")

    def forget(self) -> None:
        """Drop the keys and values of all earlier requests: the next starts cold, which is what a benchmark measures."""
        with self.turn:
            while self._live:
                self._give_up_place()
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
        return Generation(self, request, self.loop.seeded(request.seed))

    def advance(self, generation: Generation) -> None:
        """Run passes until there is an outcome for `generation`. UsageError when the engine is closed; errors of the loop."""
        while generation.outcome is None:
            self.check_open()
            self._join(generation)
            self._run_pass()

    def leave(self, generation: Generation) -> None:
        """Its text takes part in no more passes. What its place holds may be gone on from."""
        self._live.pop(generation, None)

    def _join(self, generation: Generation) -> None:
        """Give its text a place, unless it has one."""
        if generation in self._live:
            self._live[generation] = self._live.pop(generation)
            return
        while len(self._live) >= self.plan.max_sequences:
            self._give_up_place()
        request = generation.request
        joined = self.loop.join(
            generation.text_ids,
            len(request.prompt),
            request.params,
            generation.generator,
            generation.scoring,
            tokens_left=generation.tokens_left,
            repeatable=request.keeps_plan,
            before=generation.left,
            beside=self._live.values(),
        )
        generation.left = None
        if not generation.has_joined:
            generation.has_joined, generation.stats.reused_tokens = True, joined.segment.length
        self._live[generation] = joined

    def _give_up_place(self) -> None:
        """Of the text whose step was not asked for longest."""
        generation = next(iter(self._live))
        generation.left = self._live.pop(generation).leave()

    def _run_pass(self) -> None:
        """One pass for all who have a place and wait for an outcome."""
        waiting = {generation: joined for generation, joined in self._live.items() if generation.outcome is None}
        alone = next(iter(waiting)) if len(waiting) == 1 else None  # plans predict rounds of one text
        if alone is not None and self._changes_plan(alone):
            alone.stats.passes_before_plan = len(alone.stats.passes)
        try:
            outcomes = self.loop.run_pass(tuple(waiting.values()))
            for generation, outcome in zip(waiting, outcomes, strict=True):
                generation.outcome = outcome
        except BaseException:
            self._live.clear()  # each goes on from the tokens that it has
            raise
        if self.replanner is not None and alone is not None and isinstance(alone.outcome, StepResult):
            result = alone.outcome
            self.replanner.saw(self.plan, result.stats, Counted(result.shape, result.verdict.path, result.tops))

    def _changes_plan(self, generation: Generation) -> bool:
        """Whether another tree is taken from here on, between two rounds of the only text."""
        if self.replanner is None or generation.request.keeps_plan or self._live[generation].start_s is not None:
            return False
        return self.replanner.consider(self.loop)

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
