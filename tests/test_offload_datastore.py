"""Datastores: what is found in one against a search through its texts, and files that are not what they should be."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import CHANGED, INVALID, assert_error, assert_usage_error, run_command
from offload.datastore import build as building
from offload.datastore.build import MEMORY_BYTES, build
from offload.datastore.layout import CONTEXT_TOKENS, PAGE_BYTES, SAMPLE_STEP, Head, parse_head
from offload.datastore.sorting import BYTES_PER_PLACE
from offload.datastore.store import Datastore
from offload.datastore.texts import PIECE_CHARACTERS, files_of, read_texts
from offload.errors import FitError, IntegrityError, ModelError
from tree.ngram import MOST_LEVELS, MOST_MATCHES

TOKENIZER = hashlib.sha256(b"a vocabulary").digest()
VOCAB = 7
DEMO = Path(__file__).resolve().parent.parent / "offload/demo/target"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def built(path: Path, texts: Sequence[list[int]], vocab_size: int = VOCAB, memory_bytes: int = MEMORY_BYTES) -> Path:
    build(path, iter(texts), vocab_size=vocab_size, tokenizer=TOKENIZER, memory_bytes=memory_bytes)
    return path


def opened(path: Path, vocab_size: int = VOCAB) -> Datastore:
    return Datastore(path, tokenizer=TOKENIZER, vocab_size=vocab_size)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many last tokens they share, CONTEXT_TOKENS at most."""
    pairs = zip(reversed(left[-CONTEXT_TOKENS:]), reversed(right[-CONTEXT_TOKENS:]), strict=False)
    length = 0
    for one, other in pairs:
        if one != other:
            break
        length += 1
    return length


def found_by_search(texts: Sequence[list[int]], context: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Length of match and continuation of every place of `texts` that matches at all."""
    places = [(text, end) for text in texts for end in range(1, len(text))]
    matched = [(common(text[:end], context), tuple(text[end : end + MOST_LEVELS])) for text, end in places]
    return sorted((one for one in matched if one[0]), reverse=True)


def check_matches(store: Datastore, texts: Sequence[list[int]], context: list[int]) -> None:
    """As long as any, and all of them texts'."""
    matches = [(match.length, tuple(match.token_ids)) for match in store.matches(context)]
    sought = found_by_search(texts, context)
    assert [length for length, _ in matches] == [length for length, _ in sought[:MOST_MATCHES]]
    least = matches[-1][0] if matches else 0
    surely = [one for one in sought if one[0] > least]
    assert sorted(matches, reverse=True)[: len(surely)] == surely
    rest = list(sought)
    for one in matches:
        rest.remove(one)  # each place once


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=30), min_size=1, max_size=6),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
)
def test_matches_are_those_that_a_search_through_the_texts_finds(
    tmp_path: Path, texts: list[list[int]], context: list[int]
) -> None:
    if all(len(text) < 2 for text in texts):
        with pytest.raises(ModelError, match="no text has two tokens"):
            built(tmp_path / "store", texts)
        return
    store = opened(built(tmp_path / "store", texts))
    check_matches(store, texts, context)
    store.close()


@pytest.fixture(params=[VOCAB, 70_000], ids=["2 bytes a token", "4 bytes a token"])
def repeating(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[list[list[int]], int]:
    """Texts that say much twice, of more tokens than one step of the sample, and the size of their vocabulary."""
    num_tokens, phrases = request.param, [rng.integers(request.param, size=20).tolist() for _ in range(40)]
    texts = [[token_id for number in rng.integers(40, size=25) for token_id in phrases[number]] for _ in range(12)]
    return texts, num_tokens


@pytest.mark.matrix
def test_matches_beyond_the_first_sample_are_right(tmp_path: Path, repeating: tuple[list[list[int]], int]) -> None:
    texts, vocab_size = repeating
    store = opened(built(tmp_path / "store", texts, vocab_size), vocab_size)
    assert store.head.num_samples > 4 and store.head.num_places > 4 * SAMPLE_STEP
    for text in texts[::3]:
        for end in (1, 3, 77, 200, len(text)):
            check_matches(store, texts, text[:end])
            check_matches(store, texts, [*text[:end], (text[0] + 1) % vocab_size])


def test_little_memory_makes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeating: tuple[list[list[int]], int]
) -> None:
    texts, vocab_size = repeating
    whole = built(tmp_path / "whole", texts, vocab_size)
    deals = []
    monkeypatch.setattr(building, "_deal", lambda *what, deal=building._deal: deals.append(deal(*what)))
    parted = built(tmp_path / "parted", texts, vocab_size, memory_bytes=700 * BYTES_PER_PLACE)
    assert deals and os.listdir(tmp_path) in (["whole", "parted"], ["parted", "whole"])
    with parsed(whole) as one, parsed(parted) as other:  # places that tie may stand otherwise
        assert one.head.num_places == other.head.num_places
        contexts = [[store._context(number) for number in range(store.head.num_places)] for store in (one, other)]
    assert contexts[0] == contexts[1] == sorted(contexts[0])


class parsed:
    def __init__(self, path: Path) -> None:
        head = parse_head(path.read_bytes())
        self._store = Datastore(path, tokenizer=None, vocab_size=head.vocab_size)

    def __enter__(self) -> Datastore:
        return self._store

    def __exit__(self, *error: object) -> None:
        self._store.close()


def test_a_source_follows_its_text(tmp_path: Path, repeating: tuple[list[list[int]], int]) -> None:
    texts, vocab_size = repeating
    store = opened(built(tmp_path / "store", texts, vocab_size), vocab_size)
    text = texts[3]
    source = store.start(text[:20])
    source.follow(text[20:33])
    assert source.find((), 9) == store.start(text[:33]).find((), 9) == store.start(text[:30]).find(text[30:33], 9) != []
    assert store.start([]).find((), 9) == []


def test_tokens_that_the_model_lacks_end_a_continuation(tmp_path: Path) -> None:
    store = opened(built(tmp_path / "store", [[1, 2, 3, 6, 4]]), vocab_size=6)
    assert [tuple(match.token_ids) for match in store.matches([1])] == [(2, 3)]
    assert store.matches([1, 2, 3]) == []
    assert store.matches([9_999_999]) == []


# -- files that are not what they should be --------------------------------------------------------------------------------


@pytest.fixture
def store_file(tmp_path: Path) -> Path:
    return built(tmp_path / "store", [[1, 2, 3, 4, 5, 6] * 9])


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        opened(path)
    assert error.value.exit_code == 3 and str(path) in error.value.where


@pytest.mark.parametrize("length", [0, 5, 100, PAGE_BYTES - 1, PAGE_BYTES, -1])
def test_a_file_cut_short_is_refused(store_file: Path, length: int) -> None:
    store_file.write_bytes(store_file.read_bytes()[:length])
    refused(store_file, "not a datastore: it (does not begin|ends after|has .* bytes, and says)")


def test_a_file_that_grew_is_refused(store_file: Path) -> None:
    store_file.write_bytes(store_file.read_bytes() + b"\0")
    refused(store_file, "not a datastore: it has")


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("what follows is no datastore")
    refused(tmp_path / "text", "does not begin as one does")
    refused(tmp_path, "directory")
    refused(tmp_path / "none", "No such file")


@pytest.mark.parametrize("place", range(0, 200, 3))
def test_every_changed_byte_of_the_head_is_noticed(store_file: Path, place: int) -> None:
    data = bytearray(store_file.read_bytes())
    data[place] ^= 0x40
    store_file.write_bytes(data)
    refused(store_file, "not a datastore")


def test_another_version_says_so(store_file: Path) -> None:
    data = bytearray(store_file.read_bytes())
    data[16] = 9
    store_file.write_bytes(data)
    refused(store_file, "version 9 .* reads version 1")


def test_claims_that_nothing_could_hold_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    head = Head(vocab_size=VOCAB, num_tokens=2**32 - 1, num_places=2**31, tokenizer=TOKENIZER, digests=(TOKENIZER,) * 3)
    (tmp_path / "huge").write_bytes(head.pack())
    refused(tmp_path / "huge", "it has 4096 bytes, and says that it has")
    for changed in ({"vocab_size": 0}, {"num_tokens": 3}, {"num_places": 2**32}):
        fields = {"vocab_size": VOCAB, "num_tokens": 99, "num_places": 9, **changed}
        (tmp_path / "odd").write_bytes(Head(tokenizer=TOKENIZER, digests=(TOKENIZER,) * 3, **fields).pack())
        refused(tmp_path / "odd", "it claims")


def test_another_tokenizer_is_refused_and_none_is_not_compared(store_file: Path) -> None:
    with pytest.raises(ModelError, match="another vocabulary"):
        Datastore(store_file, tokenizer=hashlib.sha256(b"another").digest(), vocab_size=VOCAB)
    Datastore(store_file, tokenizer=None, vocab_size=VOCAB).close()


@pytest.mark.parametrize("part", ["tokens", "places", "sample"])
def test_changed_contents_are_found_when_all_is_read_and_harm_nobody_before(store_file: Path, part: str) -> None:
    opened(store_file).verify()
    begin = parse_head(store_file.read_bytes()).parts[part].start
    data = bytearray(store_file.read_bytes())
    data[begin : begin + 8] = b"\xff" * 8
    store_file.write_bytes(data)
    store = opened(store_file)
    for context in ([1], [6, 1], [1, 2, 3, 4, 5, 6], [0]):
        assert all(token_id < VOCAB for match in store.matches(context) for token_id in match.token_ids)
    with pytest.raises(IntegrityError, match=f"the {part} of the datastore") as error:
        store.verify()
    assert error.value.exit_code == 5


def test_what_is_broken_off_leaves_nothing_behind(tmp_path: Path) -> None:
    def texts() -> Iterator[list[int]]:
        yield [1, 2, 3]
        raise KeyboardInterrupt

    (tmp_path / "store").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "store", texts(), vocab_size=VOCAB, tokenizer=TOKENIZER)
    assert os.listdir(tmp_path) == ["store"] and (tmp_path / "store").read_text() == "before"


def test_more_tokens_than_places_can_number_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_TOKENS", 40)
    with pytest.raises(FitError, match="more than 40 tokens"):
        built(tmp_path / "store", [[1] * 50])


# -- texts ------------------------------------------------------------------------------------------------------------------


def texts_in(path: Path) -> list[str]:
    return list(read_texts(path, lambda num_bytes: None))


def test_folders_give_their_texts_in_order_without_what_is_hidden_or_binary(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.jsonl", ".hidden", "a/.git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert [path.relative_to(tmp_path).as_posix() for path in files_of([str(tmp_path)])] == ["a/y.jsonl", "a/z.md", "b.txt"]


def test_long_texts_come_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(PIECE_CHARACTERS // 5))
    (tmp_path / "long.txt").write_text(text)
    pieces: list[str] = []
    seen: list[int] = []
    for piece in read_texts(tmp_path / "long.txt", seen.append):
        pieces.append(piece)
    assert "".join(pieces) == text and len(pieces) == 3 and all(piece.endswith("\n") for piece in pieces)
    assert sum(seen) == len(text)
    (tmp_path / "one_line.txt").write_text("x" * (PIECE_CHARACTERS + 5))
    assert [len(piece) for piece in texts_in(tmp_path / "one_line.txt")] == [PIECE_CHARACTERS, 5]


def test_lines_of_json_give_their_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n\n{"text": "two", "id": 3}')
    assert texts_in(tmp_path / "a.jsonl") == ["one\n", "two"]


@pytest.mark.parametrize(
    "name, data, what",
    [
        ("a.txt", b"\xff\xfe", "can't decode"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]', 'line 2 has no "text"'),
        ("a.jsonl", b'{"text": 5}', 'line 1 has no "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogates not allowed"),
        ("a.jsonl", b"[" * 99999, "line 1 is not JSON"),
    ],
)
def test_files_that_are_no_texts_are_named(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ModelError, match=what) as error:
        texts_in(tmp_path / name)
    assert name in error.value.where


def test_names_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        files_of([str(tmp_path / "nothing")])
    with pytest.raises(ModelError, match="no texts in it"):
        files_of([str(tmp_path)])


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("The Congress of the United States shall have power. " * 30)
    (folder / "b.jsonl").write_text('{"text": "We the people of the United States."}\n')
    return folder


def test_the_command_builds_what_it_then_finds_whole(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, texts_folder: Path
) -> None:
    output = tmp_path / "store"
    made = run_command(capsys, "datastore", "build", "--model", DEMO, "--output", output, texts_folder, "--json")
    document = json.loads(made.stdout)
    assert (made.code, document["files"], document["bytes"]) == (0, 2, output.stat().st_size)
    seen = run_command(capsys, "datastore", "verify", output)
    assert seen.code == 0 and f"{document['tokens']} tokens" in seen.stdout
    again = run_command(capsys, "datastore", "build", "--model", DEMO, "--output", output, texts_folder / "a.txt")
    assert again.code == 0 and f"--ngram {output}" in again.stdout


def test_the_command_refuses_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path, texts_folder: Path) -> None:
    build_command = ("datastore", "build", "--model", DEMO, "--output")
    store = tmp_path / "store"
    assert_error(run_command(capsys, *build_command, store, tmp_path / "none"), INVALID, "no such file or folder")
    assert_usage_error(run_command(capsys, *build_command, store), "TEXTS")
    assert_usage_error(run_command(capsys, *build_command, tmp_path / "no/store", texts_folder), "folder does not exist")
    assert_usage_error(run_command(capsys, *build_command, tmp_path, texts_folder), "it is a folder")
    own = texts_folder / "a.txt"
    assert_usage_error(run_command(capsys, *build_command, own, texts_folder), "the output is one of the texts")
    assert "Congress" in own.read_text()
    assert_usage_error(run_command(capsys, *build_command, store, texts_folder, "--memory", "1MiB"), "too little")
    (texts_folder / "c.txt").write_bytes(b"\xff\xff")
    assert_error(run_command(capsys, *build_command, store, texts_folder), INVALID, "c.txt", "not a text")
    assert_error(run_command(capsys, "datastore", "verify", own), INVALID, "not a datastore", "does not begin as one")
    assert_usage_error(run_command(capsys, "datastore"), "build|verify")
    assert not store.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_the_command_finds_what_changed(capsys: pytest.CaptureFixture[str], store_file: Path) -> None:
    data = bytearray(store_file.read_bytes())
    data[PAGE_BYTES + 3] ^= 1
    store_file.write_bytes(data)
    assert_error(run_command(capsys, "datastore", "verify", store_file), CHANGED, "tokens of the datastore", str(store_file))
