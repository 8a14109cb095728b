"""`run_70b.py serve`: what it refuses, what it says, how it loads in the background and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2 as httpx
import pytest

from command_line import INVALID, assert_error, assert_usage_error, run_command
from conftest import save_tiny_model
from offload.cli import serve as command
from offload.serve.server import Server
from offload.serve.settings import ServeSettings
from serving import chat, client, completion, running, slow_engine, tiny_engine, until

ROOT = Path(__file__).resolve().parent.parent
DEMO = "treestream-demo"


# -- refused before anything is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--host", "example.org"], "can be reached from other machines"),
        (["--api-key", "short"], "not a key"),
        (["--api-key-file", "/nowhere/key"], "the key cannot be read"),
        (["--api-key", "longenough", "--api-key-file", "x"], "not allowed with"),
        (["--port", "70000"], "too large"),
        (["--port", "-1"], "too small"),
        (["--port", "http"], "not a whole number"),
        (["--max-queue", "-1"], "too small"),
        (["--grace", "nan"], "is not"),
        (["--grace", "-1"], "is not"),
        (["--prompt", "x"], "unrecognized arguments"),
        (["--host", "256.1.1.1", "--allow-unauthenticated"], "cannot listen on 256.1.1.1"),
    ],
)
def test_bad_flags_are_usage_errors(capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert_usage_error(run_command(capsys, "serve", "--quiet", *flags), says)


def test_a_port_that_is_taken_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_usage_error(run_command(capsys, "serve", "--quiet", "--port", port), f"port {port}", "take another --port")


def test_whoever_knows_the_address_can_connect(tmp_path: Path) -> None:
    """It is said before the server's loop runs."""
    server = Server(ServeSettings(model_name="m", port=0), lambda _: tiny_engine(tmp_path))
    host, port = server.url.removeprefix("http://").split(":")
    with server._socket, socket.create_connection((host, int(port)), timeout=10):
        pass


def test_without_its_packages_it_names_the_command_that_installs_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert_usage_error(run_command(capsys, "serve"), "uvicorn", 'pip install -c constraints.txt -e ".[serve]"')


def test_usage_errors_do_not_wait_for_torch() -> None:
    code = "from sys import modules; from offload.cli.main import main; code = main(['serve', '--host', '::']); "
    code += "print(code, sorted({'torch', 'transformers', 'fastapi'} & set(modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "2 []"


# -- a server's life ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address as it says it."""
    argv = [sys.executable, "run_70b.py", "serve", "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = next(found for line in process.stderr if (found := re.search(r" on (http://[0-9.:]+)", line)))
            yield process, said[1].rstrip(":")
        finally:
            process.kill()


def is_up(url: str) -> bool:
    return httpx.get(f"{url}/health", trust_env=False, verify=False).json() == {"status": "ok"}


@pytest.mark.slow
def test_it_answers_while_loading_and_finishes_its_answer_after_sigterm() -> None:
    """One process for both: starting one takes seconds. A pass takes about 0.2 s here, the answer 12 of them."""
    with serving("--tree", "none", "--emulate-link", "90MB/s", "--profile", "l40") as (process, url):
        loading = httpx.get(f"{url}/health", trust_env=False, verify=False)
        assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
        assert httpx.get(f"{url}/v1/models", trust_env=False, verify=False).json()["data"][0]["id"] == DEMO
        refused = httpx.post(f"{url}/v1/chat/completions", json={**chat(), "model": DEMO}, trust_env=False, verify=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_loading") and refused.headers[
            "retry-after"
        ]
        until(lambda: is_up(url))
        body = {**chat(max_tokens=12, stream=True), "model": DEMO, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False, verify=False
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"
        assert process.wait(30) == 143
        assert process.stdout is not None and process.stdout.read() == ""


def test_ctrl_c_ends_a_server_that_is_still_loading() -> None:
    with serving() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130  # when it has loaded: 7 s of CPU time, which take long on a busy machine


@pytest.mark.slow
def test_a_grace_that_is_over_cuts_the_answer() -> None:
    with running(lambda _: slow_engine(), grace_s=1.0) as server, client(server) as http:
        with http.stream("POST", "/v1/completions", json=completion(max_tokens=400, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            start_s = time.monotonic()
            server.stop()
            with suppress(httpx.HTTPError):
                assert "data: [DONE]" not in list(lines)
        assert time.monotonic() - start_s < 10  # of 130 s


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    finished = run_command(capsys, "serve", "--quiet", "--port", 0, "--model", tmp_path / "nothing")
    assert finished.code in (2, 3) and finished.stderr.startswith("error: ")
    folder = save_tiny_model(tmp_path / "wordless")
    assert_error(run_command(capsys, "serve", "--quiet", "--port", 0, "--model", folder), INVALID, "has no tokenizer")
