"""How a model's tensors are stored while it runs: as they are in its files, coded while they are loaded, or decoded; and which
of its parameters have a base."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .coding.base_kinds import BASE_KINDS, BaseKind
from .coding.tensor_codec import Part
from .config import EngineSettings
from .model.architecture import Architecture
from .model.files import ModelFiles, dtype_text, first_parameter, open_model
from .planner.offered import wanted_base
from .scale.model import open_scale_model
from .scale.preset import is_scale_model
from .weights.checkpoint import Checkpoint
from .weights.encoding import Scheme
from .weights.encoding_source import encoding_source
from .weights.packed_source import Codecs, DecodedSource, check_scales
from .weights.source import CheckpointSource, TensorSource

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes read, and to be read in all
Bases = Mapping[str, tuple[Part, ...]]  # of the parameters that have a base, by full name


@dataclass(frozen=True, slots=True, kw_only=True)
class Storing:
    """What flags say: `codec` is --codec, `self_draft` the base that is to draft as --draft-model names it: "self",
    "self:KIND", "auto" where there may be one, None where none is asked for."""

    codec: str
    self_draft: str | None = None

    def base(self, *, packed: str = "", there: str = "") -> BaseKind | None:
        """Of the base that is asked for: see planner/offered.py, which says why there can be none."""
        names = (self.self_draft,) if self.self_draft is not None else ()
        kind = wanted_base(EngineSettings(model="", draft_models=names, codec=self.codec), packed=packed, base=there)
        return BASE_KINDS[kind] if kind is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A model whose files were checked, or that is made. `dtype` is that of the weights where they come from; `codecs` are
    those of the parameters that travel otherwise, `parameters` the tensors that the model has. `bases` are of kind `base`;
    `is_base_for_draft`: there would be none, did it not draft."""

    path: Path
    architecture: Architecture
    dtype: torch.dtype
    tensors: TensorSource
    parameters: TensorSource
    checkpoint: Checkpoint | None = None
    weights: str = ""
    codecs: Codecs = field(default_factory=dict)
    bases: Bases = field(default_factory=dict)
    base: BaseKind | None = None
    is_base_for_draft: bool = False


def store_as(name: str, flag: str, storing: Storing, progress: Progress | None) -> Stored:
    """The model `name`, as `flag` gave it. UsageError for a base that it cannot have, ModelError or CheckpointError for
    whatever is wrong with its files. `progress` gets the bytes read and those to be read where weights have to be looked at."""
    if is_scale_model(name):
        return _coded(_made(name, flag), storing, progress)
    files = open_model(name, flag)
    stored = _of_files(files)
    if files.codecs and not files.is_lossless:
        storing.base(packed=files.weights)
        return stored
    if files.base is not None:
        storing.base(there=files.base.name)
        return stored if storing.codec != "none" else _of_its_base(stored, storing)
    as_it_is = ("auto", "lossless") if files.codecs else ("auto", "none")
    if storing.codec in as_it_is and storing.base() is None:
        return stored
    return _coded(_decoded(stored), storing, progress)


def _made(name: str, flag: str) -> Stored:
    folder, architecture, tensors = open_scale_model(name, flag)
    dtype = tensors.dtype(first_parameter(architecture))
    return Stored(path=folder, architecture=architecture, dtype=dtype, tensors=tensors, parameters=tensors)


def _of_files(files: ModelFiles) -> Stored:
    """As the files have it."""
    tensors, codecs = CheckpointSource(files.checkpoint), files.codecs
    check_scales(tensors, codecs, str(files.path))
    decoded = DecodedSource(stored=tensors, codecs=codecs, unpacked=files.dtype if files.is_lossless else None)
    return Stored(
        path=files.path,
        architecture=files.architecture,
        dtype=files.dtype,
        tensors=tensors,
        parameters=decoded if codecs else tensors,
        checkpoint=files.checkpoint,
        weights=files.weights,
        codecs=codecs,
        bases=files.bases,
        base=files.base,
    )


def _decoded(stored: Stored) -> Stored:
    """What is coded in the files is decoded on the host, while it is loaded. A base stays what it is."""
    return replace(stored, tensors=stored.parameters, codecs={}, weights=dtype_text(stored.dtype))


def _of_its_base(stored: Stored, storing: Storing) -> Stored:
    """What is coded beside a base travels as it computes; the base only drafts, if it does."""
    drafts = storing.self_draft is not None
    decoded = _decoded(stored)
    return replace(decoded, is_base_for_draft=True) if drafts else replace(decoded, bases={}, base=None)


def _coded(source: Stored, storing: Storing, progress: Progress | None) -> Stored:
    """With the decoder layers coded while they are loaded, and bases made of them, as `storing` has it."""
    base = storing.base()
    travel = storing.codec if storing.codec != "auto" else "none" if base is None else "residual"
    scheme = Scheme(travel, base)
    if scheme == Scheme("none"):
        return source
    parameters, copies = _parameters_and_copies(source)
    tensors = encoding_source(source.tensors, parameters, copies, scheme, _counter(source, parameters, progress))
    dtype = dtype_text(source.dtype)
    if storing.codec in ("lossless", "residual") and not tensors.codecs:
        logger.warning("--codec %s: there is nothing to gain by a code for %s", storing.codec, dtype)
        if storing.self_draft is None:
            return source
    code = f", coded beside a base of {scheme.kind.name}" if scheme.travel == "residual" else ", coded without loss"
    return replace(
        source,
        tensors=tensors,
        parameters=source.tensors,
        codecs=tensors.codecs,
        weights=dtype + code if tensors.codecs else dtype,
        bases=tensors.bases,
        base=scheme.base,
        is_base_for_draft=storing.codec != "residual" and scheme.base is not None,
    )


def _parameters_and_copies(source: Stored) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of the decoder layers' parameters, by full name; of layers with the same bytes only of one, and whose the
    others' are."""
    prefix, equal = source.architecture.prefix, sorted(source.tensors.equal_layers)
    parameters: dict[str, tuple[int, ...]] = {}
    copies: dict[str, str] = {}
    for layer, shapes in enumerate(source.architecture.layer_shapes):
        for name, shape in shapes.items():
            if layer in equal[1:]:
                copies[f"{prefix}.{layer}.{name}"] = f"{prefix}.{equal[0]}.{name}"
            else:
                parameters[f"{prefix}.{layer}.{name}"] = shape
    return parameters, copies


def _counter(source: Stored, parameters: Mapping[str, object], progress: Progress | None) -> Callable[[int], None]:
    total_bytes, read_bytes = sum(map(source.tensors.num_bytes, parameters)), 0

    def count(num_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += num_bytes
        if progress is not None:
            progress(read_bytes, total_bytes)

    return count
