"""Manifests: a checkpoint equals its own, any change is named, and a bad manifest is an error of its own."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offload.errors import DeviceError, IntegrityError, ModelError, UsageError
from offload.weights.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from offload.weights.manifest import MANIFEST_NAME, check_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Six shards, more than there are threads."""
    shards = {f"t{number}": f"model-{number}.safetensors" for number in range(6)}
    for name, shard in shards.items():
        save_file({name: torch.arange(1000)}, tmp_path / shard)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": shards}))
    return open_checkpoint(tmp_path)


@pytest.fixture
def manifest(checkpoint: Checkpoint) -> Path:
    path = checkpoint.folder / MANIFEST_NAME
    write_manifest(checkpoint, path)
    return path


def _flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_manifest_holds_size_and_sha256_of_every_file(checkpoint: Checkpoint, manifest: Path) -> None:
    contents = {file.name: file.read_bytes() for file in checkpoint.files}
    assert json.loads(manifest.read_text()) == {
        "schema_version": 1,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()
        },
    }


def test_unchanged_checkpoint_passes_and_every_byte_is_counted(checkpoint: Checkpoint, manifest: Path) -> None:
    counts: list[int] = []
    check_manifest(checkpoint, manifest, counts.append)
    assert sum(counts) == sum(file.stat().st_size for file in checkpoint.files)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_flipped_bit_is_found_and_its_file_named(checkpoint: Checkpoint, manifest: Path, place: int) -> None:
    _flip_bit(checkpoint.folder / "model-3.safetensors", place)
    with pytest.raises(IntegrityError) as caught:
        check_manifest(checkpoint, manifest)
    assert caught.value.exit_code == 5
    assert "1 of 6 files differ: 'model-3.safetensors' has other contents" in caught.value.what


def test_all_differences_are_listed_in_three_lines(checkpoint: Checkpoint, manifest: Path) -> None:
    files = json.loads(manifest.read_text())["files"]
    del files["model-0.safetensors"]
    files["../../etc/shadow"] = files["model-1.safetensors"]
    manifest.write_text(json.dumps({"schema_version": 1, "files": files}))
    _flip_bit(checkpoint.folder / "model-2.safetensors", 500)
    with open(checkpoint.folder / "model-4.safetensors", "ab") as stream:
        stream.write(b"more")
    with pytest.raises(IntegrityError) as caught:
        check_manifest(checkpoint, manifest)
    text = str(caught.value)
    assert "4 of 7 files differ" in text and len(text.splitlines()) == 3
    assert "'../../etc/shadow' is missing" in text
    assert "'model-0.safetensors' is not in the manifest" in text
    assert "'model-2.safetensors' has other contents" in text
    size = (checkpoint.folder / "model-4.safetensors").stat().st_size
    assert f"'model-4.safetensors' has {size:,} bytes, the manifest says {size - 4:,}" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not JSON"),
        ("{}", "schema_version 1"),
        ('{"schema_version": 2, "files": {}}', "schema_version 1"),
        ('{"schema_version": true, "files": {}}', "schema_version 1"),
        ('{"schema_version": 1}', "has no files"),
        ('{"schema_version": 1, "files": []}', "has no files"),
        ('{"schema_version": 1, "files": {"a": {}}}', "without exactly bytes and sha256"),
        ('{"schema_version": 1, "files": {"a": 1}}', "without exactly bytes and sha256"),
        ('{"schema_version": 1, "files": {"a": {"bytes": -1, "sha256": ""}}}', "malformed"),
        ('{"schema_version": 1, "files": {"a": {"bytes": 1, "sha256": "' + "G" * 64 + '"}}}', "malformed"),
        ('{"schema_version": 1, "files": {}, "files": {}}', "has the key 'files' twice"),
    ],
)
def test_malformed_manifest_is_a_model_error(checkpoint: Checkpoint, manifest: Path, content: str, expected: str) -> None:
    manifest.write_text(content)
    with pytest.raises(ModelError, match=expected) as caught:
        check_manifest(checkpoint, manifest)
    assert caught.value.exit_code == 3 and caught.value.where == str(manifest)


def test_missing_manifest_is_a_model_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match="No such file"):
        check_manifest(checkpoint, checkpoint.folder / MANIFEST_NAME)


def test_lost_file_is_a_device_error_and_leaves_the_old_manifest(checkpoint: Checkpoint, manifest: Path) -> None:
    before = manifest.read_bytes()
    (checkpoint.folder / "model-5.safetensors").unlink()
    with pytest.raises(DeviceError, match=r"model-5\.safetensors at byte 0"):
        check_manifest(checkpoint, manifest)
    with pytest.raises(DeviceError, match=r"model-5\.safetensors at byte 0"):
        write_manifest(checkpoint, manifest)
    assert manifest.read_bytes() == before


def test_failed_replacement_leaves_no_temporary_file(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "taken"
    path.mkdir()
    before = sorted(checkpoint.folder.iterdir())
    with pytest.raises(UsageError, match="cannot write the manifest"):
        write_manifest(checkpoint, path)
    with pytest.raises(UsageError, match="cannot write the manifest"):
        write_manifest(checkpoint, checkpoint.folder / "none" / "manifest.json")
    assert sorted(checkpoint.folder.iterdir()) == before


def test_exception_from_progress_ends_the_work(checkpoint: Checkpoint) -> None:
    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(checkpoint, checkpoint.folder / MANIFEST_NAME, interrupt)
    assert not (checkpoint.folder / MANIFEST_NAME).exists()
