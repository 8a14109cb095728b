"""What makes no sense is refused with OpenAI's error object and the right status, and none of it reaches the engine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.serve.fields import CHAT
from offload.serve.server import Server
from serving import MODEL, chat, client, completion, demo_engine, is_idle, running, tiny_engine, until
from text_models import save_text_model

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda _: demo_engine(max_context=96)) as server:
        yield server


@pytest.fixture(scope="module")
def quick_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Some of what the schema allows is computed, up to the last row of the context."""
    folder = tmp_path_factory.mktemp("pair")
    with running(lambda _: tiny_engine(folder, max_context=48)) as server:
        yield server


def requests_begun(server: Server) -> float:
    value = server.telemetry.registry.get_sample_value("run70b_request_queue_time_seconds_count")
    assert value is not None
    return value


def refused(server: Server, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error; the engine has not been bothered."""
    before = requests_begun(server)
    with client(server) as http:
        response = http.post(path, content=body, headers=JSON)
    assert requests_begun(server) == before and is_idle(server)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return response.status_code, error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "demo", "prompt": "\xff\xfe"}',
        b"\xff\xfe\x00",
        b'{"a": ' + b"[" * 100_000 + b"}",
        b'{"model": "demo", "prompt": ' + b"9" * 5000 + b"}",
        b"{'model': 'demo'}",
    ],
    ids=range(10),
)
def test_what_is_no_json_object_is_refused(server: Server, path: str, body: bytes) -> None:
    status, _ = refused(server, path, body)
    assert status == 400


BAD_FIELDS: dict[str, list[Any]] = {
    "model": [1, "", "other", "../demo", "x" * 1000],
    "max_tokens": ["8", 1.5, -2, True, 10**9, 10**30, [8]],
    "temperature": [-0.1, 2.1, "hot", True, [1]],
    "top_p": [-1, 1.01, "x"],
    "top_k": [-2, 1.5, 2**40],
    "n": [0, 5, 10**9, "2", 1.5],
    "seed": ["x", 1.5, 2**63, 10**40],
    "stop": [1, [1], ["", 1], "x" * 257, ["x"] * 17, {"a": 1}],
    "stop_token_ids": [5, [-1], ["x"], [5] * 65],
    "stream": ["yes", 1],
    "stream_options": [1, {"include_usage": "yes"}, {"continuous_usage_stats": 1}],
    "tools": [[{"type": "function"}]],
    "logit_bias": [{"5": 100}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD_FIELDS.items() for value in values])
def test_wrong_fields_are_named_on_both_routes(server: Server, field: str, value: Any) -> None:
    for path, body in (("/v1/completions", completion()), ("/v1/chat/completions", chat())):
        status, error = refused(server, path, json.dumps({**body, field: value}).encode())
        assert status == (404 if field == "model" and isinstance(value, str) and len(value) < 512 else 400)
        assert str(error["param"]).startswith(field) or error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(server: Server, number: str) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "x", "temperature": {number}}}'.encode()
    assert refused(server, "/v1/completions", body)[0] == 400


@pytest.mark.parametrize(
    "prompt", [None, 5, "", [], [[]], [[], [1]], ["a", 1], [1, "a"], [-1], [4096], [2**40], [1.5], [True], {"a": 1}, ["x"] * 65]
)
def test_prompts_that_are_none_are_refused(server: Server, prompt: Any) -> None:
    if prompt == "":  # the demo's tokenizer begins every text with <s>: an empty one is a prompt
        return
    status, error = refused(server, "/v1/completions", json.dumps(completion(prompt)).encode())
    assert (status, str(error["param"]).partition(".")[0]) == (400, "prompt")


@pytest.mark.parametrize("content", [None, 5, ["x"], [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], {}])
def test_contents_that_are_no_text_are_refused(server: Server, content: Any) -> None:
    body = {**chat(), "messages": [{"role": "user", "content": content}]}
    assert refused(server, "/v1/chat/completions", json.dumps(body).encode())[0] == 400


@pytest.mark.parametrize("messages", [[], None, "hello", [{}], [{"role": "tool", "content": "x"}], [{"content": "x"}], [[]]])
def test_messages_that_are_none_are_refused(server: Server, messages: Any) -> None:
    body = {**chat(), "messages": messages}
    assert refused(server, "/v1/chat/completions", json.dumps(body).encode())[0] == 400


def test_lone_surrogates_are_refused(server: Server) -> None:
    """JSON can spell half a character; no tokenizer takes one."""
    for path, body in (("/v1/completions", completion("\ud800")), ("/v1/chat/completions", chat("\udfff"))):
        assert refused(server, path, json.dumps(body).encode())[0] == 400
    assert refused(server, "/v1/completions", json.dumps(completion(stop=["\ud800"])).encode())[0] == 400
    assert refused(server, "/tokenize", json.dumps({"prompt": "\ud800"}).encode())[0] == 400


def test_a_prompt_beyond_the_context_is_refused_with_the_counts(server: Server) -> None:
    long = "The Congress of the United States. " * 40
    for path, body in (("/v1/completions", completion(long)), ("/v1/chat/completions", chat(long))):
        status, error = refused(server, path, json.dumps(body).encode())
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] in body
        assert "rows of context" in error["message"] and "Congress" not in error["message"]


@pytest.mark.parametrize("depth", [50, 400, 900, 980, 100_000])
@pytest.mark.parametrize("field", ["metadata", "chat_template_kwargs", "logit_bias", "messages", "stop"])
def test_values_within_values_are_bounded_by_what_can_be_read(quick_server: Server, field: str, depth: int) -> None:
    """Each reader gives up at another depth; none may take the others by surprise."""
    for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        body = json.dumps({**chat(), field: "HERE"}).replace('"HERE"', value).encode()
        with client(quick_server) as http:
            response = http.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 200:
            assert field in ("metadata", "chat_template_kwargs")
        else:
            assert depth < 100_000 or response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions/", b"{}", 404),
        ("GET", "/v1/models/", b"", 404),
        ("GET", "/v1/models/%ff%00%ed%a0%80", b"", 404),
        ("GET", "/v1//models", b"", 404),
        ("GET", "/health?a=%ff&b", b"", 200),
        ("POST", "/health", b"{}", 405),
        ("DELETE", f"/v1/models/{MODEL}", b"", 405),
        ("HEAD", "/v1/completions", b"", 405),
        ("TRACE", "/v1/models", b"", 405),
        ("POST", "/v1/completions", b'{"model": "demo", "model": "other", "prompt": "a"}', 404),
        ("POST", "/v1/completions", b'\xef\xbb\xbf{"prompt": "a"}', 200),
        ("POST", "/v1/completions", b'{"prompt": "a", "min_p": NaN}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a", "seed": 1e400}', 400),
        ("POST", "/v1/completions", b'{"prompt": "a"} {"prompt": "b"}', 400),
        ("POST", "/v1/completions", "{'prompt': 'a'}".encode("utf-16"), 400),
    ],
)
def test_odd_requests_are_answered_with_an_error_object(
    quick_server: Server, method: str, path: str, body: bytes, status: int
) -> None:
    with client(quick_server) as http:
        response = http.request(method, path, content=body, headers=JSON if body else {})
    assert response.status_code == status
    if status != 200 and method != "HEAD":
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_absurd_numbers_of_alternatives_are_refused(server: Server) -> None:
    for path, body in (("/v1/completions", completion(logprobs=21)), ("/v1/completions", completion(logprobs=-1))):
        assert refused(server, path, json.dumps(body).encode())[1]["param"] == "logprobs"
    body = chat(logprobs=True, top_logprobs=10**6)
    assert refused(server, "/v1/chat/completions", json.dumps(body).encode())[1]["param"] == "top_logprobs"


def test_the_wrong_method_or_path_has_an_error_object_too(server: Server) -> None:
    with client(server) as http:
        for response, status in (
            (http.get("/v1/completions"), 405),
            (http.get("/v1/nothing"), 404),
            (http.get("/page/..%2f"), 404),
        ):
            assert response.status_code == status and response.json()["error"]["type"] == "invalid_request_error"


LOOPING = "{% for a in range(10**5) %}{% for b in range(10**5) %}{% set c = a * b %}{% endfor %}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(("template", "says"), [(LOOPING, "did not finish"), (REFUSING, "roles must alternate")])
def test_a_template_that_loops_or_refuses_is_an_error_and_the_server_goes_on(tmp_path: Path, template: str, says: str) -> None:
    folder = save_text_model(tmp_path, chat_template=template)
    with running(lambda _: open_engine(EngineSettings.parse(model=str(folder), device="cpu"))) as server:
        status, error = refused(server, "/v1/chat/completions", json.dumps(chat()).encode())
        assert (status, error["code"]) == (400, "chat_template_error") and says in error["message"]
        with client(server) as http:
            assert http.post("/v1/completions", json=completion()).status_code == 200


# -- whatever the schema allows -------------------------------------------------------------------------------------------


FUZZED = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models/{name}", "/health", "/metrics")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # schemathesis' own
@pytest.mark.parametrize("path", FUZZED)
def test_nothing_that_the_schema_describes_is_a_server_error(quick_server: Server, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{quick_server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    (operation,) = [one for one in operations if one.path == path]

    @settings(max_examples=20, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    def fuzz(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL
        case.call_and_validate(base_url=quick_server.url, checks=(not_a_server_error,), timeout=60)

    given(case=operation.as_strategy())(fuzz)()
    until(lambda: is_idle(quick_server))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([MODEL, "user", "system"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "a"]), inner)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", completion()), ("/v1/chat/completions", chat())])
def test_nothing_in_any_field_is_a_server_error(quick_server: Server, path: str, body: dict[str, Any]) -> None:
    """Also what the schema forbids, and fields that it does not know."""
    described = quick_server.config.loaded_app._app.openapi()["components"]["schemas"]
    names = sorted(
        {name for schema in described.values() for name in schema.get("properties", ())} | CHAT.keys() | {"metadata"}
    )
    with client(quick_server) as http:

        @given(st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=2))
        @settings(max_examples=60, deadline=None, database=None)
        def fuzz(fields: dict[str, Any]) -> None:
            response = http.post(path, content=json.dumps({**body, **fields}).encode(), headers=JSON)
            assert response.status_code in (200, 400, 404), response.text
            assert response.status_code == 200 or response.headers["content-type"] == "application/json"

        fuzz()
    until(lambda: is_idle(quick_server))
