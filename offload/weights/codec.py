"""Between slot and parameters: what is stored of a decoder layer, and how its parameters come out of that. Knows neither files
nor slots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .layout import LayerLayout, lay_out

Tensors = Mapping[str, torch.Tensor]
# decoder(stored, parameters) writes all of `parameters`, from the `stored` tensors. Both are on the device.
Decoder = Callable[[Tensors, Tensors], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodec:
    """Of one decoder layer; the layers of a model may have different ones.

    `stored` are the tensors that disk, host memory, link and slot hold, named as in the TensorSource; their bytes may differ
    from layer to layer. `computed` are the parameters. `decode` issues its work in compute order, waits for nothing and keeps
    neither: the stored tensors are overwritten soon, the parameters by the next layer. None: the parameters are what is
    stored, used where it lies.
    """

    stored: LayerLayout
    computed: LayerLayout
    decode: Decoder | None = None

    @property
    def scratch_bytes(self) -> int:
        """Of the device memory that a streamed layer is decoded into."""
        return self.computed.num_bytes if self.decode is not None else 0


def identity(layout: LayerLayout) -> LayerCodec:
    return LayerCodec(stored=layout, computed=layout)


def identities(layers: Sequence[Mapping[str, tuple[int, ...]]], dtype: torch.dtype) -> tuple[LayerCodec, ...]:
    """Of layers of parameters {name: shape}. Layers that share one object share one codec."""
    layouts = lay_out(layers, dtype)
    made = {layout: identity(layout) for layout in set(layouts)}
    return tuple(made[layout] for layout in layouts)


def scratch_bytes(codecs: Iterable[LayerCodec]) -> int:
    """Of the memory that any of these layers is decoded into, one at a time."""
    return max(codec.scratch_bytes for codec in codecs)
