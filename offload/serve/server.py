"""A server that is loading from its first moment, answers until it is told to end, and then finishes what it has begun."""

import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..errors import UsageError
from .app import build_app
from .connections import patient_protocol
from .feed import Feed
from .service import Service
from .settings import MAX_CONNECTIONS, ServeSettings
from .telemetry import Telemetry
from .worker import EngineWorker

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.loading import LoadProgress

KEEP_ALIVE_S = 5  # how long an idle connection is kept for the client's next request


class Server(uvicorn.Server):
    """`open_engine(progress)` loads the engine, on a thread of its own. `url` is where the page is."""

    def __init__(self, settings: ServeSettings, open_engine: "Callable[[LoadProgress], Engine]") -> None:
        self._socket = _bind(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.feed = Feed()
        self.telemetry = Telemetry(self.feed.publish)
        self.worker = EngineWorker(open_engine, self.telemetry, max_waiting=settings.max_waiting)
        self.worker.on_failure = self.stop
        service = Service(settings=settings, worker=self.worker, telemetry=self.telemetry, feed=self.feed)
        config = uvicorn.Config(
            build_app(service),
            http=patient_protocol(settings.header_s, settings.send_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(settings.grace_s),
        )
        super().__init__(config)

    def serve_until_told(self) -> None:
        """Serves until SIGTERM or Ctrl-C, whose exceptions it then raises, or until `stop`. Raises what the engine failed
        with."""
        self.worker.start()
        try:
            self.run(sockets=[self._socket])
        finally:
            self._socket.close()
            self.worker.close()
        if self.worker.failure is not None:
            raise self.worker.failure

    def stop(self) -> None:
        """From any thread: take nothing new, end when what runs has ended or the grace is over."""
        self.worker.drain()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.feed.close()  # those who watch would watch for ever
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> socket.socket:
    """A listening address. UsageError when it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends without delay (Nagle) only where the protocol is named
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()  # whoever reads our address may connect at once, and waits until the loop runs
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            where="--host, --port",
            cure="take another --port (0: any that is free), or end what listens there",
        ) from error
    return bound
