"""A converted folder is the model: the same weights, bit for bit, in fewer bytes, or no model at all."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import offload.demo
from allocations import working_bytes
from coding import same_bits
from command_line import CHANGED, DOES_NOT_FIT, INVALID, assert_error, assert_usage_error, run_command
from offload.cli.convert import conversion_of
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.lossless_layout import num_bytes_of
from offload.model.files import open_model
from offload.weights.conversion import Converted, convert
from offload.weights.conversion_state import STATE_NAME
from offload.weights.encoding import LOSSLESS, Scheme
from offload.weights.packed_source import DecodedSource
from offload.weights.safetensors_writer import SafetensorsWriter
from offload.weights.source import CheckpointSource

ROOT = Path(__file__).parents[1]
DEMO = Path(offload.demo.__file__).parent / "target"
SCHEMES = {"lossless": LOSSLESS, "residual": Scheme("residual", BASE_KINDS["int4"])}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
MARKS: dict[str, dict[str, Any]] = {
    "lossless": {
        "quantization_config": {"quant_method": "treestream_lossless", "version": 1},
        "transformers_weights": "treestream_lossless.safetensors",
    },
    "residual": {
        "quantization_config": {"quant_method": "treestream_residual", "version": 1, "bits": 4, "group_size": 64},
        "transformers_weights": "treestream_residual.safetensors",
    },
}


@pytest.fixture(scope="module", params=SCHEMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Converted]:
    output = tmp_path_factory.mktemp("converted") / "deeper" / "model"
    return output, convert(conversion_of(str(DEMO), str(output), SCHEMES[request.param]))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


def raw_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The weights of `folder`, each as `change` has it."""
    for path in folder.glob("*.safetensors"):
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)
    return folder


def assert_is_the_model(output: Path, model: Path, most: float = 0.8) -> None:
    files = open_model(str(output), "--model")
    expected = raw_tensors(model)
    assert files.codecs and files.checkpoint.num_bytes < most * sum(2 * tensor.numel() for tensor in expected.values())
    found = {name: torch.empty(shape, dtype=files.dtype) for name, shape in files.architecture.expected_tensors.items()}
    with DecodedSource(stored=CheckpointSource(files.checkpoint), codecs=files.codecs).open() as feed:
        feed.fill(found)
    assert found and all(same_bits(tensor, expected[name]) for name, tensor in found.items())


def test_a_converted_folder_has_the_weights_of_the_model(converted: tuple[Path, Converted]) -> None:
    output, summary = converted
    assert_is_the_model(output, DEMO)
    assert summary.num_kept == 0 and summary.num_coded == 42 and summary.num_tensors == 56
    assert summary.stored_bytes == open_model(str(output), "--model").checkpoint.num_bytes


@every_scheme
def test_float16_that_was_bfloat16_is_converted_as_float16(demo: Path, tmp_path: Path, scheme: Scheme) -> None:
    convert(conversion_of(str(rewrite(demo, lambda tensor: tensor.half())), str(tmp_path / "new"), scheme))
    assert open_model(str(tmp_path / "new"), "--model").dtype == torch.float16
    assert_is_the_model(tmp_path / "new", demo)


def test_files_are_those_that_safetensors_reads(converted: tuple[Path, Converted]) -> None:
    for path in converted[0].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert names and all(file.get_slice(name).get_shape() is not None for name in names)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", BASE_KINDS.values(), ids=BASE_KINDS)
def test_a_base_of_every_kind_is_what_the_folder_says(kind: BaseKind, tmp_path: Path) -> None:
    summary = convert(conversion_of(str(DEMO), str(tmp_path / "new"), Scheme("residual", kind)))
    assert_is_the_model(tmp_path / "new", DEMO)
    files = open_model(str(tmp_path / "new"), "--model")
    assert files.base == kind and files.is_lossless and files.bases.keys() == files.codecs.keys()
    assert summary.base_bytes == sum(num_bytes_of(parts) for parts in files.bases.values())
    assert summary.code_bytes == sum(num_bytes_of(codec.parts) for codec in files.codecs.values())
    assert summary.stored_bytes == summary.raw_bytes - summary.coded_raw_bytes + summary.code_bytes + summary.base_bytes
    most = {"int8": 0.26, "int4": 0.48, "int3": 0.54}[kind.name]  # of 16 bits
    assert 0 < summary.code_bytes < most * summary.coded_raw_bytes


@every_scheme
def test_everything_else_comes_along(scheme: Scheme, demo: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "LICENSE.txt", "chat_template.jinja", "merges.txt", "README.md"):
        (demo / name).write_text(name)
    (demo / "modeling_model.py").write_text("print()")
    convert(conversion_of(str(demo), str(tmp_path / "new"), scheme))
    old, new = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (demo, tmp_path / "new"))
    weights = {name for name in old if name.endswith(".safetensors")}
    changed = {"config.json", "model.safetensors.index.json", *weights}
    assert new.keys() == old.keys() - {"modeling_model.py"} | {"treestream.manifest.json"}
    assert all(new[name] == old[name] for name in old.keys() - changed - {"modeling_model.py"})
    assert json.loads(new["config.json"]) == {**json.loads(old["config.json"]), **MARKS[scheme.travel]}


def test_a_model_in_one_file_stays_in_one(demo: Path, tmp_path: Path) -> None:
    save_file(raw_tensors(DEMO), tmp_path / "model.safetensors")
    for path in demo.glob("model*"):
        path.unlink()
    shutil.move(tmp_path / "model.safetensors", demo)
    convert(conversion_of(str(demo), str(tmp_path / "new")))
    assert [path.name for path in (tmp_path / "new").glob("model*")] == ["model.safetensors"]
    assert_is_the_model(tmp_path / "new", demo)


def test_transformers_refuses_a_converted_folder_rather_than_read_it_wrongly(converted: tuple[Path, Converted]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"treestream_(lossless|residual)\.safetensors"):
        AutoModelForCausalLM.from_pretrained(converted[0])


def test_verify_finds_damage_in_a_converted_folder(
    converted: tuple[Path, Converted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(converted[0], tmp_path / "copy"))
    assert run_command(capsys, "verify", "--model", copy, "--full").code == 0
    damaged = sorted(copy.glob("*.safetensors"))[1]
    with damaged.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert_error(run_command(capsys, "verify", "--model", copy, "--full"), CHANGED, damaged.name)


@pytest.mark.parametrize(
    ("codec", "base", "says"),
    [("lossless", None, "42 of 56 tensors coded, every bit"), ("residual", "int4", "tensors coded: a base of ")],
)
def test_conversion_says_what_it_did(
    codec: str, base: str | None, says: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", demo, "--codec", codec)
    finished = run_command(capsys, "convert", *flags, "--output", tmp_path / "new", "--json", "--quiet")
    assert (finished.code, finished.stderr) == (0, "")
    document = json.loads(finished.stdout)
    assert (document["schema_version"], document["codec"], document["base"], document["num_coded"]) == (1, codec, base, 42)
    assert 0 < document["stored_bytes"] < 0.8 * document["raw_bytes"]
    finished = run_command(capsys, "convert", *flags, "--output", tmp_path / "other")
    assert finished.code == 0 and says in finished.stdout


def test_a_base_is_chosen_for_residual_coding_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("convert", "--model", DEMO, "--output", tmp_path / "new", "--json", "--quiet")
    assert_usage_error(run_command(capsys, *flags, "--base", "int8"), "--base int8", "--codec residual")
    assert_usage_error(run_command(capsys, *flags, "--codec", "residual", "--base", "int5"), "--base", "int5")
    finished = run_command(capsys, *flags, "--codec", "residual", "--base", "int8")
    document = json.loads(finished.stdout)
    coded_bytes = document["coded_raw_bytes"]
    assert document["base"] == "int8" and document["code_bytes"] < coded_bytes / 4 < coded_bytes / 2 < document["base_bytes"]


def test_a_conversion_goes_on_as_it_was_begun_and_not_with_another_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "new", after_files=1, scheme=SCHEMES["residual"])
    flags = ("convert", "--model", DEMO, "--output", tmp_path / "new")
    for other in ((), ("--codec", "residual", "--base", "int3")):
        assert_usage_error(run_command(capsys, *flags, *other), "another model", "or in another way", "delete this one")
    finished = run_command(capsys, *flags, "--codec", "residual")
    assert finished.code == 0 and "1 of them kept" in finished.stdout
    assert_is_the_model(tmp_path / "new", DEMO)


@pytest.mark.slow
@pytest.mark.parametrize("codec", SCHEMES)
def test_killed_at_any_point_it_goes_on_and_is_a_model_only_when_whole(codec: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/converting.py"), "11", str(DEMO), str(tmp_path / "new"), codec],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    *killed, last, whole = lines
    assert done.returncode == 0 and killed, done.stderr
    for one in killed:
        assert one["status"] == 9 and not {"config.json", "model.safetensors.index.json"} <= set(one["files"]), one
    assert any("model-00001-of-00004.safetensors" in one["files"] for one in killed) and last["kept"] > 0
    assert whole["status"] == 0 and STATE_NAME not in whole["files"] and not [n for n in whole["files"] if "part" in n]
    assert_is_the_model(tmp_path / "new", DEMO)


def interrupted(output: Path, *, after_files: int, scheme: Scheme = LOSSLESS) -> None:
    """A conversion of the demo that ends after some files, as by Ctrl-C."""
    total = sum(path.stat().st_size for path in sorted(DEMO.glob("*.safetensors"))[:after_files])
    done = 0

    def progress(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(conversion_of(str(DEMO), str(output), scheme), progress)


def test_an_interruption_leaves_finished_files_and_nothing_half(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", after_files=2)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors", STATE_NAME}
    assert convert(conversion_of(str(DEMO), str(tmp_path / "new"))).num_kept == 2
    assert_is_the_model(tmp_path / "new", DEMO)


def test_a_finished_file_that_was_damaged_meanwhile_is_made_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", after_files=2)
    with (tmp_path / "new" / "model-00002-of-00004.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff\x00\xff\x00\xff")
    (tmp_path / "new" / "model-00001-of-00004.safetensors").unlink()
    assert convert(conversion_of(str(DEMO), str(tmp_path / "new"))).num_kept == 0
    assert_is_the_model(tmp_path / "new", DEMO)


def test_progress_is_all_bytes_of_the_model_interrupted_or_not(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", after_files=3)
    seen: list[int] = []
    summary = convert(conversion_of(str(DEMO), str(tmp_path / "new")), seen.append)
    assert sum(seen) == summary.raw_bytes


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")


def begun_elsewhere(folder: Path) -> None:
    interrupted(folder, after_files=1)
    state = json.loads((folder / STATE_NAME).read_text())
    (folder / STATE_NAME).write_text(json.dumps({**state, "source": "0" * 64}))


def damaged_state(folder: Path) -> None:
    folder.mkdir()
    (folder / STATE_NAME).write_text('{"schema_version": 1, "files": {"a": 3}}')


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (foreign, "is not empty"),
        (begun_elsewhere, "another model"),
        (damaged_state, STATE_NAME),
        (lambda folder: folder.write_text("mine"), "cannot be made"),
        (lambda folder: shutil.copytree(DEMO, folder), "holds a model"),
    ],
)
def test_folders_with_anything_else_are_left_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], Any], says: str
) -> None:
    output = tmp_path / "new"
    prepare(output)
    before = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    assert_usage_error(run_command(capsys, "convert", "--model", DEMO, "--output", output), says, str(output))
    assert before == {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}


def test_the_model_is_no_output(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (demo, demo / ".." / demo.name):
        assert_usage_error(run_command(capsys, "convert", "--model", demo, "--output", name), "the model itself")


def test_two_conversions_do_not_write_to_one_folder(tmp_path: Path) -> None:
    inner: list[str] = []

    def begin_another(_: int) -> None:
        if not inner:
            with pytest.raises(Exception, match="another conversion") as refused:
                convert(conversion_of(str(DEMO), str(tmp_path / "new")))
            inner.append(str(refused.value))

    convert(conversion_of(str(DEMO), str(tmp_path / "new")), begin_another)
    assert len(inner) == 1
    assert_is_the_model(tmp_path / "new", DEMO)


@pytest.mark.parametrize("codec", SCHEMES)
def test_packed_models_gain_nothing(
    codec: str, converted: tuple[Path, Converted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run_command(capsys, "convert", "--model", converted[0], "--codec", codec, "--output", tmp_path / "new")
    assert_error(finished, INVALID, "nothing to gain", "coded already")
    assert not (tmp_path / "new").exists()


def to_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float()


def to_all_of_float16(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() * 0.7777).half()


def to_random_bits(tensor: torch.Tensor) -> torch.Tensor:
    bits = torch.randint(-(2**15), 2**15, tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    return bits.view(torch.bfloat16)


@pytest.mark.parametrize(
    ("codec", "change"),
    [
        ("lossless", to_float),
        ("lossless", to_all_of_float16),
        ("lossless", to_random_bits),
        ("residual", to_float),
        ("residual", to_random_bits),
    ],
)
def test_weights_that_no_code_shortens_are_refused(
    codec: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--model", rewrite(demo, change), "--codec", codec)
    finished = run_command(capsys, "convert", *flags, "--output", tmp_path / "new")
    assert_error(finished, INVALID, "nothing to gain", "float")
    assert not (tmp_path / "new").exists()


def test_all_of_float16_has_a_base_that_knows_something_of_it(demo: Path, tmp_path: Path) -> None:
    summary = convert(conversion_of(str(rewrite(demo, to_all_of_float16)), str(tmp_path / "new"), SCHEMES["residual"]))
    assert_is_the_model(tmp_path / "new", demo, most=1.0)
    assert summary.code_bytes < 0.7 * summary.coded_raw_bytes


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    finished = run_command(capsys, "convert", "--model", DEMO, "--output", tmp_path / "new")
    assert_error(finished, DOES_NOT_FIT, "of disk", "0.95 MiB are free")
    assert not list((tmp_path / "new").glob("*.safetensors*"))


def test_a_disk_that_is_full_when_a_file_is_flushed_leaves_nothing_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is noticed while the file after it is written, or after the last."""
    for number in (2, 4):
        fsync, calls = os.fsync, iter(range(100))

        def full(descriptor: int, number: int = number, calls: Any = calls, fsync: Any = fsync) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors.part") and next(calls) == number - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        output = tmp_path / f"new-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            finished = run_command(capsys, "convert", "--model", DEMO, "--output", output)
        assert_error(finished, DOES_NOT_FIT, "disk is full", "run the same command again")
        assert len(list(output.glob("*.safetensors"))) == number - 1 and not list(output.glob("*.part"))
        assert not (output / "config.json").exists()
        assert convert(conversion_of(str(DEMO), str(output))).num_kept == number - 1


def test_a_disk_that_fills_up_is_said_and_what_is_finished_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = SafetensorsWriter.add

    def add_until_full(writer: SafetensorsWriter, name: str, dtype: str, tensor: torch.Tensor) -> None:
        if "layers.4" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, name, dtype, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "add", add_until_full)
        finished = run_command(capsys, "convert", "--model", DEMO, "--output", tmp_path / "new")
    assert_error(finished, DOES_NOT_FIT, "disk is full", "run the same command again")
    assert list((tmp_path / "new").glob("*.safetensors")) and not list((tmp_path / "new").glob("*.part"))
    assert convert(conversion_of(str(DEMO), str(tmp_path / "new"))).num_kept > 0


@every_scheme
def test_memory_is_for_two_matrices_and_two_codes(scheme: Scheme, tmp_path: Path) -> None:
    """What torch gives out: one of each is read or written while the other is coded."""
    architecture = open_model(str(DEMO), "--model").architecture
    largest, matrix = (
        max(2 * math.prod(shape) for shape in shapes.values())
        for shapes in (architecture.expected_tensors, architecture.layer_shapes[0])
    )
    converting = conversion_of(str(DEMO), str(tmp_path / "new"), scheme)
    assert working_bytes(lambda: convert(converting)) <= 2 * largest + 2 * matrix


@pytest.mark.matrix
@pytest.mark.parametrize("tree", ["none", "3x4:kary"])
def test_texts_are_those_of_the_model_whichever_way_its_weights_travel(
    converted: tuple[Path, Converted], tree: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "The Congress of the United", "-n", 8, "--json", "--quiet", "--device", "cpu", "--profile", "l40"]
    flags += ["--draft-model", DEMO.parent / "draft", "--resident-layers", 1, "--slots", 2, "--tree", tree]
    codec, most = ("residual", 0.48) if converted[1].base_bytes else ("lossless", 0.72)
    ways = [(DEMO, "none"), (DEMO, codec), (converted[0], "auto"), (converted[0], "none")]
    runs = [run_command(capsys, "generate", "--model", model, "--codec", codec, *flags) for model, codec in ways]
    documents, coded = [json.loads(run.stdout) for run in runs], f"{codec} bfloat16"
    assert len({document["text"] for document in documents}) == 1 and documents[0]["text"]
    assert [set(document["streaming"]["codecs"]) for document in documents] == [{"none"}, {coded}, {coded}, {"none"}]
    raw, at_load, ahead, decoded = (document["streaming"]["bytes_per_pass"] for document in documents)
    assert raw == decoded and 0 < at_load == ahead < most * raw / 2  # a CPU computes in float32
