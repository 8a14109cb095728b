"""Between slot and parameters: what is stored of a decoder layer, and how its parameters come out of that. Knows neither files
nor slots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..coding.tensor_codec import Decoder, Part, TensorCodec, part_name
from .layout import NOTHING, LayerLayout, lay_out, of_one_dtype

Tensors = Mapping[str, torch.Tensor]
# decoder(stored, parameters) writes all `parameters`, from the `stored` tensors and the base's. All are on the device.
LayerDecoder = Callable[[Tensors, Tensors], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodec:
    """Of one decoder layer; the layers of a model may have different ones.

    `base` are tensors that stay on the device while the layer comes and goes: a low-bit copy of its matrices, and what is too
    small to travel. A layer that is resident as it computes needs none. `stored` are the tensors that disk, host memory, link
    and slot hold, named as in the TensorSource; their bytes may differ from layer to layer. `computed` are the parameters.
    `decode` issues its work in compute order, waits for nothing and keeps neither: the stored tensors are overwritten soon, the
    parameters by the next layer. None: the parameters are what is stored, used where it lies.
    """

    stored: LayerLayout
    computed: LayerLayout
    decode: LayerDecoder | None = None
    base: LayerLayout = NOTHING

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


def coded(
    parameters: Mapping[str, tuple[int, ...]],
    codecs: Mapping[str, TensorCodec],
    dtype: torch.dtype,
    *,
    kernels: bool,
    bases: Mapping[str, tuple[Part, ...]] | None = None,
) -> LayerCodec:
    """Of a layer of `parameters` {name: shape}, computed in `dtype`, in which those are stored that `codecs` does not name.
    `kernels`: decode by those that there are, not by plain torch. `bases` are the parts of a base, of the parameters that have
    one: then the device keeps the others as they are, and they need not travel with what has to be decoded."""
    computed, base = LayerLayout.pack(of_one_dtype(parameters, dtype)), _base_of(parameters, dtype, bases or {})
    if not codecs:
        return LayerCodec(stored=computed, computed=computed, base=base)
    are_kept = any(codec.kept for codec in codecs.values())
    stored: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape in parameters.items():
        if (codec := codecs.get(name)) is not None:
            stored += [(part_name(name, part.name), part.shape, part.dtype) for part in codec.parts]
        elif not are_kept or name in (bases or {}):
            stored.append((name, shape, dtype))
    decoders = tuple((name, _decoder_of(name, codecs.get(name), kernels)) for name in parameters)
    return LayerCodec(stored=LayerLayout.pack(stored), computed=computed, decode=_EachParameter(decoders), base=base)


def _base_of(
    parameters: Mapping[str, tuple[int, ...]], dtype: torch.dtype, bases: Mapping[str, tuple[Part, ...]]
) -> LayerLayout:
    if not bases:
        return NOTHING
    kept: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, shape in parameters.items():
        if name in bases:
            kept += [(part_name(name, part.name), part.shape, part.dtype) for part in bases[name]]
        else:
            kept.append((name, shape, dtype))
    return LayerLayout.pack(kept)


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Of one parameter, from the stored tensors of its layer: {part: name}."""

    parts: tuple[tuple[str, str], ...]
    decode: Decoder

    def __call__(self, stored: Tensors, parameter: torch.Tensor) -> None:
        self.decode({part: stored[name] for part, name in self.parts}, parameter)


@dataclass(frozen=True, slots=True)
class _EachParameter:
    """A LayerDecoder, equal to those of layers that are stored alike."""

    decoders: tuple[tuple[str, _Decoding], ...]

    def __call__(self, stored: Tensors, parameters: Tensors) -> None:
        for name, decoding in self.decoders:
            decoding(stored, parameters[name])


def _decoder_of(name: str, codec: TensorCodec | None, kernels: bool) -> _Decoding:
    if codec is None:
        return _Decoding((("", name),), _copy)
    decode = codec.kernel if kernels and codec.kernel is not None else codec.decode
    return _Decoding(tuple((part.name, part_name(name, part.name)) for part in (*codec.parts, *codec.kept)), decode)


def _copy(parts: Tensors, parameter: torch.Tensor) -> None:
    parameter.copy_(parts[""])


def scratch_bytes(codecs: Iterable[LayerCodec]) -> int:
    """Of the memory that any of these layers is decoded into, one at a time."""
    return max(codec.scratch_bytes for codec in codecs)
