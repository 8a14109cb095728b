"""Reading tensors: every bit arrives where it belongs, by every path, and a failing disk is an orderly error."""

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file

from offload.errors import CheckpointError, DeviceError
from offload.weights.checkpoint import SINGLE_NAME, Checkpoint, open_checkpoint
from offload.weights.header import TensorInfo
from offload.weights.reader import ReadJob, TensorReader

PIECE_BYTES = 8192
DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Sizes around pieces and blocks. All but the first few begin at offsets that are aligned to nothing."""
    rng = torch.Generator().manual_seed(1)
    sizes = [1, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 100_001]
    bytes_ = {f"t{size}": torch.randint(0, 256, (size,), generator=rng, dtype=torch.uint8) for size in sizes}
    return {
        **bytes_,
        "matrix": torch.randn(123, 77, generator=rng).bfloat16(),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(4, 0),
    }


def _save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    save_file(dict(tensors), folder / SINGLE_NAME)
    return open_checkpoint(folder)


def _jobs(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, ReadJob]:
    return {
        name: ReadJob(tensor=tensor, destination=torch.zeros(tensor.shape, dtype=dtype or tensor.dtype))
        for name, tensor in checkpoint.tensors.items()
    }


def _assert_bits_equal(jobs: Mapping[str, ReadJob], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        destination = jobs[name].destination
        assert destination.dtype == tensor.dtype
        assert torch.equal(destination.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


@DIRECT
@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("piece_bytes", [4096, PIECE_BYTES, 16 * 2**20])
def test_read_is_bit_equal(
    tmp_path: Path, tensors: dict[str, torch.Tensor], direct: bool, num_threads: int, piece_bytes: int
) -> None:
    checkpoint = _save(tmp_path, tensors)
    jobs = _jobs(checkpoint)
    with TensorReader(checkpoint, num_threads=num_threads, direct=direct, piece_bytes=piece_bytes) as reader:
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, tensors)


@DIRECT
def test_read_leaves_the_bytes_around_a_destination_alone(
    tmp_path: Path, tensors: dict[str, torch.Tensor], direct: bool
) -> None:
    checkpoint = _save(tmp_path, tensors)
    arena = torch.full((100_001 + 200,), 7, dtype=torch.uint8)
    job = ReadJob(tensor=checkpoint.tensors["t100001"], destination=arena[101:-99])
    with TensorReader(checkpoint, direct=direct, piece_bytes=PIECE_BYTES) as reader:
        reader.read([job])
    assert torch.equal(arena[101:-99], tensors["t100001"])
    assert bool((arena[:101] == 7).all()) and bool((arena[-99:] == 7).all())


@DIRECT
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "normal"])
def test_bfloat16_is_converted_to_float32_exactly(tmp_path: Path, direct: bool, inference: bool) -> None:
    # safetensors' own writer sorts tensors so that none is misaligned. Its format and other writers do not: no file of
    # theirs is at hand, so this one is made without a header.
    values = torch.randn(9001, generator=torch.Generator().manual_seed(2)).bfloat16()
    path = tmp_path / "raw"
    path.write_bytes(b"\0" * 4099 + bytes(values.view(torch.uint8).tolist()))
    tensor = TensorInfo(name="x", dtype_name="BF16", shape=(9001,), path=path, offset_bytes=4099, num_bytes=2 * 9001)
    checkpoint = Checkpoint(folder=tmp_path, tensors=MappingProxyType({"x": tensor}), files=(path,))
    with torch.inference_mode(inference):
        job = ReadJob(tensor=tensor, destination=torch.zeros(9001))
        with TensorReader(checkpoint, direct=direct, piece_bytes=PIECE_BYTES) as reader:
            reader.read([job])
    assert torch.equal(job.destination.clone(), values.float())


@DIRECT
@pytest.mark.parametrize("source", [torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str)
def test_floating_conversion_is_that_of_copy(tmp_path: Path, direct: bool, source: torch.dtype) -> None:
    values = {"x": torch.randn(50, 101, generator=torch.Generator().manual_seed(3)).to(source), "s": torch.ones(())}
    checkpoint = _save(tmp_path, values)
    jobs = _jobs(checkpoint, torch.bfloat16)
    with TensorReader(checkpoint, direct=direct, piece_bytes=4096) as reader:
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, {name: value.to(torch.bfloat16) for name, value in values.items()})


def test_integers_are_not_converted_and_nothing_is_read(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, {"a": torch.ones(5), "q": torch.ones(5, dtype=torch.int8)})
    jobs = _jobs(checkpoint, torch.float32)
    with TensorReader(checkpoint) as reader, pytest.raises(CheckpointError, match=r"'q' is torch\.int8") as caught:
        reader.read(list(jobs.values()))
    assert caught.value.where == str(tmp_path / SINGLE_NAME)
    assert not jobs["a"].destination.any()


@pytest.mark.parametrize("destination", [torch.zeros(4), torch.zeros(5, 2)[:, 0], torch.zeros(5, device="meta")])
def test_destination_of_another_size_layout_or_device_is_refused(tmp_path: Path, destination: torch.Tensor) -> None:
    checkpoint = _save(tmp_path, {"a": torch.ones(5)})
    with TensorReader(checkpoint) as reader, pytest.raises(ValueError, match="cannot be read into"):
        reader.read([ReadJob(tensor=checkpoint.tensors["a"], destination=destination)])


def test_progress_sums_to_the_bytes_in_the_calling_thread(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = _save(tmp_path, tensors)
    counts: list[int] = []
    threads: set[int] = set()

    def progress(num_bytes: int) -> None:
        counts.append(num_bytes)
        threads.add(threading.get_ident())

    with TensorReader(checkpoint, piece_bytes=PIECE_BYTES) as reader:
        reader.read(list(_jobs(checkpoint).values()), progress)
    assert sum(counts) == checkpoint.num_bytes and max(counts) <= PIECE_BYTES
    assert threads == {threading.get_ident()}


def test_two_readers_of_one_checkpoint_work_side_by_side(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = _save(tmp_path, tensors)
    results = [_jobs(checkpoint), _jobs(checkpoint)]

    def read(jobs: Mapping[str, ReadJob]) -> None:
        with TensorReader(checkpoint, piece_bytes=4096) as reader:
            for _ in range(5):
                reader.read(list(jobs.values()))

    threads = [threading.Thread(target=read, args=(jobs,)) for jobs in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for jobs in results:
        _assert_bits_equal(jobs, tensors)


@pytest.mark.parametrize("most_bytes", [4096, 5000, 4097])
@DIRECT
def test_short_reads_are_continued(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, direct: bool, most_bytes: int
) -> None:
    checkpoint = _save(tmp_path, tensors)
    jobs = _jobs(checkpoint)
    whole_preadv = os.preadv

    def short_preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        # Reads all, since a direct read has to be aligned, and admits to less.
        count = min(whole_preadv(descriptor, views, offset), most_bytes)
        views[0][count:] = bytes(len(views[0]) - count)
        return count

    with TensorReader(checkpoint, direct=direct, num_threads=1) as reader:
        monkeypatch.setattr(os, "preadv", short_preadv)
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, tensors)


@DIRECT
def test_file_truncated_after_opening_is_a_device_error(tmp_path: Path, tensors: dict[str, torch.Tensor], direct: bool) -> None:
    checkpoint = _save(tmp_path, tensors)
    tensor = checkpoint.tensors["t100001"]
    with TensorReader(checkpoint, direct=direct) as reader:
        os.truncate(tensor.path, tensor.offset_bytes + 50_000)
        with pytest.raises(DeviceError, match="the file has become shorter") as caught:
            reader.read([ReadJob(tensor=tensor, destination=torch.zeros(tensor.shape, dtype=torch.uint8))])
    assert caught.value.exit_code == 7
    assert caught.value.where == f"{tensor.path} at byte {tensor.offset_bytes + 50_000:,}"


@DIRECT
def test_failed_read_leaves_the_reader_usable(tmp_path: Path, direct: bool) -> None:
    good, bad = torch.arange(50_000), torch.arange(50_000)
    save_file({"good": good}, tmp_path / "good.safetensors")
    save_file({"bad": bad}, tmp_path / "bad.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"good": "good.safetensors", "bad": "bad.safetensors"}}'
    )
    checkpoint = open_checkpoint(tmp_path)
    jobs = _jobs(checkpoint)
    with TensorReader(checkpoint, direct=direct, piece_bytes=4096) as reader:
        os.truncate(tmp_path / "bad.safetensors", 20_000)
        for _ in range(3):
            with pytest.raises(DeviceError, match=r"bad\.safetensors"):
                reader.read([jobs["bad"], jobs["good"]])
            jobs["good"].destination.zero_()
            reader.read([jobs["good"]])
            _assert_bits_equal(jobs, {"good": good})


def test_every_failing_read_is_reported_with_its_reason(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _save(tmp_path, tensors)
    jobs = _jobs(checkpoint)
    whole_preadv = os.preadv
    reads_left = 0

    def failing_preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        nonlocal reads_left
        reads_left -= 1
        if reads_left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole_preadv(descriptor, views, offset)

    with TensorReader(checkpoint, piece_bytes=PIECE_BYTES) as reader:
        monkeypatch.setattr(os, "preadv", failing_preadv)
        for fail_at in range(20):
            reads_left = fail_at
            with pytest.raises(DeviceError, match="Input/output error"):
                reader.read(list(jobs.values()))
        reads_left = 10_000
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, tensors)


def test_exception_from_progress_stops_all_threads(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, {"a": torch.arange(200_000)})
    jobs = _jobs(checkpoint)

    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with TensorReader(checkpoint, piece_bytes=4096) as reader:
        with pytest.raises(KeyboardInterrupt):
            reader.read(list(jobs.values()), interrupt)
        jobs["a"].destination.zero_()
        assert not jobs["a"].destination.any()
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, {"a": torch.arange(200_000)})


@pytest.mark.parametrize("refused_at", ["open", "first read"])
def test_file_system_without_direct_reads_is_read_buffered(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    checkpoint = _save(tmp_path, tensors)
    whole_open = os.open

    def refusing_open(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return whole_open(path, flags)

    def refusing_preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with monkeypatch.context() as patched:
        if refused_at == "open":
            patched.setattr(os, "open", refusing_open)
        else:
            patched.setattr(os, "preadv", refusing_preadv)
        reader = TensorReader(checkpoint)
    jobs = _jobs(checkpoint)
    with reader:
        assert reader.num_direct_files == 0
        reader.read(list(jobs.values()))
    _assert_bits_equal(jobs, tensors)


def test_file_that_vanished_before_opening_is_a_device_error(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, {"a": torch.ones(5)})
    (tmp_path / SINGLE_NAME).unlink()
    with pytest.raises(DeviceError, match="No such file"):
        TensorReader(checkpoint)


def test_close_gives_all_descriptors_and_threads_back(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, {"a": torch.ones(5)})
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with TensorReader(checkpoint) as reader:
            reader.read(list(_jobs(checkpoint).values()))
        reader.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads


@pytest.mark.parametrize(("num_threads", "piece_bytes"), [(0, 4096), (1, 0), (1, 4095), (1, -4096)])
def test_senseless_sizes_are_refused(tmp_path: Path, num_threads: int, piece_bytes: int) -> None:
    checkpoint = _save(tmp_path, {"a": torch.ones(5)})
    with pytest.raises(ValueError, match="out of range"):
        TensorReader(checkpoint, num_threads=num_threads, piece_bytes=piece_bytes)
