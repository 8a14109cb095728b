"""The server as its clients see it, the openai package first: what they ask for is what the engine says by itself."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from offload.serve.server import Server
from serving import MODEL, chat, client, completion, demo_engine, is_idle, running, slow_engine, until
from tree.logprobs import Scoring


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda _: demo_engine()) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    with running(lambda _: slow_engine(), max_waiting=2, keep_alive_s=0.1) as server:
        yield server


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def alone(server: Server, prompt: str | list[int], **changes: Any) -> str:
    """The engine's own answer, by its Python interface."""
    until(lambda: is_idle(server))
    engine = server.worker.engine
    assert engine is not None
    text = engine.generate(prompt, **{"max_new_tokens": 8, **changes}).text
    assert text is not None
    return text


# -- what is answered -----------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).owned_by == "treestream"
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.models.retrieve("another/one")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_engines_text_with_exact_counts(server: Server, sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt="The Congress", max_tokens=8, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (alone(server, "The Congress"), "length")
    engine = server.worker.engine
    assert engine is not None and answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.admission.encode("The Congress"))
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, answer.usage.prompt_tokens + 8)


def test_sampled_answers_follow_their_seed(server: Server, sdk: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return (
            sdk.completions.create(model=MODEL, prompt="We", max_tokens=12, temperature=0.9, top_p=0.95, seed=seed)
            .choices[0]
            .text
        )

    assert ask(1) == ask(1) == alone(server, "We", max_new_tokens=12, temperature=0.9, top_p=0.95, seed=1)
    assert len({ask(seed) for seed in range(1, 6)}) > 1


def test_several_choices_and_prompts_come_in_order(server: Server, sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt=["We", "The"], n=2, max_tokens=6, temperature=0.9, seed=5)
    expected = [alone(server, text, max_new_tokens=6, temperature=0.9, seed=seed) for text in ("We", "The") for seed in (5, 6)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.completion_tokens == 24


def test_token_ids_are_prompts_too(server: Server, sdk: openai.OpenAI) -> None:
    ids = [[5, 6, 7], [9, 10]]
    answer = sdk.completions.create(model=MODEL, prompt=ids, max_tokens=5, temperature=0)
    assert [choice.text for choice in answer.choices] == [alone(server, one, max_new_tokens=5) for one in ids]
    one = sdk.completions.create(model=MODEL, prompt=ids[0], max_tokens=5, temperature=0)
    assert one.choices[0].text == answer.choices[0].text


def test_a_streamed_chat_is_the_whole_one_in_pieces(sdk: openai.OpenAI) -> None:
    request: dict[str, Any] = {**chat(max_tokens=20), "seed": 3, "n": 2}
    whole = sdk.chat.completions.create(**request)
    texts, reasons, usages = ["", ""], [None, None], []
    for chunk in sdk.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    (counted,) = usages
    assert whole.usage is not None and counted.total_tokens == whole.usage.total_tokens == counted.prompt_tokens + 40
    assert counted.prompt_tokens_details.cached_tokens == counted.prompt_tokens - 1  # the whole answer's request has read it


def test_a_stop_string_ends_the_answer_before_it(server: Server, sdk: openai.OpenAI) -> None:
    text = alone(server, "The Congress", max_new_tokens=20)
    stop = text[len(text) // 2 :][:4]
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": "The Congress",
        "max_tokens": 20,
        "temperature": 0,
        "stop": [stop, "\x00"],
    }
    answer = sdk.completions.create(**request)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text.partition(stop)[0], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in sdk.completions.create(**request, stream=True))
    assert streamed == answer.choices[0].text


def test_the_newer_name_of_the_limit_counts(sdk: openai.OpenAI) -> None:
    """On both routes: benchmarks send both names to either."""
    answer = sdk.chat.completions.create(**chat(max_completion_tokens=3))  # type: ignore[call-overload]
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    plain = sdk.completions.create(**completion(), extra_body={"max_completion_tokens": 3})
    assert plain.usage is not None and plain.usage.completion_tokens == 3


def test_messages_may_come_in_parts_and_from_developers(sdk: openai.OpenAI) -> None:
    plain = sdk.chat.completions.create(**chat("Hello there"))  # type: ignore[call-overload]
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    split = sdk.chat.completions.create(**{**chat(), "messages": [{"role": "user", "content": parts}]})  # type: ignore[call-overload]
    assert split.choices[0].message.content == plain.choices[0].message.content
    both = [
        sdk.chat.completions.create(**{**chat(), "messages": [{"role": role, "content": "Be brief"}, *chat()["messages"]]})  # type: ignore[call-overload]
        for role in ("system", "developer")
    ]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content


# -- log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_prompt_scores_are_the_engines(server: Server, sdk: openai.OpenAI, max_tokens: int) -> None:
    engine = server.worker.engine
    assert engine is not None
    prompt = engine.admission.encode("The Congress of the United States")
    answer = sdk.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, echo=True, logprobs=2)
    until(lambda: is_idle(server))
    request = engine.admission.request(prompt, max_new_tokens=max(max_tokens, 1), scoring=Scoring(num_top=2, prompt=True))
    steps = list(engine.run(request))
    scores = [*steps[0].prompt_scores, *([score for step in steps for score in step.scores] if max_tokens else [])]
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert found.token_logprobs == [None, *(score.logprob for score in scores)]
    assert found.top_logprobs[0] is None and all(len(top) in (2, 3) for top in found.top_logprobs[1:])
    assert answer.choices[0].text.startswith("The Congress of the United States")
    assert found.tokens is not None and found.text_offset is not None
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert answer.choices[0].text[offset : offset + len(token)] == token


def test_chat_logprobs_stream_as_they_come(sdk: openai.OpenAI) -> None:
    request: dict[str, Any] = {**chat(), "logprobs": True, "top_logprobs": 3}
    whole = sdk.chat.completions.create(**request).choices[0].logprobs
    streamed = [chunk.choices[0].logprobs for chunk in sdk.chat.completions.create(**request, stream=True)]
    assert whole is not None and whole.content is not None and len(whole.content) == 8
    assert [one for part in streamed if part is not None for one in part.content or ()] == whole.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in whole.content)  # greedy
    assert all(bytes(entry.bytes or ()).decode() == entry.token for entry in whole.content)


def test_scores_do_not_depend_on_the_temperature(sdk: openai.OpenAI) -> None:
    """Log-probabilities are the model's, before temperature and top-p."""
    request: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 0, "echo": True, "logprobs": 1}
    cold, warm = (sdk.completions.create(**request, temperature=value).choices[0].logprobs for value in (0, 1.5))
    assert cold is not None and warm is not None and cold.token_logprobs == warm.token_logprobs


# -- while a pass runs ----------------------------------------------------------------------------------------------------


def test_a_silent_stream_carries_comments(slow: Server) -> None:
    with client(slow) as http, http.stream("POST", "/v1/chat/completions", json=chat(max_tokens=3, stream=True)) as response:
        lines = [line for line in response.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    assert comments and all(re.fullmatch(r": keep-alive, (layer [0-9]+/6|pass [1-4])", line) for line in comments)
    assert lines[-1] == "data: [DONE]" and response.headers["content-type"].startswith("text/event-stream")


def test_health_and_models_answer_at_once_while_a_pass_runs(slow: Server) -> None:
    request = completion(max_tokens=300, stream=True)
    with client(slow) as other, client(slow) as http, http.stream("POST", "/v1/completions", json=request) as response:
        lines = response.iter_lines()  # kept: a line iterator that is dropped closes the connection
        next(lines)
        times_s = []
        for path in ("/health", "/v1/models") * 10:
            start_s = time.monotonic()
            assert other.get(path).status_code == 200
            times_s.append(time.monotonic() - start_s)
        assert not is_idle(slow)
    assert sorted(times_s)[len(times_s) // 2] < 0.05, times_s  # 4 ms on a machine with other work
    assert slow._socket.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's delay on, 40 ms an answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_the_engine_within_a_pass(slow: Server, stream: bool) -> None:
    until(lambda: is_idle(slow))
    with client(slow) as http:
        try:
            with http.stream(
                "POST", "/v1/completions", json=completion(max_tokens=400, stream=stream), timeout=0.5
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("data"):
                        break
        except Exception as error:
            assert "timed out" in str(error) or "Timeout" in type(error).__name__
    start_s = time.monotonic()
    until(lambda: is_idle(slow))
    assert time.monotonic() - start_s < 5  # of 130 s that the answer would have taken


def test_a_cancelled_openai_stream_frees_the_engine(slow: Server) -> None:
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = sdk.chat.completions.create(**chat(max_tokens=400), stream=True)  # type: ignore[call-overload]
        next(iter(stream))
        stream.close()
    until(lambda: is_idle(slow), 5)


def test_a_full_queue_says_when_to_come_again(slow: Server) -> None:
    """One runs, two wait, the fourth is sent away; those who hang up while waiting leave the queue."""
    until(lambda: is_idle(slow))
    with client(slow) as http:
        streams = [http.stream("POST", "/v1/completions", json=completion(max_tokens=300, stream=True)) for _ in range(3)]
        responses = []
        for number, stream in enumerate(streams):
            responses.append(stream.__enter__())
            until(lambda number=number: len(slow.worker._waiting) == number)  # type: ignore[misc]
        refused = http.post("/v1/completions", json=completion())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert 10 < int(refused.headers["retry-after"]) < 1000  # 300 tokens at the pace measured
        lines = responses[2].iter_lines()
        assert any("2 before this" in line for line in (next(lines) for _ in range(10)))
        streams[1].__exit__(None, None, None)
        until(lambda: len(slow.worker._waiting) == 1, 5)
        with pytest.raises(openai.RateLimitError), openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0) as sdk:
            slow.worker._max_waiting = 0
            sdk.chat.completions.create(**chat())  # type: ignore[call-overload]
        slow.worker._max_waiting = 2
        for stream in (streams[0], streams[2]):
            stream.__exit__(None, None, None)
    until(lambda: is_idle(slow))


# -- around it ------------------------------------------------------------------------------------------------------------


def test_text_goes_to_tokens_and_back(server: Server) -> None:
    with client(server) as http:
        tokens = http.post("/tokenize", json={"prompt": "The Congress", "add_special_tokens": False}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "The Congress"}
        with_special = http.post("/tokenize", json={"prompt": "The Congress"}).json()["tokens"]
        assert with_special[1:] == tokens
        info = http.get("/tokenizer_info").json()
        assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
        assert http.post("/detokenize", json={"tokens": [2**30]}).status_code == 400


def test_metrics_count_what_was_done(server: Server) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"run70b_{name} "))

    with client(server) as http:
        before = value("generation_tokens_total"), value("spec_decode_num_drafts_total")
        http.post("/v1/completions", json=completion(max_tokens=9))
        until(lambda: is_idle(server))
        assert value("generation_tokens_total") - before[0] == 9
        assert 1 <= value("spec_decode_num_drafts_total") - before[1] <= 9
        assert value("num_requests_running") == value("num_requests_waiting") == 0
        assert value("time_to_first_token_seconds_count") >= 1


def test_watchers_see_plan_and_passes_and_no_text(server: Server) -> None:
    with client(server) as http, http.stream("GET", "/v1/engine/events") as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["type"] == "plan" and first["nodes"] == 17
        with client(server) as other:
            text = other.post("/v1/completions", json=completion(max_tokens=5)).json()["choices"][0]["text"]
        seen, passes = 0, []
        while seen < 5:
            event = json.loads(next(lines).removeprefix("data: "))
            if event["type"] == "pass":
                passes.append(event)
                seen = sum(one["tokens"] for one in passes[-3:])
        assert all(event["path"][0] == 0 and len(event["path"]) >= event["tokens"] for event in passes)
        assert text not in json.dumps(passes)


def test_unknown_fields_are_named_and_unsupported_ones_refused(server: Server) -> None:
    with client(server) as http:
        kept = http.post("/v1/completions", json=completion(user="me", store=None, metadata={}, logit_bias={}, best_of=1))
        assert (kept.status_code, kept.headers["x-ignored-fields"]) == (200, "user, metadata")
        for field, value in {"tools": [{}], "frequency_penalty": 0.5, "response_format": {"type": "json_object"}}.items():
            refused = http.post("/v1/chat/completions", json=chat(**{field: value}))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
