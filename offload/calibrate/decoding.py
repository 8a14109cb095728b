"""Seconds of decoding a layer that is not stored as it computes, with the very codec that will run."""

from collections import Counter
from itertools import cycle

import torch

from ..planner.hardware import DecodeTime
from ..typed_model import TypedModel
from ..weights.codec import LayerCodec
from .short_model import ROTATED_BYTES
from .stopwatch import Stopwatch, Work

TIMES = 4  # layers in one measurement, each out of other memory than the one before


def measure_decoding(watch: Stopwatch, model: TypedModel) -> DecodeTime | None:
    """Of the kind of layer that most of those are which passes decode. None where all are stored as they compute."""
    codec = common_codec(model)
    if codec is None:
        return None
    with watch.device.translated(), torch.inference_mode():
        (layer_s,) = watch.seconds([_decoding(watch, codec, model.codecs.count(codec))])
    return DecodeTime(
        weights=model.weights,
        dtype_bytes=model.dtype.itemsize,
        computed_bytes=codec.computed.num_bytes,
        layer_s=max(layer_s, 1e-9),
    )


def common_codec(model: TypedModel) -> LayerCodec | None:
    """The codec of most of the layers that are decoded in passes; None where none is."""
    decoded = Counter(codec for codec in model.codecs if codec.decode is not None)
    return decoded.most_common(1)[0][0] if decoded else None


def _decoding(watch: Stopwatch, codec: LayerCodec, num_layers: int) -> Work:
    """Zeros are decoded: the time of a decoder depends on sizes, and zeros are positions and indexes that every code has. They
    are written, as memory that nobody has written to is one page in a cache."""
    device, decode = watch.device, codec.decode
    assert decode is not None
    num_buffers = max(1, min(num_layers, ROTATED_BYTES // codec.stored.num_bytes))
    buffers = [device.alloc(codec.stored.num_bytes).zero_() for _ in range(num_buffers)]
    bases = [codec.base.views(device.alloc(codec.base.num_bytes).zero_()) for _ in buffers]
    stored = cycle([{**base, **codec.stored.views(buffer)} for base, buffer in zip(bases, buffers, strict=True)])
    parameters = codec.computed.views(device.alloc(codec.computed.num_bytes))

    def run() -> None:
        for _ in range(TIMES):
            decode(next(stored), parameters)

    return Work(run, times=TIMES)
