"""A model that was looked at and not yet loaded: what it is, where its tensors are, how large it will be."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .coding.kernels import has_kernels
from .config import EngineSettings, base_of_draft
from .errors import ModelError, UsageError
from .model.architecture import Architecture
from .model.files import dtype_text
from .stored import Progress, Storing, store_as
from .text.tokenizer import Tokenizer, open_tokenizer
from .typed_model import TypedModel, base_draft, resolve_dtype
from .weights.checkpoint import Checkpoint
from .weights.packed import stored_shapes
from .weights.source import TensorSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model whose config, tokenizer and tensors were checked against each other. `path` is the folder or the
    GGUF file that has its tokenizer. `tensors` are those that are stored, `parameters` those that the model has; `checkpoint`
    is the files that they come from, if any. `plain` is the same model without the base that it has only in order to draft."""

    path: Path
    checkpoint: Checkpoint | None
    tensors: TensorSource
    parameters: TensorSource
    tokenizer: Tokenizer | None
    model: TypedModel
    plain: "ModelSource | None" = None

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def stored_names(self, layers: Iterable[int]) -> list[str]:
        """Of the tensors that are stored of `layers`, in `tensors`."""
        prefix, codecs = self.architecture.prefix, self.model.codecs
        return [f"{prefix}.{layer}.{field.name}" for layer in layers for field in codecs[layer].stored.fields]

    def base_names(self, layers: Iterable[int]) -> list[str]:
        """Of those that stay on the device of `layers`, in `tensors`."""
        prefix, codecs = self.architecture.prefix, self.model.codecs
        return [f"{prefix}.{layer}.{field.name}" for layer in layers for field in codecs[layer].base.fields]

    def parameter_names(self, layers: Iterable[int]) -> list[str]:
        """Of what `layers` compute with, in `parameters`."""
        prefix, shapes = self.architecture.prefix, self.architecture.layer_shapes
        return [f"{prefix}.{layer}.{name}" for layer in layers for name in shapes[layer]]

    @property
    def outside_names(self) -> list[str]:
        """Of the parameters outside the layers, as they are in `tensors`."""
        return list(stored_shapes(self.architecture.outside_shapes, self.model.packed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft that may be used: its `place` among EngineSettings.draft_models, and what it is called there. `on_host`: on the
    CPU, beside a device that has the target."""

    place: int
    name: str
    source: ModelSource
    on_host: bool = False


def check_source(
    name: str,
    flag: str,
    dtype: str,
    device_type: str,
    *,
    codec: str = "auto",
    decode_kernels: str = "auto",
    self_draft: str | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """The model `name`, a folder, a GGUF file or a hub id, as `flag` gave it. Errors of errors.py for whatever is wrong.
    `self_draft`: as --draft-model names a base that is to draft. `progress` gets the bytes read and those to be read where
    `codec`, or a base, asks for a look at the weights."""
    stored = store_as(name, flag, Storing(codec=codec, self_draft=self_draft), progress)
    tokenizer = open_tokenizer(stored.path)
    if tokenizer is not None and tokenizer.num_tokens > stored.architecture.vocab_size:
        raise ModelError(
            f"the tokenizer numbers {tokenizer.num_tokens} tokens, the model's embedding has {stored.architecture.vocab_size}",
            where=str(stored.path),
            cure="use the tokenizer files that belong to this model",
        )
    model = TypedModel(
        architecture=stored.architecture,
        dtype=resolve_dtype(dtype, stored.dtype, device_type),
        weights=stored.weights or dtype_text(stored.dtype),
        packed=stored.codecs,
        kernels=device_type == "cuda" and decode_kernels == "auto" and has_kernels(),
        bases=stored.bases,
        base=stored.base,
    )
    source = ModelSource(
        path=stored.path,
        checkpoint=stored.checkpoint,
        tensors=stored.tensors,
        parameters=stored.parameters,
        tokenizer=tokenizer,
        model=model,
    )
    return source if not stored.is_base_for_draft else replace(source, plain=_without_base(source, dtype_text(stored.dtype)))


def _without_base(source: ModelSource, raw_weights: str) -> ModelSource:
    """Layers that travel as what a base lacks travel as they are then."""
    model, tensors = replace(source.model, bases={}, base=None), source.tensors
    if any(codec.kept for codec in model.packed.values()):
        model, tensors = replace(model, packed={}, weights=raw_weights), source.parameters
    return replace(source, model=model, tensors=tensors)


def open_target(settings: EngineSettings, device_type: str, progress: Progress | None = None) -> ModelSource:
    """With a base, where one of the drafts is that, or layers travel as what it lacks."""
    return check_source(
        settings.model,
        "--model",
        settings.dtype,
        device_type,
        codec=settings.codec,
        decode_kernels=settings.decode_kernels,
        self_draft=settings.self_draft,
        progress=progress,
    )


def open_drafts(settings: EngineSettings, target: ModelSource, device_type: str, *, beside: bool = False) -> list[Draft]:
    """In their order, without "auto" where `target` can have no base. What is 16 bit stays so: nothing of a draft is
    streamed. `beside`: the target's device is not the CPU, which may have drafts of its own: behind the others if either may
    be taken, in place of them where the settings want it so. UsageError for a base then, which lies where the target does."""
    if beside and settings.draft_device == "cpu":
        if settings.self_draft is not None:
            raise UsageError(
                "a base of the target's layers lies and drafts on the target's device",
                where=f"--draft-model {settings.self_draft} with --draft-device cpu",
                cure="leave one of the two out",
            )
        return _drafts_on_host(settings)
    drafts = _drafts_on_device(settings, target, device_type)
    return (
        [*drafts, *_drafts_on_host(settings)] if beside and settings.draft_device == "auto" and device_type != "cpu" else drafts
    )


def _drafts_on_host(settings: EngineSettings) -> list[Draft]:
    drafts: list[Draft] = []
    for place, name in enumerate(settings.draft_models):
        if base_of_draft(name) is None:
            source = check_source(name, "--draft-model", settings.dtype, "cpu", decode_kernels=settings.decode_kernels)
            drafts.append(Draft(place=place, name=f"{source.path.name} on the CPU", source=source, on_host=True))
    return drafts


def _drafts_on_device(settings: EngineSettings, target: ModelSource, device_type: str) -> list[Draft]:
    drafts: list[Draft] = []
    for place, name in enumerate(settings.draft_models):
        if name != settings.self_draft:
            kernels = settings.decode_kernels
            source = check_source(name, "--draft-model", settings.dtype, device_type, decode_kernels=kernels)
            drafts.append(Draft(place=place, name=source.path.name, source=source))
        elif target.model.base is not None:
            source = replace(target, model=base_draft(target.model), plain=None)
            drafts.append(Draft(place=place, name=f"self:{target.model.base.name}", source=source))
    return drafts
