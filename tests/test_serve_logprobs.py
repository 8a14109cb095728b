"""Tokens in answers are what they are in the text, to the byte: parts of characters, spaces before words, special tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.engine.admission import Request
from offload.serve.answer_format import Choice, CompletionFormat, Header, Offsets, spelling
from offload.serve.server import Server
from offload.text.tokenizer import Tokenizer
from serving import MODEL, chat, client, running, tiny_engine
from text_models import BOS, byte_fallback_tokenizer, save_tokenizer
from tree.logprobs import ScoredToken

HOT: dict[str, Any] = {"temperature": 2, "seed": 3, "max_tokens": 60, "ignore_eos": True}  # most of it is no text at all


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pair")
    with running(lambda _: tiny_engine(folder, max_context=128)) as server:
        yield server


def complete(server: Server, **changes: Any) -> Any:
    with client(server) as http:
        body = {"model": MODEL, "prompt": "h\u00e9llo w\u20ac", "logprobs": 20, **HOT, **changes}
        return http.post("/v1/completions", json=body)


def test_the_bytes_of_chat_tokens_together_are_the_text(server: Server) -> None:
    with client(server) as http:
        body = chat("hi", logprobs=True, top_logprobs=20, **HOT)
        (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(it["bytes"] or ()) for it in tokens).decode(errors="replace") == choice["message"]["content"]
    told = [it for token in tokens for it in (token, *token["top_logprobs"])]
    for it in told:
        if it["bytes"] is None:
            assert it["token"] in ("<s>", "</s>")
        elif it["token"].startswith("\\x"):
            assert it["token"] == "".join(f"\\x{byte:02x}" for byte in it["bytes"])
        else:
            assert it["token"].encode() == bytes(it["bytes"])
    assert {"\\", "<"} <= {it["token"][:1] for it in told}  # parts of characters and special tokens were among them


def test_tokens_that_differ_have_a_value_each(server: Server) -> None:
    """As many as were asked for, and the token's own: in a dictionary, texts that read alike would be one."""
    found = complete(server, echo=True).json()["choices"][0]["logprobs"]
    assert found["top_logprobs"][0] is None
    for token, value, top in zip(found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert len(top) in (20, 21) and top[token] == value
    assert any(token.startswith("bytes:\\x") for token in found["tokens"])


@pytest.mark.matrix
@pytest.mark.parametrize("echo", [False, True])
def test_offsets_count_characters_of_the_text_also_in_streams(server: Server, echo: bool) -> None:
    choice = complete(server, echo=echo).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith(("bytes:", "<")):
            assert choice["text"][offset : offset + len(token)] == token
    streamed = [line for line in complete(server, echo=echo, stream=True).iter_lines() if line.startswith("data: {")]
    parts = [part["choices"][0]["logprobs"] for part in map(_document, streamed)]
    assert [offset for part in parts for offset in part["text_offset"]] == offsets
    assert [token for part in parts for token in part["tokens"]] == tokens


def _document(line: str) -> Any:
    return json.loads(line.removeprefix("data: "))


def test_a_prompts_first_word_has_no_space_in_the_text(tmp_path: Path) -> None:
    """Where words begin with their space, the first one's is not shown: what follows stands one character earlier."""
    tokenizer = Tokenizer(save_tokenizer(tmp_path, byte_fallback_tokenizer()))
    prompt = (tokenizer.vocabulary()["<s>"], *tokenizer.encode("a b", add_special_tokens=False))
    score = ScoredToken(tokenizer.vocabulary()["\u2581a"], -1.0, ())
    choice = Choice(request=Request(prompt=prompt), text=" a", scores=[score])
    choice.prompt_scores = tuple(ScoredToken(token_id, -1.0, ()) for token_id in prompt[1:])
    header = Header(id="x", created=0, model=MODEL)
    layout = CompletionFormat(header, tokenizer, with_logprobs=True, echo=True, num_new=1, prompt_texts=["a b"])
    (document,) = layout.whole([choice], {})["choices"]
    assert document["text"] == "a b a"
    assert document["logprobs"]["tokens"] == ["<s>", " a", " b", " a"]
    assert document["logprobs"]["text_offset"] == [0, 0, 1, 3]


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert Offsets().of([b"a", b"\xe2\x82", b"\xac", b"", b"b", b"\xe2", b"c"]) == [0, 1, 1, 2, 2, 3, 4]


def test_parts_of_characters_are_spelt_as_openai_does(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save_tokenizer(tmp_path))
    part = next(number for number in range(256) if tokenizer.token_bytes(number) == b"\xe2")
    assert (spelling(tokenizer, part), spelling(tokenizer, part, "bytes:")) == ("\\xe2", "bytes:\\xe2")
    assert spelling(tokenizer, BOS) == "<s>"
