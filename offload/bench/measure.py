"""Run one case on one engine, in this process, and tell what happens as it happens: what was told stays valid when the run is
cut off. A pass ends when its tokens are on the host."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..errors import OffloadError
from .case_and_outcome import Case, Event, error_to_json

Emit = Callable[[Event], None]


class CannotRun(Exception):
    """Why this engine cannot run here, in words for its row."""


class Decoder(Protocol):
    """A loaded engine."""

    predicted_pass_s: float | None  # None: nobody knows

    def decode(self, prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> Iterator[tuple[int, ...]]:
        """New tokens, pass by pass. There are fewer than asked for only when the caller asks no further."""

    def facts(self) -> dict[str, Any]:
        """What to tell about the engine: memory and link so far."""


def run_case(case: Case, open_decoder: Callable[[Case], AbstractContextManager[Decoder]], emit: Emit) -> None:
    """Errors of ours, and CannotRun, become a `refused` event; others are raised."""
    start_s = time.monotonic()
    deadline_s = start_s + case.max_seconds
    try:
        with open_decoder(case) as decoder:
            load_s = time.monotonic() - start_s
            emit({"event": "ready", "load_s": load_s, "facts": decoder.facts()})
            least_s = load_s + (case.warmup + 1) * (decoder.predicted_pass_s or 0.0)
            if least_s > case.max_seconds:
                emit({"event": "short", "least_s": least_s})
                return
            _warm_up(case, decoder)
            complete = all(
                _run_prompt(case, decoder, run, number, deadline_s, emit)
                for run in range(case.runs)
                for number in range(len(case.prompts))
            )
            emit({"event": "end", "complete": complete, "facts": decoder.facts()})
    except CannotRun as reason:
        emit({"event": "refused", "reason": str(reason)})
    except OffloadError as error:
        emit({"event": "refused", "reason": error.what, "error": error_to_json(error)})


def _warm_up(case: Case, decoder: Decoder) -> None:
    """Passes over the first prompt; a tree may need fewer than tokens were asked for."""
    tokens = decoder.decode(case.prompts[0], case.max_new_tokens, case.seed)
    for _ in range(case.warmup):
        next(tokens, None)


def _run_prompt(case: Case, decoder: Decoder, run: int, number: int, deadline_s: float, emit: Emit) -> bool:
    """Whether the prompt was decoded to its end. The very first pass is made whatever the time: it is the least result."""
    if time.monotonic() > deadline_s and (run or number):
        return False
    previous_s = time.monotonic()
    for token_ids in decoder.decode(case.prompts[number], case.max_new_tokens, case.seed + run):
        now_s = time.monotonic()
        emit({"event": "pass", "run": run, "prompt": number, "token_ids": list(token_ids), "s": now_s - previous_s})
        previous_s = now_s
        if now_s > deadline_s:
            return False
    return True
