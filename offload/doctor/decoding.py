"""How fast the layers of a packed model are decoded on the device that would run them."""

from ..calibrate.decoding import common_codec, measure_decoding
from ..calibrate.effort import QUICK
from ..calibrate.stopwatch import Stopwatch
from ..device import Device
from ..errors import FitError, reason
from ..typed_model import TypedModel
from .facts import Check, DecodeFacts


def time_decoding(device: Device, model: TypedModel) -> DecodeFacts | Check | None:
    """Of the kind of layer that there are most of. None where nothing is decoded in passes, or the device has no room for the
    test. A decoder that fails is a Check: kernels are compiled when they are first used, and a compiler may be missing."""
    codec = common_codec(model)
    if codec is None:
        return None
    try:
        measured = measure_decoding(Stopwatch(device, QUICK), model)
    except FitError:  # that there is no room is a finding of its own
        return None
    except (ImportError, OSError, RuntimeError) as error:
        value = f"{model.weights}: {reason(error).partition(chr(10))[0][:200]}"
        return Check(name="decoder", value=value, cure="run with --decode-kernels none: slower, the same bits")
    assert measured is not None
    return DecodeFacts(weights=model.weights, stored_bytes=codec.stored.num_bytes, layer_s=measured.layer_s)
