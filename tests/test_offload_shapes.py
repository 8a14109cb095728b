"""Shapes from config.json alone agree with the models that transformers builds and with the layout that the loader makes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import FAMILIES
from offload.demo import DRAFT, TARGET
from offload.errors import ModelError
from offload.model.architecture import read_architecture
from offload.planner.shapes import PRESETS, find_shape, preset_names, shape_from_config
from offload.typed_model import TypedModel

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
# Parameter counts that the hub states for the published checkpoints.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_llama_2_70b_is_the_model_of_the_arithmetic_in_the_readme() -> None:
    shape = find_shape("llama-2-70b", "--model")
    assert (shape.layer_parameters, shape.num_parameters) == (855_654_400, 68_976_648_192)
    cost = shape.cost(2)
    assert (cost.slot_bytes, cost.outside_bytes) == (2 * shape.layer_parameters, 2 * shape.outside_parameters)
    assert cost.kv_bytes_per_row == 327_680


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert find_shape(name, "--model").num_parameters == PUBLISHED[name]


def test_every_file_of_profiles_models_is_a_preset_with_its_source() -> None:
    files = sorted(PRESETS.iterdir())
    assert [path.name for path in files] == [f"{name}.json" for name in preset_names()] and len(files) >= 26
    for path in files:
        assert find_shape(path.stem, "--model").name == path.stem
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
        assert source.startswith("made up for scale models" if path.stem == "tiny-llama-shape" else "config.json of ")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_the_models_that_transformers_builds_of_their_facts(name: str) -> None:
    """One layer of each, without memory: parameters, key/value width and positions are those of the real class."""
    facts = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    config = AutoConfig.for_model(**{**facts, "num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = find_shape(name, "--model")
    assert sum(parameter.numel() for parameter in model.model.layers[0].parameters()) == shape.layer_parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.layer_parameters + shape.outside_parameters
    keys = model.model.layers[0].self_attn.k_proj
    assert keys.weight.shape == (shape.num_kv_heads * shape.head_dim, shape.hidden_size)
    assert config.max_position_embeddings == shape.max_positions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_costs_are_those_of_the_loaded_model(family: str, changes: dict[str, bool], models: Callable[..., Path]) -> None:
    assert_costs_agree(models(family, **changes))


@pytest.mark.parametrize("folder", [TARGET, DRAFT])
def test_costs_of_the_demo_pair_are_those_of_the_loaded_model(folder: Path) -> None:
    assert_costs_agree(folder)


def assert_costs_agree(folder: Path) -> None:
    architecture, shape = read_architecture(folder), find_shape(str(folder), "--model")
    for dtype in (torch.bfloat16, torch.float32):
        assert shape.cost(dtype.itemsize) == TypedModel(architecture=architecture, dtype=dtype, weights=shape.weights).cost
    assert (shape.max_positions, shape.name) == (architecture.max_positions, str(folder))


def test_what_configuration_classes_fill_in_is_filled_in() -> None:
    """llama-68m's config.json has neither num_key_value_heads nor head_dim; qwen3's class says 128."""
    bare = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    shape = shape_from_config(bare, where="here")
    assert (shape.num_kv_heads, shape.head_dim, shape.tied_embeddings, shape.dtype) == (4, 16, False, "float16")
    assert shape_from_config({**LLAMA, "model_type": "qwen3"}, where="here").head_dim == 128
    assert shape_from_config({**LLAMA, "head_dim": None, "torch_dtype": "bfloat16"}, where="here").dtype == "bfloat16"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**6},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"intermediate_size": 96.5},
        {"num_attention_heads": True},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": -1},
        {"head_dim": 0},
        {"vocab_size": None},
        {"max_position_embeddings": [1]},
        {"tie_word_embeddings": "no"},
        {"attention_bias": 1},
        {"mlp_bias": None},
        {"dtype": "int4"},
        {"dtype": ["float16"]},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_configs_that_are_wrong_are_refused_by_key_and_file(changes: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        shape_from_config({**LLAMA, **changes}, where="a/config.json")
    assert next(iter(changes)) in caught.value.what and caught.value.where == "a/config.json"


@pytest.mark.parametrize("key", [key for key in LLAMA if key != "num_key_value_heads"])
def test_configs_that_lack_a_fact_are_refused_by_key(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        shape_from_config({name: value for name, value in LLAMA.items() if name != key}, where="here")


@pytest.mark.parametrize("text", ["", "[]", "{", '"llama"', "nan", "[" * 100_000])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        find_shape(str(tmp_path), "--model")
    assert caught.value.where == str(tmp_path / "config.json")
    assert "again" in caught.value.cure  # not another architecture


@pytest.mark.parametrize("name", ["llama-2-71b", "nobody/never-downloaded", "../models/llama-2-7b", "", "x" * 5000])
def test_a_model_that_is_nowhere_is_refused_with_the_presets(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_shape(name, "--draft-model")
    assert caught.value.where == "--draft-model"


def test_a_preset_that_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.planner.shapes.PRESETS", tmp_path)
    for document in (
        {"config": LLAMA},
        {"schema_version": 2, "source": "x", "config": LLAMA},
        {"schema_version": 1, "source": "x"},
    ):
        (tmp_path / "mine.json").write_text(json.dumps(document))
        with pytest.raises(ModelError, match="schema_version 1, source and config"):
            find_shape("mine", "--model")


def test_a_folder_comes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-2-7b").mkdir()
    assert find_shape("llama-2-7b", "--model").num_layers == 32  # a folder without a config is none
    Path("llama-2-7b/config.json").write_text(json.dumps(LLAMA))
    assert find_shape("llama-2-7b", "--model").num_layers == 2


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shape = find_shape("someone/small", "--model")
    assert (shape.name, shape.num_layers) == ("someone/small", 2)


def test_shapes_import_neither_torch_nor_transformers() -> None:
    code = (
        "from sys import modules; from offload.planner.shapes import find_shape; find_shape('llama-2-70b', '--model');"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")
