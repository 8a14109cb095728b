"""Text that leaves while tokens arrive: it equals the decoding of all tokens, and no stop string shows in part."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from offload.errors import ModelError, UsageError
from offload.text.incremental import TextStream
from offload.text.tokenizer import REPLACEMENT, Tokenizer, check_same_vocabulary, open_tokenizer
from text_models import (
    BOS,
    EOS,
    VOCAB_SIZE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    metaspace_tokenizer,
    save_tokenizer,
    word_end_tokenizer,
    word_piece_tokenizer,
)

EURO, SMILE, UMLAUT = "\u20ac", "\U0001f600", "\u00e4"  # 3, 4 and 2 bytes
KINDS = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
    "word_piece": word_piece_tokenizer,
    "word_end": word_end_tokenizer,
}
TEXTS = st.text(alphabet=f"ab c{UMLAUT}{EURO}{SMILE}\n", max_size=12)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("byte_fallback"), byte_fallback_tokenizer()))


@pytest.fixture(params=["byte_level", "byte_fallback"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=sorted(KINDS), scope="module")
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp(request.param), KINDS[request.param]()))


def pieces(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = (), context: Sequence[int] = ()
) -> tuple[list[str], TextStream]:
    """What each token gave out and then `finish`, as the engine does it: nothing follows a stop string."""
    stream = TextStream(tokenizer, stop, context)
    given: list[str] = []
    for token_id in token_ids:
        given.append(stream.push(token_id))
        if stream.stopped:
            break
    given.append(stream.finish())
    assert "".join(given) == stream.text
    return given, stream


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte."""
    if "<0x00>" in tokenizer.vocabulary():
        return [tokenizer.vocabulary()[f"<0x{byte:02X}>"] for byte in text.encode()]
    return [token_id for character in text for token_id in tokenizer.encode(character)]


# -- characters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", [UMLAUT, EURO, SMILE])
def test_a_character_over_several_tokens_appears_once_and_whole(tokenizer: Tokenizer, character: str) -> None:
    token_ids = bytes_of(tokenizer, character)
    assert len(token_ids) == len(character.encode())
    given, _ = pieces(tokenizer, token_ids)
    assert given == [""] * (len(token_ids) - 1) + [character, ""]


def test_characters_in_bytes_follow_each_other(tokenizer: Tokenizer) -> None:
    """A window that began inside a character once turned a run of byte tokens into replacement characters: Llama-2's
    decoder gives up a whole run when one of its bytes is wrong."""
    text = f"{EURO}{SMILE}{EURO}{UMLAUT}{EURO}"
    given, stream = pieces(tokenizer, bytes_of(tokenizer, text))
    assert stream.text == text
    assert [piece for piece in given if piece] == list(text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_streamed_text_is_the_text_that_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    given, _ = pieces(tokenizer, token_ids)
    assert "".join(given) == tokenizer.decode(token_ids)
    assert REPLACEMENT not in "".join(given)


@settings(max_examples=150, deadline=None)
@given(token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24))
def test_streamed_text_of_any_tokens_is_the_decoding_of_all(byte_level: Tokenizer, token_ids: list[int]) -> None:
    given, _ = pieces(byte_level, token_ids)
    assert "".join(given) == byte_level.decode(token_ids)


def test_special_tokens_in_the_middle_show_nothing_and_cost_no_space(tokenizer: Tokenizer) -> None:
    end = tokenizer.vocabulary()["</s>"]
    token_ids = [*tokenizer.encode("a"), end, end, *tokenizer.encode(" b")]
    _, stream = pieces(tokenizer, token_ids)
    assert stream.text == tokenizer.decode(token_ids)
    assert "</s>" not in stream.text and " b" in stream.text


def test_the_window_that_is_decoded_again_stays_small(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decoded(token_ids)

    decoded = byte_level.decode
    monkeypatch.setattr(byte_level, "decode", decode)
    pieces(byte_level, byte_level.encode(f"a {EURO} b {SMILE}" * 50))
    assert longest <= 8  # two characters of four bytes


def test_finish_gives_out_the_bytes_that_never_became_a_character(byte_level: Tokenizer) -> None:
    given, stream = pieces(byte_level, bytes_of(byte_level, f"a{EURO}")[:-1])
    assert given == ["a", "", "", REPLACEMENT]
    assert stream.finish() == "" and stream.text == f"a{REPLACEMENT}"


# -- what stands behind a prompt ---------------------------------------------------------------------------------------


def text_behind(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """What the answer adds to the decoded prompt, as transformers decodes both."""
    both, alone = tokenizer.decode([*prompt, *answer]), tokenizer.decode(prompt)
    while not both.startswith(alone):  # bytes at its end that were no character become one
        alone = alone[:-1]
    return both[len(alone) :]


def test_an_answer_keeps_the_space_in_front_of_its_first_word(any_tokenizer: Tokenizer) -> None:
    token_ids = any_tokenizer.encode("ab a b", add_special_tokens=False)
    for end in range(1, len(token_ids)):
        _, stream = pieces(any_tokenizer, token_ids[end:], context=token_ids[:end])
        assert any_tokenizer.decode(token_ids[:end]) + stream.text == any_tokenizer.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_behind_any_prompt_is_what_it_adds_to_the_prompts(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Whatever tokens the prompt ends with: special ones, spaces, nothing else at all."""
    last = len(any_tokenizer.vocabulary()) - 1
    first = 259 if "<0x00>" in any_tokenizer.vocabulary() else 0  # of broken bytes, all is given up or nothing: not in windows
    tokens = st.lists(st.one_of(st.sampled_from([1, 2]), st.integers(first, last)), max_size=20)
    prompt, answer = data.draw(tokens), data.draw(tokens)
    _, stream = pieces(any_tokenizer, answer, context=prompt)
    assert stream.text == text_behind(any_tokenizer, prompt, answer)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, end=st.integers(0, 12))
def test_a_character_that_the_prompt_began_is_the_answers(tokenizer: Tokenizer, text: str, end: int) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    prompt, answer = token_ids[:end], token_ids[end:]
    _, stream = pieces(tokenizer, answer, context=prompt)
    assert stream.text == text_behind(tokenizer, prompt, answer)
    assert REPLACEMENT not in stream.text


def test_a_long_prompt_is_not_decoded_for_its_last_tokens(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return decoded(token_ids)

    decoded = byte_level.decode
    monkeypatch.setattr(byte_level, "decode", decode)
    _, stream = pieces(byte_level, byte_level.encode(" hell"), context=byte_level.encode("hello" * 2000))
    assert stream.text == " hell" and max(lengths) <= 16


def test_a_stop_string_may_begin_with_the_space_of_the_first_word(byte_fallback: Tokenizer) -> None:
    prompt, answer = byte_fallback.encode("ab"), byte_fallback.encode("a")
    given, stream = pieces(byte_fallback, answer, [" a"], context=prompt)
    assert stream.stopped and given == ["", ""]


# -- stop strings ------------------------------------------------------------------------------------------------------


def test_text_ends_before_a_stop_string_split_over_tokens(byte_level: Tokenizer) -> None:
    given, stream = pieces(byte_level, bytes_of(byte_level, "one\nEND two"), ["\nEND"])
    assert stream.stopped and stream.text == "one"
    assert given == ["o", "n", "e", "", "", "", "", ""]


def test_text_ends_before_a_stop_string_inside_a_token(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("hell")
    assert len(token_ids) == 1
    given, stream = pieces(byte_level, token_ids, ["el"])
    assert stream.stopped and given == ["h", ""]


def test_a_stop_string_that_does_not_come_is_held_back_no_longer_than_needed(byte_level: Tokenizer) -> None:
    given, stream = pieces(byte_level, bytes_of(byte_level, "abaabx"), ["abac"])
    assert not stream.stopped
    assert given == ["", "", "", "aba", "", "abx", ""]


def test_finish_gives_out_what_might_have_become_a_stop_string(byte_level: Tokenizer) -> None:
    given, stream = pieces(byte_level, bytes_of(byte_level, "x\nEN"), ["\nEND"])
    assert given == ["x", "", "", "", "\nEN"] and not stream.stopped


def test_a_stop_string_of_many_byte_characters_is_found(tokenizer: Tokenizer) -> None:
    _, stream = pieces(tokenizer, bytes_of(tokenizer, f"{EURO}{SMILE}{UMLAUT}"), [f"{SMILE}{UMLAUT}"])
    assert stream.stopped and stream.text == EURO


def test_the_stop_string_that_is_complete_first_ends_the_text(byte_level: Tokenizer) -> None:
    _, stream = pieces(byte_level, bytes_of(byte_level, "abcd"), ["bcd", "c", ""])
    assert stream.stopped and stream.text == "ab"


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=f"ab{EURO}", max_size=12), stop=st.text(alphabet=f"ab{EURO}", min_size=1, max_size=4))
def test_nothing_of_a_stop_string_is_ever_given_out(byte_level: Tokenizer, text: str, stop: str) -> None:
    given, stream = pieces(byte_level, byte_level.encode(text), [stop])
    assert stream.stopped == (stop in text)
    assert "".join(given) == text.partition(stop)[0]


# -- stop strings and special tokens ---------------------------------------------------------------------------------------

END, BEGIN = EOS, BOS  # </s>, <s>


@pytest.mark.parametrize(
    ("answer", "stop", "num_tokens", "text"),
    [
        (["a", END, "b"], "</s>", 2, "a"),
        (["a", END, "b"], "a</s>", 2, ""),
        (["a", END, "b", "c"], "</s>b", 3, "a"),
        (["a", "b", END, BEGIN, "c"], "b</s><s>", 4, "a"),
        (["a", END, END, "b"], "</s></s>", 3, "a"),
        (["a", END, "b", END, "c"], "</s>c", 5, "ab"),
        ([END, "a"], "</s>", 1, ""),
        (["a", END, "b", "c"], "s>b", 3, "a"),
        (["<", "/", "s", ">", "a"], "</s>", 4, ""),
    ],
    ids=str,
)
def test_a_stop_string_may_name_special_tokens(
    byte_level: Tokenizer, answer: list[str | int], stop: str, num_tokens: int, text: str
) -> None:
    token_ids = [one if isinstance(one, int) else byte_level.encode(one)[0] for one in answer]
    given, stream = pieces(byte_level, token_ids, [stop])
    assert stream.stopped and stream.text == text
    assert len(given) - 1 == num_tokens


def test_a_stop_string_that_special_tokens_part_is_not_shown_either(byte_level: Tokenizer) -> None:
    token_ids = [*byte_level.encode("a"), END, *byte_level.encode("b")]
    _, stream = pieces(byte_level, token_ids, ["ab"])
    assert stream.stopped and stream.text == ""


def test_what_might_go_on_with_a_special_token_is_held_back(byte_level: Tokenizer) -> None:
    a, b = byte_level.encode("ab")
    given, stream = pieces(byte_level, [b, a, b, a, END, b, a], ["a</s>a"])
    assert not stream.stopped and given == ["b", "", "ab", "", "", "ab", "", "a"]


@settings(max_examples=150, deadline=None)
@given(
    token_ids=st.lists(st.sampled_from([64, 65, END, BEGIN]), max_size=12),
    stop=st.lists(st.sampled_from(["a", "b", "</s>", "<s>", ">", "<"]), min_size=1, max_size=3).map("".join),
)
def test_texts_end_where_a_search_in_all_of_it_would_end_them(byte_level: Tokenizer, token_ids: list[int], stop: str) -> None:
    """The first token at which the stop string is in the text, with special tokens or without."""
    names = {64: "a", 65: "b", END: "</s>", BEGIN: "<s>"}
    assert byte_level.decode([64, 65]) == "ab"

    def holds(count: int) -> bool:
        everything = "".join(names[token_id] for token_id in token_ids[:count])
        return stop in everything or stop in byte_level.decode(token_ids[:count])

    counts = [count for count in range(1, len(token_ids) + 1) if holds(count)]
    given, stream = pieces(byte_level, token_ids, [stop])
    assert stream.stopped == bool(counts)
    assert len(given) - 1 == (counts[0] if counts else len(token_ids))
    assert byte_level.decode(token_ids).startswith(stream.text) and stop not in stream.text


def test_tokens_that_decoding_leaves_out_are_special_whatever_their_role(tmp_path: Path) -> None:
    """Llama-3's <|eot_id|> has none: it is marked in tokenizer.json only."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens([AddedToken("<|eot|>", special=True)])
    tokenizer = Tokenizer(save_tokenizer(tmp_path, backend))
    end = tokenizer.vocabulary()["<|eot|>"]
    assert tokenizer.decode([end]) == "" and tokenizer.is_special(end) and not tokenizer.is_special(64)
    _, stream = pieces(tokenizer, [64, end, 65], ["<|eot|>"])
    assert stream.stopped and stream.text == "a"


# -- tokenizers and vocabularies ---------------------------------------------------------------------------------------


def test_tokens_added_to_the_vocabulary_are_not_counted(tmp_path: Path) -> None:
    """Padding that a fine-tune added lies beyond the embedding, and models of the Qwen family bring one of their own."""
    backend = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "plain"))
    backend.add_tokens(["[PAD]"], special_tokens=True)
    backend.save_pretrained(tmp_path / "padded")
    plain, padded = Tokenizer(tmp_path / "plain"), Tokenizer(tmp_path / "padded")
    assert (len(padded.vocabulary()), padded.num_tokens) == (len(plain.vocabulary()) + 1, plain.num_tokens)


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "\0" * 64])
def test_a_damaged_tokenizer_is_named_with_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        open_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "tokenizer" in caught.value.what
    assert len(str(caught.value).splitlines()) == 3


def test_one_user_turn_is_laid_out_by_the_template(tmp_path: Path) -> None:
    template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}!"
    tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template=template))
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_chat("hi", None)) == "<user>hi!"
    assert tokenizer.decode(tokenizer.encode_chat("hi", "be")) == "<system>be<user>hi!"


def test_a_template_that_fails_is_the_models_fault(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save_tokenizer(tmp_path, chat_template="{{ raise_exception('no\nsystem turn') }}"))
    with pytest.raises(ModelError, match="no system turn"):
        tokenizer.encode_chat("hi", "be")


def test_a_model_without_template_cannot_chat(byte_level: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        byte_level.encode_chat("hi", None)


def test_equal_tokenizers_pass_whatever_the_padding(byte_level: Tokenizer, tmp_path: Path) -> None:
    check_same_vocabulary(byte_level, Tokenizer(save_tokenizer(tmp_path)), (VOCAB_SIZE, VOCAB_SIZE + 64), "--draft-model")


def test_the_first_token_that_differs_is_named(byte_level: Tokenizer, tmp_path: Path) -> None:
    other = byte_level_tokenizer(renamed={BOS + 3: "other", EOS + 4: "more", EOS + 1: "first"})
    draft = Tokenizer(save_tokenizer(tmp_path, other))
    with pytest.raises(ModelError) as caught:
        check_same_vocabulary(byte_level, draft, (VOCAB_SIZE, VOCAB_SIZE), "--draft-model")
    assert f"token {EOS + 1} is 'first' in the draft and 'he' in the target" in caught.value.what
    assert caught.value.where == "--draft-model"


def test_a_longer_vocabulary_differs_where_the_shorter_ends(byte_level: Tokenizer, tmp_path: Path) -> None:
    longer = byte_level_tokenizer()
    longer.add_tokens(["extra"])
    draft = Tokenizer(save_tokenizer(tmp_path, longer))
    with pytest.raises(ModelError, match=f"token {VOCAB_SIZE} is 'extra' in the draft and None in the target"):
        check_same_vocabulary(byte_level, draft, (VOCAB_SIZE, VOCAB_SIZE), "--draft-model")


def test_without_two_tokenizers_the_sizes_decide(byte_level: Tokenizer) -> None:
    for tokenizers in ((None, None), (byte_level, None), (None, byte_level)):
        check_same_vocabulary(*tokenizers, (97, 97), "--draft-model")
        with pytest.raises(ModelError, match=r"has 64 tokens, the target's 97; .* is token 64"):
            check_same_vocabulary(*tokenizers, (97, 64), "--draft-model")


# -- bytes of tokens ----------------------------------------------------------------------------------------------------


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_the_bytes_of_a_texts_tokens_are_the_text(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for tokenizer, before in ((byte_level, ""), (byte_fallback, " ")):  # a space before the first word, which decoding drops
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        together = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)
        assert together == (before + text if text else "").encode()


def test_every_byte_has_its_token_and_every_token_its_bytes(tokenizer: Tokenizer) -> None:
    numbers = tokenizer.vocabulary().values()
    assert {bytes([byte]) for byte in range(256)} <= {tokenizer.token_bytes(token_id) for token_id in numbers}
    for token_id in numbers:
        text = tokenizer.token_text(token_id)
        assert tokenizer.is_special(token_id) or tokenizer.token_bytes(token_id).decode(errors="replace") == text
    assert tokenizer.token_bytes(tokenizer.num_tokens + 100) == b""  # a model's vocabulary may be padded


def test_words_keep_the_space_before_them(byte_fallback: Tokenizer) -> None:
    spaced, alone = (byte_fallback.vocabulary()[token] for token in ("\u2581a", "a"))
    assert (byte_fallback.token_text(spaced), byte_fallback.token_bytes(alone)) == (" a", b"a")


def test_a_character_that_stands_for_broken_ones_may_be_a_token_itself(tmp_path: Path) -> None:
    """U+FFFD in a vocabulary is no part of anything: neither as itself nor in a byte-level spelling."""
    backend = byte_fallback_tokenizer()
    backend.add_tokens([AddedToken("\ufffd", normalized=False)])
    plain = Tokenizer(save_tokenizer(tmp_path / "plain", backend))
    spelt = Tokenizer(save_tokenizer(tmp_path / "spelt", byte_level_tokenizer(renamed={0: "\u00ef\u00bf\u00bd"})))
    assert plain.token_bytes(plain.vocabulary()["\ufffd"]) == spelt.token_bytes(0) == "\ufffd".encode()


def test_tokens_that_no_text_shows_have_no_bytes(tmp_path: Path) -> None:
    """Special by their mark, be it in the role of one or in none."""
    backend = byte_level_tokenizer()
    backend.add_special_tokens(["<|header|>"])
    backend.add_tokens(["<think>"])
    tokenizer = Tokenizer(save_tokenizer(tmp_path, backend))
    header, think = (tokenizer.vocabulary()[token] for token in ("<|header|>", "<think>"))
    for token_id in (BOS, EOS, header):
        assert tokenizer.is_special(token_id) and tokenizer.token_bytes(token_id) == b"" and tokenizer.decode([token_id]) == ""
    assert not tokenizer.is_special(think) and tokenizer.token_bytes(think) == tokenizer.decode([think]).encode() == b"<think>"
    assert tokenizer.token_text(header) == "<|header|>"


def test_truncation_and_padding_of_a_tokenizer_file_are_dropped_before_threads_come(tmp_path: Path) -> None:
    """They were in the first call, which another thread's call at that moment failed of."""
    backend = byte_level_tokenizer()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=3)
    tokenizer = Tokenizer(save_tokenizer(tmp_path, backend))
    settled = tokenizer._tokenizer.backend_tokenizer
    assert settled.truncation is None and settled.padding is None
    assert tokenizer.decode(tokenizer.encode("hello a b")) == "hello a b"
