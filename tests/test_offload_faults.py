"""What torch and the system raise when something is wrong with the machine is told in errors of ours, whatever device it is."""

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from offload.device import Device
from offload.errors import HostMemoryError, NumericError, OutOfMemoryError

ABSURD_BYTES = 2**60


def vector_of_c() -> None:
    raise RuntimeError("std::bad_alloc")


REFUSED: list[Callable[[], object]] = [
    lambda: torch.empty(ABSURD_BYTES, dtype=torch.uint8),
    lambda: np.empty(ABSURD_BYTES, dtype=np.uint8),
    lambda: bytearray(ABSURD_BYTES),
    vector_of_c,
]


@pytest.mark.parametrize("allocate", REFUSED)
def test_memory_that_the_system_refuses_is_an_error_of_three_lines_with_the_size(
    device: Device, allocate: Callable[[], object]
) -> None:
    with pytest.raises(HostMemoryError) as caught, device.translated(), device.translated():
        allocate()
    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 4 and len(lines) == 3 and lines[0].startswith("out of memory: ")
    assert "enforce fail" not in lines[0] and (allocate is not REFUSED[0] or str(ABSURD_BYTES) in lines[0])


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), KeyboardInterrupt(), KeyError(1), NumericError("NaN", where="x", cure="y")]
)
def test_any_other_error_passes_as_it_is(device: Device, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, device.translated():
        raise error
    assert caught.value is error


def test_what_was_computed_goes_with_the_error_and_not_when_the_garbage_is_collected(device: Device) -> None:
    class Computed:
        pass

    alive: list[weakref.ref[Computed]] = []

    def compute() -> None:
        computed = Computed()
        alive.append(weakref.ref(computed))
        raise MemoryError

    gc.disable()
    try:
        try:
            with device.translated():
                compute()
        except OutOfMemoryError as error:
            assert error.what == "out of memory: MemoryError"
        assert alive[0]() is None
    finally:
        gc.enable()
