"""Plans of models whose weights are packed or coded: from files, from a config alone, and for what might be."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from command_line import INVALID, assert_error, assert_usage_error, run_command
from conftest import save_tiny_model
from offload.cli.convert import conversion_of
from offload.coding.gguf_types import BLOCKS
from offload.coding.packings import READERS, read_packing
from offload.demo import TARGET
from offload.errors import ModelError, UsageError
from offload.planner.gguf_mixtures import MIXTURES
from offload.planner.quantization import LOSSLESS_NAME, METHODS, read_quantization
from offload.planner.shapes import ModelShape, find_shape, shape_from_config
from offload.planner.what_if import NAMES, coded_without_loss, with_weights, without_code
from offload.source import check_source
from offload.weights.conversion import convert
from packed_models import FORMS, write_packed

ROOT = Path(__file__).resolve().parents[1]
Capsys = pytest.CaptureFixture[str]
Models = Callable[..., Path]
GIB = 2**30


def bits_of(shape: ModelShape) -> float:
    """Bits a weight of the matrices in its layers, norms aside."""
    cost, vectors = shape.cost(2), sum(math.prod(one) for one in shape.layer_tensors.values() if len(one) == 1)
    matrices = sum(math.prod(one) for one in shape.layer_tensors.values() if len(one) == 2)
    return 8 * (cost.stored_bytes / shape.num_layers - 2 * vectors) / matrices


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *[("fp16", 16.0), ("bf16", 16.0), ("lossless", 16 * 0.705), ("fp8", 8.0), ("fp8-block", 8.002), ("int8", 8.0)],
        *[("int4", 4.125), ("gptq", 4.156), ("awq", 4.156), ("nvfp4", 4.5), ("mxfp4", 4.25), ("nf4", 4.5)],
        *[("q8_0", 8.5), ("q6_k", 6.5625), ("q5_k_s", 5.5), ("q4_0", 4.5), ("q4_1", 5.0), ("q5_0", 5.5), ("q5_1", 6.0)],
    ],
)
def test_a_preset_takes_the_bits_that_its_weights_are_said_to_have(name: str, bits: float) -> None:
    shape = with_weights(find_shape("llama-2-70b", "--model"), name)
    assert bits_of(shape) == pytest.approx(bits, rel=1e-3)
    cost, raw = shape.cost(2), find_shape("llama-2-70b", "--model").cost(2)
    assert (cost.computed_bytes, cost.outside_bytes) == (raw.computed_bytes, raw.outside_bytes)
    assert cost.scratch_bytes == (0 if bits == 16 else raw.slot_bytes)


# What llama.cpp's tool for quantising says of its files: GiB of Llama 3.1 8B, and bits a weight of Llama 2 70B.
SIZES_OF_8B = {
    "q2_k": 2.95,
    "q3_k_s": 3.41,
    "q3_k_m": 3.74,
    "q3_k_l": 4.02,
    "q4_k_s": 4.36,
    "q4_k_m": 4.58,
    "q5_k_s": 5.21,
    "q5_k_m": 5.33,
    "q6_k": 6.14,
    "q8_0": 7.95,
}
BITS_OF_70B = {"q3_k_s": 3.47, "q3_k_m": 3.85, "q3_k_l": 4.19, "q4_k_m": 4.80, "q5_k_m": 5.65, "q6_k": 6.56}


def file_bytes(model: str, mixture: str) -> float:
    """Of the whole file, but for what names and pads: layers, embedding, head."""
    shape = with_weights(find_shape(model, "--model"), mixture)
    assert shape.stored is not None
    layers = sum(sum(layer.values()) for layer in shape.stored.layers)
    base = {"q2_k": "Q2_K", "q6_k": "Q6_K", "q8_0": "Q8_0"}.get(mixture, mixture.upper()[:4])
    head = "Q8_0" if mixture == "q8_0" else "Q6_K"
    bits = [8 * BLOCKS[kind].num_bytes / BLOCKS[kind].num_weights for kind in (base, head)]
    return layers + shape.vocab_size * shape.hidden_size * sum(bits) / 8


@pytest.mark.parametrize("mixture", SIZES_OF_8B)
def test_mixtures_of_types_have_the_sizes_of_published_files(mixture: str) -> None:
    assert file_bytes("llama-3.1-8b", mixture) / GIB == pytest.approx(SIZES_OF_8B[mixture], abs=0.012)


@pytest.mark.parametrize("mixture", BITS_OF_70B)
def test_mixtures_of_a_70b_have_the_published_bits(mixture: str) -> None:
    parameters = find_shape("llama-2-70b", "--model").num_parameters
    assert 8 * file_bytes("llama-2-70b", mixture) / parameters == pytest.approx(BITS_OF_70B[mixture], abs=0.01)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_that_blocks_do_not_make_up_get_other_types(mixture: str) -> None:
    """896 columns are no multiple of 256, and 17 none of 32."""
    narrow = with_weights(find_shape("qwen2.5-0.5b", "--model"), mixture.lower())
    assert 2.5 < bits_of(narrow) < 9
    odd = replace(find_shape("qwen2.5-0.5b", "--model"), hidden_size=17, intermediate_size=17)
    assert bits_of(with_weights(odd, mixture.lower())) > 8


def test_weights_that_nobody_knows_are_refused_with_those_that_we_do() -> None:
    with pytest.raises(UsageError) as caught:
        with_weights(find_shape("llama-2-7b", "--model"), "q9_k")
    assert with_weights(find_shape("llama-2-7b", "--model"), "Q4_K_M").weights == "GGUF Q4_K_M"
    assert "q9_k" in caught.value.what and all(name in caught.value.cure for name in NAMES)


def test_a_folder_with_weights_of_its_own_is_not_asked_what_if(models: Models) -> None:
    with pytest.raises(UsageError, match="weights of its own, in float32") as caught:
        with_weights(find_shape(str(models()), "--model"), "fp8")
    assert caught.value.where == "--weights fp8"


def test_only_16_bit_weights_are_coded_without_loss_and_decoded_while_loading() -> None:
    shape = find_shape("llama-2-7b", "--model")
    coded = coded_without_loss(shape)
    assert coded.weights == "float16, coded without loss"
    converted = replace(coded, stored=replace(coded.stored, name=LOSSLESS_NAME)) if coded.stored else coded
    assert without_code(converted) == shape
    for other in (replace(shape, dtype="float32"), with_weights(shape, "fp8")):
        assert coded_without_loss(other) is other and without_code(other) is other


CONFIG = {**json.loads((ROOT / "profiles/models/llama-2-7b.json").read_text(encoding="utf-8"))["config"]}
PACKED = [
    ({"quant_method": "fp8"}, "FP8", 8.0),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 in blocks of 128x128", 8.002),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ int4", 4.156),
    ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "GPTQ int8", 8.0),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, "AWQ int4", 4.3125),
    ({"quant_method": "mxfp4"}, "MXFP4", 4.25),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4", 4.5),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "NF4", 4.5),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 128}}}},
        "compressed-tensors int4",
        4.125,
    ),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}},
        "compressed-tensors FP8",
        8.0,
    ),
    ({"quant_method": "treestream_lossless", "version": 1}, LOSSLESS_NAME, 16 * 0.705),
]


@pytest.mark.parametrize(("quantization", "name", "bits"), PACKED)
def test_a_config_without_its_files_says_how_many_bits_weights_have(
    quantization: dict[str, object], name: str, bits: float
) -> None:
    shape = shape_from_config({**CONFIG, "quantization_config": quantization}, where="here")
    assert shape.weights == name and shape.stored is not None and shape.stored.is_estimated
    assert bits_of(shape) == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize(
    "quantization",
    [
        *({"quant_method": method} for method in ("aqlm", "", 7, None, ["fp8"], "x" * 1000)),
        "fp8",
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "bits": "4", "group_size": 128},
        {"quant_method": "awq", "bits": 0, "group_size": 128},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": "large"},
        {"quant_method": "modelopt", "quant_algo": "W4A8"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 2**40}}}},
    ],
)
def test_a_quantisation_that_is_described_wrongly_or_unknown_is_refused(quantization: object) -> None:
    with pytest.raises(ModelError) as caught:
        shape_from_config({**CONFIG, "quantization_config": quantization}, where="a/config.json")
    assert "quantization_config" in caught.value.what and len(str(caught.value)) < 1000 and caught.value.cure


def test_weights_that_are_stored_as_they_compute_have_no_quantisation() -> None:
    assert read_quantization({}) is None and read_quantization({"quantization_config": None}) is None


def pack_bytes(folder: Path) -> Path:
    """FP8 with a scale for each tensor, in all projections but those of the first layer; activations have scales, too."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight") and ".layers.0." not in name]:
        stem = name.rpartition(".")[0]
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors |= {f"{stem}.weight_scale": torch.ones(1), f"{stem}.input_scale": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_files_that_are_there_are_believed_over_any_formula(tmp_path: Path) -> None:
    folder = pack_bytes(save_tiny_model(tmp_path / "model", num_layers=3))
    shape = find_shape(str(folder), "--model")
    assert shape.stored is not None and not shape.stored.is_estimated and shape.has_weights
    first, second, third = shape.cost(2).layers
    assert first.stored_bytes == first.computed_bytes and not first.is_decoded
    assert second is third and second.is_decoded and second.stored_bytes < second.computed_bytes
    raw = {name: size for name, size in shape.layer_tensors.items() if "_proj.weight" not in name}
    scales_bytes = 7 * 256  # of seven matrices
    weights_bytes = sum(math.prod(one) for name, one in shape.layer_tensors.items() if name not in raw)
    assert second.stored_bytes - scales_bytes - 256 * len(raw) == pytest.approx(weights_bytes, abs=256 * 7)


def test_files_that_are_not_all_there_leave_it_to_the_formula(tmp_path: Path) -> None:
    folder = pack_bytes(save_tiny_model(tmp_path / "model"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    shape = find_shape(str(folder), "--model")
    assert shape.stored is not None and shape.stored.is_estimated and shape.has_weights


def plan_json(capsys: Capsys, *flags: object) -> dict[str, object]:
    finished = run_command(capsys, "plan", "--model", "llama-2-70b", "--profile", "l40", "-q", "--json", *flags)
    assert finished.code == 0, finished.stderr
    document: dict[str, object] = json.loads(finished.stdout)
    return document


def test_the_plan_says_which_weights_it_is_of_and_what_they_take_raw(capsys: Capsys) -> None:
    raw = plan_json(capsys, "--resident-layers", 0)
    made = plan_json(capsys, "--resident-layers", 0, "--weights", "q4_k_m")
    assert (raw["weights"], made["weights"]) == ("float16", "GGUF Q4_K_M")
    assert made["raw_bytes_per_pass"] == raw["raw_bytes_per_pass"] == raw["bytes_per_pass"] == 80 * 855_654_400 * 2
    assert made["bytes_per_pass"] == pytest.approx(80 * 855_654_400 * 4.8 / 8, rel=0.01)
    assert raw["predicted_decode_s"] == 0 and isinstance(made["predicted_decode_s"], float) and made["predicted_decode_s"] > 0
    notes = " ".join(map(str, made["notes"])) if isinstance(made["notes"], list) else ""
    assert "estimated from the rate of the device's memory" in notes and "4.8 bits a weight" in notes


def test_coding_without_loss_is_advised_where_it_helps_and_done_where_it_is_asked_for(capsys: Capsys) -> None:
    def said(*flags: object) -> str:
        return str(plan_json(capsys, *flags)["notes"])

    assert "`convert --codec lossless` would make a pass 2.16 s, not 3.75 s" in said()
    for flags in (("--codec", "none"), ("--codec", "lossless"), ("--weights", "fp8"), ("--gpu-memory", "200GiB")):
        assert "convert" not in said(*flags)
    coded = plan_json(capsys, "--codec", "lossless", "--resident-layers", 0)
    assert coded["weights"] == "float16, coded without loss"
    assert coded["bytes_per_pass"] == pytest.approx(0.705 * 80 * 855_654_400 * 2, rel=1e-3)
    assert coded == plan_json(capsys, "--weights", "lossless", "--resident-layers", 0)


def test_coding_is_advised_too_where_the_layer_that_is_decoded_leaves_no_room_for_the_whole_tree(capsys: Capsys) -> None:
    """The tree of the card's last bytes: half of it fits beside the scratch."""
    made = plan_json(capsys, "--draft-model", "llama-2-7b", "--profile", "rtx-4090")
    assert isinstance(made["tree"], dict) and made["tree"]["nodes"] > 1000
    assert "`convert --codec lossless` would make a pass 3.67 s, not 5.21 s" in str(made["notes"])


def test_a_decoder_that_is_slower_than_the_link_is_told(capsys: Capsys, tmp_path: Path) -> None:
    profile = json.loads((ROOT / "profiles/hardware/l40.json").read_text(encoding="utf-8"))
    decoder = {"weights": "AWQ int4", "dtype_bytes": 2, "computed_bytes": 855_654_400 * 2, "layer_s": 0.5}
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({**profile, "decoders": [decoder]}))
    notes = str(plan_json(capsys, "--profile", path, "--weights", "awq", "--resident-layers", 0)["notes"])
    assert "AWQ int4 is decoded more slowly than it comes: a layer takes 0.5 s" in notes
    assert "is estimated from" not in notes
    notes = str(plan_json(capsys, "--profile", path, "--weights", "gptq", "--resident-layers", 0)["notes"])
    assert "more slowly" not in notes and "is estimated from" in notes


def test_coded_resident_layers_are_a_line_of_the_screen(capsys: Capsys) -> None:
    flags = ("--model", "llama-2-70b", "--profile", "l40", "-q", "--weights", "int4")
    finished = run_command(capsys, "plan", *flags, "--gpu-memory", "30GiB")
    assert finished.code == 0
    for part in (
        "in compressed-tensors int4 |",
        "coded resident layers",
        "decoded layer",
        "decoder's workspace",
        "of it decoding",
    ):
        assert part in finished.stdout


def test_what_if_is_refused_in_one_line_where_it_makes_no_sense(capsys: Capsys, models: Models) -> None:
    finished = run_command(capsys, "plan", "--model", "llama-2-7b", "--weights", "q9_k")
    assert_usage_error(finished, "q9_k")
    finished = run_command(capsys, "plan", "--model", models(), "--weights", "fp8")
    assert_usage_error(finished, "weights of its own")


def test_an_unknown_quantisation_ends_a_plan_with_the_methods_that_we_know(capsys: Capsys, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "aqlm"}}))
    assert_error(run_command(capsys, "plan", "--model", folder), INVALID, "compressed-tensors")


def test_a_plan_for_a_packed_folder_imports_no_torch(tmp_path: Path) -> None:
    folder = pack_bytes(save_tiny_model(tmp_path / "model"))
    code = (
        "from sys import modules; from offload.cli.main import main; "
        f"code = main(['plan', '-q', '--model', {str(folder)!r}]); "
        "print(code, [m for m in ('torch', 'transformers') if m in modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "0 []" and ran.stderr == ""


@pytest.mark.matrix
@pytest.mark.parametrize("form", FORMS)
def test_sizes_and_names_of_packed_models_are_those_of_the_models_that_run(form: str, tmp_path: Path) -> None:
    folder = write_packed(form, tmp_path).folder
    shape = find_shape(str(folder), "--model")
    assert shape.stored is not None and not shape.stored.is_estimated
    for dtype in ("float32", "bfloat16"):
        model = check_source(str(folder), "--model", dtype, "cpu").model
        assert shape.cost(model.dtype.itemsize) == model.cost


def test_methods_that_plans_know_are_those_that_are_unpacked() -> None:
    assert set(METHODS) == set(READERS)


def test_coding_without_loss_takes_about_what_a_plan_says() -> None:
    planned_cost = coded_without_loss(find_shape(str(TARGET), "--model")).cost(2)
    cost = check_source(str(TARGET), "--model", "float16", "cpu", codec="lossless").model.cost
    assert planned_cost.stored_bytes == pytest.approx(cost.stored_bytes, rel=0.02)
    assert (planned_cost.weights, planned_cost.computed_bytes) == (cost.weights, cost.computed_bytes)


def test_sizes_of_a_converted_folder_are_those_of_the_model_that_runs(tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    convert(conversion_of(str(TARGET), str(converted)), lambda *_: None)
    shape = find_shape(str(converted), "--model")
    assert shape.weights == LOSSLESS_NAME and shape.stored is not None and not shape.stored.is_estimated
    for dtype in ("float32", "bfloat16"):
        model = check_source(str(converted), "--model", dtype, "cpu").model
        assert shape.cost(model.dtype.itemsize) == model.cost
        raw = check_source(str(converted), "--model", dtype, "cpu", codec="none").model
        assert replace(without_code(shape).cost(model.dtype.itemsize), weights=raw.weights) == raw.cost


FIELDS = (
    "bits",
    "group_size",
    "weight_block_size",
    "quant_algo",
    "quant_method",
    "bnb_4bit_quant_type",
    "config_groups",
    "w_bit",
)
VALUES = st.none() | st.booleans() | st.sampled_from([-1, 0, 4, 8, 16, 128, 2.5, "nf4", "FP8", "128x128", "fp8", "gptq", "awq"])
NESTED = (
    VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(st.sampled_from(["a", "weights", "num_bits"]), VALUES, max_size=2)
)
WEIGHTS = {"num_bits": [2, 4, 8], "type": ["int", "float"], "group_size": [-1, 16, 32, 128], "symmetric": [True, False]}


@given(st.data())
def test_what_is_read_to_be_unpacked_is_planned_under_the_same_name(data: st.DataObject) -> None:
    """And what is refused by a plan is not run."""
    quantization = {**FORMS[data.draw(st.sampled_from(sorted(FORMS)))].quantization}
    quantization |= data.draw(st.dictionaries(st.sampled_from(FIELDS), NESTED, max_size=2))
    if data.draw(st.booleans()):
        drawn = {name: data.draw(st.sampled_from(values)) for name, values in WEIGHTS.items()}
        others = data.draw(st.dictionaries(st.sampled_from(["strategy", *WEIGHTS]), NESTED, max_size=1))
        quantization["config_groups"] = {"a": {"weights": {**drawn, **others}}}
    try:
        name: str | None = read_packing(quantization, "here").name
    except ModelError:
        name = None
    try:
        packed = read_quantization({"quantization_config": quantization})
    except ValueError:
        packed = None
    assert name is None or (packed is not None and packed.name == name and 2 <= packed.bits < 40)
