"""An architecture in the dtype that it runs in, and how its parameters are stored: all of a model that has a size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .coding.base_kinds import BaseKind
from .coding.base_layout import base_parts
from .coding.tensor_codec import Part
from .model.architecture import Architecture, architecture_of
from .model.transformers_api import make_config
from .planner.cost import LayerCost, ModelCost, kv_bytes_per_row
from .planner.shapes import read_preset_config
from .weights.codec import LayerCodec, coded, identity
from .weights.layout import LayerLayout, of_one_dtype
from .weights.packed_source import Codecs


@dataclass(frozen=True, slots=True, kw_only=True)
class TypedModel:
    """`packed` are the codecs of the parameters, by full name, that are not stored as they compute; `kernels`: they are decoded
    by kernels where there are some. `weights` is what people call how the weights are stored: "float16", "FP8".

    `bases` are the parts of the low-bit copies, of kind `base`, of those parameters that have one; with them a layer that comes
    and goes leaves a base on the device. `drafts_from_base`: this is not the target but the draft that its base is, see
    `base_draft`.
    """

    architecture: Architecture
    dtype: torch.dtype
    weights: str = ""
    packed: Codecs = field(default_factory=dict)
    kernels: bool = False
    bases: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    base: BaseKind | None = None
    drafts_from_base: bool = False

    @property
    def codecs(self) -> tuple[LayerCodec, ...]:
        """How each decoder layer is stored and computed. Equal layers share one. A base that drafts is used as it lies."""
        if self.drafts_from_base:
            of_target = self.target.codecs
            drafts = {codec: identity(codec.base) for codec in set(of_target)}
            return tuple(drafts[codec] for codec in of_target)
        prefix, kinds = self.architecture.prefix, dict[object, LayerCodec]()
        found: list[LayerCodec] = []
        for layer, shapes in enumerate(self.architecture.layer_shapes):
            names = {name: f"{prefix}.{layer}.{name}" for name in shapes}
            codecs = {name: self.packed[full] for name, full in names.items() if full in self.packed}
            bases = {name: self.bases[full] for name, full in names.items() if full in self.bases}
            kind = id(shapes), *codecs.items(), *bases
            if kind not in kinds:
                kinds[kind] = coded(shapes, codecs, self.dtype, kernels=self.kernels, bases=bases)
            found.append(kinds[kind])
        return tuple(found)

    @property
    def target(self) -> "TypedModel":
        """The model whose base this is a draft from; any other model itself."""
        return replace(self, drafts_from_base=False)

    @property
    def formats(self) -> tuple[frozenset[str], ...]:
        """Of the packed parameters of each decoder layer."""
        prefix = self.architecture.prefix
        full = [[f"{prefix}.{layer}.{name}" for name in shapes] for layer, shapes in enumerate(self.architecture.layer_shapes)]
        return tuple(frozenset(self.packed[name].format for name in names if name in self.packed) for names in full)

    @property
    def outside_layout(self) -> LayerLayout:
        """Of the tensors outside the decoder layers."""
        return LayerLayout.pack(of_one_dtype(self.architecture.outside_shapes, self.dtype))

    @property
    def cost(self) -> ModelCost:
        architecture, config, itemsize = self.architecture, self.architecture.config, self.dtype.itemsize
        kinds = list(zip(self.target.codecs, architecture.kv_shapes, strict=True))
        cost_of = _draft_cost if self.drafts_from_base else _layer_cost
        costs = {(codec, kv_shape): cost_of(codec, kv_bytes_per_row(*kv_shape, itemsize)) for codec, kv_shape in set(kinds)}
        return ModelCost(
            layers=tuple(costs[kind] for kind in kinds),
            outside_bytes=0 if self.drafts_from_base else self.outside_layout.num_bytes,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=max(head_dim for _, head_dim in architecture.kv_shapes),
            vocab_size=architecture.vocab_size,
            dtype_bytes=itemsize,
            num_masks=len(set(architecture.windows)),
            weights=self.weights,
            is_base=self.drafts_from_base,
        )


def with_bases(model: TypedModel, kind: BaseKind) -> TypedModel:
    """`model` with a base of each matrix of its decoder layers, which travel as they did."""
    prefix, layers = model.architecture.prefix, enumerate(model.architecture.layer_shapes)
    matrices = {
        f"{prefix}.{layer}.{name}": shape for layer, shapes in layers for name, shape in shapes.items() if len(shape) == 2
    }
    return replace(model, bases={name: base_parts(name, shape, kind) for name, shape in matrices.items()}, base=kind)


def base_draft(target: TypedModel) -> TypedModel:
    """The draft that the base of `target` is: the same layers, of which the matrices are those of the base. What lies outside
    the layers, and the base itself, it shares with the target, which they are counted with."""
    assert target.base is not None and target.bases
    return replace(target, drafts_from_base=True)


def _layer_cost(codec: LayerCodec, kv_bytes: int) -> LayerCost:
    return LayerCost(
        stored_bytes=codec.stored.num_bytes,
        computed_bytes=codec.computed.num_bytes,
        num_parameters=codec.computed.num_elements,
        kv_bytes_per_row=kv_bytes,
        scratch_bytes=codec.scratch_bytes,
        base_bytes=codec.base.num_bytes,
    )


def _draft_cost(codec: LayerCodec, kv_bytes: int) -> LayerCost:
    """Of the base of a layer of that codec, which multiplies as many numbers as the layer has."""
    return LayerCost(
        stored_bytes=codec.base.num_bytes,
        computed_bytes=codec.base.num_bytes,
        num_parameters=codec.computed.num_elements,
        kv_bytes_per_row=kv_bytes,
    )


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
