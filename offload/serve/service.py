"""One request from admission to answer: into the worker's queue, and out as one document or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from .admit import Order, admit_chat, admit_completion
from .answer_format import Choice, Json, usage
from .feed import Feed
from .problems import Problem
from .protocol import ChatRequest, CompletionRequest, Sampling
from .settings import ServeSettings
from .streams import DONE, EventStream, data, or_hangup, with_comments
from .telemetry import Telemetry
from .worker import EngineWorker, Finished, Job, Stepped

if TYPE_CHECKING:
    from ..engine.engine import Engine

MAX_ADMITTING = 2  # prompts that are tokenised, or laid out by a template's process, at a time
T = TypeVar("T", bound=Sampling)


class Answer:
    """A job's events on the server's loop."""

    def __init__(self, order: Order) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Stepped | Finished] = asyncio.Queue()  # no more than max_new_tokens of them
        self.order = order
        self.choices = [Choice(request=request) for request in order.requests]
        self.job = Job(order.requests, lambda event: _hand_over(loop, self._events, event))

    async def steps(self) -> AsyncIterator[Stepped]:
        """Every step, added to its choice. Problem when the engine failed or went."""
        while isinstance(event := await self._events.get(), Stepped):
            self.choices[event.index].add(event.step, event.reused_tokens)
            yield event
        if event.problem is not None:
            raise event.problem

    def usage(self) -> dict[str, object]:
        return usage(self.choices, self.order.choices_per_prompt)


def _hand_over(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Stepped | Finished]", event: Stepped | Finished) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


@dataclass(slots=True, kw_only=True)
class Service:
    """What the routes share."""

    settings: ServeSettings
    worker: EngineWorker
    telemetry: Telemetry
    feed: Feed
    created: int = field(default_factory=lambda: int(time.time()))
    admitting: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_ADMITTING))

    def check_model(self, name: str | None) -> None:
        """Problem for a model other than ours. A request that names none asks for ours."""
        ours = self.settings.model_name
        if name is not None and name != ours:
            raise Problem(404, "model_not_found", f"no model {name[:80]!r} here: this is {ours!r}", "model")

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        ignored = body.ignored()
        return await self._answer(await self._admit(admit_chat, body), body, ignored, http)

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self.check_model(body.model)
        ignored = body.ignored()
        return await self._answer(await self._admit(admit_completion, body), body, ignored, http)

    async def _admit(self, admit: "Callable[[Engine, T, str], Order]", body: T) -> Order:
        self.worker.check_room()
        name = self.settings.model_name
        return await to_thread.run_sync(admit, self.worker.ready(), body, name, limiter=self.admitting)

    async def _answer(self, order: Order, body: Sampling, ignored: Sequence[str], http: HttpRequest) -> Response:
        answer = Answer(order)
        self.worker.submit(answer.job)
        headers = {"x-ignored-fields": ", ".join(_header_safe(ignored))} if ignored else {}
        if body.stream:
            events = with_comments(self._stream(answer, body), self.settings.keep_alive_s, lambda: self._status(answer))
            return EventStream(events, lambda: self.worker.cancel(answer.job), headers)
        try:
            await or_hangup(_all(answer.steps()), http.receive)
            return JSONResponse(order.format.whole(answer.choices, answer.usage()), headers=headers)
        finally:
            self.worker.cancel(answer.job)

    async def _stream(self, answer: Answer, body: Sampling) -> AsyncIterator[str]:
        layout = answer.order.format

        def chunk(document: Json) -> str:
            if body.wants_usage:  # all chunks have the field then, in OpenAI's interface null but for the last
                document["usage"] = answer.usage() if body.wants_usage_so_far else None
            return data(document)

        try:
            for document in layout.opening(answer.choices):
                yield chunk(document)
            async for event in answer.steps():
                yield chunk(layout.chunk(event.index, answer.choices[event.index], event.step))
            if body.wants_usage:
                yield data(layout.closing(answer.usage()))
            yield DONE
        except Problem as problem:  # the status has been sent: clients look for an error among the chunks
            yield data(problem.body())

    def _status(self, answer: Answer) -> str:
        ahead = self.worker.ahead_of(answer.job)
        return f"keep-alive, {ahead} before this" if ahead else f"keep-alive, {self.worker.progress()}"


async def _all(steps: AsyncIterator[Stepped]) -> None:
    async for _ in steps:
        pass


def _header_safe(names: Sequence[str]) -> list[str]:
    return [name[:40] for name in names if name.isascii() and name.replace(".", "_").isidentifier()][:16]
