"""Small tensors on their way past a layer: through mapped memory, unless the driver lets them pass by itself."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import LateDevice
from offload.device import small_uploads
from offload.device.base import CopyTicket, Ticket
from offload.device.cpu import CpuDevice
from offload.device.small_uploads import HALF_BYTES, SMALL_BYTES, MappedUploads, choose_uploads
from offload.errors import DeviceError

DTYPES = (torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.uint8)


class QueueingDevice(LateDevice):
    """A copy lands when somebody waits for it. `copy_up` is a driver that puts uploads behind it, `pass_by` lets them pass."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[CopyTicket] = []

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        self.copies.append(super().copy_async(dst, src, after))
        return self.copies[-1]

    def copy_up(self, host: torch.Tensor) -> torch.Tensor:
        self.drain(self.copies[-1])
        return host.clone()

    def pass_by(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()


def map_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    memory = torch.zeros(num_bytes, dtype=torch.uint8)
    return memory, memory


def map_nothing(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("CUDA error: operation not supported\nmore lines")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueingDevice]:
    monkeypatch.setattr(small_uploads, "PROBE_BYTES", 4096)
    monkeypatch.setattr(small_uploads, "_lets_pass", {})
    monkeypatch.setattr(small_uploads, "map_host_memory", map_memory)
    device = QueueingDevice()
    yield device
    device.close()


def test_a_driver_that_lets_uploads_pass_is_left_to_it(device: QueueingDevice) -> None:
    assert choose_uploads(device, "auto", device.pass_by) is None


def test_uploads_that_would_wait_are_mapped_and_the_machine_is_asked_once(device: QueueingDevice) -> None:
    assert isinstance(choose_uploads(device, "auto", device.copy_up), MappedUploads)
    num_copies = len(device.copies)
    assert num_copies > 1, "a machine that is busy for a moment is asked again"
    assert isinstance(choose_uploads(device, "auto", device.copy_up), MappedUploads)
    assert len(device.copies) == num_copies


def test_where_nothing_passes_uploads_stay_with_the_driver_and_a_warning_says_so(
    device: QueueingDevice, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedUploads, "upload", lambda self, host: device.copy_up(host))
    assert choose_uploads(device, "auto", device.copy_up) is None
    assert "wait for the layer under way" in caplog.text


def test_numbers_that_arrive_wrong_are_not_trusted(device: QueueingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As through an address that is not the device's."""

    def map_another(num_bytes: int, where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return map_memory(num_bytes, where)[0], map_memory(num_bytes, where)[0]

    monkeypatch.setattr(small_uploads, "map_host_memory", map_another)
    assert choose_uploads(device, "auto", device.copy_up) is None


def test_a_device_that_cannot_map_goes_on_unless_it_must(device: QueueingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_uploads, "map_host_memory", map_nothing)
    assert choose_uploads(device, "auto", device.copy_up) is None
    with pytest.raises(DeviceError, match="operation not supported") as caught:
        choose_uploads(device, "mapped", device.copy_up)
    assert "--small-uploads" in caught.value.where


def test_who_names_a_way_gets_it_unasked(device: QueueingDevice) -> None:
    assert choose_uploads(device, "copy", device.copy_up) is None
    assert isinstance(choose_uploads(device, "mapped", device.pass_by), MappedUploads)
    assert device.copies == []


tensors = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 40), max_size=3))


@given(st.lists(tensors, min_size=1, max_size=40))
def test_what_is_uploaded_arrives_and_stays(wanted: list[tuple[torch.dtype, list[int]]]) -> None:
    """Of any type and shape; in memory of its own, which later uploads do not touch."""
    device = CpuDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_uploads, "HALF_BYTES", SMALL_BYTES)
        uploads = MappedUploads(device, *map_memory(2 * SMALL_BYTES, torch.device("cpu")))
        hosts = [(torch.rand(shape) * 9).to(dtype) for dtype, shape in wanted if torch.Size(shape).numel() * 8 <= SMALL_BYTES]
        found = [uploads.upload(host) for host in hosts]
        for host, tensor in zip(hosts, found, strict=True):
            assert tensor.dtype == host.dtype and torch.equal(tensor, host)
        columns = torch.arange(64).view(8, 8).T
        assert torch.equal(uploads.upload(columns), columns)
    device.close()


def test_memory_that_the_device_may_still_read_is_not_written_to() -> None:
    """A half is left with a mark behind its last reader, and entered again only past that mark."""

    class Marks(CpuDevice):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[object] = []

        def mark(self) -> Ticket:
            self.log.append(super().mark())
            return self.log[-1]  # type: ignore[return-value]

        def drain(self, ticket: Ticket) -> None:
            self.log.append(("past", ticket))

    device = Marks()
    uploads = MappedUploads(device, *map_memory(2 * HALF_BYTES, torch.device("cpu")))
    full = torch.zeros(SMALL_BYTES, dtype=torch.uint8)
    for _ in range(3 * HALF_BYTES // SMALL_BYTES + 1):
        uploads.upload(full)
    first, second, past_first, third, past_second = device.log
    assert (past_first, past_second) == (("past", first), ("past", second)) and len({first, second, third}) == 3
    device.close()
