"""Connections that do not wait for ever: for headers that never end, or for a client that never reads.

uvicorn limits neither, so a stranger could hold all connections with a few bytes each, and it has no hook for such limits. This
builds on its protocol class, therefore: setup.py bounds its releases, and tests/test_serve_security.py tries such clients."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState


def patient_protocol(header_s: float, send_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with two limits. A connection is cut when the headers of a request are not there after `header_s`, or
    when its client has read nothing of what was written for `send_s`."""

    class PatientProtocol(H11Protocol):
        def __init__(
            self,
            config: Config,
            server_state: ServerState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._headers_due, self._reading_due = _Timer(self.loop), _Timer(self.loop)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Whatever the kernel does not take at once counts as unread; by default, 64 KiB might stay unread for ever.
            transport.set_write_buffer_limits(high=0)
            self._headers_due.start(header_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._headers_due.cancel()

        def on_response_complete(self) -> None:
            self._headers_due.start(self.timeout_keep_alive + header_s, self.transport.abort)
            super().on_response_complete()  # may begin with a request that has come already
            if not self.cycle.response_complete:
                self._headers_due.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading_due.start(send_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._reading_due.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_due.cancel()
            self._reading_due.cancel()
            super().connection_lost(exc)

    return PatientProtocol


class _Timer:
    """At most one call to come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._call: asyncio.TimerHandle | None = None

    def start(self, seconds: float, callback: Callable[[], None]) -> None:
        self.cancel()
        self._call = self._loop.call_later(seconds, callback)

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
