"""What a model is, read from its config: the shape of its decoder layers, and whether we can run it exactly.

The model is built on the meta device, which costs no memory and asks transformers itself for names and shapes.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..coding.tensor_codec import Packing
from ..errors import ModelError
from ..weights.checkpoint import Checkpoint, check_tensors, have_same_bytes
from ..weights.packed import find_codecs, module_and_part, stored_shapes
from ..weights.packed_source import Codecs
from .attention import ATTENTION, register
from .probe import probe_layers
from .rope import Rope, read_rope
from .transformers_api import (
    PreTrainedModel,
    build_on_meta,
    keeps_float32,
    make_config,
    read_config,
    take_quantization,
    tied_parameters,
)

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]

MAX_LAYERS = 2048  # building them takes seconds; a config that lies must not take hours
_LAYER_KINDS = {"full_attention", "sliding_attention"}  # chunked attention sees no token of an earlier chunk, however near
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model on the meta device and the names of its tensors.

    `layer_shapes` are the parameters of each decoder layer, named without `prefix` and number; equal layers share one object.
    `outside_shapes` are the parameters outside the layers (embedding, final norm, head), full names, tied ones once.
    `kv_shapes` are (key/value heads, head dimension) of every layer; `windows` how many tokens the attention of each sees,
    its own included, or None. `quantization` is what the config says of how weights are stored, empty where they are as they
    compute.
    """

    config: Any
    model: PreTrainedModel
    rope: Rope
    prefix: str
    num_layers: int
    kv_shapes: tuple[tuple[int, int], ...]
    windows: tuple[int | None, ...]
    layer_shapes: tuple[Shapes, ...]
    outside_shapes: Shapes
    quantization: Mapping[str, Any]

    @property
    def expected_tensors(self) -> Shapes:
        layers = {
            f"{self.prefix}.{layer}.{name}": shape
            for layer, shapes in enumerate(self.layer_shapes)
            for name, shape in shapes.items()
        }
        return {**layers, **self.outside_shapes}

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int:
        return self.rope.max_positions

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.config.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the model in `folder`. ModelError when config.json is missing or invalid, or when the model is
    one that we would not compute exactly."""
    where = str(folder / "config.json")
    try:
        config = read_config(folder)
    except Exception as error:  # transformers raises anything here: OSError, ValueError, KeyError, StrictDataclassError
        raise _not_buildable(error, where) from error
    return architecture_of(config, where)


def read_architecture_of(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that `values`, the contents of a config.json, describe. Errors as in `read_architecture`."""
    try:
        config = make_config(values)
    except Exception as error:
        raise _not_buildable(error, where) from error
    return architecture_of(config, where)


def architecture_of(config: Any, where: str) -> Architecture:
    """The architecture that transformers builds from `config`, which came from `where`. Errors as in `read_architecture`."""
    try:
        quantization = take_quantization(config)
        _check_sizes(config)
        register()
        model = build_on_meta(config, ATTENTION)
    except Exception as error:
        raise _not_buildable(error, where) from error
    _refuse_unsupported(config, model, where)
    model.eval()
    try:
        rope = read_rope(config.to_dict())
        kv_shapes, windows = probe_layers(model, rope, config.num_hidden_layers)
    except ValueError as error:
        raise _unsupported(str(error), config, where) from error
    prefix = "model.layers"
    layers = list(model.get_submodule(prefix).children())
    kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], Shapes] = {}
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in layers]
    return Architecture(
        config=config,
        model=model,
        rope=rope,
        prefix=prefix,
        num_layers=len(layers),
        kv_shapes=kv_shapes,
        windows=windows,
        layer_shapes=tuple(kinds.setdefault(tuple(shape.items()), shape) for shape in shapes),
        outside_shapes={name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(f"{prefix}.")},
        quantization=MappingProxyType(quantization),
    )


def shortened(architecture: Architecture, num_layers: int) -> Architecture:
    """The same model with `num_layers` decoder layers, for measuring."""
    config = copy.deepcopy(architecture.config)
    config.num_hidden_layers = num_layers
    if (kinds := getattr(config, "layer_types", None)) is not None:
        config.layer_types = (kinds * num_layers)[:num_layers]
    return architecture_of(config, "a shortened model")


def match_weights(
    architecture: Architecture, checkpoint: Checkpoint, packing: Packing | None = None
) -> tuple[Architecture, Checkpoint, Codecs]:
    """The architecture and the tensors as transformers would put the two together, and the codecs of those parameters that are
    packed. CheckpointError naming every tensor that the config asks for and the files have not.

    Where the config ties two tensors of which the files have both, and they differ, they are not tied; where the files have
    the other of the two, it is taken. Tensors that the model has no place for are left out, with a warning.
    """
    tied = tied_parameters(architecture.model)
    tensors = dict(checkpoint.tensors)
    for name, owner in tied.items():
        if name in tensors and owner in tensors:
            if not have_same_bytes(tensors[name], tensors[owner]):
                logger.warning("config.json ties %s to %s, and the files hold two: both are used", name, owner)
                return match_weights(_untied(architecture, str(checkpoint.folder)), checkpoint, packing)
        elif name in tensors:
            tensors[owner] = tensors[name]
    checkpoint = replace(checkpoint, tensors=MappingProxyType(tensors))
    codecs = find_codecs(checkpoint, architecture.expected_tensors, packing) if packing is not None else {}
    others = check_tensors(checkpoint, stored_shapes(architecture.expected_tensors, codecs))
    beside = {name.rpartition(".")[0] for name in codecs}  # scales of activations, say, which are left as they are
    unknown = [
        name for name in others if name not in tied and "rotary_emb." not in name and module_and_part(name)[0] not in beside
    ]
    if unknown:
        few, more = ", ".join(unknown[:3]), f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        logger.warning("tensors that this model has no place for are left out, as in transformers: %s%s", few, more)
    return architecture, checkpoint, codecs


def _untied(architecture: Architecture, where: str) -> Architecture:
    config = copy.deepcopy(architecture.config)
    config.tie_word_embeddings = False
    return replace(architecture_of(config, where), quantization=architecture.quantization)


def _check_sizes(config: Any) -> None:
    """ValueError for a size that no model has, before anything is built from it."""
    for name in (*_SIZES, "max_position_embeddings"):
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}")
    if (getattr(config, "num_hidden_layers", None) or 0) > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, more than {MAX_LAYERS}")


def _refuse_unsupported(config: Any, model: PreTrainedModel, where: str) -> None:
    names = {name for name, _ in model.named_parameters()}
    if any("experts" in key and value for key, value in config.to_dict().items()):
        raise _unsupported("it is a mixture of experts", config, where)
    if not any(name.startswith("model.layers.0.") for name in names):
        raise _unsupported("its decoder layers are not at model.layers", config, where)
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_KINDS
    if kinds:
        raise _unsupported(f"its layers are of other kinds than attention ({min(kinds)})", config, where)
    buffers = sorted(name for name, _ in model.named_buffers() if "rotary_emb" not in name.split("."))
    # Tensors that are neither weights nor buffers would stay on the meta device.
    buffers += [key for module in model.modules() for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    if buffers:
        raise _unsupported(f"it keeps buffers that are not weights ({buffers[0]})", config, where)
    if kept := keeps_float32(model):
        raise _unsupported(f"a part of it stays in float32 whatever the dtype ({kept[0]})", config, where)
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    if getattr(config, "attn_logit_softcapping", None) or not num_kv_heads or config.num_attention_heads % num_kv_heads:
        raise _unsupported("its attention is not plain grouped-query attention", config, where)
    if getattr(config, "max_position_embeddings", None) is None:
        raise _unsupported("its config names no max_position_embeddings", config, where)


def _not_buildable(error: Exception, where: str) -> ModelError:
    return ModelError(
        f"not a causal language model that transformers can build: {_one_line(error)}",
        where=where,
        cure="give the folder of a dense decoder such as Llama, Mistral, Qwen2 or Qwen3",
    )


def _unsupported(reason: str, config: Any, where: str) -> ModelError:
    return ModelError(
        f"{config.model_type} is not supported: {reason}",
        where=where,
        cure="use a dense decoder such as Llama, Mistral, Qwen2 or Qwen3",
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text
