"""Fields of a configuration that may hold anything. Errors continue a sentence about it: "... has bits of 'x'"."""

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import TypeVar

Config = Mapping[str, object]
T = TypeVar("T", bound=str | int)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
# What `convert` writes as quant_method: nobody else takes it for weights. And what people are told.
LOSSLESS_METHOD, LOSSLESS_NAME = "treestream_lossless", "16 bit, coded without loss"
RESIDUAL_METHOD, RESIDUAL_NAME = "treestream_residual", "16 bit, coded beside a base"
MAX_COUNT = 2**31 - 1  # no tensor's side is longer, and kernels count so far


def quant_method(quantization: Config) -> object:
    """Which method a quantization_config is of. Old files name none: their fields are one's own."""
    if (method := quantization.get("quant_method")) is not None:
        return method
    if "config_groups" in quantization:
        return "compressed-tensors"
    return "bitsandbytes" if "load_in_4bit" in quantization or "load_in_8bit" in quantization else None


def one_of(config: Config, key: str, allowed: Collection[T], default: T | None = None) -> T:
    """`config[key]`, which is one of `allowed`; `default` where it is not there or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    for known in allowed:
        if type(value) is type(known) and value == known:
            return known
    raise ValueError(f"has {key} {said(value)}, not {' or '.join(map(str, allowed))}")


def count(config: Config, key: str, default: int | None = None) -> int:
    """`config[key]`, a size; `default` where it is not there or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise ValueError(f"has {key} {said(value)}, which is no size")
    return value


def group_size(config: Config, key: str) -> int | None:
    """`config[key]`, a size; None for -1: all in one group."""
    return None if type(config.get(key)) is int and config[key] == -1 else count(config, key)


def block_size(config: Config, key: str) -> tuple[int, int] | None:
    """`config[key]`, [rows, columns] or, in old files, "128x128"; None where it is not there or null."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}x[0-9]{1,9}", value):
        value = [int(side) for side in value.split("x")]
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and 1 <= rows <= MAX_COUNT and 1 <= columns <= MAX_COUNT:
            return rows, columns
    raise ValueError(f"has {key} {said(value)}, which are no two sizes")


def section(config: Config, key: str) -> Config:
    """`config[key]`, an object; an empty one where it is not there or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"has {key} {said(value)}, which is no object")
    return value


def said(value: object) -> str:
    """Fit to print: short, and whatever it is."""
    try:
        return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    except ValueError:  # an integer of thousands of digits
        return "a number that is too long"
