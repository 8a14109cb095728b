"""The queue and the engine's thread, with an engine that does what the test says: order, cancelling, draining, failing."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from offload.engine.admission import Request
from offload.engine.generation import Step
from offload.engine.loading import LoadProgress
from offload.errors import DeviceError, DeviceMemoryError, NumericError
from offload.report.stats import PassStats
from offload.serve.problems import Problem
from offload.serve.telemetry import Telemetry
from offload.serve.worker import MAX_OUT_OF_MEMORY, EngineWorker, Finished, Job, Stepped
from serving import until
from tree.shape import TreeShape
from tree.verify import Verdict

PASS = PassStats(
    num_rows=1,
    num_nodes=1,
    emitted_tokens=1,
    bytes_streamed=10,
    draft_s=0,
    pass_s=2,
    verify_s=0,
    round_s=2,
    stall_s=0,
    stall_by_layer_s=(),
    copied_s=0,
)


def one_token(reason: str | None) -> Step:
    shape = TreeShape.root_only()
    verdict = Verdict((0,), (7,), 1.0)
    return Step(
        shape=shape, token_ids=(7,), text="x", finish_reason=reason, verdict=verdict, stats=PASS, scores=(), prompt_scores=()
    )


class ScriptedEngine:
    """Emits one token a pass, each when `allow` has been released for it. `fail` is raised by the next pass."""

    def __init__(self) -> None:
        plan = SimpleNamespace(
            text_tokens=100,
            context_rows=100,
            tree=TreeShape.root_only(),
            bytes_per_pass=10,
            link_bytes_per_s=None,
            to_json=lambda: {"predicted_s_per_token": None},
            placement=SimpleNamespace(streamed=(0,), resident=()),
        )
        self.plan, self.device_name, self.emulated_link = plan, "scripted", False
        self.allow = threading.Semaphore(0)
        self.fail: BaseException | None = None
        self.closed = False

    def __enter__(self) -> "ScriptedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def memory(self) -> Any:
        return SimpleNamespace(host_pinned_bytes=0)

    def run(self, request: Request) -> "ScriptedGeneration":
        return ScriptedGeneration(self, request.max_new_tokens)


class ScriptedGeneration:
    stats = SimpleNamespace(reused_tokens=0)

    def __init__(self, engine: ScriptedEngine, num_tokens: int) -> None:
        self.engine, self.num_tokens = engine, num_tokens

    def __iter__(self) -> Iterator[Step]:
        for number in range(self.num_tokens):
            self.engine.allow.acquire()
            if self.engine.fail is not None:
                failure, self.engine.fail = self.engine.fail, None
                raise failure
            yield one_token("length" if number + 1 == self.num_tokens else None)

    def stop(self) -> str:
        return ""


class Client:
    """Collects what the worker says about one job."""

    def __init__(self, *lengths: int) -> None:
        self.events: list[Stepped | Finished] = []
        self.job = Job(tuple(Request(prompt=(1,), max_new_tokens=length) for length in lengths), self.events.append)

    @property
    def tokens(self) -> int:
        return sum(isinstance(event, Stepped) for event in self.events)

    @property
    def finished(self) -> Finished | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Finished) else None


def answered(worker: EngineWorker, engine: ScriptedEngine, error: BaseException | None) -> Finished:
    """How a request for one token ends, whose pass raises `error`."""
    engine.fail, client = error, Client(1)
    worker.submit(client.job)
    engine.allow.release()
    until(lambda: client.finished is not None)
    assert client.finished is not None
    return client.finished


Start = Callable[..., tuple[EngineWorker, ScriptedEngine]]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[tuple[EngineWorker, ScriptedEngine]] = []

    def make(max_waiting: int = 2) -> tuple[EngineWorker, ScriptedEngine]:
        engine = ScriptedEngine()
        worker = EngineWorker(lambda _: engine, Telemetry(lambda _: None), max_waiting=max_waiting)  # type: ignore[arg-type, return-value]
        worker.start()
        until(lambda: worker.state == "ok")
        made.append((worker, engine))
        return made[-1]

    yield make
    for worker, engine in made:
        engine.allow.release(10_000)
        worker.close()
        assert engine.closed and not worker._thread.is_alive()


def test_jobs_are_answered_in_order_each_to_its_end(start: Start) -> None:
    worker, engine = start()
    clients = [Client(2, 1), Client(1), Client(3)]
    for client in clients:
        worker.submit(client.job)
        until(lambda: worker._running is clients[0].job)
    assert [worker.ahead_of(client.job) for client in clients] == [0, 1, 2]
    for allowed in range(1, 8):
        engine.allow.release()
        until(lambda allowed=allowed: sum(client.tokens for client in clients) == allowed)  # type: ignore[misc]
        assert [client.tokens for client in clients] == [min(allowed, 3), min(max(allowed - 3, 0), 1), max(allowed - 4, 0)]
    until(lambda: clients[2].finished is not None)
    assert [client.finished for client in clients] == [Finished(None)] * 3
    assert [event.index for event in clients[0].events if isinstance(event, Stepped)] == [0, 0, 1]


def test_a_full_queue_refuses_with_the_time_the_running_job_may_take(start: Start) -> None:
    worker, engine = start(max_waiting=1)
    first, second, third = Client(11), Client(1), Client(1)
    worker.submit(first.job)
    engine.allow.release()
    until(lambda: first.tokens == 1)
    worker.submit(second.job)
    with pytest.raises(Problem) as caught:
        worker.submit(third.job)
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "20"})  # 10 tokens, 2 s each
    assert third.events == []


def test_a_queue_of_none_still_answers_one(start: Start) -> None:
    worker, engine = start(max_waiting=0)
    first = Client(1)
    worker.submit(first.job)
    until(lambda: worker._running is first.job)
    with pytest.raises(Problem):
        worker.submit(Client(1).job)
    engine.allow.release()
    until(lambda: first.finished is not None)


def test_a_cancelled_job_ends_after_its_pass_and_a_waiting_one_at_once(start: Start) -> None:
    worker, engine = start()
    running, waiting, last = Client(50), Client(50), Client(1)
    for client in (running, waiting, last):
        worker.submit(client.job)
    until(lambda: worker._running is running.job)
    worker.cancel(waiting.job)
    assert worker.ahead_of(last.job) == 1
    worker.cancel(running.job)
    engine.allow.release(2)  # the pass under way, and the one of the last
    until(lambda: last.finished is not None)
    assert (running.tokens, waiting.events, last.tokens) == (1, [], 1)
    worker.cancel(last.job)  # once more is not wrong


@pytest.mark.parametrize("error", [NumericError("NaN", where="x", cure="y"), RuntimeError("broken")])
def test_a_request_that_fails_fails_alone(start: Start, error: Exception) -> None:
    worker, engine = start()
    engine.fail = error
    failing, other = Client(5), Client(1)
    worker.submit(failing.job)
    worker.submit(other.job)
    engine.allow.release(2)
    until(lambda: other.finished is not None)
    assert failing.finished is not None and failing.finished.problem is not None and failing.finished.problem.status == 500
    assert other.finished == Finished(None) and worker.state == "ok"


def test_a_lost_device_ends_the_worker_and_everyone_learns_it(start: Start) -> None:
    worker, engine = start()
    told: list[bool] = []
    worker.on_failure = lambda: told.append(True)
    engine.fail = DeviceError("gone", where="x", cure="y")
    running, waiting = Client(5), Client(1)
    worker.submit(running.job)
    worker.submit(waiting.job)
    engine.allow.release()
    until(lambda: waiting.finished is not None)
    assert running.finished is not None and running.finished.problem is not None and running.finished.problem.status == 500
    assert waiting.finished is not None and waiting.finished.problem is not None and waiting.finished.problem.status == 503
    until(lambda: told == [True])
    assert worker.state == "failed" and isinstance(worker.failure, DeviceError)
    with pytest.raises(Problem, match="failed"):
        worker.submit(Client(1).job)


def test_an_engine_that_fails_every_request_is_given_up_without_quoting_one(start: Start) -> None:
    worker, engine = start()
    for number, error in enumerate([RuntimeError("x"), None, *[RuntimeError("the prompt")] * 3]):
        assert worker.state == "ok", number
        answered(worker, engine, error)
    until(lambda: worker.state == "failed")
    assert "3 requests in a row" in str(worker.failure) and "the prompt" not in str(worker.failure)


def test_memory_that_does_not_come_back_ends_the_worker_and_memory_that_does_is_forgotten(start: Start) -> None:
    worker, engine = start()
    full = DeviceMemoryError("out of memory", where="x", cure="y")
    for number, error in enumerate([*[full] * (MAX_OUT_OF_MEMORY - 1), None, *[full] * MAX_OUT_OF_MEMORY]):
        assert worker.state == "ok", number
        problem = answered(worker, engine, error).problem
        assert (problem is None) == (error is None) and (problem is None or problem.status == 503)
    until(lambda: worker.state == "failed")
    assert worker.failure is full


def test_draining_takes_nothing_new_and_finishes_what_there_is(start: Start) -> None:
    worker, engine = start()
    running, waiting = Client(2), Client(1)
    worker.submit(running.job)
    worker.submit(waiting.job)
    worker.drain()
    with pytest.raises(Problem, match="draining"):
        worker.submit(Client(1).job)
    engine.allow.release(3)
    until(lambda: engine.closed)
    assert (running.finished, waiting.finished) == (Finished(None), Finished(None))


def test_an_engine_that_cannot_be_loaded_is_reported(start: Start) -> None:
    def fail(_progress: LoadProgress) -> Any:
        raise DeviceError("no such device", where="x", cure="y")

    told: list[bool] = []
    worker = EngineWorker(fail, Telemetry(lambda _: None), max_waiting=1)
    worker.on_failure = lambda: told.append(True)
    assert worker.state == "loading"
    worker.start()
    until(lambda: told == [True])
    assert worker.state == "failed" and isinstance(worker.failure, DeviceError)
    worker.close()


def test_a_loading_that_is_no_longer_wanted_ends() -> None:
    reading = threading.Event()

    def load(progress: LoadProgress) -> Any:
        reading.set()
        while True:
            progress(1, 2)

    worker = EngineWorker(load, Telemetry(lambda _: None), max_waiting=1)
    worker.start()
    reading.wait()
    worker.close()
    assert worker.failure is None
