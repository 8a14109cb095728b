"""Answers that take a while: server-sent events with comments in between, and requests whose client may hang up."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


class Hangup(Exception):
    """The client has gone; there is nobody to answer."""


def head_only(send: Send) -> Send:
    """A `send` that passes on an answer's status and headers. It then raises Hangup, so that nobody makes the body."""

    async def send_head(message: Message) -> None:
        await send(message)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        raise Hangup

    return send_head


def data(document: object) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def comment(text: str) -> str:
    """What clients ignore and proxies count as a sign of life."""
    return f": {text}\n\n"


async def with_comments(events: AsyncIterator[str], interval_s: float, say: Callable[[], str]) -> AsyncIterator[str]:
    """`events`, and after every `interval_s` of silence a comment with the words of `say`."""
    pending: asyncio.Task[str] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=interval_s)
            if not done:
                yield comment(say())
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield event
    finally:
        if pending is not None:
            pending.cancel()


async def or_hangup(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`. When the client goes first, `work` is cancelled and Hangup is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Hangup
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    message: Message = {"type": "http.request"}
    while message["type"] != "http.disconnect":
        message = await receive()


class EventStream(Response):
    """Sends `events` as they come. `on_end` is called once, however it ends: finished, failed, or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None], headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await or_hangup(self._send_all(send), receive)
        except Hangup:
            pass
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
