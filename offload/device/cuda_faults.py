"""Pure: what an error of CUDA or of the libraries on top of it means, read from its words: torch gives most of them the type
RuntimeError, or its subclass AcceleratorError, and nothing else to tell them apart by."""

import re

import torch

from ..errors import DeviceError, DeviceMemoryError, OffloadError

# Also where graphs are instantiated and libraries make handles and workspaces, which torch's own exception does not cover.
_OUT_OF_MEMORY = re.compile(
    r"CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU\w+_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
)
# After these nothing runs on the device any more in this process, or on this machine. A wrong call is not among them.
_LOST = re.compile(
    r"CUDA (driver )?error: .*("
    r"illegal (memory access|address|instruction)|misaligned address|invalid (program counter|address space)"
    r"|launch failure|launch timed out|device-side assert|stack error|ECC error|NVLink|nvlink|hardware error"
    r"|unknown error|device.* (lost|unavailable)|no CUDA-capable device|driver shutting down|initialization error"
    r"|CU\w+_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR))"
)


def kind_of(error: BaseException) -> type[OffloadError] | None:
    """DeviceMemoryError, DeviceError, or None for what is neither, such as a fault of ours."""
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceMemoryError
    if not isinstance(error, RuntimeError):
        return None
    return DeviceMemoryError if _OUT_OF_MEMORY.search(words) else DeviceError if _LOST.search(words) else None


def translate(device_name: str, error: Exception) -> None:
    """Raises `error` as one of ours, if it is one of those."""
    kind, words = kind_of(error), str(error).partition("\n")[0]
    if kind is DeviceMemoryError:
        raise DeviceMemoryError(
            f"out of memory: {words}",
            where=f"{device_name}, memory",
            cure="lower --gpu-memory, --resident-layers or --max-context, or end what else uses the GPU",
        ) from error
    if kind is DeviceError:
        raise DeviceError(
            f"the GPU failed: {words}",
            where=device_name,
            cure="start again; if it comes back, look at `dmesg` and `nvidia-smi -q`, and try --draft-passes eager",
        ) from error
