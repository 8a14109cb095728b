"""How a small tensor gets to a device whose link is busy with a layer: two ways, and which of them need not wait for it.

    copy    the driver's: up to 64 KiB of pageable memory are taken along with the command, by drivers that do
    mapped  through a few pages of host memory that the device reads by itself: a kernel fetches them

A round has about a hundred of them. If each waited for a layer under way, a round would take seconds longer.
"""

import logging
from collections.abc import Callable, Mapping

import torch

from ..errors import DeviceError, reason
from .base import Device, Ticket

logger = logging.getLogger(__name__)

SMALL_BYTES = 2**16
HALF_BYTES = 2**20  # a round uploads less, and ends with a wait for the device
ALIGNMENT_BYTES = 256
PROBE_BYTES = 2**28  # one copy of which takes milliseconds, and an upload that gets past it a twentieth of that
PROBE_TRIES = 3  # on a machine so busy that this process is late to look

_lets_pass: dict[torch.device, bool] = {}  # whether copies do get past, where that was asked
Upload = Callable[[torch.Tensor], torch.Tensor]


class MappedUploads:
    """Uploads through `host`, [2 * HALF_BYTES] uint8 of host memory, which is `mapped` for the device: the same bytes.

    It is filled from end to end, over and over; a half is written to again when the device is past all that it read there.
    """

    def __init__(self, device: Device, host: torch.Tensor, mapped: torch.Tensor) -> None:
        self._device, self._host, self._mapped = device, host, mapped
        self._half, self._used_bytes = 0, 0
        self._left: list[Ticket | None] = [None, None]

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, of at most SMALL_BYTES, in device memory of its own."""
        start = self._room_for(tensor.nbytes)
        piece = slice(start, start + tensor.nbytes)
        self._host[piece] = tensor.contiguous().view(-1).view(torch.uint8)
        # Not a copy, which might go to the copy engine: something that a kernel computes.
        return self._mapped[piece].bitwise_or(0).view(tensor.dtype).view(tensor.shape)

    def _room_for(self, num_bytes: int) -> int:
        num_bytes = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._used_bytes + num_bytes > HALF_BYTES:
            self._left[self._half] = self._device.mark()
            self._half, self._used_bytes = 1 - self._half, 0
            left = self._left[self._half]
            if left is not None:
                self._device.drain(left)
        start = self._half * HALF_BYTES + self._used_bytes
        self._used_bytes += num_bytes
        return start


class _OnDevice:
    """Pinned host memory, at the address under which the device reads it: with one address space for both, the same."""

    def __init__(self, host: torch.Tensor) -> None:
        address = {"data": (host.data_ptr(), False), "shape": tuple(host.shape), "typestr": "|u1", "version": 3}
        self.__cuda_array_interface__ = address


def map_host_memory(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Host memory, and the same bytes as a tensor of the device. RuntimeError where that cannot be."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return host, torch.as_tensor(_OnDevice(host), device=device)


def choose_uploads(device: Device, way: str, copy: Upload) -> MappedUploads | None:
    """What small tensors go through on `device` if `way` is "mapped"; None for `copy`. "auto" asks the machine, once in a
    process. DeviceError for "mapped" where there is no such memory."""
    if way == "copy" or (way == "auto" and _lets_pass.get(device.torch_device, False)):
        return None
    try:
        mapped = MappedUploads(device, *map_host_memory(2 * HALF_BYTES, device.torch_device))
    except RuntimeError as error:
        if way == "auto":
            return None
        raise DeviceError(
            f"{device.name} cannot read host memory by itself: {reason(error).partition(chr(10))[0]}",
            where="--small-uploads mapped",
            cure="leave it at auto, or take copy",
        ) from error
    if way == "auto" and device.torch_device not in _lets_pass:
        _lets_pass[device.torch_device] = _first_to_pass(device, {"copy": copy, "mapped": mapped.upload}) == "copy"
    return None if way == "auto" and _lets_pass[device.torch_device] else mapped


def _first_to_pass(device: Device, ways: Mapping[str, Upload]) -> str:
    """The first of `ways` whose uploads get past a copy under way; the first of all if none does."""
    slot, source = device.alloc(PROBE_BYTES), device.pin(PROBE_BYTES, ())
    try:
        for way, upload in ways.items():
            if _gets_past(device, upload, source.tensor, slot):
                logger.info("small uploads: %s", way)
                return way
    finally:
        source.close()
    logger.warning("small uploads wait for the layer under way: each level of a draft takes as long as a layer's copy")
    return next(iter(ways))


def _gets_past(device: Device, upload: Upload, source: torch.Tensor, slot: torch.Tensor) -> bool:
    numbers = torch.arange(SMALL_BYTES // 8)
    for _ in range(PROBE_TRIES):
        copy = device.copy_async(slot, source, device.mark())
        found = upload(numbers)
        device.drain(device.mark())
        under_way = not device.passed(copy)
        device.drain(copy)
        if under_way:
            return torch.equal(device.download(found), numbers)
    return False
