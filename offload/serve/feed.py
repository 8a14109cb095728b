"""Events from the engine's thread to listeners on the server's loop; a slow listener misses some and delays nobody."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from .problems import Problem
from .settings import MAX_LISTENERS
from .telemetry import Event

BACKLOG_EVENTS = 64


class Feed:
    """`latest` has the last event of each type: what a new listener is told first."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: set[Listener] = set()
        self.latest: dict[str, Event] = {}

    def publish(self, event: Event) -> None:
        """From any thread."""
        self.latest[event["type"]] = event
        if self._loop is not None and self._listeners:
            with suppress(RuntimeError):  # the loop has ended, and its listeners with it
                self._loop.call_soon_threadsafe(self._hand_out, event)

    def listen(self) -> "Listener":
        """Events from now on, and the latest ones before. Problem 429 when too many listen already."""
        if len(self._listeners) >= MAX_LISTENERS:
            raise Problem(429, "too_many_listeners", f"{MAX_LISTENERS} listen already", headers={"Retry-After": "10"})
        self._loop = asyncio.get_running_loop()
        listener = Listener(list(self.latest.values()))
        self._listeners.add(listener)
        return listener

    def forget(self, listener: "Listener") -> None:
        self._listeners.discard(listener)

    def close(self) -> None:
        """End every listener's events. On the server's loop."""
        self._hand_out(None)

    def _hand_out(self, event: Event | None) -> None:
        for listener in self._listeners:
            listener.put(event)


class Listener:
    """An asynchronous iterator of events; when it falls behind by BACKLOG_EVENTS, the oldest are dropped."""

    def __init__(self, first: list[Event]) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(BACKLOG_EVENTS)
        for event in first:
            self.put(event)

    def put(self, event: Event | None) -> None:
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None:
            raise StopAsyncIteration
        return event
