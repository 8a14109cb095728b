"""What configs and tensors say of packed weights is read, or refused in words, whatever they are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.coding.packings import read_packing
from offload.coding.scales import bad_scale, scale_values
from offload.coding.tensor_codec import Part
from offload.errors import ModelError
from packed_models import FORMS, compressed_tensors, int4

SHAPE = (64, 128)
WHERE = "folder/config.json"


def stored(form: str, shape: tuple[int, int] = SHAPE) -> dict[str, Part]:
    parts, _ = FORMS[form].pack(*shape, torch.Generator().manual_seed(0))
    return {name: Part(name=name, shape=tuple(part.shape), dtype=part.dtype) for name, part in parts.items()}


def refusal(quantization: Mapping[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        read_packing(quantization, WHERE)
    assert caught.value.where == WHERE and len(str(caught.value)) < 1000
    return f"{caught.value.what} / {caught.value.cure}"


def problem(quantization: Mapping[str, Any], beside: Mapping[str, Part], shape: tuple[int, ...] = SHAPE) -> str:
    with pytest.raises(ValueError, match=r"^(is|has|packs) ") as caught:
        read_packing(quantization, WHERE).codec_of("layer.weight", shape, beside)
    return str(caught.value)


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "name", "formats"),
    [
        ("fp8", "FP8", "FP8"),
        ("fp8-blocks", "FP8 in blocks of 128x128", "FP8"),
        ("compressed-tensors-int4", "compressed-tensors int4", "int4"),
        ("compressed-tensors-nvfp4", "compressed-tensors NVFP4", "NVFP4"),
        ("compressed-tensors-mxfp8", "compressed-tensors MXFP8", "MXFP8"),
        ("gptq-int8", "GPTQ int8", "GPTQ int8"),
        ("awq", "AWQ int4", "AWQ int4"),
        ("modelopt-nvfp4", "NVFP4", "NVFP4"),
        ("nf4", "NF4", "NF4"),
    ],
)
def test_packings_are_called_what_people_call_them(form: str, name: str, formats: str) -> None:
    packing = read_packing(FORMS[form].quantization, WHERE)
    codec = packing.codec_of("layer.weight", SHAPE, stored(form))
    assert codec is not None and (packing.name, codec.format) == (name, formats)


def test_an_unknown_method_is_named_with_those_that_are_known() -> None:
    said = refusal({"quant_method": "exl3", "bits": 4})
    assert "quantised by 'exl3', which we do not read" in said
    assert all(method in said for method in ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4"))


def test_an_old_file_writes_a_block_as_one_word_and_integers_of_few_bits_may_have_eight_each() -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "block"}
    new, old = (compressed_tensors("float-quantized", **weights, block_structure=block) for block in ([128, 64], "128x64"))
    assert read_packing(old, WHERE) == read_packing(new, WHERE)
    few = compressed_tensors("int-quantized", type="int", num_bits=4, strategy="channel")
    codec = read_packing(few, WHERE).codec_of("layer.weight", SHAPE, stored("compressed-tensors-int8"))
    assert codec is not None and codec.parts[0].dtype == torch.int8


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "has bits 3, not 2 or 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "has group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"+:.*up_proj.*": {"bits": 8}}}, "dynamic '+:"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "has version 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "has weight_block_size [128]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "has quant_algo 'W4A8_AWQ', not FP8 or NVFP4 or MIXED"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "has load_in_8bit"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant"),
        (compressed_tensors("marlin-24", num_bits=4, type="int"), "has format 'marlin-24'"),
        (compressed_tensors("pack-quantized", num_bits=3, type="int"), "has num_bits 3"),
        ({**int4(), "transform_config": {"config_groups": {"u": {}}}}, "has a transform_config"),
        ({**int4(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "has no config_groups"),
        ({"config_groups": [1, 2]}, "has config_groups [1, 2], which is no object"),
        ({"quant_method": "gptq", "bits": 10**5000}, "has bits a number that is too long"),
        ({"quant_method": "gptq", "bits": [[[[[[[["x" * 1000]]]]]]]]}, "has bits [[[[[["),
    ],
)
def test_what_we_do_not_read_is_refused_by_name(quantization: Mapping[str, Any], said: str) -> None:
    assert said in refusal(quantization)


def test_older_files_name_no_method() -> None:
    old = {key: value for key, value in int4().items() if key != "quant_method"}
    assert read_packing(old, WHERE) == read_packing(int4(), WHERE)
    assert read_packing({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, WHERE).name == "NF4"


fields = sorted({key for form in FORMS.values() for key in form.quantization} | {"dynamic", "sparsity_config", "pack_dtype"})
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
weight_fields = ("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "dynamic", "actorder")


@given(st.data())
def test_a_config_of_any_values_is_read_or_refused_in_words(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(FORMS)))
    quantization: dict[str, Any] = {**FORMS[form].quantization}
    quantization |= data.draw(st.dictionaries(st.sampled_from(fields), anything, max_size=3))
    if data.draw(st.booleans()) and isinstance(groups := FORMS[form].quantization.get("config_groups"), dict):
        weights = {**groups["group_0"]["weights"], **data.draw(st.dictionaries(st.sampled_from(weight_fields), anything))}
        quantization["config_groups"] = {"group_0": {"weights": weights}}
    beside = stored(form)
    try:
        packing = read_packing(quantization, WHERE)
        assert packing.name.isprintable() and len(packing.name) < 200
        packing.codec_of("layer.weight", SHAPE, beside)
    except ModelError as error:
        assert len(str(error)) < 1000
    except ValueError as error:
        assert str(error).startswith(("is ", "has ")) and len(str(error)) < 1000


# -- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_part_is_needed_and_has_one_shape(form: str) -> None:
    beside = stored(form)
    codec = read_packing(FORMS[form].quantization, WHERE).codec_of("layer.weight", SHAPE, beside)
    assert codec is not None
    optional = {"g_idx", "weight_g_idx"}
    for part in codec.parts:
        if "quant_state" in part.name:
            continue
        others = {name: other for name, other in beside.items() if name != part.name}
        if part.name not in optional and part.name not in ("weight", "weight_packed", "qweight"):
            assert problem(FORMS[form].quantization, others).startswith(f"is packed, and its {part.name}")
        wrong = replace(part, shape=(*part.shape, 3))
        assert f"has a {part.name} of shape " in problem(FORMS[form].quantization, {**beside, part.name: wrong})
        if part.name not in ("weight", "weight_packed"):
            other = replace(part, dtype=torch.int16)
            assert f"has a {part.name} of int16, not " in problem(FORMS[form].quantization, {**beside, part.name: other})


@given(st.sampled_from(sorted(FORMS)), st.data())
def test_tensors_of_any_shape_and_dtype_are_taken_or_refused_in_words(form: str, data: st.DataObject) -> None:
    sides = st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 128, 2**31, 2**62]), max_size=4).map(tuple)
    dtypes = st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
    beside = stored(form)
    for name in data.draw(st.lists(st.sampled_from(sorted(beside)), max_size=2)):
        beside[name] = Part(name=name, shape=data.draw(sides | st.just(beside[name].shape)), dtype=data.draw(dtypes))
    shape = data.draw(sides | st.just(SHAPE))
    try:
        read_packing(FORMS[form].quantization, WHERE).codec_of("layer.weight", shape, beside)
    except ValueError as error:
        assert str(error).startswith(("is ", "has ", "packs ")) and len(str(error)) < 1000


@pytest.mark.parametrize(
    ("form", "shape", "said"),
    [
        ("gptq", (64, 100), "has 100 columns, which are not whole groups of 64"),
        ("gptq", (60, 128), "has 60 rows, which are not whole groups of 8"),
        ("awq", (60, 128), "has 60 rows, which are not whole groups of 8"),
        ("compressed-tensors-int4", (64, 100), "has 100 columns, which are not whole groups of 32"),
        ("compressed-tensors-nvfp4", (64, 100), "has 100 columns, which are not whole groups of 16"),
        ("fp8", (64, 128, 2), "is packed and of shape [64, 128, 2]: only matrices are"),
        ("nf4", (3, 5), "has 15 weights, which are not whole groups of 64"),
    ],
)
def test_parameters_that_do_not_divide_are_refused(form: str, shape: tuple[int, ...], said: str) -> None:
    assert problem(FORMS[form].quantization, stored(form), shape) == said


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_are_not_packed_are_stored_as_they_are(form: str) -> None:
    packing = read_packing(FORMS[form].quantization, WHERE)
    bias = Part(name="bias", shape=(64,), dtype=torch.bfloat16)
    assert packing.codec_of("layer.bias", (64,), {**stored(form), "bias": bias}) is None
    weight = Part(name="weight", shape=SHAPE, dtype=torch.bfloat16)
    assert packing.codec_of("lm_head.weight", SHAPE, {"weight": weight}) is None
    assert packing.codec_of("missing.weight", SHAPE, {}) is None


def test_of_groups_with_different_schemes_the_tensors_say_which() -> None:
    quantization = int4()
    fp8 = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="channel")
    wide = {"weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 64}}
    groups = {"a": wide, "b": quantization["config_groups"]["group_0"], "c": fp8["config_groups"]["group_0"]}
    packing = read_packing({**quantization, "format": "mixed-precision", "config_groups": groups}, WHERE)
    assert packing.name == "compressed-tensors int4 and FP8"
    for form in ("compressed-tensors-int4", "compressed-tensors-fp8-channel"):
        alone = read_packing(FORMS[form].quantization, WHERE).codec_of("layer.weight", SHAPE, stored(form))
        assert packing.codec_of("layer.weight", SHAPE, stored(form)) == alone
    assert problem(fp8, stored("compressed-tensors-int8")) == "is packed as int, as no group of the config is"


def test_scales_that_bitsandbytes_packs_as_well_are_refused_though_the_config_does_not_say_so() -> None:
    beside = stored("nf4")
    beside["weight.absmax"] = replace(beside["weight.absmax"], dtype=torch.uint8)
    assert problem(FORMS["nf4"].quantization, beside) == (
        "packs its scales, too (bnb_4bit_use_double_quant), which we do not read"
    )


def test_activations_that_are_scaled_before_a_weight_are_refused() -> None:
    smooth = Part(name="pre_quant_scale", shape=(128,), dtype=torch.bfloat16)
    assert "pre_quant_scale" in problem(
        FORMS["modelopt-nvfp4"].quantization, {**stored("modelopt-nvfp4"), "pre_quant_scale": smooth}
    )


# -- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, getattr(torch, "float8_e8m0fnu", torch.uint8)])
def test_every_power_of_two_is_what_the_specification_says(dtype: torch.dtype) -> None:
    found = scale_values(torch.arange(256, dtype=torch.uint8).view(dtype))
    assert [float(value) for value in found[:255]] == [2.0 ** (byte - 127) for byte in range(255)] and found[255].isnan()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (torch.tensor([0.0, -3e38]), torch.tensor([torch.nan])),
        (torch.tensor([65504.0]).half(), torch.tensor([torch.inf]).half()),
        (torch.tensor([3e38]).bfloat16(), torch.tensor([-torch.inf]).bfloat16()),
        (
            torch.tensor([448.0, -448.0]).to(torch.float8_e4m3fn),
            torch.tensor([127], dtype=torch.uint8).view(torch.float8_e4m3fn),
        ),
        (torch.tensor([57344.0]).to(torch.float8_e5m2), torch.tensor([124], dtype=torch.uint8).view(torch.float8_e5m2)),
        (torch.tensor([0, 254], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)),
    ],
)
def test_scales_that_are_no_numbers_are_named(good: torch.Tensor, bad: torch.Tensor) -> None:
    assert bad_scale("a.scale", good) is None
    both = torch.cat([good.view(torch.uint8), bad.view(torch.uint8)]).view(good.dtype)
    said = f"tensor 'a.scale' multiplies weights, and 1 of its {len(both)} values are not finite"
    assert bad_scale("a.scale", both) == said
    assert bad_scale("a.scale", good[0]) is None  # of no dimension
