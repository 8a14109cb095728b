"""`datastore build`: texts to find continuations in, in a model's tokens. `datastore verify`: all of one, compared with its
checksums."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from ..config import bytes_text, counted, parse_size, seconds_text
from ..datastore.build import LEAST_MEMORY_BYTES, build
from ..datastore.store import Datastore
from ..datastore.texts import files_of, read_texts
from ..errors import DeviceError, ModelError, UsageError, reason
from ..model.files import open_model
from ..text.tokenizer import Tokenizer, open_tokenizer
from .terminal import LoadBar


def run(arguments: argparse.Namespace) -> int:
    return _build(arguments) if arguments.what == "build" else _verify(arguments)


def _build(arguments: argparse.Namespace) -> int:
    output, memory_bytes = _output(arguments.output), _memory(arguments.memory)
    files = files_of(arguments.texts)
    tokenizer = _tokenizer(arguments.model)
    start_s, num_texts, read_bytes, total_bytes = time.monotonic(), 0, 0, sum(path.stat().st_size for path in files)
    with LoadBar(enabled=not arguments.quiet, doing="building") as bar:  # one half is reading, the other sorting

        def read(num_bytes: int) -> None:
            nonlocal read_bytes
            read_bytes += num_bytes
            bar.update(min(read_bytes, total_bytes), 2 * total_bytes)

        def sorted_places(done: int, total: int) -> None:
            bar.update(total_bytes + total_bytes * done // total, 2 * total_bytes)

        def texts() -> Iterator[list[int]]:
            nonlocal num_texts
            for path in files:
                if path.resolve() == output.resolve():
                    raise UsageError("the output is one of the texts", where=f"--output {output}", cure="name another file")
                for text in read_texts(path, read):
                    num_texts += 1
                    yield tokenizer.encode(text, add_special_tokens=False)

        try:
            head = build(
                output,
                texts(),
                vocab_size=max(tokenizer.vocabulary().values()) + 1,
                tokenizer=tokenizer.vocabulary_digest(),
                memory_bytes=memory_bytes,
                progress=sorted_places,
            )
        except OSError as error:
            cure = "choose a folder that can be written to, with room for about 12 bytes a token"
            raise DeviceError(f"it cannot be written: {reason(error)}", where=str(output), cure=cure) from error
    elapsed_s, num_tokens = time.monotonic() - start_s, head.num_tokens
    if arguments.json:
        sizes = {"files": len(files), "tokens": num_tokens, "places": head.num_places, "bytes": head.file_bytes}
        print(json.dumps({"schema_version": 1, "output": str(output), **sizes, "elapsed_s": elapsed_s}))
    else:
        print(
            f"ok: {counted(num_tokens, 'token')} of {counted(len(files), 'file')} in {bytes_text(head.file_bytes)}, "
            f"{seconds_text(elapsed_s)} s; --ngram {output} drafts from it"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    store = Datastore(Path(arguments.file).expanduser(), tokenizer=None, vocab_size=2**32)
    done, head = 0, store.head
    with LoadBar(enabled=not arguments.quiet, doing="reading") as bar:

        def progress(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(done, head.file_bytes)

        store.verify(progress)
        store.close()
    if arguments.json:
        sizes = {"tokens": head.num_tokens, "places": head.num_places, "bytes": head.file_bytes}
        print(json.dumps({"schema_version": 1, "file": str(store.path), **sizes, "vocabulary": head.vocab_size}))
    else:
        tokens, size = counted(head.num_tokens, "token"), bytes_text(head.file_bytes)
        print(f"ok: {tokens} of a vocabulary of {head.vocab_size} in {size}, all as they were written")
    return 0


def _output(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise UsageError(what, where=f"--output {name}", cure="name a file in a folder that exists")
    return path


def _memory(text: str) -> int:
    num_bytes = parse_size(text, flag="--memory")
    if num_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(f"{text} is too little", where="--memory", cure=f"allow {bytes_text(LEAST_MEMORY_BYTES)} or more")
    return num_bytes


def _tokenizer(model: str) -> Tokenizer:
    path = open_model(model, "--model").path
    tokenizer = open_tokenizer(path)
    if tokenizer is None:
        raise ModelError("the model has no tokenizer", where=str(path), cure="add its tokenizer files to the folder")
    return tokenizer
