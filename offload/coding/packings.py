"""What a config.json says of how its weights are packed.

Weights are unpacked to what their format says that they are, and computed with as such. Some formats also say that
activations, or keys and values, are rounded while a model runs: those are not.
"""

from collections.abc import Callable, Mapping
from typing import Final

from ..errors import ModelError
from .config_fields import LOSSLESS_METHOD, RESIDUAL_METHOD, quant_method, said
from .lossless_packing import read_lossless
from .packing_bitsandbytes import read_bitsandbytes
from .packing_compressed_tensors import read_compressed_tensors
from .packing_fp4 import read_modelopt, read_mxfp4
from .packing_fp8 import read_fp8
from .packing_gptq import read_awq, read_gptq
from .residual_packing import read_residual
from .tensor_codec import Packing

# By `quant_method`: reads the rest of the object. ValueError says what is wrong with it.
READERS: Final[dict[str, Callable[[Mapping[str, object]], Packing]]] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_fp8,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
    LOSSLESS_METHOD: read_lossless,
    RESIDUAL_METHOD: read_residual,
}
OURS: Final = {LOSSLESS_METHOD, RESIDUAL_METHOD}  # what nobody is told to look for


def read_packing(quantization: Mapping[str, object], where: str) -> Packing:
    """The packing that the object `quantization_config` of the file `where` describes, or its older `compression_config`. Which
    parameters are packed is told by their tensors; lists of modules are not read. ModelError for a method that we do not know,
    and for one that is described wrongly."""
    method = quant_method(quantization)
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise ModelError(
            f"its weights are quantised by {said(method)}, which we do not read",
            where=where,
            cure=f"take the model in 16 bit, or quantised by one of {', '.join(sorted(READERS.keys() - OURS))}",
        )
    try:
        return reader(quantization)
    except ValueError as error:
        raise ModelError(
            f"its weights are quantised by {method}, and the config {error}",
            where=where,
            cure="use the config.json that belongs to these weights, or take the model in 16 bit",
        ) from error
