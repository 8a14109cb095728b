"""The tensors that a packed parameter needs, looked up and checked. Errors continue the sentence "tensor 'name' ..."."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from .tensor_codec import Part

Beside = Mapping[str, Part]
Shape = tuple[int, ...]


def need(
    beside: Beside, name: str, shapes: Collection[Shape], dtypes: Collection[torch.dtype], *, is_scale: bool = False
) -> Part:
    """The part `name`, of one of `shapes` and one of `dtypes`. ValueError where it is not there or is another."""
    part = beside.get(name)
    if part is None:
        raise ValueError(f"is packed, and its {name} is missing")
    if part.dtype not in dtypes:
        raise ValueError(f"has a {name} of {_name(part.dtype)}, not {' or '.join(sorted(map(_name, dtypes)))}")
    if part.shape not in shapes:
        raise ValueError(f"has a {name} of shape {list(part.shape)}, not {' or '.join(str(list(shape)) for shape in shapes)}")
    return replace(part, is_scale=is_scale)


def matrix(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a parameter that is packed. ValueError where it is no matrix."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"is packed and of shape {list(shape)}: only matrices are")
    return shape[0], shape[1]


def last_name(parameter: str) -> str:
    """What follows the last dot: the name of the part that the parameter itself is."""
    return parameter.rpartition(".")[2]


def whole_groups(size: int, group: int, what: str) -> int:
    """`size` in groups of `group`. ValueError where they do not divide it."""
    if size % group:
        raise ValueError(f"has {size} {what}, which are not whole groups of {group}")
    return size // group


def check_coded(needed: tuple[Part, ...], found: Beside) -> None:
    """Of a parameter in a code of ours: all that it needs is there. ValueError where it is not."""
    for part in needed:
        if part.name not in found:
            raise ValueError(f"is coded, and {part.name} is missing")
        if (found[part.name].shape, found[part.name].dtype) != (part.shape, part.dtype):
            there = f"{found[part.name].shape} of {found[part.name].dtype}"
            raise ValueError(f"is coded, and has a {part.name} of {there} in place of {part.shape} of {part.dtype}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
