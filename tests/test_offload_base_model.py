"""The draft that a base is computes what its matrices stand for, layer by layer base or raw, and says what it cannot draft."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from bases import matrix_of, nearest_base
from conftest import FAMILIES, VOCAB_SIZE, reference_model
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_layout import base_prefix
from offload.coding.kernels import has_kernels
from offload.device.cpu import CpuDevice
from offload.errors import ModelError
from offload.model.architecture import read_architecture
from offload.model.base_model import BaseLinear, base_architecture
from offload.model.causal_lm import CausalLM
from offload.model.drafter import ModelDrafter
from offload.model.kv_cache import KVCache
from offload.streaming.stream import ResidentWeights, Weights
from small_models import assert_close, text_part
from tree.aim import Aim
from tree.shape import TreeShape

Models = Callable[..., Path]
INT8, INT4 = BASE_KINDS["int8"], BASE_KINDS["int4"]
TOKENS = [3, 14, 15, 92, 65, 35]


class Pair:
    """The model in `folder` as transformers has it, with a base of each matrix of its decoder layers: what `is_raw` names is
    left, in both. `layers` are what a pass binds."""

    def __init__(self, folder: Path, kind: BaseKind, is_raw: Callable[[int], bool] = lambda _: False) -> None:
        self.folder, self.kind, self.plain = folder, kind, reference_model(folder)
        self.bases: set[str] = set()
        self.raw: list[Weights] = []
        self.base: list[Weights] = []
        for layer, module in enumerate(self.plain.model.layers):  # type: ignore[union-attr,arg-type]
            self.raw.append({name: parameter.data.clone() for name, parameter in module.named_parameters()})
            self.base.append(self._base_of(layer, module, is_raw(layer)))
        self.layers = [self.raw[layer] if is_raw(layer) else self.base[layer] for layer in range(len(self.raw))]

    def _base_of(self, layer: int, module: torch.nn.Module, stays: bool) -> Weights:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in module.named_parameters():
            if parameter.dim() < 2:
                tensors[name] = parameter.data
                continue
            self.bases.add(f"model.layers.{layer}.{name}")
            base = nearest_base(parameter.data, self.kind)
            owner, prefix = name.rpartition(".")[0], base_prefix(name)
            tensors |= {f"{owner}.{prefix}{field}": getattr(base, field) for field in ("codes", "scale", "zero")}
            if not stays:
                parameter.data = matrix_of(base, parameter.shape[1], self.kind).float()
        return tensors

    def draft(self, layers: list[Weights], *, kernels: bool = False) -> CausalLM:
        architecture = base_architecture(read_architecture(self.folder), self.kind, self.bases, kernels=kernels)
        device = CpuDevice()
        cache = KVCache(
            device,
            layer_shapes=architecture.kv_shapes,
            num_segments=1,
            segment_rows=64,
            dtype=torch.float32,
            rope=architecture.rope,
        )
        state: Mapping[str, torch.Tensor] = self.plain.state_dict()
        outside = {name: state[name] for name in architecture.outside_shapes}
        return CausalLM(architecture, device, torch.float32, outside, ResidentWeights(layers), cache)

    def expected(self) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.plain(torch.tensor([TOKENS])).logits[0]
        return logits


def logits_of(model: CausalLM) -> torch.Tensor:
    segment = model.cache.segments[0]
    (output,) = model.forward((text_part(segment, TOKENS, num_logits=len(TOKENS)),))
    segment.truncate(0)
    return output.logits


@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_logits_are_those_of_the_matrices_that_the_bases_stand_for(models: Models, family: str) -> None:
    """Maps with and without biases, and of several matrices in one."""
    pair = Pair(models(family), INT4)
    assert_close(logits_of(pair.draft(pair.layers)), pair.expected())


@pytest.mark.skipif(not has_kernels(), reason="no triton")
def test_kernels_draft_as_plain_torch_does(models: Models) -> None:
    pair = Pair(models(num_layers=2), BASE_KINDS["int3"])
    assert_close(logits_of(pair.draft(pair.layers, kernels=True)), pair.expected())


@pytest.mark.parametrize("raw", [{0}, {1, 2}, {0, 1, 2}])
def test_layers_that_are_raw_draft_as_they_are(models: Models, raw: set[int]) -> None:
    pair = Pair(models(), INT4, raw.__contains__)
    assert_close(logits_of(pair.draft(pair.layers)), pair.expected())


def test_a_layer_that_loses_its_raw_weights_drafts_with_its_base(models: Models) -> None:
    """And one that gets them back with them again, bound anew: the old ones are held by nobody."""
    pair = Pair(models(), INT4, {1}.__contains__)
    mixed, based = pair.expected(), Pair(models(), INT4).expected()
    drafter = ModelDrafter(
        model := pair.draft(pair.layers),
        CpuDevice(),
        VOCAB_SIZE,
        Aim(shape=TreeShape.root_only()),
        64,
        max_nodes=1,
    )
    assert_close(logits_of(model), mixed)
    drafter.rebind(ResidentWeights(pair.base))
    assert all(parameter.numel() == 0 for layer in model.architecture.model.model.layers for parameter in layer.parameters())
    assert_close(logits_of(model), based)
    assert all(module.weight.numel() == 0 for module in model.architecture.model.modules() if isinstance(module, BaseLinear))
    drafter.rebind(ResidentWeights(pair.layers))
    assert_close(logits_of(model), mixed)


def test_a_layer_whose_weights_are_not_all_there_is_bound_to_nothing_else(models: Models) -> None:
    pair = Pair(models(), INT4)
    for layer, kept in (
        (pair.base[1], "q_proj.weight_base_zero"),
        (pair.raw[1], "q_proj.weight"),
        (pair.raw[1], "norm.weight"),
    ):
        missing = {name: tensor for name, tensor in layer.items() if not name.endswith(kept)}
        assert len(missing) < len(layer)
        with pytest.raises(KeyError):
            logits_of(pair.draft([pair.base[0], missing, pair.base[2]]))


def test_only_the_named_matrices_have_a_base(models: Models) -> None:
    pair = Pair(models(num_layers=2), INT8)
    architecture = base_architecture(read_architecture(pair.folder), INT8, {"model.layers.1.mlp.up_proj.weight"}, kernels=False)
    maps = [name for name, module in architecture.model.named_modules() if isinstance(module, BaseLinear)]
    assert maps == ["model.layers.1.mlp.up_proj"]
    assert architecture.layer_shapes == read_architecture(pair.folder).layer_shapes
    assert all(parameter.is_meta for parameter in architecture.model.parameters())


def refused(folder: Path, bases: set[str]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        base_architecture(read_architecture(folder), INT4, bases, kernels=False)
    assert caught.value.where == "--draft-model" and caught.value.cure
    return caught.value


def test_matrices_that_are_no_linear_maps_are_refused(models: Models) -> None:
    error = refused(models(), {"model.layers.0.input_layernorm.weight"})
    assert "model.layers.0.input_layernorm.weight is not the matrix of a linear map" in error.what


@pytest.mark.parametrize("uses", ["its weight", "nothing of it"])
def test_layers_that_use_a_matrix_otherwise_than_by_calling_its_map_are_refused(
    models: Models, monkeypatch: pytest.MonkeyPatch, uses: str
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = F.linear(x, self.up_proj.weight) if uses == "its weight" else self.gate_proj(x)
        down: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        return down

    folder = models(num_layers=1)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    error = refused(folder, {f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate", "down")})
    assert "llama cannot draft with a low-bit copy of itself" in error.what
    assert ("a pass over it fails" if uses == "its weight" else "do not call model.layers.0.mlp.up_proj") in error.what
