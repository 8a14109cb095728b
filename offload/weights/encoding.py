"""How 16-bit parameters are coded on their way in: which of them, into what, and the threads that do it. Knows no files."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Final

import torch

from ..coding.base_kinds import BaseKind
from ..coding.base_layout import Base, base_parts, base_prefix
from ..coding.lossless import FORMATS, lossless_codec, pays
from ..coding.lossless_encode import Encoder, Survey
from ..coding.lossless_layout import Coded, prefix_of
from ..coding.residual import residual_codec
from ..coding.residual_layout import Remainder, remainder_parts
from ..coding.residual_survey import ResidualSurvey
from ..coding.tensor_codec import Part, TensorCodec
from ..errors import CheckpointError
from .header import quoted

if TYPE_CHECKING:
    from ..coding.residual_encode import ResidualEncoder

TRAVELS: Final = ("none", "lossless", "residual")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the parameters of decoder layers travel, one of TRAVELS, and the low-bit copy of them that is made beside, if any: a
    "residual" is what that lacks."""

    travel: str
    base: BaseKind | None = None

    def __post_init__(self) -> None:
        if self.travel not in TRAVELS or (self.travel == "residual" and self.base is None):
            raise ValueError(f"{self.travel} beside {self.base} is no scheme")

    @property
    def kind(self) -> BaseKind:
        """Of the copy that there is."""
        assert self.base is not None
        return self.base

    @property
    def name(self) -> str:
        """What people call weights so stored."""
        return "16-bit weights, coded beside a base" if self.travel == "residual" else "16-bit weights, coded without loss"

    def is_based(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a parameter gets a low-bit copy: a matrix of any float dtype."""
        return self.base is not None and len(shape) == 2 and 0 not in shape and dtype.is_floating_point

    def may_be_coded(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a parameter may travel as another than it is: a matrix in 16 bit, as vectors are too few bytes to matter.
        Then its weights say what comes of it."""
        if self.travel == "residual":
            return self.is_based(shape, dtype) and dtype in FORMATS
        return self.travel == "lossless" and len(shape) > 1 and dtype in FORMATS


LOSSLESS: Final = Scheme("lossless")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a parameter of that shape and dtype is stored: in the parts of `codec`, without one as it is; and `base` are the
    parts of its low-bit copy. `survey` is what the code needs to know of all of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    survey: Survey | ResidualSurvey | None = None
    codec: TensorCodec | None = None
    base: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that are made of it."""
        return (*(self.codec.parts if self.codec is not None else ()), *self.base)


class Coder:
    """The encoders of a scheme, whose threads, as many as there are cores for this process, share a tensor. Tensors are
    contiguous, on the CPU. Beside them it takes a few MiB for each thread, and where a remainder is encoded without its base
    that base."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme, self._stack = scheme, ExitStack()
        self._lossless = self._stack.enter_context(Encoder())
        self._residual = self._stack.enter_context(_residual_encoder(scheme.base)) if scheme.base is not None else None

    def __enter__(self) -> "Coder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def look(self, name: str, tensor: torch.Tensor) -> Encoding | None:
        """At a parameter that `may_be_coded`. None where it is stored as it is, and nothing beside it."""
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if self._scheme.travel == "residual":
            return self._look_beside_base(name, tensor)
        survey = self._lossless.survey(tensor)
        if survey is None:
            return unread(self._scheme, name, shape, dtype)
        codec = lossless_codec(name, shape, survey.num_escapes, survey.num_exceptions, dtype)
        if not pays(codec, shape):
            return unread(self._scheme, name, shape, dtype)
        return Encoding(shape=shape, dtype=dtype, survey=survey, codec=codec, base=_base_of(self._scheme, name, shape, dtype))

    def _look_beside_base(self, name: str, tensor: torch.Tensor) -> Encoding | None:
        """Coded even where it does not pay: that is never worse than a raw tensor by more than a few bytes, and one way to
        store what has a base suffices."""
        assert self._residual is not None
        shape, dtype = tuple(tensor.shape), tensor.dtype
        survey = self._residual.survey(tensor)
        if survey is None:
            return unread(self._scheme, name, shape, dtype)
        codec = residual_codec(
            name,
            shape,
            self._scheme.kind,
            num_words=survey.num_words,
            num_exceptions=survey.num_exceptions,
            dtype=dtype,
            is_half=survey.is_half,
        )
        return Encoding(shape=shape, dtype=dtype, survey=survey, codec=codec, base=codec.kept)

    def encode(self, name: str, tensor: torch.Tensor, encoding: Encoding, parts: Mapping[str, torch.Tensor]) -> None:
        """Fills `parts`, by what they are called beside the parameter: those of the codec, of the base, or of both. What
        travels is decoded and compared. CheckpointError for a tensor that is not the one that was looked at."""
        is_coded = encoding.codec is not None and encoding.codec.parts[0].name in parts
        is_based = bool(encoding.base) and encoding.base[0].name in parts
        try:
            if isinstance(encoding.survey, ResidualSurvey):
                self._encode_beside_base(name, tensor, encoding, parts, is_coded=is_coded, is_based=is_based)
                return
            if is_coded:
                assert encoding.survey is not None
                self._lossless.encode(tensor, encoding.survey, Coded.of(parts, prefix_of(name)))
            if is_based:
                assert self._residual is not None
                self._residual.encode_base(tensor, self._residual.fit(tensor), Base.of(parts, base_prefix(name)))
        except ValueError as error:
            raise CheckpointError(
                f"tensor {quoted(name)} {error}",
                where=self._scheme.name,
                cure="run again; if it happens again, check the disk and the memory of this machine",
            ) from error

    def _encode_beside_base(
        self,
        name: str,
        tensor: torch.Tensor,
        encoding: Encoding,
        parts: Mapping[str, torch.Tensor],
        *,
        is_coded: bool,
        is_based: bool,
    ) -> None:
        assert self._residual is not None and isinstance(encoding.survey, ResidualSurvey)
        if not is_based:
            parts = {**parts, **{part.name: torch.empty(part.shape, dtype=part.dtype) for part in encoding.base}}
        base = Base.of(parts, base_prefix(name))
        if is_coded:
            self._residual.encode(tensor, encoding.survey, base, Remainder.of(parts, prefix_of(name)))
        else:
            self._residual.encode_base(tensor, encoding.survey.fit, base)


def _residual_encoder(kind: BaseKind) -> "ResidualEncoder":
    from ..coding.residual_encode import ResidualEncoder  # numba: only where something is taken apart

    return ResidualEncoder(kind)


def unread(scheme: Scheme, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Encoding | None:
    """Of a parameter that is stored as it is, beside its base if it gets one: its weights need not be looked at."""
    base = _base_of(scheme, name, shape, dtype)
    return Encoding(shape=shape, dtype=dtype, base=base) if base else None


def _base_of(scheme: Scheme, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Part, ...]:
    return base_parts(name, shape, scheme.kind) if scheme.is_based(shape, dtype) else ()


def possible_parts(scheme: Scheme, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Part, ...]:
    """All that may be stored of a parameter in place of itself, or beside it, each as large as it may become."""
    base, most = _base_of(scheme, name, shape, dtype), 2 * math.prod(shape)
    if not scheme.may_be_coded(shape, dtype):
        return base
    if scheme.travel == "lossless":
        return (*lossless_codec(name, shape, most, most, dtype).parts, *base)
    prefix = prefix_of(name)
    remainders = (
        remainder_parts(
            prefix, math.prod(shape), scheme.kind, num_words=most, num_exceptions=most, dtype=dtype, is_half=is_half
        )
        for is_half in (False, True)
    )
    return (*chain.from_iterable(remainders), *base)
