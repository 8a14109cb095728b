"""Models that were checked and not yet loaded: config, tokenizer and tensors, held against each other. Reads no weight."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .config import EngineSettings
from .device import Device
from .errors import ModelError
from .model.architecture import Architecture, check_weights, read_architecture
from .model.locate import locate_model
from .planner.cost import ModelCost, kv_bytes_per_row
from .scale.model import is_scale_model, open_scale_model
from .text import TextCodec, open_codec
from .weights.checkpoint import open_checkpoint
from .weights.layout import LayerLayout
from .weights.source import CheckpointSource, TensorSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that was checked and not yet loaded. `folder` has its tokenizer and generation config."""

    folder: Path
    architecture: Architecture
    tensors: TensorSource
    codec: TextCodec | None
    dtype: torch.dtype
    layout: LayerLayout

    @property
    def shared_layout(self) -> LayerLayout:
        return LayerLayout.pack(self.architecture.shared_shapes.items(), self.dtype)

    @property
    def cost(self) -> ModelCost:
        architecture, config = self.architecture, self.architecture.config
        return ModelCost(
            num_layers=architecture.num_layers,
            layer_bytes=self.layout.num_bytes,
            shared_bytes=self.shared_layout.num_bytes,
            kv_bytes_per_row=kv_bytes_per_row(
                architecture.num_layers, architecture.num_kv_heads, architecture.head_dim, self.dtype.itemsize
            ),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            vocab_size=architecture.vocab_size,
            dtype_bytes=self.dtype.itemsize,
        )


def check_source(name: str, flag: str, settings: EngineSettings, device: Device) -> ModelSource:
    """Config, tokenizer, headers and index of one model, checked against each other."""
    folder, architecture, tensors = open_scale_model(name, flag) if is_scale_model(name) else _open_checkpoint(name, flag)
    dtype = _dtype(settings.dtype, architecture, tensors, device)
    codec = open_codec(folder)
    if codec is not None and codec.num_tokens > architecture.vocab_size:
        raise ModelError(
            f"the tokenizer numbers {codec.num_tokens} tokens, the model's embedding has {architecture.vocab_size}",
            where=str(folder),
            cure="use the tokenizer files that belong to this model",
        )
    return ModelSource(
        folder=folder,
        architecture=architecture,
        tensors=tensors,
        codec=codec,
        dtype=dtype,
        layout=LayerLayout.pack(architecture.layer_shapes.items(), dtype),
    )


def _open_checkpoint(name: str, flag: str) -> tuple[Path, Architecture, TensorSource]:
    folder = locate_model(name, flag)
    architecture = read_architecture(folder)
    checkpoint = open_checkpoint(folder)
    check_weights(architecture, checkpoint)
    return folder, architecture, CheckpointSource(checkpoint)


def _dtype(name: str, architecture: Architecture, tensors: TensorSource, device: Device) -> torch.dtype:
    """auto: the checkpoint's own on a GPU, float32 on the CPU, where 16-bit arithmetic is slow or emulated."""
    if name != "auto":
        return {
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
            "float32": torch.float32,
            "float64": torch.float64,
        }[name]
    if device.torch_device.type == "cpu":
        return torch.float32
    first = next(iter(architecture.layer_shapes))
    return tensors.dtype(f"{architecture.prefix}.0.{first}")
