"""Every field of a request is honoured, refused by its name, or named as without effect; what asks for nothing is taken."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.engine.engine import Engine
from offload.serve.fields import CHAT, COMPLETION, MESSAGE
from offload.serve.problems import Problem, from_validation
from offload.serve.protocol import ChatRequest, CompletionRequest, Sampling
from offload.serve.server import Server
from serving import MODEL, chat, client, completion, demo_engine, running
from text_models import save_text_model

THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"
    "{% if enable_thinking is defined and not enable_thinking %}<>{% endif %}"
)
ROUTES: list[tuple[type[Sampling], dict[str, Any], Any]] = [
    (ChatRequest, chat(), CHAT),
    (CompletionRequest, completion(), COMPLETION),
]
# Of each server's own documentation, what changes an answer: the tables must know it.
CLIENTS = {
    "openai": {"tools": [{}], "response_format": {"type": "json_object"}, "frequency_penalty": 0.1, "verbosity": "low"},
    "vllm": {"min_tokens": 6, "bad_words": ["a"], "allowed_token_ids": [5], "guided_choice": ["a"], "guided_json": {}}
    | {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}, "skip_special_tokens": False, "prompt_logprobs": 0}
    | {"include_stop_str_in_output": True, "use_beam_search": True, "length_penalty": 2, "truncate_prompt_tokens": 3}
    | {"repetition_penalty": 1.1, "min_p": 0.05, "logprob_token_ids": [1], "thinking_token_budget": 9},
    "sglang": {
        "regex": "a",
        "ebnf": "a",
        "stop_regex": "a",
        "no_stop_trim": True,
        "lora_path": "a",
        "return_hidden_states": True,
    },
    "llama.cpp": {"grammar": "a", "json_schema": {}, "typical_p": 0.5, "mirostat": 2, "dry_multiplier": 0.8}
    | {"n_predict": 5, "repeat_penalty": 1.1, "dynatemp_range": 0.5, "samplers": ["top_k"], "n_probs": 3, "xtc_probability": 1},
    "transformers": {"no_repeat_ngram_size": 2, "num_beams": 4, "max_new_tokens": 5, "do_sample": False, "typical_p": 0.9},
    "ollama": {"options": {"temperature": 0}, "format": "json", "think": True},
    "hosted": {"extra_body": {"min_p": 1}, "reasoning": {"effort": "low"}, "enable_thinking": False, "random_seed": 5},
}
OF_CHATS = {"chat_template": "x", "add_generation_prompt": False, "continue_final_message": True, "echo": True, "suffix": "x"}
OF_COMPLETIONS = {"suffix": "x", "top_logprobs": 5, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low"}
IGNORED = {
    "user": "me",
    "metadata": {"a": 1},
    "service_tier": "auto",
    "priority": 3,
    "cache_prompt": True,
    "nobody_knows_it": 1,
}


def problem_of(kind: type[Sampling], body: dict[str, Any]) -> Problem:
    """What a body is refused with, by whatever finds it wrong first."""
    try:
        kind.model_validate_json(json.dumps(body)).ignored()
    except Problem as problem:
        return problem
    except ValidationError as error:
        return from_validation(RequestValidationError(error.errors()))
    raise AssertionError(f"taken: {body}")


def ignored(kind: type[Sampling], body: dict[str, Any]) -> tuple[str, ...]:
    return kind.model_validate_json(json.dumps(body)).ignored()


# -- refused, or without effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", CLIENTS)
def test_what_changes_answers_elsewhere_is_refused_by_its_name(server: str) -> None:
    for kind, body, _ in ROUTES:
        for name, value in CLIENTS[server].items():
            problem = problem_of(kind, {**body, name: value})
            assert (problem.status, problem.code, problem.param) == (400, "unsupported_parameter", name)
            assert problem.message.startswith(f"{name} is not supported: ")


def test_each_route_has_fields_that_the_other_lacks() -> None:
    for (kind, body, _), fields in zip(ROUTES, (OF_CHATS, OF_COMPLETIONS), strict=True):
        for name, value in fields.items():
            assert problem_of(kind, {**body, name: value}).param == name


def test_values_that_ask_for_nothing_are_taken_and_others_are_not() -> None:
    for kind, body, table in ROUTES:
        nothing = [(name, value) for name, neutral in table.items() for value in (None, *neutral)]
        for name, value in nothing:
            assert ignored(kind, {**body, name: value}) == ()
        for name in table:
            assert problem_of(kind, {**body, name: {"some": "thing"}}).param == name
        assert not table.keys() & kind.model_fields.keys(), "honoured, so the table is never asked"
        assert ignored(kind, {**body, **dict.fromkeys(kind.model_fields.keys() - {"messages", "prompt"})}) == ()


def test_fields_without_effect_are_named_wherever_they_stand() -> None:
    for kind, body, _ in ROUTES:
        options = {"include_obfuscation": False, "include_usage": True}
        found = ignored(kind, {**body, **IGNORED, "stream": True, "stream_options": options})
        assert found == (*IGNORED, "stream_options.include_obfuscation")
    messages = [{"role": "user", "content": "a", "name": "me"}, {"role": "assistant", "content": "b", "name": "you"}]
    assert ignored(ChatRequest, {**chat(), "messages": messages}) == ("messages.name",)


@pytest.mark.parametrize("name", MESSAGE)
def test_messages_have_such_fields_too(name: str) -> None:
    messages = [*chat()["messages"], {"role": "assistant", "content": "b", name: {"some": "thing"}}]
    assert problem_of(ChatRequest, {**chat(), "messages": messages}).param == f"messages.1.{name}"
    for value in (None, *MESSAGE[name]):
        messages[1][name] = value
        assert ignored(ChatRequest, {**chat(), "messages": messages}) == ()


# -- wrong values ---------------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=4)
    ),
    max_leaves=8,
)
INSIDES = ("function", "validator", "pydantic", "Annotated", "constrained", "instance of", " at 0x", "Value error", "union")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_wrong_value_is_refused_in_plain_words_with_the_fields_own_name(data: st.DataObject) -> None:
    kind, body, _ = data.draw(st.sampled_from(ROUTES))
    name = data.draw(st.sampled_from(sorted(kind.model_fields)))
    value = data.draw(JUNK)
    try:
        kind.model_validate_json(json.dumps({**body, name: value}))
    except ValidationError as error:
        problem = from_validation(RequestValidationError(error.errors()))
        assert problem.status == 400 and problem.param is not None
        assert not [word for word in INSIDES if word in problem.message]
        place = value
        for number, part in enumerate(problem.param.split(".")):
            if number == 0:
                assert part == name
            else:  # every part leads to a value, or is what an object lacks
                assert isinstance(place, list | dict) and (isinstance(place, dict) or int(part) < len(place))
                place = place[int(part)] if isinstance(place, list) else place.get(part)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "no images"),
        ([{"type": "input_audio", "input_audio": {}}], "text only"),
        (None, "text only"),
        (5, "text only"),
    ],
)
def test_what_is_no_text_is_told_what_is(content: Any, says: str) -> None:
    problem = problem_of(ChatRequest, {**chat(), "messages": [{"role": "user", "content": content}]})
    assert problem.param == "messages.0.content" and says in problem.message


def test_a_body_that_is_no_object_is_told_so() -> None:
    for body in (b"[]", b"null", b"5", b'"x"'):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate_json(body)
        assert from_validation(RequestValidationError(caught.value.errors())).message == "the body is not a JSON object"


# -- honoured -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda _: demo_engine(max_context=96)) as server:
        yield server


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_text_model(tmp_path_factory.mktemp("thinker"), chat_template=THINKING)
    with running(lambda _: open_engine(EngineSettings.parse(model=str(folder), device="cpu"))) as server:
        yield server


def ask(server: Server, body: dict[str, Any]) -> Any:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with client(server) as http:
        return http.post(path, json=body).json()


def text_of(answer: Any) -> str:
    (choice,) = answer["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize(
    "off", [{"top_k": 0}, {"top_k": -1}, {"stop": ""}, {"stop": [""]}, {"stop": ["", "\x00"]}, {"model": None}]
)
def test_values_by_which_clients_say_off_change_nothing(server: Server, off: dict[str, Any]) -> None:
    for body in (completion(temperature=0.9, seed=4), chat(temperature=0.9, seed=4)):
        answer = ask(server, {**body, **off})
        assert text_of(answer) == text_of(ask(server, body)) and answer["model"] == MODEL


def test_a_top_p_of_0_leaves_one_token(server: Server) -> None:
    for body in (completion(), chat()):
        assert text_of(ask(server, {**body, "temperature": 2, "top_p": 0})) == text_of(ask(server, body))


def test_a_seed_of_minus_1_is_none(server: Server) -> None:
    body = completion(temperature=1.5, max_tokens=20, seed=-1)
    assert len({text_of(ask(server, body)) for _ in range(3)}) > 1


def test_minus_1_tokens_are_all_that_there_is_room_for(server: Server) -> None:
    engine = server.worker.engine
    assert isinstance(engine, Engine)
    for body in (completion(), chat(), chat(max_completion_tokens=-1)):
        counts = ask(server, {**body, "max_tokens": -1, "ignore_eos": True})["usage"]
        if "prompt" in body:  # a transcript may end before
            assert counts["total_tokens"] == engine.plan.text_tokens
        assert counts["completion_tokens"] > 8


def test_stop_tokens_end_the_answer_before_them(server: Server) -> None:
    scored = ask(server, completion(logprobs=0))
    engine = server.worker.engine
    assert isinstance(engine, Engine) and engine.tokenizer is not None
    ids = [engine.tokenizer.encode(token, add_special_tokens=False) for token in scored["choices"][0]["logprobs"]["tokens"]]
    at, stop = next((at, one[0]) for at, one in enumerate(ids) if len(one) == 1 and at and one not in ids[:at])
    stopped = ask(server, completion(stop_token_ids=[stop], ignore_eos=True))
    assert stopped["usage"]["completion_tokens"] == at + 1 and stopped["choices"][0]["finish_reason"] == "stop"
    assert text_of(stopped) == "".join(scored["choices"][0]["logprobs"]["tokens"][:at])


def test_special_tokens_before_a_prompt_can_be_left_out(server: Server) -> None:
    counts = [ask(server, completion(add_special_tokens=value))["usage"]["prompt_tokens"] for value in (None, True, False)]
    assert counts[0] == counts[1] == counts[2] + 1


def test_a_template_is_told_what_the_client_says(thinker: Server) -> None:
    def prompt_tokens(**fields: Any) -> int:
        return int(ask(thinker, chat(**fields))["usage"]["prompt_tokens"])

    thinking = prompt_tokens()
    for given_, more in (
        ({"chat_template_kwargs": {"enable_thinking": False}}, 2),
        ({"chat_template_kwargs": {"enable_thinking": True, "unknown": [1, {"a": None}]}}, 0),
        ({"reasoning_effort": "none"}, 2),
        ({"reasoning_effort": "high"}, 0),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, 2),
    ):
        assert prompt_tokens(**given_) == thinking + more, given_


@pytest.mark.parametrize("values", [{"messages": []}, {"add_generation_prompt": False}, {"a": "\ud800"}, {"a\ud800": 1}, 5, []])
def test_what_a_template_cannot_be_told_is_refused(thinker: Server, values: Any) -> None:
    body = json.dumps(chat(chat_template_kwargs=values)).encode()
    with client(thinker) as http:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_an_effort_that_the_template_does_not_know_is_refused(server: Server) -> None:
    assert ask(server, chat(reasoning_effort="high"))["error"]["param"] == "reasoning_effort"
    assert "choices" in ask(server, chat(reasoning_effort="none"))


def test_top_logprobs_alone_are_refused(server: Server) -> None:
    assert ask(server, chat(top_logprobs=2))["error"]["param"] == "top_logprobs"
    assert ask(server, chat(top_logprobs=0))["choices"][0]["logprobs"] is None


# -- usage in streams -----------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("body", [completion(n=2), chat(n=2)])
def test_usage_is_null_in_every_chunk_but_the_last_where_it_is_asked_for(server: Server, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"

    def usages(options: dict[str, Any] | None) -> list[Any]:
        with client(server) as http:
            lines = http.post(path, json={**body, "stream": True, "stream_options": options}).text.splitlines()
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        return [chunk.get("usage", "absent") for chunk in chunks]

    *before, last = usages({"include_usage": True})
    assert before == [None] * len(before) and last["completion_tokens"] == 16
    for options in (None, {}, {"include_usage": False}, {"continuous_usage_stats": True}):
        assert set(usages(options)) == {"absent"}
    so_far = [counts["completion_tokens"] for counts in usages({"include_usage": True, "continuous_usage_stats": True})]
    assert so_far == sorted(so_far) and so_far[-1] == 16 and len(set(so_far)) > 2


def test_a_model_that_is_not_here_is_named(server: Server) -> None:
    for name in ("gpt-4o", "\u20ac\n"):
        with client(server) as http:
            body = json.dumps(chat(model=name)).encode()
            answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 404 and repr(name) in answer.json()["error"]["message"]
        assert repr(MODEL) in answer.json()["error"]["message"]
