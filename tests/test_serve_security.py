"""Nobody gets past the gate: hosts, origins, keys, bodies, clients that dawdle; and nothing that is refused is logged."""

import base64
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.datastructures import Headers

from offload.errors import UsageError
from offload.serve.security import given_key, is_foreign_page, is_key, is_known_host
from offload.serve.server import Server
from offload.serve.settings import MAX_BODY_BYTES, ServeSettings
from serving import MODEL, chat, client, completion, demo_engine, is_idle, running, until

KEY = "correct-horse"
SECRET = "the-secret-of-the-prompt"


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    settings: dict[str, Any] = {"header_s": 0.5, "body_s": 0.5, "send_s": 0.5}
    with running(lambda _: demo_engine(), api_key=KEY, allowed_hosts=("box.lan",), **settings) as server:
        yield server


def error_code(response: Any) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["code"]


# -- who may ask ----------------------------------------------------------------------------------------------------------


def test_every_route_but_health_asks_for_the_key(locked: Server) -> None:
    with client(locked) as http:
        paths = [*http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"], "/", "/openapi.json"]
        paths += ["/page/page.js", "/nothing/here", "/docs"]
        assert {"/v1/models", "/v1/completions", "/metrics", "/tokenize", "/v1/engine/events"} <= set(paths)
        for path in paths:
            for method in ("GET", "POST"):
                response = http.request(method, path, json={} if method == "POST" else None)
                if path == "/health":
                    assert response.status_code in (200, 405)
                else:
                    assert error_code(response) == (401, "invalid_api_key"), path
                    assert "www-authenticate" in response.headers
        assert http.get("/v1/health").status_code == 200


@pytest.mark.parametrize("wrong", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Basic !!!", "Bearer \xe4"])
def test_a_wrong_key_is_refused(locked: Server, wrong: str) -> None:
    with client(locked) as http:
        assert error_code(http.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})) == (
            401,
            "invalid_api_key",
        )


def test_the_key_is_a_bearer_token_or_a_password(locked: Server) -> None:
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    with client(locked) as http:
        for value in (f"Bearer {KEY}", f"bearer  {KEY}", f"Basic {basic}"):
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == 200
        page = http.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 401 and page.headers["www-authenticate"].startswith("Basic realm")
    assert given_key("Basic " + base64.b64encode(b"\xff\xfe").decode()) == ""
    assert is_key(KEY, KEY) and not is_key(KEY + "\udcff", KEY)


@pytest.mark.parametrize(
    ("bound", "host", "known"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:8000", True),
        ("127.0.0.1", "box.lan:80", True),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "192.168.1.5:8000", False),
        ("0.0.0.0", "192.168.1.5:8000", True),
        ("0.0.0.0", "evil.example", False),
        ("192.168.1.5", "192.168.1.5:8000", True),
        ("192.168.1.5", "192.168.1.6:8000", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[", False),
        ("127.0.0.1", "evil.example@127.0.0.1", False),
    ],
)
def test_hosts_are_known_by_name(bound: str, host: str, known: bool) -> None:
    settings = ServeSettings(model_name=MODEL, host=bound, api_key=KEY, allowed_hosts=("box.lan",))
    assert is_known_host(host, settings) is known


def test_a_rebound_name_is_refused_even_with_the_key(locked: Server) -> None:
    with client(locked, Authorization=f"Bearer {KEY}") as http:
        assert error_code(http.get("/v1/models", headers={"Host": "evil.example"})) == (403, "unknown_host")
        assert error_code(http.get("/health", headers={"Host": "evil.example"})) == (403, "unknown_host")
        assert http.get("/v1/models", headers={"Host": "box.lan"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "path", "foreign"),
    [
        ({}, "/v1/models", False),
        ({"origin": "http://h:1"}, "/v1/models", False),
        ({"origin": "http://h:2"}, "/v1/models", True),
        ({"origin": "null"}, "/v1/models", True),
        ({"origin": "http://evil"}, "/", True),
        ({"sec-fetch-site": "cross-site"}, "/v1/engine/events", True),
        ({"sec-fetch-site": "same-site"}, "/metrics", True),
        ({"sec-fetch-site": "same-origin"}, "/metrics", False),
        ({"sec-fetch-site": "none"}, "/metrics", False),
        ({"sec-fetch-site": "cross-site"}, "/", False),
    ],
)
def test_pages_of_other_origins_are_foreign(headers: dict[str, str], path: str, foreign: bool) -> None:
    assert is_foreign_page(Headers({"host": "h:1", **headers}), path) is foreign


def test_no_answer_invites_other_origins(locked: Server) -> None:
    with client(locked, Authorization=f"Bearer {KEY}", Origin="http://evil.example") as http:
        for response in (http.get("/v1/models"), http.options("/v1/chat/completions"), http.post("/v1/completions", json={})):
            assert error_code(response) == (403, "foreign_origin")
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_every_answer_carries_the_security_headers(locked: Server) -> None:
    with client(locked, Authorization=f"Bearer {KEY}") as http:
        for response in (
            http.get("/"),
            http.get("/v1/models"),
            http.get("/nothing"),
            http.get("/health", headers={"Host": "x"}),
        ):
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"


# -- HEAD ---------------------------------------------------------------------------------------------------------------


def get_paths(server: Server) -> list[str]:
    with client(server, Authorization=f"Bearer {KEY}") as http:
        described = http.get("/openapi.json").json()["paths"]
    found = [path.replace("{name}", MODEL) for path, methods in described.items() if "get" in methods]
    assert {"/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/v1/engine/events", "/version"} <= set(found)
    return [*found, "/", "/page/page.js", "/v1/health", "/openapi.json", "/nothing", "/v1/models/other", "/v1/completions"]


@pytest.mark.parametrize("key", [KEY, "another-key"])
def test_head_is_get_without_the_body_on_every_route(locked: Server, key: str) -> None:
    """Also of streams that never end, of refusals, and for those who may not ask."""
    with client(locked, Authorization=f"Bearer {key}") as http:
        for path in get_paths(locked):
            head = http.head(path)
            with http.stream("GET", path) as got:
                pass
            assert (head.status_code, head.content) == (got.status_code, b""), path
            if path == "/metrics":  # its length depends on the time
                del head.headers["content-length"], got.headers["content-length"]
            assert {**head.headers, "date": ""} == {**got.headers, "date": ""}, path
    until(lambda: not locked.feed._listeners)


def test_a_connection_goes_on_after_head(locked: Server) -> None:
    connection = raw(locked, "HEAD /health HTTP/1.1", "Host: localhost", "", "GET /health HTTP/1.1", "Host: localhost", "")
    connection.settimeout(10)
    received = b""
    with connection:
        while not received.endswith(b'{"status":"ok"}'):
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 2 and received.count(b'{"status":"ok"}') == 1


# -- what may be sent -----------------------------------------------------------------------------------------------------


def test_bodies_are_bounded_and_json(locked: Server) -> None:
    with client(locked, Authorization=f"Bearer {KEY}") as http:
        body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'
        json_type = {"Content-Type": "application/json"}
        assert error_code(http.post("/tokenize", content=body, headers=json_type)) == (413, "body_too_large")
        pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
        assert error_code(http.post("/tokenize", content=pieces, headers=json_type)) == (413, "body_too_large")  # no length
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            assert error_code(http.post("/tokenize", content=b"{}", headers={"Content-Type": kind})) == (415, "not_json")
    until(lambda: is_idle(locked))


def raw(server: Server, *lines: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)
    connection.sendall("\r\n".join([*lines, ""]).encode() + body)
    return connection


def seconds_until_closed(connection: socket.socket) -> tuple[float, bytes]:
    start_s, received = time.monotonic(), b""
    with connection:
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass
    return time.monotonic() - start_s, received


def test_headers_that_never_end_and_bodies_that_never_come_are_cut_off(locked: Server) -> None:
    host = "Host: localhost"
    silent = raw(locked)
    slow_headers = raw(locked, "POST /v1/completions HTTP/1.1", host)
    key = f"Authorization: Bearer {KEY}"
    head = ("POST /tokenize HTTP/1.1", host, key, "Content-Type: application/json", "Content-Length: 100", "")
    slow_body = raw(locked, *head, body=b'{"prom')
    for connection in (silent, slow_headers):
        seconds, received = seconds_until_closed(connection)
        assert seconds < 5 and received == b""
    seconds, received = seconds_until_closed(slow_body)
    assert seconds < 5 and received.startswith(b"HTTP/1.1 408")
    until(lambda: not locked.server_state.connections, 10)


def test_a_client_that_never_reads_is_cut_off(locked: Server) -> None:
    """It asks for answers of half a megabyte, one after another, and its receive buffer is a few kilobytes."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(locked.url.rpartition(":")[2])))
    request = f"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    connection.settimeout(10)
    start_s = time.monotonic()
    with connection, pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() - start_s < 10:
            connection.sendall(request * 50)
            time.sleep(0.02)
    until(lambda: not locked.server_state.connections, 10)


# -- what is said about it ------------------------------------------------------------------------------------------------


def test_prompts_and_keys_are_in_no_log(
    locked: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it goes well, not when it is refused, not when there is a bug that quotes the prompt."""
    engine = locked.worker.engine
    assert engine is not None
    with caplog.at_level(logging.DEBUG), client(locked, Authorization=f"Bearer {KEY}") as http:
        assert http.post("/v1/completions", json=completion(SECRET)).status_code == 200
        assert http.post("/v1/chat/completions", json=chat(SECRET, n=99)).status_code == 400
        assert http.post("/v1/completions", json=completion(SECRET * 400)).status_code == 400
        assert (
            http.post("/v1/completions", content=f'{{"{SECRET}', headers={"Content-Type": "application/json"}).status_code
            == 400
        )

        def quote(*_: object, **__: object) -> None:
            raise RuntimeError(f"cannot do {SECRET}")

        monkeypatch.setattr(engine.tokenizer, "encode", quote)
        assert error_code(http.post("/v1/completions", json=completion(SECRET))) == (500, "internal_error")
        monkeypatch.undo()
        monkeypatch.setattr(engine, "run", quote)
        failed = http.post("/v1/completions", json=completion(SECRET))
        monkeypatch.undo()
        assert error_code(failed) == (500, "internal_error") and SECRET not in failed.text
        assert http.post("/v1/completions", json=completion(SECRET)).status_code == 200  # and it goes on
    ours = "\n".join(
        record.getMessage() + str(record.exc_info) for record in caplog.records if not record.name.startswith("http")
    )
    assert "RuntimeError" in ours
    assert SECRET not in ours and KEY not in ours


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan", "127.0.0.1.evil.example"])
def test_an_address_that_others_reach_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="can be reached"):
        ServeSettings(model_name=MODEL, host=host)
    assert ServeSettings(model_name=MODEL, host=host, api_key=KEY).host == host
    assert ServeSettings(model_name=MODEL, host=host, allow_unauthenticated=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServeSettings(model_name=MODEL, host=host).api_key is None


@pytest.mark.parametrize("key", ["", "short", "with space in it", "tab\tinside-it", "umlaut-\xe4-inside"])
def test_keys_are_long_and_visible(key: str) -> None:
    with pytest.raises(UsageError, match="not a key") as caught:
        ServeSettings(model_name=MODEL, api_key=key)
    assert not key or key not in str(caught.value)
