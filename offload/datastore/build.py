"""A datastore made of texts, in bounded memory: tokens go to the file as they come, then their places are sorted, group by
group of contexts, each as large as memory allows. The file takes its name when it is whole."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import FitError, ModelError
from .layout import CONTEXT_TOKENS, MARKS_AT_END, MOST_TOKENS, PAGE_BYTES, SAMPLE_STEP, SAMPLE_TOKENS, Head, token_bytes
from .sorting import BYTES_PER_PLACE, Keys, Places, Tokens, keys_of, places_with_context, sort_places, splitters

MEMORY_BYTES = 2**30
LEAST_MEMORY_BYTES = 64 * 2**20

Progress = Callable[[int, int], None]  # places done, of how many


def build(
    output: Path,
    texts: Iterable[list[int]],
    *,
    vocab_size: int,
    tokenizer: bytes,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> Head:
    """Write the datastore of `texts`, token ids below `vocab_size`, to `output`; it is there whole or not at all. `tokenizer`
    is the digest of their vocabulary. Holds a text at a time, and about `memory_bytes`. FitError for more tokens than a file
    takes, ModelError where there is nothing to find; OSError as it comes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)))
        path = folder / "datastore"
        with path.open("w+b") as file:
            file.write(bytes(PAGE_BYTES))
            num_tokens, tokens_digest = _write_tokens(file, texts, vocab_size)
            _fill_page(file)
            file.flush()
            dtype = np.dtype(f">u{token_bytes(vocab_size)}")
            tokens = np.memmap(path, dtype, mode="r", offset=PAGE_BYTES, shape=(num_tokens,))
            num_places, places_digest, sample_digest = _write_places(
                file, folder, tokens, vocab_size, memory_bytes // BYTES_PER_PLACE, progress
            )
            if not num_places:
                raise ModelError("no text has two tokens", where="TEXTS", cure="name texts of which something can be learned")
            head = Head(
                vocab_size=vocab_size,
                num_tokens=num_tokens,
                num_places=num_places,
                tokenizer=tokenizer,
                digests=(tokens_digest, places_digest, sample_digest),
            )
            assert file.tell() == head.file_bytes
            file.seek(0)
            file.write(head.pack())
            file.flush()
            os.fsync(file.fileno())
        path.replace(output)
    return head


def _write_tokens(file: BinaryIO, texts: Iterable[list[int]], vocab_size: int) -> tuple[int, bytes]:
    """How many tokens there are, marks included, and their digest."""
    digest, num_tokens, dtype = hashlib.sha256(), 0, np.dtype(f">u{token_bytes(vocab_size)}")

    def write(token_ids: list[int]) -> None:
        nonlocal num_tokens
        num_tokens += len(token_ids)
        if num_tokens > MOST_TOKENS:
            raise FitError(
                f"more than {MOST_TOKENS} tokens",
                where="TEXTS",
                cure="make several datastores, and name them all with --ngram",
            )
        data = np.array(token_ids, dtype=np.int64).astype(dtype).tobytes()
        digest.update(data)
        file.write(data)

    for token_ids in texts:
        assert not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size), "a token that is none"
        write([*token_ids[::-1], vocab_size])
    write([vocab_size] * MARKS_AT_END)
    return num_tokens, digest.digest()


def _write_places(
    file: BinaryIO, folder: Path, tokens: Tokens, vocab_size: int, most_places: int, progress: Progress | None
) -> tuple[int, bytes, bytes]:
    """All places, sorted, and the sample of their contexts: how many there are, and both digests."""
    digest, num_places, dtype = hashlib.sha256(), 0, tokens.dtype
    sample: list[bytes] = []
    for group in _groups(folder, tokens, vocab_size, most_places):
        places = sort_places(tokens, group, vocab_size)
        first = -num_places % SAMPLE_STEP
        for place in places[first::SAMPLE_STEP]:
            sample.append(tokens[int(place) : int(place) + SAMPLE_TOKENS].astype(dtype).tobytes())
        data = places.astype("<u4").tobytes()
        digest.update(data)
        file.write(data)
        num_places += len(places)
        if progress is not None:
            progress(num_places, len(tokens))
    _fill_page(file)
    sampled = b"".join(sample)
    file.write(sampled)
    _fill_page(file)
    return num_places, digest.digest(), hashlib.sha256(sampled).digest()


def _groups(folder: Path, tokens: Tokens, vocab_size: int, most_places: int) -> Iterator[Places]:
    """All places, parted by their contexts, the lesser first: groups of about `most_places`, larger only where so many contexts
    begin alike. Those that wait, wait in files of `folder`."""
    num_groups = -(-len(tokens) // most_places)
    if num_groups == 1 or len(tokens) <= 2 * CONTEXT_TOKENS:
        yield np.concatenate(list(places_with_context(tokens, vocab_size)))
        return
    between = splitters(tokens, num_groups, vocab_size)
    paths = [folder / f"places-{number}" for number in range(len(between) + 1)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for places in places_with_context(tokens, vocab_size):
            _deal(places, keys_of(tokens, places, 0, vocab_size), between, files)
    for path in paths:
        yield np.fromfile(path, dtype=np.uint32)
        path.unlink()


def _deal(places: Places, keys: Keys, between: Keys, files: Sequence[BinaryIO]) -> None:
    groups = np.searchsorted(between, keys, side="right")
    order = np.argsort(groups, kind="stable")
    ends = np.searchsorted(groups[order], np.arange(len(files)), side="right")
    for file, part in zip(files, np.split(places[order], ends[:-1]), strict=True):
        file.write(part.tobytes())


def _fill_page(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % PAGE_BYTES))
