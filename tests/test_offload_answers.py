"""The text of an answer, from the engine and from the server: what it adds to the prompt's, and where it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.engine.engine import Engine
from planning import L40
from serving import MODEL, client, running
from text_models import byte_fallback_tokenizer, change_tensors, save_text_model, save_tokenizer

PROMPTS = ("ab", "a b", "hgfe", "c d e f", "gg h")


def one_of_two(folder: Path, one: str, other: str) -> Path:
    """A model with Llama-2's kind of tokenizer, whose every token is `one` or `other`."""
    tokenizer = byte_fallback_tokenizer()
    save_text_model(folder, vocab_size=tokenizer.get_vocab_size(), num_layers=2, bos_token_id=1, eos_token_id=0)
    save_tokenizer(folder, tokenizer)
    vocab = tokenizer.get_vocab()

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != "lm_head.weight":
            return tensor
        changed = torch.zeros_like(tensor)
        changed[vocab[one]], changed[vocab[other]] = tensor[0], -tensor[0]
        return changed

    change_tensors(folder, change)
    return folder


def open_alone(folder: Path) -> Engine:
    return open_engine(EngineSettings(model=str(folder), tree="none", device="cpu"), hardware=L40)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_of_two(tmp_path_factory.mktemp("words"), "\u2581a", "\u2581b")


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_of_two(tmp_path_factory.mktemp("endings"), "c", "</s>")


def test_prompt_and_answer_are_the_text_of_both(words: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words)
    with open_alone(words) as engine:
        for prompt in (*PROMPTS, [1], [1, *tokenizer("ab").input_ids, 2]):
            stream = engine.stream(prompt, max_new_tokens=4, ignore_eos=True)
            pieces = "".join(step.text for step in stream)
            report = stream.result()
            ids = list(report.prompt_token_ids)
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            assert shown + pieces == tokenizer.decode([*ids, *report.token_ids], skip_special_tokens=True)
            assert report.text == pieces and (pieces[0] == " ") == bool(shown)


def test_the_server_keeps_the_space_in_answers_echoes_and_streams(words: Path) -> None:
    with running(lambda _: open_alone(words)) as server, client(server) as http:
        body: dict[str, Any] = {"model": MODEL, "prompt": "a b", "max_tokens": 3, "temperature": 0}

        def text(**changes: Any) -> str:
            return str(http.post("/v1/completions", json={**body, **changes}).json()["choices"][0]["text"])

        answer = text()
        assert answer[0] == " " and len(answer) == 6
        assert text(echo=True) == "a b" + answer
        assert text(stop=[answer[:2]]) == "" and text(stop=[answer[1:]]) == " "
        with http.stream("POST", "/v1/completions", json={**body, "stream": True, "echo": True}) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == "a b" + answer


def test_a_special_token_ends_the_answer_where_it_ends_transformers(endings: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(endings)
    reference = AutoModelForCausalLM.from_pretrained(endings, dtype=torch.float32).eval()
    reasons = []
    with open_alone(endings) as engine:
        for stop in ("</s>", "c</s>", "</s></s>c"):
            for prompt in PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                whole = reference.generate(
                    ids,
                    max_new_tokens=8,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    stop_strings=[stop],
                    tokenizer=tokenizer,
                )
                expected = whole[0, ids.shape[1] :].tolist()
                report = engine.generate(prompt, max_new_tokens=8, stop=stop, ignore_eos=True)
                assert list(report.token_ids) == expected, (stop, prompt)
                reasons.append(report.finish_reason)
                if report.finish_reason == "stop":
                    names = "".join(tokenizer.convert_ids_to_tokens(expected))
                    assert report.text == names[: names.index(stop)].replace("</s>", "")
    assert {"stop", "length"} == set(reasons)
