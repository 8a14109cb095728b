"""Whether decoders have kernels here: they are written in Triton, which comes with torch's builds for CUDA."""

import importlib.util


def has_kernels() -> bool:
    return importlib.util.find_spec("triton") is not None
