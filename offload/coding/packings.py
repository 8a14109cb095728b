"""What a config.json says of how its weights are packed."""

from collections.abc import Callable, Mapping
from typing import Final

from ..errors import ModelError
from .lossless_packing import METHOD, read_lossless
from .tensor_codec import Packing

# By `quant_method`: reads the rest of the object. ValueError says what is wrong with it.
READERS: Final[dict[str, Callable[[Mapping[str, object]], Packing]]] = {METHOD: read_lossless}


def read_packing(quantization: Mapping[str, object], where: str) -> Packing:
    """The packing that the object `quantization_config` of the file `where` describes. ModelError for a method that we do not
    know, and for one that is described wrongly."""
    method = quantization.get("quant_method")
    known = ", ".join(sorted(READERS))
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise ModelError(
            f"its weights are quantised by {str(method)[:60]!r}, which we do not read",
            where=where,
            cure=f"take the model in 16 bit, or quantised by one of {known}",
        )
    try:
        return reader(quantization)
    except ValueError as error:
        raise ModelError(
            f"its weights are quantised by {method}, and the config {error}",
            where=where,
            cure="use the config.json that belongs to these weights",
        ) from error
