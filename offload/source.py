"""A model that was looked at and not yet loaded: what it is, where its tensors are, how large it will be."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .coding.kernels import has_kernels
from .config import EngineSettings
from .errors import ModelError
from .model.architecture import Architecture
from .model.files import ModelFiles, dtype_text, first_parameter, open_model
from .scale.model import open_scale_model
from .scale.preset import is_scale_model
from .text.tokenizer import Tokenizer, open_tokenizer
from .typed_model import TypedModel, resolve_dtype
from .weights.checkpoint import Checkpoint
from .weights.encoding import LOSSLESS
from .weights.encoding_source import encoding_source
from .weights.packed import stored_shapes
from .weights.packed_source import Codecs, DecodedSource, check_scales
from .weights.source import CheckpointSource, TensorSource

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes read, and to be read in all


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model whose config, tokenizer and tensors were checked against each other. `path` is the folder or the
    GGUF file that has its tokenizer. `tensors` are those that are stored, `parameters` those that the model has; `checkpoint`
    is the files that they come from, if any."""

    path: Path
    checkpoint: Checkpoint | None
    tensors: TensorSource
    parameters: TensorSource
    tokenizer: Tokenizer | None
    model: TypedModel

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def stored_names(self, layers: Iterable[int]) -> list[str]:
        """Of the tensors that are stored of `layers`, and of the parameters outside the layers."""
        prefix, codecs = self.architecture.prefix, self.model.codecs
        of_layers = [f"{prefix}.{layer}.{field.name}" for layer in layers for field in codecs[layer].stored.fields]
        return [*of_layers, *stored_shapes(self.architecture.outside_shapes, self.model.packed)]


def check_source(
    name: str,
    flag: str,
    dtype: str,
    device_type: str,
    *,
    codec: str = "auto",
    decode_kernels: str = "auto",
    progress: Progress | None = None,
) -> ModelSource:
    """The model `name`, a folder, a GGUF file or a hub id, as `flag` gave it. Errors of errors.py for whatever is wrong.
    `progress` gets the bytes read and those to be read where `codec` says that weights are looked at."""
    source = _made(name, flag) if is_scale_model(name) else _of_files(open_model(name, flag), codec)
    if codec == "lossless" and not source.codecs:
        source = _coded(source, progress)
    tokenizer = open_tokenizer(source.path)
    if tokenizer is not None and tokenizer.num_tokens > source.architecture.vocab_size:
        raise ModelError(
            f"the tokenizer numbers {tokenizer.num_tokens} tokens, the model's embedding has {source.architecture.vocab_size}",
            where=str(source.path),
            cure="use the tokenizer files that belong to this model",
        )
    model = TypedModel(
        architecture=source.architecture,
        dtype=resolve_dtype(dtype, source.stored, device_type),
        weights=source.weights or dtype_text(source.stored),
        packed=source.codecs,
        kernels=device_type == "cuda" and decode_kernels == "auto" and has_kernels(),
    )
    parameters = DecodedSource(stored=source.tensors, codecs=source.codecs) if source.codecs else source.tensors
    return ModelSource(
        path=source.path,
        checkpoint=source.checkpoint,
        tensors=source.tensors,
        parameters=parameters,
        tokenizer=tokenizer,
        model=model,
    )


def open_target(settings: EngineSettings, device_type: str, progress: Progress | None = None) -> ModelSource:
    return _open(settings, settings.model, "--model", device_type, settings.codec, progress)


def open_drafts(settings: EngineSettings, device_type: str) -> list[ModelSource]:
    """In their order. What is 16 bit stays so: nothing of a draft is streamed."""
    return [_open(settings, name, "--draft-model", device_type, "auto") for name in settings.draft_models]


def _open(
    settings: EngineSettings, name: str, flag: str, device_type: str, codec: str, progress: Progress | None = None
) -> ModelSource:
    kernels = settings.decode_kernels
    return check_source(name, flag, settings.dtype, device_type, codec=codec, decode_kernels=kernels, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """`stored` is the dtype of the weights where they come from; `codecs` are those of the parameters that travel otherwise."""

    path: Path
    architecture: Architecture
    stored: torch.dtype
    tensors: TensorSource
    checkpoint: Checkpoint | None = None
    weights: str = ""
    codecs: Codecs = field(default_factory=dict)


def _made(name: str, flag: str) -> _Source:
    folder, architecture, tensors = open_scale_model(name, flag)
    stored = tensors.dtype(first_parameter(architecture))
    return _Source(path=folder, architecture=architecture, stored=stored, tensors=tensors)


def _of_files(files: ModelFiles, codec: str) -> _Source:
    tensors: TensorSource = CheckpointSource(files.checkpoint)
    codecs = files.codecs
    check_scales(tensors, codecs, str(files.path))
    if codecs and files.is_lossless and codec == "none":
        tensors, codecs = DecodedSource(stored=tensors, codecs=codecs), {}
    return _Source(
        path=files.path,
        architecture=files.architecture,
        stored=files.dtype,
        tensors=tensors,
        checkpoint=files.checkpoint,
        weights=files.weights,
        codecs=codecs,
    )


def _coded(source: _Source, progress: Progress | None) -> _Source:
    """With the decoder layers coded without loss while they are loaded."""
    architecture, tensors = source.architecture, source.tensors
    prefix, equal = architecture.prefix, sorted(tensors.equal_layers)
    parameters: dict[str, tuple[int, ...]] = {}
    copies: dict[str, str] = {}
    for layer, shapes in enumerate(architecture.layer_shapes):
        for name, shape in shapes.items():
            if layer in equal[1:]:
                copies[f"{prefix}.{layer}.{name}"] = f"{prefix}.{equal[0]}.{name}"
            else:
                parameters[f"{prefix}.{layer}.{name}"] = shape
    total_bytes, read_bytes = sum(map(tensors.num_bytes, parameters)), 0

    def count(num_bytes: int) -> None:
        nonlocal read_bytes
        read_bytes += num_bytes
        if progress is not None:
            progress(read_bytes, total_bytes)

    coded_tensors = encoding_source(tensors, parameters, copies, LOSSLESS, count)
    if not coded_tensors.codecs:
        logger.warning("--codec lossless: there is nothing to gain by a code for %s", dtype_text(source.stored))
        return source
    weights = f"{dtype_text(source.stored)}, coded without loss"
    return replace(source, tensors=coded_tensors, codecs=coded_tensors.codecs, weights=weights)
