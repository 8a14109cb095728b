"""Heads of GGUF files: what is accepted, what is refused, and whether the refusal says all of it."""

import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.coding.gguf_types import BLOCKS, TYPE_NAMES
from offload.errors import CheckpointError
from offload.weights.gguf_cursor import LongArray
from offload.weights.gguf_header import GgufTensor, read_gguf

U8, U32, BOOL, STRING, ARRAY, U64 = 0, 4, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def entry(name: bytes | str, dimensions: Sequence[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


PAIRS = [
    pair("general.architecture", STRING, text("llama")),
    pair("llama.block_count", U32, struct.pack("<I", 2)),
    pair("a.flag", BOOL, b"\x01"),
    pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, text("a") + text("") + text("\u00e9"))),
    pair("tokenizer.ggml.scores", ARRAY, array(6, 2, struct.pack("<2f", 0.5, -1))),
]
ENTRIES = [entry("a.weight", [64, 2], 8, 0), entry("b", [3], 0, 160), entry("c", [], 0, 192)]
DATA_BYTES = 196


def content(
    pairs: Sequence[bytes] = PAIRS,
    entries: Sequence[bytes] = ENTRIES,
    data_bytes: int = DATA_BYTES,
    start: bytes = b"GGUF\3\0\0\0",
) -> bytes:
    head = start + struct.pack("<QQ", len(entries), len(pairs)) + b"".join([*pairs, *entries])
    return head + bytes(-len(head) % 32) + bytes(data_bytes)


def read(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return read_gguf(path)


def refusal(call: Callable[[], object]) -> str:
    """The text of the error, after checking that it is one of three lines that say what, where and what to do."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert message.isascii() and len(message.splitlines()) == 3 and len(message) < 3000
    assert caught.value.exit_code == 3
    return message


def test_head_gives_values_types_shapes_and_absolute_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    header = read(path, content())
    assert dict(header.metadata) == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "a.flag": True,
        "tokenizer.ggml.tokens": ("a", "", "\u00e9"),
        "tokenizer.ggml.scores": (0.5, -1.0),
    }
    start = path.stat().st_size - DATA_BYTES
    assert header.tensors == (
        GgufTensor(name="a.weight", type_name="Q8_0", shape=(2, 64), path=path, offset_bytes=start, num_bytes=136),
        GgufTensor(name="b", type_name="F32", shape=(3,), path=path, offset_bytes=start + 160, num_bytes=12),
        GgufTensor(name="c", type_name="F32", shape=(), path=path, offset_bytes=start + 192, num_bytes=4),
    )
    assert header.files == (path,)


def test_versions_two_and_three_are_read_alike(tmp_path: Path) -> None:
    two, three = (read(tmp_path / "x.gguf", content(start=b"GGUF" + struct.pack("<I", version))) for version in (2, 3))
    assert two == three


def test_types_and_block_sizes_are_those_of_ggml() -> None:
    theirs = {member.value: member.name for member in gguf.GGMLQuantizationType}  # older ones lack the newest types
    assert {number: TYPE_NAMES[number] for number in TYPE_NAMES.keys() & theirs.keys()}.items() <= theirs.items()
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS}
    assert {name: (block.num_weights, block.num_bytes) for name, block in BLOCKS.items()} == sizes


def test_file_that_ggufs_own_writer_made_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["one", "two"])
    writer.add_custom_alignment(64)
    weights = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)
    writer.add_tensor("a", weights)
    writer.add_tensor(
        "b", gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(path)
    assert header.metadata["llama.block_count"] == 3 and header.metadata["tokenizer.ggml.tokens"] == ("one", "two")
    a, b = header.tensors
    assert (a.name, a.type_name, a.shape, b.name, b.type_name, b.shape) == ("a", "F32", (5, 64), "b", "Q4_0", (5, 64))
    stored = path.read_bytes()[a.offset_bytes : a.offset_bytes + a.num_bytes]
    assert stored == weights.tobytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is truncated: its head goes on to byte 4 at least and the file has 0"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (content(start=b"GGUF\0\0\0\3"), "a big-endian file"),
        (content(start=b"GGUF\1\0\0\0"), "version 1: we read versions 2 and 3"),
        (b"GGUF\3\0\0\0" + struct.pack("<QQ", 2**63, 0), "declares 9,223,372,036,854,775,808 tensors"),
        (b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, 2**32), "4,294,967,296 keys, more than"),
        (content([struct.pack("<Q", 2**60) + b"key"]), "has a string of 1,152,921,504,606,846,976 bytes at byte 24"),
        (content([struct.pack("<Q", 2**20) + b"key"]), "is truncated: its head goes on to byte 1,048,608"),
        (
            content([pair("k", STRING, struct.pack("<Q", 2**60))]),
            "metadata 'k' has a string of 1,152,921,504,606,846,976 bytes",
        ),
        (content([pair("k", ARRAY, array(STRING, 1, struct.pack("<Q", 2**60)))]), "metadata 'k' has a string of"),
        (content([pair("k", ARRAY, array(U64, 2**61, b""))]), "metadata 'k' is an array of 2,305,843,009,213,693,952 items"),
        (content([pair("k", ARRAY, array(U8, 2**22, b""))]), "is truncated"),
        (content([pair("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"a")))]), "is an array of arrays"),
        (content([pair("k", ARRAY, array(13, 1, b"a"))]), "has a value of type 13"),
        (content([pair("k", 99, b"a")]), "metadata 'k' has a value of type 99"),
        (content([pair("k", BOOL, b"\x02")]), "metadata 'k' has a truth value of 2"),
        (content([pair("k", STRING, text(b"\xff"))]), "metadata 'k' has a string that is not UTF-8"),
        (content([pair(b"\xff", U8, b"a")]), "has a string that is not UTF-8 at byte 24"),
        (content([pair("a\x1b[2J", U8, b"a")]), "has a key with unprintable characters"),
        (content([pair("k", U8, b"a")] * 2), "has the key 'k' twice"),
        (content([pair("general.alignment", U32, struct.pack("<I", 0))]), "has the alignment '0'"),
        (content([pair("general.alignment", U32, struct.pack("<I", 48))]), "has the alignment '48'"),
        (content([pair("general.alignment", STRING, text("32"))]), "has the alignment '32'"),
        (content([pair("general.alignment", U64, struct.pack("<Q", 2**63))], ENTRIES[:1]), "is truncated"),
        (content(entries=[entry("a", [1] * 5, 0, 0)]), "tensor 'a' has 5 dimensions"),
        (content(entries=[text("a") + struct.pack("<I", 2**31)]), "tensor 'a' has 2,147,483,648 dimensions"),
        (content(entries=[entry("a", [2**63], 0, 0)]), "tensor 'a' has a dimension of 9,223,372,036,854,775,808"),
        (content(entries=[entry("a", [2**31, 2**31], 0, 0)]), "tensor 'a' has a shape of 2**63 bytes or more"),
        (content(entries=[entry("a", [2**62, 2**62, 0], 0, 0)]), "tensor 'a' has a shape of 2**63 bytes or more"),
        (content(entries=[entry("a", [48], 8, 0)]), "tensor 'a' has rows of 48 weights, which blocks of 32 (Q8_0) do not"),
        (content(entries=[entry("a", [], 8, 0)]), "tensor 'a' has rows of 1 weights"),
        (content(entries=[entry("a", [1], 0, 8)]), "tensor 'a' has the offset 8, which is not aligned to 32"),
        (content(entries=[entry("a", [1], 0, 2**63)]), "tensor 'a' has the offset 9,223,372,036,854,775,808"),
        (content(entries=[entry("a", [1], 0, 2**63 - 32)]), "belong to no tensor"),
        (content(entries=[entry("a", [1], 0, 32)]), "belong to no tensor"),
        (content(entries=[entry("a", [16], 0, 0), entry("b", [1], 0, 32)]), "tensor 'b' overlaps tensor 'a' at byte"),
        (content(entries=[entry("a", [1], 0, 0), entry("b", [1], 0, 0)]), "overlaps tensor"),
        (content(entries=[entry("a", [1], 0, 0), entry("a", [1], 0, 32)]), "tensor 'a' is there twice"),
        (content(entries=[entry("", [1], 0, 0)]), "has a name with unprintable characters, none"),
        (content(entries=[entry("a\nb", [1], 0, 0)]), "has a name with unprintable characters"),
        (content(entries=[entry("a" * 256, [1], 0, 0)]), "or more than 255 bytes"),
        (
            content(entries=[entry("a", [8], 24, 0)]),
            "1 tensor such as 'a' of type I8 (24), which we do not read: we read F32",
        ),
        (content(entries=[entry("a", [8], 777, 0)]), "of type unknown (777)"),
        (content(data_bytes=195), "is truncated: its tensors end at byte"),
    ],
)
def test_malformed_file_is_refused_with_its_reason(tmp_path: Path, data: bytes, expected: str) -> None:
    message = refusal(lambda: read(tmp_path / "x.gguf", data))
    assert "in the checkpoint: x.gguf: " in message
    assert expected in message


def test_each_unread_type_is_one_problem_however_many_tensors_have_it(tmp_path: Path) -> None:
    entries = [entry(f"blk.{layer}", [256], kind, 0) for layer in range(40) for kind in (16, 29)]
    message = refusal(lambda: read(tmp_path / "x.gguf", content(entries=entries)))
    assert "40 tensors such as 'blk.0' of type IQ2_XXS (16)" in message
    assert "40 tensors such as 'blk.0' of type IQ1_M (29)" in message
    assert "2 problems" in message and "Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4" in message


def test_a_lying_length_takes_no_memory(tmp_path: Path) -> None:
    """In a process that has no 2 GiB to give: as many items as fit the limits, said by a file of a few bytes."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content([pair("k", ARRAY, array(U64, 2**22, b""))]))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "from pathlib import Path; from offload.weights.gguf_header import scan_gguf\n"
        f"print(scan_gguf(Path({str(path)!r}))[1][0])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "is truncated" in ran.stdout, ran.stderr


def test_reading_a_head_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import offload.weights.gguf_header"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "offload.weights.gguf_header" in imported and not re.search(r"\| +torch\b", imported)


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = content()
    for size in range(len(data)):
        assert "x.gguf" in refusal(lambda size=size: read(tmp_path / "x.gguf", data[:size]))  # type: ignore[misc]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "is not a regular file" in refusal(lambda: read_gguf(tmp_path / "fifo.gguf"))
    assert "is not a regular file" in refusal(lambda: read_gguf(tmp_path / "folder.gguf"))
    assert "1 of 1 files are missing: none.gguf" in refusal(lambda: read_gguf(tmp_path / "none.gguf"))


def check_what_was_accepted(path: Path) -> None:
    """Every byte of every tensor is in the file and belongs to one tensor, and gguf's own reader says the same of them."""
    header = read_gguf(path)
    end = 0
    for tensor in header.tensors:
        assert tensor.offset_bytes >= end
        end = tensor.offset_bytes + tensor.num_bytes
    assert end <= path.stat().st_size
    theirs = {it.name: (it.tensor_type.name, tuple(it.shape)[::-1], it.data_offset) for it in gguf.GGUFReader(path).tensors}
    # It has no tensors of no dimensions: a number without a name for its size is one of size 1 there.
    assert theirs == {tensor.name: (tensor.type_name, tensor.shape, tensor.offset_bytes) for tensor in header.tensors}


HEAD = content(data_bytes=0)


def check_refused_or_as_gguf_says(path: Path) -> None:
    try:
        read_gguf(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 3
    else:
        check_what_was_accepted(path)


def test_file_with_any_one_byte_changed_is_refused_or_means_what_gguf_says(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for place in range(len(HEAD)):
        for flip in (0x01, 0x80):
            path.write_bytes(HEAD[:place] + bytes([HEAD[place] ^ flip]) + HEAD[place + 1 :] + bytes(DATA_BYTES))
            check_refused_or_as_gguf_says(path)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, len(HEAD)),
    new=st.one_of(
        st.binary(max_size=9), st.sampled_from([struct.pack("<Q", 2**power - 1) for power in (8, 31, 32, 60, 63, 64)])
    ),
    removed=st.integers(0, 9),
)
def test_fuzzed_head_is_refused_or_means_what_gguf_says(tmp_path: Path, place: int, new: bytes, removed: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HEAD[:place] + new + HEAD[place + removed :] + bytes(DATA_BYTES))
    check_refused_or_as_gguf_says(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=64))
def test_random_bytes_behind_the_first_ones_are_refused_or_hold_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + data)
    try:
        header = read_gguf(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 3
    else:
        assert sum(tensor.num_bytes for tensor in header.tensors) <= len(data)


def parts(folder: Path, changes: Sequence[Sequence[bytes]] | None = None) -> list[Path]:
    """A model in three parts of one tensor each."""
    paths = [folder / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        split = [pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", 3))]
        total = [pair("split.tensors.count", 5, struct.pack("<i", 3))]
        pairs = changes[number] if changes else [*(PAIRS if number == 0 else []), *split, *total]
        path.write_bytes(content(pairs, [entry(f"blk.{number}", [8], 0, 0)], data_bytes=32))
    return paths


def test_any_part_of_a_model_in_parts_gives_the_whole(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    for path in paths:
        header = read_gguf(path)
        assert header.files == tuple(paths)
        assert [(tensor.name, tensor.path) for tensor in header.tensors] == [(f"blk.{i}", paths[i]) for i in range(3)]
        assert header.metadata["general.architecture"] == "llama"


def test_all_missing_parts_are_named_together(tmp_path: Path) -> None:
    first, second, third = parts(tmp_path)
    first.unlink()
    third.unlink()
    message = refusal(lambda: read_gguf(second))
    assert "2 of 3 files are missing: m-00001-of-00003.gguf, m-00003-of-00003.gguf" in message


def test_parts_of_two_models_or_in_disorder_are_refused(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    message = refusal(lambda: read_gguf(paths[0]))
    assert "m-00002-of-00003.gguf: says that it is part '2' (from 0) of '3', and its name does not" in message
    assert "m-00003-of-00003.gguf: tensor 'blk.2' is in m-00002-of-00003.gguf, too" in message


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    renamed = parts(tmp_path)[1].rename(tmp_path / "model.gguf")
    assert "part '1' (from 0) of '3', and its name does not" in refusal(lambda: read_gguf(renamed))


def test_long_vocabulary_is_read_in_two_seconds_and_skipped_in_less(tmp_path: Path) -> None:
    """262,144 tokens and as many merges: what Gemma's tokenizers have. Processor time, as the machine may be busy."""
    path, count = tmp_path / "x.gguf", 262_144
    tokens = array(STRING, count, b"".join(text(f"token {number}") for number in range(count)))
    merges = array(STRING, 2 * count, b"".join(text(f"tok {number}") for number in range(2 * count)))
    scores = array(6, count, np.arange(count, dtype=np.float32).tobytes())
    data = content([pair("tokens", ARRAY, tokens), pair("merges", ARRAY, merges), pair("scores", ARRAY, scores)])
    path.write_bytes(data)
    start_s = time.process_time()
    whole = read_gguf(path)
    read_s = time.process_time() - start_s
    assert whole.metadata["tokens"][262_143] == "token 262143" and whole.metadata["scores"][5] == 5.0  # type: ignore[index]
    skipped = read_gguf(path, long_arrays=False)
    skipped_s = time.process_time() - start_s - read_s
    assert skipped.metadata["merges"] == LongArray(2 * count) and skipped.tensors == whole.tensors
    assert read_s < 2 and skipped_s < read_s
