"""Devices that obey the contract of offload.device.base as badly as it allows.

A real copy lands somewhere between its issue and its wait. EagerDevice lands it at once: what is overwritten too early shows.
LateDevice lands it at the last moment and fills released buffers with NaN: what is used too early or too long shows.
RefusingDevice and its kin pin less than they are asked to: what is copied from memory that is not pinned shows.
RecordingDevice replays what was computed and asks Python nothing: what a recording must not hold fixed shows.

And a codec whose stored layers look nothing like their parameters: what is used before it is decoded shows.
"""

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.device.base import CopyTicket, Ticket
from offload.device.chunks import register_chunks
from offload.device.cpu import CpuCopy, CpuDevice, CpuMark
from offload.device.host import HostMapping, move
from offload.engine.engine import Engine
from offload.errors import HostMemoryError
from offload.weights.codec import LayerCodec, Tensors
from offload.weights.layout import LayerLayout, of_one_dtype
from offload.weights.source import Destinations, TensorFeed, TensorSource

NAN_BYTE = 0xFF  # all bits set is a NaN in every float format


class EagerDevice(CpuDevice):
    name = "eager"

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CpuMark)
        ticket = CpuCopy(dst)
        ticket.start_s = time.monotonic()
        move(dst, src)
        ticket.end_s = time.monotonic()
        ticket.landed.set()
        return ticket


class LateDevice(CpuDevice):
    name = "late"

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[CpuCopy, torch.Tensor] = {}
        self._lock = threading.Lock()

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        assert isinstance(after, CpuMark)
        ticket = CpuCopy(dst)
        self._sources[ticket] = src
        return ticket

    def wait(self, ticket: CopyTicket) -> torch.Tensor:
        self.drain(ticket)
        return super().wait(ticket)

    def drain(self, ticket: Ticket) -> None:
        with self._lock:
            if isinstance(ticket, CpuCopy) and not ticket.landed.is_set():
                ticket.start_s = time.monotonic()
                move(ticket.dst, self._sources.pop(ticket))
                ticket.end_s = time.monotonic()
                ticket.landed.set()

    def drain_copies(self) -> None:
        for ticket in list(self._sources):
            self.drain(ticket)

    def release(self, buffer: torch.Tensor) -> Ticket:
        buffer.fill_(NAN_BYTE)
        return super().release(buffer)


class LosingDevice(LateDevice):
    """Its `lose_at`-th copy (from 1) is queued, but Ctrl-C comes before anybody has its ticket."""

    name = "losing"

    def __init__(self, lose_at: int) -> None:
        super().__init__()
        self._left = lose_at

    @property
    def num_under_way(self) -> int:
        return len(self._sources)

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        ticket = super().copy_async(dst, src, after)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return ticket


class FailingDevice(CpuDevice):
    """Its `fail_at`-th copy (from 1) fails where the copy is done: on the worker thread."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self._left = fail_at

    def _copy(self, ticket: CpuCopy, src: torch.Tensor, after: CpuMark) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("the link broke")
        super()._copy(ticket, src, after)


class Tape(TorchDispatchMode):
    """The operations that torch was asked for, with the tensors they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "this would wait for the device"
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, output in self.calls:
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class RecordingDevice(CpuDevice):
    """Records and replays as a CUDA graph does: the same operations on the same tensors."""

    name = "recording"
    replays = True

    def __init__(self) -> None:
        super().__init__()
        self.num_recordings = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_recordings += 1
        work()
        with Tape() as tape:
            work()
        return tape.replay


class _PinnedInPart(HostMapping):
    """Its leading pieces, as many as `device` has room to pin."""

    def __init__(self, device: "RefusingDevice", num_bytes: int, cuts: Sequence[int]) -> None:
        super().__init__(num_bytes)
        self._device = device
        self.pinned_bytes = register_chunks(num_bytes, cuts, 2**30, self._register)

    def _register(self, start: int, end: int) -> bool:
        if end - start > self._device.room_bytes:
            return False
        self._device.room_bytes -= end - start
        address = self.tensor.data_ptr()
        self._device.pinned.append((address + start, address + end))
        return True

    def close(self) -> None:
        address = self.tensor.data_ptr()
        mine = [chunk for chunk in self._device.pinned if address <= chunk[0] < address + self.pinned_bytes]
        for chunk in mine:
            self._device.pinned.remove(chunk)
            self._device.room_bytes += chunk[1] - chunk[0]
        super().close()


class RefusingDevice(CpuDevice):
    """Memory of its own, as a GPU has; pins `room_bytes` of the host's at a time, and counts copies from what is not."""

    name = "refusing"
    host_addressable = False
    room_bytes = 2**40

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[tuple[int, int]] = []  # addresses
        self.num_pageable_copies = 0

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        return _PinnedInPart(self, num_bytes, cuts)

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        start = src.data_ptr()
        self.num_pageable_copies += not any(first <= start and start + src.numel() <= last for first, last in self.pinned)
        return super().copy_async(dst, src, after)


class RefusingEagerDevice(RefusingDevice, EagerDevice):
    pass


class RefusingLateDevice(RefusingDevice, LateDevice):
    pass


class FullHostDevice(CpuDevice):
    """Its host has room for pinned memory of `room_bytes` at a time."""

    name = "full host"

    def __init__(self, room_bytes: int) -> None:
        super().__init__()
        self.room_bytes = room_bytes

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        if num_bytes > self.room_bytes:
            raise HostMemoryError(f"refused {num_bytes} bytes", where="host memory", cure="free memory")
        return super().pin(num_bytes, cuts)


class AllocationFault(TorchDispatchMode):
    """While entered, the `fail_at`-th operation (from 1) that makes a new tensor runs out of memory, as on a device that is
    full at that moment. `num_seen` counts them."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self._fail_at, self.num_seen = fail_at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        old = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        made = [tensor for tensor in tree_leaves(results) if isinstance(tensor, torch.Tensor) and tensor.nbytes]
        if any(tensor.untyped_storage().data_ptr() not in old for tensor in made):
            self.num_seen += 1
            if self.num_seen == self._fail_at:
                raise torch.OutOfMemoryError("Out of memory. Tried to allocate a tensor.\nmore lines")
        return results


def _storages(values: Any) -> set[int]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.nbytes]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@contextmanager
def layer_fault(engine: Engine, layer: int, is_full: Callable[[], bool]) -> Iterator[list[int]]:
    """The device has no memory for decoder layer `layer` while `is_full()`. Yields the rows of every pass that failed."""
    failed: list[int] = []

    def hook(_module: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
        if is_full():
            failed.append(args[0].shape[1])
            raise torch.OutOfMemoryError("Out of memory. Tried to allocate 2.00 MiB.\nmore lines")

    handle = list(engine.loop._target._model.get_submodule("model.layers").children())[layer].register_forward_hook(hook)
    yield failed
    handle.remove()


class CountingDevice(RecordingDevice):
    """Tells how much of what it gave out is still held."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self._given: list[tuple[weakref.ref[mmap.mmap], int]] = []

    @property
    def held_bytes(self) -> int:
        return sum(num_bytes for given, num_bytes in self._given if given() is not None)

    def alloc(self, num_bytes: int) -> torch.Tensor:
        return self._give(num_bytes)

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        buffer = HostMapping(0)
        buffer.tensor = self._give(num_bytes)
        return buffer

    def _give(self, num_bytes: int) -> torch.Tensor:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        mapping = mmap.mmap(-1, num_bytes)
        self._given.append((weakref.ref(mapping), num_bytes))
        return torch.frombuffer(mapping, dtype=torch.uint8)


class _WatchedBuffer(HostMapping):
    """Whoever closes it has seen to it that no copy from it is under way."""

    def __init__(self, device: "WatchedDevice", tensor: torch.Tensor) -> None:
        super().__init__(0)
        self._device, self.tensor = device, tensor

    def close(self) -> None:
        start, sources = self.tensor.data_ptr(), [source.data_ptr() for source in self._device._sources.values()]
        assert not any(start <= source < start + self.tensor.numel() for source in sources), "its memory is still read"
        super().close()


class WatchedDevice(CountingDevice, LateDevice):
    """Memory of its own, as a GPU has. Its memory and its copies are asked for in `calls`, before and behind each: the
    `interrupt_at`-th of them (from 1) is where Ctrl-C comes, and where `fault`, if that is given, is raised instead."""

    name = "watched"
    host_addressable = False

    def __init__(self, interrupt_at: int = 0, fault: BaseException | None = None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._interrupt_at, self._fault = interrupt_at, fault

    @property
    def num_under_way(self) -> int:
        return len(self._sources)

    def called(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._interrupt_at:
            raise self._fault or KeyboardInterrupt

    def alloc(self, num_bytes: int) -> torch.Tensor:
        self.called("alloc")
        memory = super().alloc(num_bytes)
        self.called("allocated")
        return memory

    def pin(self, num_bytes: int, cuts: Sequence[int]) -> HostMapping:
        self.called("pin")
        buffer = _WatchedBuffer(self, self._give(num_bytes))
        buffer.pinned_bytes = num_bytes
        self.called("pinned")
        return buffer

    def copy_async(self, dst: torch.Tensor, src: torch.Tensor, after: Ticket) -> CopyTicket:
        self.called("copy")
        ticket = super().copy_async(dst, src, after)
        self.called("copied")
        return ticket


XOR_PATTERN, PADDING_BYTE = 0x5A, 0xA5


def xor_codec(computed: LayerLayout, layer: int) -> LayerCodec:
    """Every byte is stored XORed with a pattern, as a tensor of bytes for each parameter, with padding of another size in each
    of seven layers."""
    bytes_of: dict[str, tuple[int, ...]] = {f"{field.name}.xor": (field.num_bytes,) for field in computed.fields}
    bytes_of["padding"] = (1 + 256 * (layer * 5 % 7),)
    stored = LayerLayout.pack(of_one_dtype(bytes_of, torch.uint8))
    return LayerCodec(stored=stored, computed=computed, decode=_decode_xor)


def _decode_xor(stored: Tensors, parameters: Tensors) -> None:
    for name, parameter in parameters.items():
        parameter.view(-1).view(torch.uint8).copy_(stored[f"{name}.xor"] ^ XOR_PATTERN)


def pad_codec(computed: LayerLayout, layer: int) -> LayerCodec:
    """Every byte of `a` is stored XORed with one of a pad, which is the base's, as all other parameters are: one-time pads, of
    which neither half says anything."""
    first, *others = computed.fields
    base = [(f"{first.name}.pad", (first.num_bytes,), torch.uint8)]
    base += [(field.name, field.shape, field.dtype) for field in others]
    stored = LayerLayout.pack(of_one_dtype({f"{first.name}.rest": (first.num_bytes,), "padding": (layer + 1,)}, torch.uint8))
    return LayerCodec(stored=stored, computed=computed, decode=_decode_pad, base=LayerLayout.pack(base))


def _decode_pad(tensors: Tensors, parameters: Tensors) -> None:
    for name, parameter in parameters.items():
        if f"{name}.pad" in tensors:
            parameter.view(-1).view(torch.uint8).copy_(tensors[f"{name}.rest"] ^ tensors[f"{name}.pad"])
        else:
            parameter.copy_(tensors[name])


def pad_of(parameter: str, num_bytes: int) -> torch.Tensor:
    """Of a parameter by its full name."""
    return torch.randint(256, (num_bytes,), generator=torch.Generator().manual_seed(crc32(parameter.encode()))).byte()


class XorSource:
    """Of the stored tensors and the bases of layers `prefix`.0, .1, ... with `codecs`, made from the parameters in `inner`."""

    equal_layers: frozenset[int] = frozenset()

    def __init__(self, inner: TensorSource, prefix: str, codecs: Sequence[LayerCodec]) -> None:
        self.inner = inner
        self.parameters = {
            f"{prefix}.{layer}.{field.name}": field for layer, codec in enumerate(codecs) for field in codec.computed.fields
        }
        self._stored = {
            f"{prefix}.{layer}.{field.name}": field
            for layer, codec in enumerate(codecs)
            for field in (*codec.base.fields, *codec.stored.fields)
        }

    def num_bytes(self, name: str) -> int:
        return self._stored[name].num_bytes if name in self._stored else self.inner.num_bytes(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype if name in self._stored else self.inner.dtype(name)

    def open(self) -> "XorFeed":
        return XorFeed(self)


class XorFeed:
    def __init__(self, source: XorSource) -> None:
        self._parameters = source.parameters
        self._inner: TensorFeed = source.inner.open()

    def __enter__(self) -> "XorFeed":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._inner.__exit__(*raised)

    def fill(self, destinations: Destinations, progress: Callable[[int], None] | None = None) -> None:
        read: dict[str, torch.Tensor] = {}
        for name, view in destinations.items():
            if name.endswith(".padding"):
                view.fill_(PADDING_BYTE)
                if progress is not None:
                    progress(view.numel())
            elif name.endswith((".xor", ".rest")):
                parameter = name.rpartition(".")[0]
                read[parameter] = torch.empty(self._parameters[parameter].shape, dtype=self._parameters[parameter].dtype)
            elif name.endswith(".pad"):
                view.copy_(pad_of(name.removesuffix(".pad"), view.numel()))
            else:
                read[name] = view
        self._inner.fill(read, progress)
        for name, view in destinations.items():
            if name.endswith(".xor"):
                view.copy_(read[name.removesuffix(".xor")].view(-1).view(torch.uint8) ^ XOR_PATTERN)
            elif name.endswith(".rest"):
                parameter = name.removesuffix(".rest")
                view.copy_(read[parameter].view(-1).view(torch.uint8) ^ pad_of(parameter, view.numel()))


DEVICES = {"cpu": CpuDevice, "eager": EagerDevice, "late": LateDevice}
REFUSING = {"cpu": RefusingDevice, "eager": RefusingEagerDevice, "late": RefusingLateDevice}
