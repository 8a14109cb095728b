"""Requests that share an engine: in whatever order passes are asked for, and by whom, each text is that of a request alone."""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.engine.engine import Engine
from offload.engine.generation import Generation
from offload.errors import UsageError
from planning import L40
from tree.logprobs import Scoring

Models = Callable[..., Path]
PROMPTS = ([5, 9, 33, 2, 71], [4, 4], [(7 * i + 3) % 90 for i in range(50)], [(5 * i + 1) % 90 for i in range(45)])
# float64, as passes of other widths round otherwise. Two prompts have too few rows to be put aside, two have enough.
REQUESTS: tuple[dict[str, Any], ...] = tuple(
    {"prompt": prompt, "max_new_tokens": 12 + number, "temperature": temperature, "seed": number, "ignore_eos": True}
    for number, (prompt, temperature) in enumerate(zip(PROMPTS, (0.0, 1.0, 0.8, 0.0), strict=True))
)


@pytest.fixture(params=["4x3:kary", "none", "12:dynamic"], scope="module")
def engine(request: pytest.FixtureRequest, models: Models) -> Iterator[Engine]:
    with open_pair(models, request.param) as engine:
        yield engine


@pytest.fixture
def alone(engine: Engine) -> list[tuple[int, ...]]:
    """What each request gets from an engine that nobody else uses."""
    tokens = []
    for request in REQUESTS:
        engine.forget()
        tokens.append(engine.generate(**request).token_ids)
    engine.forget()
    return tokens


def open_pair(models: Models, tree: str = "4x3:kary") -> Engine:
    drafts = (str(models(num_layers=1, seed=1)),) if tree != "none" else ()
    settings = EngineSettings(
        model=str(models()), draft_models=drafts, tree=tree, device="cpu", dtype="float64", resident_layers=1, slots=2
    )
    return open_engine(settings, hardware=L40)


def in_turns(streams: Sequence[Generation]) -> list[tuple[int, ...]]:
    """A pass for one, a pass for the next, until all have ended."""
    left = set(range(len(streams)))
    for number in cycle(range(len(streams))):
        if number in left and next(streams[number], None) is None:
            left.remove(number)
        if not left:
            return [tuple(stream.token_ids) for stream in streams]
    raise AssertionError("no streams")


@pytest.mark.matrix
def test_streams_that_take_turns_do_not_mix(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    assert in_turns([engine.stream(**request) for request in REQUESTS]) == alone


def test_without_room_to_put_texts_aside_they_do_not_mix_either(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    kept, engine.loop.sessions._max_bytes = engine.loop.sessions._max_bytes, 0
    assert in_turns([engine.stream(**request) for request in REQUESTS]) == alone
    engine.loop.sessions._max_bytes = kept


@pytest.mark.matrix
def test_calls_of_several_threads_are_all_right(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    def ask(number: int) -> tuple[int, ...]:
        if number % 2:
            return engine.generate(**REQUESTS[number]).token_ids
        return tuple(token_id for step in engine.stream(**REQUESTS[number]) for token_id in step.token_ids)

    with ThreadPoolExecutor(max_workers=4) as pool:
        numbers = [*range(len(REQUESTS))] * 2
        assert list(pool.map(ask, numbers)) == [alone[number] for number in numbers]


@pytest.mark.matrix
def test_any_thread_may_ask_for_the_next_step(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    """As a web framework does that hands every step of a response to another worker."""
    streams = [engine.stream(**request) for request in REQUESTS]
    with ThreadPoolExecutor(max_workers=8) as pool:
        while any(list(pool.map(lambda stream: next(stream, None), [*streams, *streams]))):
            pass
    assert [tuple(stream.token_ids) for stream in streams] == alone


@pytest.mark.slow
@pytest.mark.matrix
def test_a_call_within_the_loop_over_a_stream_is_answered(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    stream = engine.stream(**REQUESTS[2])
    for _ in stream:
        assert engine.generate(**REQUESTS[1]).token_ids == alone[1]
    assert tuple(stream.token_ids) == alone[2]


@pytest.mark.matrix
def test_a_stream_that_is_left_half_read_keeps_nobody_waiting(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    left = engine.stream(**REQUESTS[2])
    next(left)
    with ThreadPoolExecutor(max_workers=1) as pool:
        assert pool.submit(engine.generate, **REQUESTS[0]).result(timeout=60).token_ids == alone[0]
        before = tuple(left.token_ids)
        left.stop()
        assert pool.submit(engine.generate, **REQUESTS[1]).result(timeout=60).token_ids == alone[1]
        assert tuple(left.token_ids) == before == alone[2][: len(before)]
        del left
        gc.collect()
        assert pool.submit(engine.generate, **REQUESTS[3]).result(timeout=60).token_ids == alone[3]


def test_forgetting_in_the_middle_of_a_text_changes_no_token(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    for number, request in enumerate(REQUESTS):
        stream = engine.stream(**request)
        for _ in stream:
            engine.forget()
        assert tuple(stream.token_ids) == alone[number]


def test_scores_of_a_prompt_come_once_and_those_of_tokens_stay_right(engine: Engine) -> None:
    def request(number: int) -> Any:
        return engine.admission.request(**REQUESTS[number], scoring=Scoring(num_top=2, prompt=True))

    def scores(stream: Generation) -> tuple[list[Any], list[Any]]:
        steps = list(stream)
        return [one for step in steps for one in step.prompt_scores], [one for step in steps for one in step.scores]

    expected = scores(engine.run(request(3)))
    assert len(expected[0]) == len(PROMPTS[3]) - 1
    interrupted = engine.run(request(3))
    first = next(interrupted)
    engine.generate(**REQUESTS[1])
    prompt_scores, token_scores = scores(interrupted)
    got = [*first.prompt_scores, *prompt_scores], [*first.scores, *token_scores]
    for some, others in zip(expected, got, strict=True):
        assert [one.token_id for one in some] == [one.token_id for one in others]
        assert [one.logprob for one in some] == pytest.approx([one.logprob for one in others], abs=1e-5)


def test_an_engine_that_is_closed_by_another_thread_ends_its_texts_with_a_word(models: Models) -> None:
    engine, in_a_pass, closing = open_pair(models), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        in_a_pass.set()
        assert closing.wait(60)

    engine.loop._target._model.get_submodule("model.layers.0").register_forward_hook(wait)
    with ThreadPoolExecutor(max_workers=2) as pool:
        answer = pool.submit(engine.generate, PROMPTS[0], max_new_tokens=40, ignore_eos=True)
        assert in_a_pass.wait(60)
        closed = pool.submit(engine.close)
        while not engine._closed:
            assert closed.running() or not closed.done()
        closing.set()
        closed.result(timeout=60)
        with pytest.raises(UsageError, match="closed"):
            answer.result(timeout=60)
    with pytest.raises(UsageError, match="closed"):
        engine.stream(PROMPTS[0])
