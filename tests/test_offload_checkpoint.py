"""Checkpoint folders: what is accepted, what is refused, and whether the refusal says all of it."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from offload.errors import CheckpointError
from offload.weights.checkpoint import INDEX_NAME, SINGLE_NAME, check_tensors, open_checkpoint
from offload.weights.dtypes import DTYPES
from offload.weights.header import TensorInfo, read_header

VALID_ENTRIES: dict[str, dict[str, object]] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "I8", "shape": [4, 0], "data_offsets": [26, 26]},
}
VALID_DATA = bytes(range(26))


def _pack(header: bytes, data: bytes = VALID_DATA) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _write(path: Path, entries: Mapping[str, object], data: bytes = VALID_DATA) -> Path:
    path.write_bytes(_pack(json.dumps(entries).encode(), data))
    return path


def _refusal(call: Callable[[], object]) -> str:
    """The text of the error, after checking that it is one of three lines that say what, where and what to do."""
    with pytest.raises(CheckpointError) as caught:
        call()
    text = str(caught.value)
    assert text.isascii() and len(text.splitlines()) == 3
    assert caught.value.exit_code == 3
    return text


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with two tensors each."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(3), "b": torch.ones(2, 2)},
        "model-00002-of-00002.safetensors": {"c": torch.ones(5), "d": torch.ones(1)},
    }
    for shard, tensors in shards.items():
        save_file(tensors, tmp_path / shard)
    _write_index(tmp_path, {name: shard for shard, tensors in shards.items() for name in tensors})
    return tmp_path


def _write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    return weight_map


def test_header_gives_dtype_shape_and_absolute_offset(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", VALID_ENTRIES)
    start = path.stat().st_size - len(VALID_DATA)
    assert read_header(path) == (
        TensorInfo(name="a.weight", dtype_name="F32", shape=(2, 3), path=path, offset_bytes=start, num_bytes=24),
        TensorInfo(name="b", dtype_name="BF16", shape=(), path=path, offset_bytes=start + 24, num_bytes=2),
        TensorInfo(name="c", dtype_name="I8", shape=(4, 0), path=path, offset_bytes=start + 26, num_bytes=0),
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_header_written_by_safetensors_is_read_for_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.zeros(3, 5).to(dtype)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    (tensor,) = read_header(tmp_path / "x.safetensors")
    assert (tensor.dtype, tensor.shape, tensor.num_bytes) == (dtype, (3, 5), 15 * dtype.itemsize)


def test_file_without_tensors_is_valid(tmp_path: Path) -> None:
    assert read_header(_write(tmp_path / "x.safetensors", {}, b"")) == ()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is 0 bytes long, too short"),
        (b"1234567", "is 7 bytes long, too short"),
        (struct.pack("<Q", 2**63) + b"{}", "declares a header of 9,223,372,036,854,775,808 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "more than the 100,000,000 that are allowed"),
        (struct.pack("<Q", 5) + b"{}", "a header that ends at byte 13 but is 10 bytes long"),
        (_pack(b"", b""), "does not begin with '{'"),
        (_pack(b" {}", b""), "does not begin with '{'"),
        (_pack(b"[]", b""), "does not begin with '{'"),
        (_pack(b'{"\xff": 1}', b""), "is not UTF-8 at byte 2"),
        (_pack(b"{", b""), "is not JSON: Expecting property name"),
        (_pack(b"{} {}", b""), "is not JSON: Extra data"),
        (_pack(b'{"x": NaN}', b""), "is not JSON: it contains NaN"),
        (_pack(b'{"x": ' + b"[" * 200_000, b""), "is nested too deeply"),
        (_pack(b'{"x": ' + b"1" * 5000 + b"}", b""), "Exceeds the limit"),
        (_pack(b'{"x": 1, "x": 1}', b""), "has the key 'x' twice"),
        (_pack(b'{"x": {"dtype": "I8", "dtype": "U8"}}', b""), "has the key 'dtype' twice"),
        (_pack(b'{"__metadata__": {"a": 1}}', b""), "__metadata__ that does not map strings to strings"),
        (_pack(b'{"__metadata__": []}', b""), "__metadata__ that does not map strings to strings"),
        (_pack(b'{"\\ud800": {}}', b""), "unprintable characters"),
        (_pack(b'{"a\\nb": {}}', b""), "unprintable characters"),
    ],
)
def test_malformed_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    text = _refusal(lambda: read_header(tmp_path / "x.safetensors"))
    assert "1 problem in the checkpoint: x.safetensors: " in text
    assert expected in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["F32", [6], [0, 24]], "is not described by an object"),
        ({"strides": [1]}, "has the fields 'dtype, shape, data_offsets, strides'"),
        ({"dtype": "F4"}, "has dtype 'F4', which we do not read"),
        ({"dtype": ["F32"]}, "has a dtype that is not a string"),
        ({"shape": [2, True, 3]}, "has a shape that is not a list of counts"),
        ({"shape": [2, 3.0]}, "has a shape that is not a list of counts"),
        ({"shape": [-2, -3]}, "has a shape that is not a list of counts"),
        ({"shape": [2**63]}, "has a shape that is not a list of counts"),
        ({"shape": "23"}, "has a shape that is not a list of counts"),
        ({"shape": [2**62, 2**62]}, "has a shape of 2**63 bytes or more"),
        ({"shape": [2**32] * 100_000}, "has a shape of 2**63 bytes or more"),
        ({"shape": [7]}, "has 28 bytes by shape and dtype but the data_offsets 0, 24"),
        ({"data_offsets": [24, 0]}, "has 24 bytes by shape and dtype but the data_offsets 24, 0"),
        ({"data_offsets": [0, 24, 0]}, "has data_offsets that are not two counts"),
        ({"data_offsets": [False, 24]}, "has data_offsets that are not two counts"),
        ({"data_offsets": [-24, 0]}, "has data_offsets that are not two counts"),
        ({"data_offsets": 24}, "has data_offsets that are not two counts"),
        ({"data_offsets": [1, 25]}, "tensor 'b' overlaps tensor 'a.weight' at byte"),
        ({"data_offsets": [2, 26]}, "belong to no tensor"),
        ({"shape": [1], "data_offsets": [0, 4]}, "belong to no tensor"),
    ],
)
def test_lying_entry_is_refused_with_its_reason(tmp_path: Path, change: object, expected: str) -> None:
    valid = VALID_ENTRIES["a.weight"]
    entries = {**VALID_ENTRIES, "a.weight": {**valid, **change} if isinstance(change, dict) else change}
    assert expected in _refusal(lambda: read_header(_write(tmp_path / "x.safetensors", entries)))


def test_all_bad_entries_of_a_file_are_listed(tmp_path: Path) -> None:
    entries = {name: {**entry, "dtype": "X"} for name, entry in VALID_ENTRIES.items() if "shape" in entry}
    text = _refusal(lambda: read_header(_write(tmp_path / "x.safetensors", entries)))
    assert "3 problems in the checkpoint" in text
    assert all(f"tensor '{name}' has dtype 'X'" in text for name in ("a.weight", "b", "c"))


def test_endless_and_hostile_names_do_not_break_the_message(tmp_path: Path) -> None:
    entries: dict[str, object] = {"n" * 10_000: {}, "\x1b[2J": {}, "../../etc/passwd\u202e": {}}
    text = _refusal(lambda: read_header(_write(tmp_path / "x.safetensors", entries)))
    assert len(text) < 1000 and "\x1b" not in text


def test_truncated_file_is_reported_with_both_sizes(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", VALID_ENTRIES)
    size = path.stat().st_size
    os.truncate(path, size - 7)
    text = _refusal(lambda: read_header(path))
    assert f"the header declares {size:,} bytes and the file has {size - 7:,}" in text
    assert "interrupted download" in text


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", VALID_ENTRIES)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert "x.safetensors" in _refusal(lambda: read_header(path))


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", VALID_ENTRIES, VALID_DATA + b"PK\x03\x04")
    assert "has 4 bytes after its last tensor" in _refusal(lambda: read_header(path))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "is not a regular file" in _refusal(lambda: read_header(tmp_path / "fifo.safetensors"))
    assert "is not a regular file" in _refusal(lambda: read_header(tmp_path / "folder.safetensors"))
    assert "No such file" in _refusal(lambda: read_header(tmp_path / "none.safetensors"))


HEADER_BYTES = json.dumps(VALID_ENTRIES).encode()
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "repeat"]),
        st.integers(0, len(HEADER_BYTES)),
        st.one_of(st.binary(max_size=3), st.sampled_from([b"-", b"0", b"1", b"e", b".", b",", b'"', b"}", b" ", b"[]"])),
    ),
    min_size=1,
    max_size=4,
)


def _mutated(header: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, new in mutations:
        skipped = {"replace": len(new), "insert": 0, "delete": 1 + len(new), "repeat": -len(new)}[kind]
        header = header[:place] + (b"" if kind == "delete" else new) + header[max(0, place + skipped) :]
    return header


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS, data_change=st.sampled_from([0, 0, 0, -1, 1]))
def test_fuzzed_header_is_refused_or_means_what_safetensors_says(
    tmp_path: Path, mutations: list[tuple[str, int, bytes]], data_change: int
) -> None:
    content = _pack(_mutated(HEADER_BYTES, mutations), bytes(len(VALID_DATA) + data_change))
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        ours = read_header(tmp_path / "x.safetensors")
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 3
        return
    assert _as_safetensors_reads(content) == {tensor.name: (tensor.dtype, tensor.shape, tensor.num_bytes) for tensor in ours}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    _refusal(lambda: read_header(tmp_path / "x.safetensors"))


def _as_safetensors_reads(content: bytes) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    # "-0" is the one thing that only we accept: an integer to Python, a float to safetensors. It means 0.
    entries = safetensors.deserialize(content.replace(b"-0", b" 0"))  # type: ignore[no-untyped-call]
    return {name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), len(entry["data"])) for name, entry in entries}


def test_single_file_folder_is_opened(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / SINGLE_NAME)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (tmp_path / SINGLE_NAME,)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {"a": (3,), "b": (2, 2)}
    assert checkpoint.num_bytes == 3 * 4 + 4 * 2


def test_sharded_folder_is_opened_through_links_as_the_cache_makes_them(sharded: Path) -> None:
    (sharded / "blobs").mkdir()
    for path in [*sharded.glob("*.safetensors"), sharded / INDEX_NAME]:
        path.rename(sharded / "blobs" / path.name)
        path.symlink_to(sharded / "blobs" / path.name)
    checkpoint = open_checkpoint(sharded)
    assert sorted(checkpoint.tensors) == ["a", "b", "c", "d"]
    assert [path.name[:11] for path in checkpoint.files] == ["model-00001", "model-00002"]


def test_sharded_folder_written_by_transformers_is_opened(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert check_tensors(checkpoint, expected) == ()
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_single_file_wins_over_an_index_as_in_transformers(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"only": torch.ones(1)}, sharded / SINGLE_NAME)
    assert list(open_checkpoint(sharded).tensors) == ["only"]
    assert "reading the former" in caplog.text


def test_all_missing_shards_are_listed_with_the_download_command(sharded: Path) -> None:
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    text = _refusal(lambda: open_checkpoint(sharded))
    assert "2 of 2 files are missing: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in text
    assert f"hf download <repository> --local-dir {sharded}" in text


def test_download_command_names_the_repository_inside_the_cache(sharded: Path, tmp_path_factory: Path) -> None:
    folder = sharded / "models--meta-llama--Llama-2-70b-hf" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    _write_index(folder, _weight_map(sharded))
    (folder / "model-00001-of-00002.safetensors").symlink_to(sharded / "pruned")
    assert "hf download meta-llama/Llama-2-70b-hf`" in _refusal(lambda: open_checkpoint(folder))


def test_faults_of_several_kinds_and_files_are_reported_together(sharded: Path) -> None:
    weight_map = _weight_map(sharded)
    first, second = sorted(set(weight_map.values()))
    save_file({"a": torch.ones(1)}, sharded / "model-cut.safetensors")
    os.truncate(sharded / "model-cut.safetensors", (sharded / "model-cut.safetensors").stat().st_size - 1)
    weight_map |= {"e": "model-gone.safetensors", "f": "model-cut.safetensors", "g": first, "d": first, "h": second}
    del weight_map["c"]
    _write_index(sharded, weight_map)
    text = _refusal(lambda: open_checkpoint(sharded))
    assert "6 problems" in text
    assert "1 of 4 files are missing: model-gone.safetensors" in text
    assert "model-cut.safetensors: is truncated" in text
    assert f"{first}: has no tensor 'g', which the index places there" in text
    assert f"{second}: has no tensor 'h', which the index places there" in text
    assert f"{second}: tensor 'd' is in {first} according to the index" in text
    assert f"{second}: tensor 'c' is not in the index" in text


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"c": torch.ones(5), "d": torch.ones(1), "a": torch.ones(3)}, sharded / "model-00002-of-00002.safetensors")
    assert "1 problem in the checkpoint: tensor 'a' is in 2 files" in _refusal(lambda: open_checkpoint(sharded))


def test_long_lists_of_problems_are_cut_in_the_message_and_complete_in_the_log(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _weight_map(sharded)["a"]
    _write_index(sharded, _weight_map(sharded) | {f"extra.{number}": first for number in range(30)})
    with caplog.at_level("DEBUG", logger="offload"):
        text = _refusal(lambda: open_checkpoint(sharded))
    assert "30 problems" in text and "'extra.7'" in text and "'extra.8'" not in text and "; and 22 more" in text
    assert all(f"'extra.{number}'" in caplog.text for number in range(30))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "c:x.safetensors",
        "x..safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "x.bin",
        "x.safetensors/",
        "",
        "..",
        "x" * 300 + ".safetensors",
    ],
)
def test_shard_name_that_is_not_one_name_is_refused(sharded: Path, name: str) -> None:
    _write_index(sharded, _weight_map(sharded) | {"a": name})
    assert "is not the name of a safetensors file" in _refusal(lambda: open_checkpoint(sharded))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("", "does not begin with '{'"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "does not map strings to strings"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key 'a' twice"),
        ('{"weight_map": {"a": "x.safetensors"', "is not JSON"),
    ],
)
def test_malformed_index_is_refused_with_its_reason(tmp_path: Path, index: str, expected: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    assert expected in _refusal(lambda: open_checkpoint(tmp_path))


def test_index_of_any_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).touch()
    os.truncate(tmp_path / INDEX_NAME, 2**40)  # sparse
    assert "more than the 67,108,864 that are allowed" in _refusal(lambda: open_checkpoint(tmp_path))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    text = _refusal(lambda: open_checkpoint(tmp_path))
    assert "only safetensors files are read" in text and "'pytorch_model.bin'" in text and "save_pretrained" in text


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    assert f"2 safetensors files such as 'model-00001-of-00002.safetensors' but no {INDEX_NAME}" in _refusal(
        lambda: open_checkpoint(sharded)
    )


def test_folder_without_weights_and_missing_folder_are_refused(tmp_path: Path) -> None:
    assert f"neither {SINGLE_NAME} nor" in _refusal(lambda: open_checkpoint(tmp_path))
    assert "No such file" in _refusal(lambda: open_checkpoint(tmp_path / "none"))


def test_all_differences_from_the_model_are_listed(sharded: Path) -> None:
    expected = {"a": (3,), "b": (4,), "c": (5,), "lm_head.weight": (2, 2)}
    text = _refusal(lambda: check_tensors(open_checkpoint(sharded), expected))
    assert "2 problems" in text
    assert "tensor 'lm_head.weight' is missing" in text
    assert "tensor 'b' has shape (2, 2), the model needs (4,)" in text


def test_tensors_of_something_else_are_named_and_parts_of_packed_weights_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3), "a.weights": torch.ones(3), "b.weight_scale": torch.ones(1), "c": torch.ones(4)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    checkpoint = open_checkpoint(tmp_path)
    assert check_tensors(checkpoint, {"a.weight": (3,)}) == ("a.weights", "b.weight_scale", "c")
    for part in ("a.weight_scale", "a.weight_scale_inv", "a.weight.absmax"):
        save_file({**tensors, part: torch.ones(1)}, tmp_path / SINGLE_NAME)
        text = _refusal(lambda: check_tensors(open_checkpoint(tmp_path), {"a.weight": (3,)}))
        assert f"tensor '{part}' says that 'a.weight' is packed" in text
