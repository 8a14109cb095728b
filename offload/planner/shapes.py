"""What planning needs to know of a model, from its config.json, and from the headers of its files where weights are packed: no
weights, no torch, no network.

model/architecture.py reads the same off the model that transformers builds, and takes seconds to import: `plan` answers in half
of one. A test holds both to the same sizes, family by family.

The facts of well-known models are in profiles/models, so that a plan for one needs nothing of it on this machine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, ModelError
from ..model.locate import find_config, is_gguf
from ..model.rope import read_rope
from .cost import LayerCost, ModelCost, kv_bytes_per_row
from .gguf_file import read_gguf_config, stored_in_gguf
from .json_file import read_file
from .quantization import Packed, read_quantization
from .stored import Stored, aligned_bytes, beside_base, by_bits
from .weight_files import has_weights, stored_in_folder

PRESETS = Path(__file__).parents[2] / "profiles/models"
CURE = "give the config.json of a dense Llama, Mistral, Qwen2 or Qwen3"
MAX_LAYERS = 2048  # as model/architecture.py, which would refuse to build it
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder of equal layers: grouped-query attention, a gated MLP, two norms. Sizes count elements. `stored` says how
    its weights are stored, None as they compute, in `dtype`; `has_weights`: they are on this machine."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool = False
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    dtype: str = "float16"
    stored: Stored | None = None
    has_weights: bool = False

    @property
    def weights(self) -> str:
        """What people call how they are stored."""
        return self.stored.name if self.stored is not None else self.dtype

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer: 855,654,400 for Llama-2-70B."""
        return sum(map(math.prod, self.layer_tensors.values()))

    @property
    def outside_parameters(self) -> int:
        """Elements outside the layers: embedding, final norm, head. A head tied to the embedding is counted once."""
        return sum(self._outside_tensors())

    @property
    def num_parameters(self) -> int:
        return self.num_layers * self.layer_parameters + self.outside_parameters

    def cost(self, dtype_bytes: int) -> ModelCost:
        """Bytes in a dtype of `dtype_bytes`, every tensor aligned as in a layer's buffer."""
        sizes = {name: math.prod(shape) for name, shape in self.layer_tensors.items()}
        computed_bytes = aligned_bytes(sizes.values(), dtype_bytes)

        stored = self.stored or Stored(name=self.dtype, layers=({},) * self.num_layers)
        kinds: dict[tuple[int, int, bool], LayerCost] = {}
        layers: list[LayerCost] = []
        for layer, packed in enumerate(stored.layers):
            stored_bytes, base_bytes = stored.sizes(sizes, layer, dtype_bytes)
            kind = stored_bytes, base_bytes, bool(packed)
            if kind not in kinds:
                kinds[kind] = LayerCost(
                    stored_bytes=stored_bytes,
                    computed_bytes=computed_bytes,
                    num_parameters=self.layer_parameters,
                    kv_bytes_per_row=kv_bytes_per_row(self.num_kv_heads, self.head_dim, dtype_bytes),
                    scratch_bytes=computed_bytes if packed else 0,
                    base_bytes=base_bytes,
                )
            layers.append(kinds[kind])
        return ModelCost(
            layers=tuple(layers),
            outside_bytes=aligned_bytes(self._outside_tensors(), dtype_bytes),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            dtype_bytes=dtype_bytes,
            weights=self.weights,
        )

    @property
    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of one decoder layer, as the families call them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        outputs = {"q": queries, "k": keys, "v": keys}
        tensors: dict[str, tuple[int, ...]] = {}
        for name, rows in outputs.items():
            tensors[f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if self.query_key_value_bias:
                tensors[f"self_attn.{name}_proj.bias"] = (rows,)
        tensors["self_attn.o_proj.weight"] = (hidden, queries)
        if self.output_bias:
            tensors["self_attn.o_proj.bias"] = (hidden,)
        for name, (rows, columns) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            tensors[f"mlp.{name}_proj.weight"] = (rows, columns)
            if self.mlp_bias:
                tensors[f"mlp.{name}_proj.bias"] = (rows,)
        if self.query_key_norm:
            tensors |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return tensors | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}

    def _outside_tensors(self) -> list[int]:
        embedding = self.vocab_size * self.hidden_size
        return [embedding, self.hidden_size] if self.tied_embeddings else [embedding, self.hidden_size, embedding]


def find_shape(name: str, flag: str) -> ModelShape:
    """The shape of a folder with config.json, a GGUF file, a preset of profiles/models, or a hub id in the local cache. A
    folder comes before a preset of the same name, as it does where weights are loaded. Nothing is fetched. ModelError names
    `flag`."""
    if is_preset(name):
        config, where = read_preset_config(name)
        return replace(shape_from_config(config, where=where), name=name)
    path = find_config(name, flag)
    if path is None:
        raise ModelError(
            f"{name} is no folder, no preset, and not in the local cache",
            where=flag,
            cure=f"give a folder with config.json, a GGUF file, a hub id that is there, or one of {', '.join(preset_names())}",
        )
    if is_gguf(path):
        return replace(_shape_of_gguf(path), name=name)
    shape = shape_from_config(_read_json(path), where=str(path))
    return replace(_with_files(shape, path.parent), name=name)


def _with_files(shape: ModelShape, folder: Path) -> ModelShape:
    """With what the files of `folder` hold, where weights are packed. Files that are not all there say nothing."""
    if not has_weights(folder):
        return shape
    if shape.stored is None:
        return replace(shape, has_weights=True)
    try:
        stored = stored_in_folder(folder, shape.stored, shape.layer_tensors, shape.num_layers)
    except CheckpointError:
        stored = shape.stored
    return replace(shape, stored=stored, has_weights=True)


def _shape_of_gguf(path: Path) -> ModelShape:
    config, header = read_gguf_config(path)
    shape = shape_from_config(config, where=str(path))
    return replace(shape, stored=stored_in_gguf(header, shape.layer_tensors, shape.num_layers), has_weights=True)


def preset_names() -> tuple[str, ...]:
    """The models of profiles/models, sorted."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def is_preset(name: str) -> bool:
    """Whether `name` means a preset: there is one, and no model of that name in the working directory."""
    return name in preset_names() and not (Path(name) / "config.json").is_file()


def shape_from_config(config: Mapping[str, object], *, where: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes. What a family's own configuration class would fill in is filled
    in here; for anything else that is missing or wrong, ModelError names the key and `where`."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _invalid(f"model_type is {family!r}, and shapes are known of {', '.join(FAMILIES)}", where)
    packed = _quantization(config, where)
    hidden_size, num_heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    num_kv_heads = _count(config, "num_key_value_heads", where, default=num_heads if family == "llama" else None)
    head_dim = _count(config, "head_dim", where, default=128 if family == "qwen3" else hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise _invalid(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}", where)
    attention_bias = family in ("llama", "qwen3") and _flag(config, "attention_bias", where)
    shape = ModelShape(
        name=str(family),
        num_layers=_count(config, "num_hidden_layers", where, most=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size", where),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size", where),
        max_positions=_max_positions(config, where),
        tied_embeddings=_flag(config, "tie_word_embeddings", where),
        query_key_value_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=family == "llama" and _flag(config, "mlp_bias", where),
        query_key_norm=family == "qwen3",
        dtype=_dtype(config, where),
    )
    if packed is None:
        return shape
    stored = by_bits(packed.name, shape.layer_tensors, shape.num_layers, packed.bits, packed.codec)
    if packed.base is not None:
        stored = beside_base(stored, shape.layer_tensors, packed.base)
    return replace(shape, stored=stored)


def read_preset_config(name: str) -> tuple[dict[str, object], str]:
    """What profiles/models keeps of the config.json of preset `name`, and the file it stands in."""
    path = PRESETS / f"{name}.json"
    document = _read_json(path)
    config = document.get("config")
    if document.get("schema_version") != 1 or not isinstance(document.get("source"), str) or not isinstance(config, dict):
        raise _invalid("not a model shape: it needs schema_version 1, source and config", str(path))
    return config, str(path)


def _read_json(path: Path) -> dict[str, object]:
    return read_file(path, _object, "the JSON of a model", "download or copy this file again")


def _object(document: object) -> dict[str, object]:
    if not isinstance(document, dict):
        raise ValueError("it must be an object")
    return document


def _count(config: Mapping[str, object], key: str, where: str, *, default: int | None = None, most: int = 2**31) -> int:
    """A positive whole number; `default` when the key is absent or null, as in configuration classes."""
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if value is None:
        raise _invalid(f"{key} is missing", where)
    if type(value) is not int or not 1 <= value <= most:
        raise _invalid(f"{key} is {value!r}, not a whole number from 1 to {most}", where)
    return value


def _flag(config: Mapping[str, object], key: str, where: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise _invalid(f"{key} is {value!r}, not true or false", where)
    return value


def _max_positions(config: Mapping[str, object], where: str) -> int:
    _count(config, "max_position_embeddings", where)
    try:
        return read_rope(config).max_positions
    except (TypeError, ValueError, OverflowError) as error:
        raise _invalid(f"its rotary embedding cannot be read: {error}", where) from error


def _dtype(config: Mapping[str, object], where: str) -> str:
    """transformers writes `dtype`, and wrote `torch_dtype` before. Half precision where neither says anything."""
    value = config.get("dtype") or config.get("torch_dtype") or "float16"
    if value not in DTYPES:
        raise _invalid(f"dtype is {value!r}, not one of {', '.join(DTYPES)}", where)
    return str(value)


def _quantization(config: Mapping[str, object], where: str) -> Packed | None:
    try:
        return read_quantization(config)
    except ValueError as error:
        raise ModelError(
            f"its quantization_config {error}", where=where, cure="use the config.json that belongs to these weights"
        ) from error


def _invalid(what: str, where: str) -> ModelError:
    return ModelError(what, where=where, cure=CURE)
