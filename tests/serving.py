"""Servers on loopback for tests: the demo pair behind a free port of 127.0.0.1, in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import ACCEPTANCE, DRAFT, TARGET
from offload.engine.engine import Engine
from offload.engine.loading import LoadProgress
from offload.serve.server import Server
from offload.serve.settings import ServeSettings
from text_models import CHAT_TEMPLATE, save_text_model

MODEL = "demo"
READY_S = 60


def demo_engine(**changes: Any) -> Engine:
    """Small trees and float32: what a test asks for comes in a few dozen milliseconds."""
    settings: dict[str, Any] = {"tree": "4x4:kary", "dtype": "float32", "acceptance": str(ACCEPTANCE), **changes}
    return open_engine(EngineSettings.parse(model=str(TARGET), draft_model=str(DRAFT), device="cpu", **settings))


def tiny_engine(folder: Path, **changes: Any) -> Engine:
    """A random pair, made in `folder`, whose passes take milliseconds: for what does not depend on the text."""
    target, draft = (save_text_model(folder / str(layers), num_layers=layers, chat_template=CHAT_TEMPLATE) for layers in (3, 1))
    settings: dict[str, Any] = {"model": str(target), "draft_model": str(draft), "tree": "4x4:kary", "device": "cpu", **changes}
    return open_engine(EngineSettings.parse(**settings))


def slow_engine() -> Engine:
    """A pass takes a third of a second, and brings one token."""
    return demo_engine(tree="none", resident_layers=0, emulate_link=17_707_008 / 0.33)


@contextmanager
def running(open_it: Callable[[LoadProgress], Engine], **settings: Any) -> Iterator[Server]:
    """A server that takes requests. What its engine fails with is raised at the end."""
    server = Server(ServeSettings(**{"model_name": MODEL, "port": 0, **settings}), open_it)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve_until_told()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve, name="server")
    thread.start()
    try:
        until(lambda: server.worker.state != "loading" and server.started)
        yield server
    finally:
        server.stop()
        thread.join(READY_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def until(holds: Callable[[], bool], seconds: float = READY_S) -> None:
    """Wait for what happens on another thread."""
    end_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.005)


def is_idle(server: Server) -> bool:
    return server.worker._running is None and not server.worker._waiting


def client(server: Server, **headers: str) -> httpx.Client:
    """Nothing is encrypted here: reading the certificates of the world would take longer than most tests."""
    return httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False, verify=False)


def completion(prompt: Any = "The Congress", **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **changes}


def chat(text: str = "Tell me", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **changes}
