"""A model that was looked at and not yet loaded: what it is, where its tensors are, how large it will be."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import ModelError
from .model.architecture import Architecture, architecture_of, match_weights, read_architecture
from .model.locate import locate_model
from .model.transformers_api import make_config
from .planner.cost import LayerCost, ModelCost, kv_bytes_per_row
from .planner.shapes import read_preset_config
from .scale.model import open_scale_model
from .scale.preset import is_scale_model
from .text.tokenizer import Tokenizer, open_tokenizer
from .weights.checkpoint import open_checkpoint
from .weights.codec import LayerCodec, identities
from .weights.layout import LayerLayout, of_one_dtype
from .weights.source import CheckpointSource, TensorSource


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedModel:
    """An architecture in the dtype it will run in: everything that has a size."""

    architecture: Architecture
    dtype: torch.dtype

    @property
    def codecs(self) -> tuple[LayerCodec, ...]:
        """How each decoder layer is stored and computed. Equal layers share one."""
        return identities(self.architecture.layer_shapes, self.dtype)

    @property
    def outside_layout(self) -> LayerLayout:
        """Of the tensors outside the decoder layers."""
        return LayerLayout.pack(of_one_dtype(self.architecture.outside_shapes, self.dtype))

    @property
    def cost(self) -> ModelCost:
        architecture, config, itemsize = self.architecture, self.architecture.config, self.dtype.itemsize
        kinds = list(zip(self.codecs, architecture.kv_shapes, strict=True))
        costs = {
            (codec, kv_shape): LayerCost(
                stored_bytes=codec.stored.num_bytes,
                computed_bytes=codec.computed.num_bytes,
                num_parameters=codec.computed.num_elements,
                kv_bytes_per_row=kv_bytes_per_row(*kv_shape, itemsize),
                scratch_bytes=codec.scratch_bytes,
            )
            for codec, kv_shape in set(kinds)
        }
        return ModelCost(
            layers=tuple(costs[kind] for kind in kinds),
            outside_bytes=self.outside_layout.num_bytes,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=max(head_dim for _, head_dim in architecture.kv_shapes),
            vocab_size=architecture.vocab_size,
            dtype_bytes=itemsize,
            num_masks=len(set(architecture.windows)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model whose config, tokenizer and tensors were checked against each other. `folder` has its tokenizer."""

    folder: Path
    tensors: TensorSource
    tokenizer: Tokenizer | None
    model: TypedModel

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def stored_names(self, layers: Iterable[int]) -> list[str]:
        """Of the tensors that are stored of `layers`, and of those outside the layers."""
        prefix, codecs = self.architecture.prefix, self.model.codecs
        of_layers = [f"{prefix}.{layer}.{field.name}" for layer in layers for field in codecs[layer].stored.fields]
        return [*of_layers, *self.architecture.outside_shapes]


def check_source(name: str, flag: str, dtype: str, device_type: str) -> ModelSource:
    """The model `name`, a folder or a hub id, as `flag` gave it. Errors of errors.py for whatever is wrong with it."""
    folder, architecture, tensors = open_scale_model(name, flag) if is_scale_model(name) else _open_folder(name, flag)
    tokenizer = open_tokenizer(folder)
    if tokenizer is not None and tokenizer.num_tokens > architecture.vocab_size:
        raise ModelError(
            f"the tokenizer numbers {tokenizer.num_tokens} tokens, the model's embedding has {architecture.vocab_size}",
            where=str(folder),
            cure="use the tokenizer files that belong to this model",
        )
    stored = tensors.dtype(f"{architecture.prefix}.0.{next(iter(architecture.layer_shapes[0]))}")
    model = TypedModel(architecture=architecture, dtype=resolve_dtype(dtype, stored, device_type))
    return ModelSource(folder=folder, tensors=tensors, tokenizer=tokenizer, model=model)


def _open_folder(name: str, flag: str) -> tuple[Path, Architecture, TensorSource]:
    folder = locate_model(name, flag)
    checkpoint = open_checkpoint(folder)  # first: a damaged config is told from one of another architecture here
    architecture = read_architecture(folder)
    architecture, checkpoint = match_weights(architecture, checkpoint)
    return folder, architecture, CheckpointSource(checkpoint)


def typed_preset(name: str, dtype: str, device_type: str) -> TypedModel:
    """The preset `name` of profiles/models, which has a shape and no weights."""
    config, where = read_preset_config(name)
    stored = DTYPES[str(config["dtype"])]
    architecture = architecture_of(make_config(config), where)
    return TypedModel(architecture=architecture, dtype=resolve_dtype(dtype, stored, device_type))


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def resolve_dtype(name: str, stored: torch.dtype, device_type: str) -> torch.dtype:
    """auto: the checkpoint's own on a GPU, bfloat16 where nobody computes in that, such as eight bits; float32 on the CPU,
    where 16-bit arithmetic is slow or emulated."""
    if name != "auto":
        return DTYPES[name]
    if device_type == "cpu":
        return torch.float32
    return stored if stored in DTYPES.values() else torch.bfloat16
