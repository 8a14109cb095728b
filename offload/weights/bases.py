"""The device memory of bases: what stays there of layers that come and go. Knows neither files nor when it is read."""

from collections.abc import Collection, Iterable, Sequence

import torch

from ..device import Device
from ..errors import OutOfMemoryError
from .codec import LayerCodec


class LayerBases:
    """Owns the memory of the bases of some layers, of which `codecs` has one each. Those that have no base take nothing."""

    def __init__(self, device: Device, codecs: Sequence[LayerCodec]) -> None:
        self._device, self._codecs = device, codecs
        self._memory: dict[int, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._memory.values())

    def only(self, layers: Collection[int]) -> dict[int, torch.Tensor]:
        """[bytes of its base] uint8 of the device, of those of `layers` that have memory for one."""
        return {layer: buffer for layer, buffer in self._memory.items() if layer in layers}

    def needed(self, layers: Iterable[int]) -> list[int]:
        """Those of `layers` that have a base, and no memory for it."""
        return [layer for layer in layers if self._codecs[layer].base.fields and layer not in self._memory]

    def take(self, layers: Iterable[int], spare: Collection[torch.Tensor] = ()) -> list[int]:
        """Memory for those of `layers` that are `needed`, which are returned. Where the device has no more, it is cut from the
        buffers that are `spare`. OutOfMemoryError when there is none: then nothing has changed."""
        layers, rest = self.needed(layers), list(spare)
        taken: dict[int, torch.Tensor] = {}
        for layer in layers:
            num_bytes = self._codecs[layer].base.num_bytes
            try:
                taken[layer] = self._device.alloc(num_bytes)
            except OutOfMemoryError:
                place = next((place for place, buffer in enumerate(rest) if buffer.numel() >= num_bytes), None)
                if place is None:
                    raise
                taken[layer], rest[place] = rest[place][:num_bytes], rest[place][num_bytes:]
        self._memory |= taken
        return layers

    def drop(self, layers: Iterable[int]) -> None:
        for layer in layers:
            del self._memory[layer]

    def views(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer's base by name; none where it has no memory for one."""
        return self._codecs[layer].base.views(self._memory[layer]) if layer in self._memory else {}

    def close(self) -> None:
        self._memory.clear()
