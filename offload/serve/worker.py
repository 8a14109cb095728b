"""The engine on a thread of its own: it loads there, answers one job after another from a bounded queue, and is closed there.

Knows no HTTP. What it has to say about a job goes to the job's `deliver`, on the worker's thread.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from ..errors import DeviceError, OffloadError, OutOfMemoryError
from .problems import Problem, from_error, place_of
from .telemetry import Telemetry

if TYPE_CHECKING:  # torch takes seconds to import: `open_engine` does it, on the worker's thread, while the server answers
    from ..engine.admission import Request
    from ..engine.engine import Engine
    from ..engine.generation import Step
    from ..engine.loading import LoadProgress

logger = logging.getLogger(__name__)

# Failures in a row that end the server. Memory may come back, so it is waited for longer.
MAX_BUGS, MAX_OUT_OF_MEMORY = 3, 20
PACE_MEMORY = 0.8  # share of the pace that a new pass leaves as it was


@dataclass(frozen=True, slots=True)
class Stepped:
    """One pass for the `index`-th request of a job. The first `reused_tokens` of its prompt needed no pass."""

    index: int
    step: "Step"
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing follows. `problem` is None when every request of the job was answered."""

    problem: Problem | None


@dataclass(eq=False, slots=True)
class Job:
    """Requests of one client, answered in order."""

    requests: tuple["Request", ...]
    deliver: Callable[[Stepped | Finished], None]
    queued_s: float = field(default_factory=monotonic)
    cancelled: bool = False
    tokens_left: int = field(init=False)  # at most

    def __post_init__(self) -> None:
        self.tokens_left = sum(request.max_new_tokens for request in self.requests)


class _ToldToEnd(Exception):
    """The server is told to end while its engine loads."""


class EngineWorker:
    """Owns the engine. `open_engine` runs on the worker's thread and calls its argument while weights are read. That call
    raises once the server is told to end, so loading ends, too. `failure` is why the engine is gone, None until then."""

    def __init__(self, open_engine: "Callable[[LoadProgress], Engine]", telemetry: Telemetry, *, max_waiting: int) -> None:
        self._open_engine, self._telemetry, self._max_waiting = open_engine, telemetry, max_waiting
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._pace_s: float | None = None  # measured seconds per token, recent passes first
        self._draining = False
        self._num_failed = 0  # requests in a row that failed for no reason of theirs
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.engine: Engine | None = None
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> str:
        """loading, ok, draining or failed."""
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        return "ok" if self.engine is not None else "loading"

    def ready(self) -> "Engine":
        """The engine, to admit requests with. Problem while there is none."""
        if self.engine is None or self.state != "ok":
            raise Problem(503, f"engine_{self.state}", f"the engine is {self.state}", headers={"Retry-After": "5"})
        return self.engine

    def submit(self, job: Job) -> None:
        """Queue `job`. Problem 429 when the queue is full, with the time that the running job may still take."""
        with self._condition:
            self.check_room()
            self._waiting.append(job)
            self._condition.notify()
            self._telemetry.queue(self._running is not None, len(self._waiting))

    def check_room(self) -> None:
        """Raises the Problem that `submit` would raise. Making a request takes time: this is asked before, and again after."""
        self.ready()
        if len(self._waiting) + (self._running is not None) > self._max_waiting:
            message = f"one request runs and {self._max_waiting} wait: no more may"
            raise Problem(429, "queue_full", message, headers={"Retry-After": str(self._retry_after_s())})

    def cancel(self, job: Job) -> None:
        """Forget `job`: at once when it waits, after the pass under way when it runs."""
        with self._condition:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._telemetry.ended("cancelled")
                self._telemetry.queue(self._running is not None, len(self._waiting))

    def ahead_of(self, job: Job) -> int:
        """Requests that will be answered before `job`; 0 for the one that runs."""
        with self._condition:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def progress(self) -> str:
        """What the engine is at, in words."""
        engine = self.engine
        if engine is None or self._running is None:
            return self.state
        seen = engine.progress()
        return f"layer {seen.layers_done}/{seen.num_layers}"

    def drain(self) -> None:
        """Take no more jobs; the ones there are go on."""
        with self._condition:
            self._draining = True
            self._condition.notify()

    def close(self) -> None:
        """Cancel everything, wait for the pass under way, give the engine's memory back."""
        with self._condition:
            self._draining = True
            for job in (*self._waiting, self._running):
                if job is not None:
                    job.cancelled = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # -- on the worker's thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with self._open_engine(self._loading) as engine:
                self._telemetry.loaded(engine)
                self.engine = engine
                while self._answer_next(engine):
                    pass
        except _ToldToEnd:
            pass
        except BaseException as error:  # reported by whoever started the server
            self.failure = error
        finally:
            self.engine = None
            self._dismiss_waiting()

    def _loading(self, read_bytes: int, total_bytes: int) -> None:
        self._telemetry.loading(read_bytes, total_bytes)
        if self._draining:
            raise _ToldToEnd

    def _answer_next(self, engine: "Engine") -> bool:
        """Whether there is more to do."""
        job = self._next()
        if job is None:
            return False
        job.deliver(Finished(self._answer(engine, job)))
        return self.failure is None

    def _next(self) -> Job | None:
        """The next job; None when draining and there is none left."""
        with self._condition:
            self._running = None
            self._telemetry.queue(False, len(self._waiting))
            while not self._waiting:
                if self._draining:
                    return None
                self._condition.wait()
            self._running = self._waiting.popleft()
            self._telemetry.queue(True, len(self._waiting))
            return self._running

    def _answer(self, engine: "Engine", job: Job) -> Problem | None:
        self._telemetry.began(monotonic() - job.queued_s)
        try:
            for index, request in enumerate(job.requests):
                self._generate(engine, job, index, request)
        except Exception as error:
            logger.error("a request failed: %s", place_of(error))
            self._telemetry.ended("error")
            self._note_failure(error)
            return from_error(error)
        self._num_failed = 0
        self._telemetry.ended("cancelled" if job.cancelled else "answered")
        return None

    def _note_failure(self, error: Exception) -> None:
        """A request fails alone, unless the device is lost, or every request fails: some errors of a GPU never go away."""
        is_memory = isinstance(error, OutOfMemoryError)
        self._num_failed = self._num_failed + 1 if is_memory or not isinstance(error, OffloadError) else 0
        if isinstance(error, DeviceError) or (is_memory and self._num_failed >= MAX_OUT_OF_MEMORY):
            self.failure = error
        elif not is_memory and self._num_failed >= MAX_BUGS:
            self.failure = OffloadError(  # without the message, which may quote a prompt
                f"{self._num_failed} requests in a row failed, the last with {place_of(error)}",
                where="serve",
                cure="start the server again; if it stays, report the place",
            )

    def _generate(self, engine: "Engine", job: Job, index: int, request: "Request") -> None:
        if job.cancelled:
            return
        generation = engine.run(request)
        emitted = 0
        for step in generation:
            emitted += len(step.token_ids)
            job.tokens_left -= len(step.token_ids)
            self._measure_pace(step)
            self._telemetry.step(
                step,
                first=emitted == len(step.token_ids),
                queued_s=job.queued_s,
                num_tokens_held=len(request.prompt) + emitted,
            )
            job.deliver(Stepped(index, step, generation.stats.reused_tokens))
            if job.cancelled:
                generation.stop()
                return
        job.tokens_left -= request.max_new_tokens - emitted

    def _measure_pace(self, step: "Step") -> None:
        pace_s = step.stats.round_s / max(len(step.token_ids), 1)
        old_s = self._pace_s if self._pace_s is not None else pace_s
        self._pace_s = PACE_MEMORY * old_s + (1 - PACE_MEMORY) * pace_s

    def _retry_after_s(self) -> int:
        """When the running job will have made room at the latest, from the measured pace."""
        tokens_left = self._running.tokens_left if self._running is not None else 1
        return max(1, math.ceil(tokens_left * (self._pace_s or 1.0)))

    def _dismiss_waiting(self) -> None:
        """The engine is gone: whoever waits learns it."""
        with self._condition:
            left, self._running = list(self._waiting), None
            self._waiting.clear()
        problem = Problem(503, f"engine_{self.state}", f"the engine is {self.state}")
        for job in left:
            job.deliver(Finished(problem))
        if self.failure is not None:
            self.on_failure()
