"""Weights in every packed format that we read: random codes and scales, and what they unpack to, known before they are packed.

Each packer is written from the specification of its format, apart from the decoders, and plainly.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]
Packer = Callable[[int, int, torch.Generator], tuple[Tensors, torch.Tensor]]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Dettmers et al., QLoRA, 2023, appendix E
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight consecutive outputs lies where in a word


@dataclass(frozen=True, slots=True)
class Form:
    """`quantization` as in config.json. `pack(rows, columns, generator)` makes the parts of a weight, named as in the
    checkpoint in place of `weight`, and the float32 weight that they are."""

    quantization: dict[str, Any]
    pack: Packer


@dataclass(frozen=True, slots=True)
class PackedModel:
    """Folders of a packed model, and of the same with its weights unpacked in float32."""

    folder: Path
    reference_folder: Path


# -- numbers ----------------------------------------------------------------------------------------------------------


def scales(shape: tuple[int, ...], values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random ones, which make of `values`, a weight's before they are scaled, the size that weights have."""
    size = 2.0 / float(values.std(correction=0).clamp(min=0.01)) / values.shape[-1] ** 0.5
    return torch.rand(shape, generator=generator).add(0.5).mul(size)


def fp8_codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """All E4M3 numbers but NaN, the large ones less often."""
    return (torch.randn(shape, generator=generator) * 40).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_codes(shape: tuple[int, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, count, shape, generator=generator)


def in_words(codes: torch.Tensor, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """[m, n] codes as [m, ceil(n * bits / 32)] int32. `places[i]` is which of a word's consecutive codes lies at i."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = sum(codes[..., code] << bits * place for place, code in enumerate(places or range(per_word)))
    return torch.as_tensor(words).to(torch.int32).contiguous()  # the conversion wraps


def in_bytes(codes: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    first, second = codes[..., 0::2], codes[..., 1::2]
    return (second | first << 4 if high_first else first | second << 4).to(torch.uint8)


def table(numbers: tuple[float, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers)[codes]


def spread(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """One scale for each block, as one for each weight."""
    return scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]


def powers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """E8M0 bytes around 2**-5."""
    return torch.randint(120, 125, shape, generator=generator).to(torch.uint8)


# -- packers ----------------------------------------------------------------------------------------------------------


def fp8(block: tuple[int, int] | None, shape: str, name: str = "weight_scale", dtype: torch.dtype = torch.float32) -> Packer:
    """The scale's `shape`: "one", "rows" or "blocks"."""

    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = fp8_codes((rows, columns), generator)
        size = block or ((rows, columns) if shape == "one" else (1, columns))
        scale = scales((-(-rows // size[0]), -(-columns // size[1])), codes.float(), generator).to(dtype)
        stored = scale.view(()) if shape == "one" else scale
        return {"weight": codes, name: stored}, codes.float() * spread(scale, rows, columns, size)

    return pack


def int8(symmetric: bool) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = (random_codes((rows, columns), 256, generator) - 128).to(torch.int8)
        scale = scales((rows, 1), codes.float(), generator).bfloat16()
        if symmetric:
            return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()
        zero_point = (random_codes((rows, 1), 60, generator) - 30).to(torch.int8)
        parts = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point}
        return parts, (codes.float() - zero_point.float()) * scale.float()

    return pack


def mxfp8(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes = (fp8_codes((rows, columns), generator).float() / 40).to(torch.float8_e4m3fn)
    scale = powers((rows, columns // 32), generator)
    factor = spread(2.0 ** (scale.float() - 127), rows, columns, (1, 32))
    return {"weight": codes, "weight_scale": scale}, codes.float() * factor


def rows_of_words(bits: int, group: int | None, *, symmetric: bool = True, ordered: bool = False) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        size = group or columns
        codes = random_codes((rows, columns), 2**bits, generator)
        zero_points = torch.full((rows, columns // size), 2 ** (bits - 1))
        if not symmetric:
            zero_points = random_codes((rows, columns // size), 2**bits, generator)
        scale = scales((rows, columns // size), codes.float(), generator).bfloat16()
        of_column = torch.arange(columns) // size
        parts = {
            "weight_packed": in_words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            parts["weight_zero_point"] = in_words(zero_points.t(), bits).t().contiguous()
        if ordered:
            of_column = of_column[torch.randperm(columns, generator=generator)]
            parts["weight_g_idx"] = of_column.to(torch.int32)
        return parts, (codes - zero_points[:, of_column]).float() * scale.float()[:, of_column]

    return pack


def gptq(bits: int, group: int | None, *, first_format: bool, ordered: bool) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        size = group or columns
        codes = random_codes((rows, columns), 2**bits, generator)
        zero_points = random_codes((columns // size, rows), 2**bits, generator)
        scale = scales((columns // size, rows), codes.float(), generator).half()
        of_column = torch.arange(columns) // size
        if ordered:
            of_column = of_column[torch.randperm(columns, generator=generator)]
        words = in_words(zero_points, bits)
        if first_format:  # words are one smaller in each of their codes, with borrows
            words = (words.to(torch.int64) - sum(1 << bits * place for place in range(32 // bits))).to(torch.int32)
        parts = {
            "qweight": in_words(codes, bits).t().contiguous(),
            "qzeros": words,
            "scales": scale,
            "g_idx": of_column.to(torch.int32),
        }
        return parts, (codes - zero_points[of_column].t()).float() * scale.float()[of_column].t()

    return pack


def awq(group: int) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = random_codes((rows, columns), 16, generator)
        zero_points = random_codes((columns // group, rows), 16, generator)
        scale = scales((columns // group, rows), codes.float(), generator).half()
        of_column = torch.arange(columns) // group
        parts = {
            "qweight": in_words(codes.t(), 4, AWQ_ORDER),
            "qzeros": in_words(zero_points, 4, AWQ_ORDER),
            "scales": scale,
        }
        return parts, (codes - zero_points[of_column].t()).float() * scale.float()[of_column].t()

    return pack


def nvfp4(packed: str, whole: str, *, divides: bool) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = random_codes((rows, columns), 16, generator)
        scale = fp8_codes((rows, columns // 16), generator).float().abs().to(torch.float8_e4m3fn)
        size = scales((1,), table(E2M1, codes) * scale.float().mean(), generator)
        number = 1 / size if divides else size.view(())
        factor = scale.float() / number if divides else scale.float() * number
        parts = {packed: in_bytes(codes), "weight_scale": scale, whole: number}
        return parts, table(E2M1, codes) * spread(factor, rows, columns, (1, 16))

    return pack


def mxfp4(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scale = random_codes((rows, columns), 16, generator), powers((rows, columns // 32), generator)
    factor = spread(2.0 ** (scale.float() - 127), rows, columns, (1, 32))
    return {"weight_packed": in_bytes(codes), "weight_scale": scale}, table(E2M1, codes) * factor


def numbered(numbers: tuple[float, ...], kind: str) -> Packer:
    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = random_codes((rows, columns), 16, generator)
        scale = scales((rows * columns // 64,), table(numbers, codes), generator)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
        parts = {
            "weight": in_bytes(codes.view(-1, 1, 2), high_first=True).view(-1, 1),
            "weight.absmax": scale,
            "weight.quant_map": torch.tensor(numbers),
            f"weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
        return parts, table(numbers, codes) * spread(scale.view(1, -1), 1, rows * columns, (1, 64)).view(rows, columns)

    return pack


def apart(bits: int, group: int) -> Packer:
    """A base of plain rounding to nearest, and what it lacks of 16-bit weights; some are such that no field is made for
    them."""

    def pack(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        weight = torch.randn(rows, columns, generator=generator).mul(2 / columns**0.5)
        weight[:, ::61] *= 2.0**-20
        weight[::7, ::53] = -0.0
        weight = weight.bfloat16()
        codes, scale, zero, steps = rounded(weight, bits, group)
        field, needed = fields(weight, steps, spread(scale, rows, columns, (1, group)))
        widths = torch.stack([most_of(needed[steps.abs() == step]) for step in range(2**bits)])
        width = widths[steps.abs()]
        field += (width - 1).clamp(min=0).exp2().long() * ((steps == 0) & (weight.view(torch.int16) < 0))
        words, offsets = in_blocks(field.flatten(), width.flatten())
        positions = (needed > width).flatten().nonzero().flatten()
        return {
            "weight_base_codes": from_low_bits(codes, torch.full_like(codes, bits)),
            "weight_base_scale": scale,
            "weight_base_zero": zero.to(torch.uint8),
            "weight_remainder": words,
            "weight_widths": widths.to(torch.uint8),
            "weight_offsets": offsets,
            "weight_positions": positions.to(torch.int32),
            "weight_exceptions": weight.flatten()[positions],
        }, weight.float()

    return pack


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, ...]:
    """(codes [N, K], scale [N, G], zero [N, G], steps [N, K])"""
    groups = weight.float().split(group, 1)
    low, high = (torch.stack([some.amin(1).clamp(max=0) for some in each], 1) for each in (groups, [-some for some in groups]))
    scale = ((-high - low) / (2**bits - 1)).bfloat16()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    rows, columns = weight.shape
    zeros = spread(zero, rows, columns, (1, group))
    codes = (weight.float() / spread(scale, rows, columns, (1, group))).round().add(zeros).clamp(0, 2**bits - 1)
    return codes.long(), scale, zero, (codes - zeros).long()


def fields(weight: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is stored of each weight, but for the sign of those of no step; and how many bits that needs, 99 where none do."""
    beyond = ordinal(weight) - ordinal((steps.abs() * scale).bfloat16())
    below = ordinal((scale / 2).bfloat16()) - ordinal(weight)
    has_its_sign = (weight.view(torch.int16) < 0) == (steps < 0)
    of_step = torch.where(has_its_sign, 1 + bit_length(torch.where(beyond < 0, -beyond - 1, beyond)), 99)
    of_none = torch.where(below >= 0, 1 + bit_length(below), 99)
    return torch.where(steps == 0, below, beyond), torch.where(steps == 0, of_none, of_step)


def ordinal(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16).long() & 0x7FFF


def bit_length(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([(values >> bit) > 0 for bit in range(16)]).sum(0)


def most_of(needed: torch.Tensor) -> torch.Tensor:
    """A width that suffices for all but a few."""
    return needed.sort().values[len(needed) * 98 // 100].clamp(max=16) if len(needed) else torch.tensor(0)


def in_blocks(field: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(words, and one that nobody needs; the word that each block begins with)"""
    bytes_of_blocks = []
    for some, widths in zip(field.split(1024), width.split(1024), strict=True):
        packed = from_low_bits(some[None], widths[None])[0]
        bytes_of_blocks.append(torch.nn.functional.pad(packed, (0, -len(packed) % 4)))
    offsets = torch.tensor([0, *(len(some) // 4 for some in bytes_of_blocks)]).cumsum(0)
    return torch.cat([*bytes_of_blocks, torch.zeros(4, dtype=torch.uint8)]).view(torch.int32), offsets[:-1].to(torch.int32)


def from_low_bits(values: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """[rows, bytes] uint8 of `values` [rows, N], each in as many bits as `widths` says, one after another."""
    bits = [(values >> bit & 1)[..., None] for bit in range(16)]
    is_there = torch.arange(16) < widths[..., None]
    stream = torch.cat(bits, -1)[is_there].view(len(values), -1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return torch.sum(stream << torch.arange(8), -1).to(torch.uint8)


# -- forms ------------------------------------------------------------------------------------------------------------


def compressed_tensors(form: str, **weights: Any) -> dict[str, Any]:
    group = {"format": form, "targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def int4(**weights: Any) -> dict[str, Any]:
    return compressed_tensors("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32, **weights)


def gptq_config(bits: int, group: int, form: str, desc_act: bool) -> dict[str, Any]:
    fields = {"bits": bits, "group_size": group, "checkpoint_format": form, "desc_act": desc_act, "sym": False}
    return {"quant_method": "gptq", **fields}


FP8_CHANNEL = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="channel")
FP8_TENSOR = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="tensor")
FP8_BLOCK = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[128, 128])
INT8 = compressed_tensors("int-quantized", type="int", num_bits=8, strategy="channel")
INT8_ASYMMETRIC = compressed_tensors("int-quantized", type="int", num_bits=8, strategy="channel", symmetric=False)
INT8_PACKED = compressed_tensors("pack-quantized", type="int", num_bits=8, strategy="channel")
NVFP4 = compressed_tensors("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16)
MXFP4 = compressed_tensors("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32)
MXFP8 = compressed_tensors("mxfp8-quantized", type="float", num_bits=8, strategy="group", group_size=32)
BLOCKS = (128, 128)
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}
PLAIN_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

FORMS: Mapping[str, Form] = {
    "fp8": Form(PLAIN_FP8, fp8(None, "one", "weight_scale_inv", torch.bfloat16)),
    "fp8-blocks": Form(BLOCK_FP8, fp8(BLOCKS, "blocks", "weight_scale_inv")),
    "fp8-rows": Form({"quant_method": "fbgemm_fp8"}, fp8(None, "rows")),
    "compressed-tensors-fp8": Form(FP8_TENSOR, fp8(None, "one", dtype=torch.bfloat16)),
    "compressed-tensors-fp8-channel": Form(FP8_CHANNEL, fp8(None, "rows", dtype=torch.bfloat16)),
    "compressed-tensors-fp8-block": Form(FP8_BLOCK, fp8(BLOCKS, "blocks", dtype=torch.bfloat16)),
    "compressed-tensors-int4": Form(int4(), rows_of_words(4, 32)),
    "compressed-tensors-int4-asymmetric": Form(int4(symmetric=False), rows_of_words(4, 32, symmetric=False)),
    "compressed-tensors-int4-ordered": Form(int4(actorder="group"), rows_of_words(4, 32, ordered=True)),
    "compressed-tensors-int8": Form(INT8, int8(True)),
    "compressed-tensors-int8-asymmetric": Form(INT8_ASYMMETRIC, int8(False)),
    "compressed-tensors-int8-packed": Form(INT8_PACKED, rows_of_words(8, None)),
    "compressed-tensors-nvfp4": Form(NVFP4, nvfp4("weight_packed", "weight_global_scale", divides=True)),
    "compressed-tensors-mxfp4": Form(MXFP4, mxfp4),
    "compressed-tensors-mxfp8": Form(MXFP8, mxfp8),
    "gptq": Form(gptq_config(4, 64, "gptq", False), gptq(4, 64, first_format=True, ordered=False)),
    "gptq-ordered": Form(gptq_config(4, 64, "gptq", True), gptq(4, 64, first_format=True, ordered=True)),
    "gptq-second-format": Form(gptq_config(4, -1, "gptq_v2", False), gptq(4, None, first_format=False, ordered=False)),
    "gptq-int8": Form(gptq_config(8, 32, "gptq", True), gptq(8, 32, first_format=True, ordered=True)),
    "gptq-int2": Form(gptq_config(2, 32, "gptq_v2", True), gptq(2, 32, first_format=False, ordered=True)),
    "awq": Form({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}, awq(64)),
    "modelopt-fp8": Form({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(None, "one")),
    "modelopt-nvfp4": Form(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4("weight", "weight_scale_2", divides=False)
    ),
    "nf4": Form({**BNB, "bnb_4bit_quant_type": "nf4"}, numbered(NF4, "nf4")),
    "fp4": Form({**BNB, "bnb_4bit_quant_type": "fp4"}, numbered(E2M1, "fp4")),
}

# What `convert` makes: 16-bit weights, apart.
RESIDUAL_FORMS: Mapping[str, Form] = {
    f"residual-int{bits}": Form(
        {"quant_method": "treestream_residual", "version": 1, "bits": bits, "group_size": group}, apart(bits, group)
    )
    for bits, group in ((8, 128), (4, 64), (3, 64))
}
EVERY_FORM: Mapping[str, Form] = {**FORMS, **RESIDUAL_FORMS}

# One of each way to pack; the others differ in where a scale or a zero point lies, and are for the slow tests.
QUICK_FORMS = (
    *("fp8", "fp8-blocks", "compressed-tensors-int4", "compressed-tensors-int4-asymmetric", "compressed-tensors-mxfp4"),
    *("gptq", "gptq-ordered", "awq", "modelopt-nvfp4", "nf4", "residual-int4"),
)

# -- models -----------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 320,  # two and a half blocks of 128
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 160,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 96,
    "pad_token_id": None,
}


def write_packed(form: str, folder: Path, *, seed: int = 0, **changes: Any) -> PackedModel:
    """A tiny model of the family Llama below `folder`, the matrices of its layers packed in `form`, the rest in bfloat16."""
    packing = EVERY_FORM[form]
    config = AutoConfig.for_model("llama", **{**SIZES, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    stored: Tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, _, last = name.rpartition(".")
            if "_proj" in stem and last == "weight":
                rows, columns = parameter.shape
                parts, weight = packing.pack(rows, columns, generator)
                stored |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
                parameter.copy_(weight)
            else:
                stored[name] = parameter.to(torch.bfloat16)
                parameter.copy_(stored[name])
    model.save_pretrained(folder / "unpacked")
    packed = folder / "packed"
    packed.mkdir()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "unpacked" / "config.json").read_text())
    written |= {"dtype": "bfloat16", "quantization_config": packing.quantization}
    (packed / "config.json").write_text(json.dumps(written))
    return PackedModel(packed, folder / "unpacked")
