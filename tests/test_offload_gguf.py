"""A GGUF file is a model: the text of its unpacked weights in transformers, wherever its layers lie; what is not sound or not
read is refused in three lines."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import EOS
from gguf_files import write_gguf
from offload.assemble import open_engine
from offload.cli.main import main
from offload.coding.gguf_types import BLOCKS
from offload.config import EngineSettings
from offload.errors import CheckpointError, ModelError
from offload.model.gguf_config import config_of
from offload.model.gguf_rope import llama3_factors
from offload.source import check_source
from offload.weights.gguf_header import read_gguf
from planning import L40

PROMPT = [5, 9, 33, 2, 71]
NUM_TOKENS, TREE = 12, "2x3:kary"
COMMON = ("Q4_0", "Q4_K", "F16")


def text_of(path: Path, **changes: Any) -> tuple[list[int], dict[str, Any]]:
    settings: dict[str, Any] = {"model": str(path), "device": "cpu", "tree": "none", **changes}
    with open_engine(EngineSettings(**settings), hardware=L40) as engine:
        result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        return list(result.token_ids), result.to_json()


def greedy(model: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    text = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False)
    return [int(token_id) for token_id in text[0, len(PROMPT) :]]


@pytest.mark.matrix
@pytest.mark.parametrize("type_name", [it if it in COMMON else pytest.param(it, marks=pytest.mark.slow) for it in BLOCKS])
def test_a_file_writes_the_text_of_its_unpacked_weights_in_transformers(type_name: str, tmp_path: Path) -> None:
    """Streamed, resident, and with trees, which a draft in the same file grows."""
    path = tmp_path / "model.gguf"
    expected = greedy(write_gguf(path, type_name))
    assert len(set(expected)) > 1
    for changes in (
        {"resident_layers": 0},
        {"resident_layers": 3},
        {"resident_layers": 1, "tree": TREE, "draft_models": (str(path),)},
    ):
        found, document = text_of(path, **changes)
        assert found == expected, changes
        assert str(document["environment"]["weights"]).startswith(f"GGUF {type_name}")
        if type_name not in ("F32", "F16", "BF16") and changes["resident_layers"] < 3:
            assert document["streaming"]["codecs"] == {type_name: 3 - changes["resident_layers"]}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 64, "num_key_value_heads": 8}),
    ],
)
def test_families_biases_heads_and_ties_are_read_from_the_file(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = greedy(write_gguf(path, "Q5_0", family=family, **changes))
    assert text_of(path, resident_layers=1)[0] == expected


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("rope", "metadata", "factors"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}, None),
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 40}, None),
        ({**LLAMA3, "original_max_position_embeddings": 8192}, {}, llama3_factors(500_000.0, 16, 32.0)),
        ({"rope_type": "default"}, {"type": "none", "factor": 2.0}, [1.0] * 16),
    ],
    ids=["linear", "yarn", "llama3", "none"],
)
def test_scaled_rotary_frequencies_are_those_of_transformers(
    rope: dict[str, Any], metadata: dict[str, Any], factors: Sequence[float] | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    parameters = {**rope, "rope_theta": 500_000.0}
    scaling = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    model: Any = write_gguf(path, metadata=scaling, factors=factors, rope_parameters=parameters)
    read = check_source(str(path), "--model", "float32", "cpu").architecture.config.rope_parameters
    assert {key: read[key] for key in parameters} == parameters
    assert text_of(path)[0] == greedy(model)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_source(str(path), "--model", "auto", "cpu")
    assert len(str(caught.value).splitlines()) == 3 and str(path) in caught.value.where
    return str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.expert_count": 8}, "llama is not supported: it is a mixture of experts"),
        ({"llama.rope.dimension_count": 16}, "it rotates 16 of 32 dimensions of a head"),
        ({"llama.rope.scaling.type": "longrope"}, "it scales rotary frequencies by 'longrope', which we do not read"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.original_context_length is missing"),
        ({"llama.attention.sliding_window": 64}, "its attention has a window"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(metadata: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata=metadata, num_hidden_layers=1)
    assert expected in refused(path)


def test_rotary_factors_that_are_not_those_of_llama_3_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, factors=[2.0] * 16, num_hidden_layers=1)
    assert "factors that are not those of Llama 3.1" in refused(path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, num_hidden_layers=1)
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
    text = refused(path)
    assert "gemma is not supported: we read models of llama, qwen2, qwen3" in text and "safetensors" in text


def test_a_tensor_that_the_family_has_not_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, num_hidden_layers=1)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    assert "tensor 'blk.0.ffn_xx.weight' is none that we know of this family" in refused(path)


def test_metadata_that_do_not_fit_the_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, num_hidden_layers=2)
    key = b"llama.block_count\x04\0\0\0"
    path.write_bytes(path.read_bytes().replace(key + b"\x02", key + b"\x03"))
    said = refused(path)
    assert "tensor 'model.layers.2.self_attn.q_proj.weight' is missing" in said and "config.json" not in said


def test_a_float_of_the_metadata_is_what_it_was_before_it_was_stored(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", num_hidden_layers=1)
    assert config_of(read_gguf(tmp_path / "model.gguf"))["rms_norm_eps"] == 1e-5


def test_ends_of_text_are_all_that_the_vocabulary_has(tmp_path: Path) -> None:
    tokens = [f"t{number}" for number in range(EOS + 1)]
    tokens[7], tokens[8], tokens[9] = "<|im_end|>", "<|eot_id|>", "<|end|>"
    types = [3 if number in (7, 8) else 1 for number in range(EOS + 1)]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.eom_token_id": 11}
    write_gguf(tmp_path / "model.gguf", metadata=metadata, num_hidden_layers=1)
    assert config_of(read_gguf(tmp_path / "model.gguf"))["eos_token_id"] == [7, 8, 11, EOS]
    assert config_of(read_gguf(tmp_path / "model.gguf", long_arrays=False))["eos_token_id"] == [7, 8, 11, EOS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, num_hidden_layers=1)
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data[: len(data) // 2], "is truncated: its tensors end at byte"),
        (lambda data: data[:50], "is truncated: its head goes on to byte"),
        (lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", (2**60).to_bytes(8, "little") + b"llama", 1), "has a string of"),
    ],
    ids=["cut short", "cut in its head", "a string of 2**60 bytes"],
)
def test_a_damaged_file_ends_the_command_with_three_lines(
    small: Path, change: Callable[[bytes], bytes], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(small.read_bytes()))
    assert main(["--model", str(path), "--prompt-ids", "1,2", "--quiet"]) == CheckpointError.exit_code == 3
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and expected in lines[0] and str(path) in lines[1]


def test_a_file_is_verified_against_a_manifest_beside_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", str(small), "--write-manifest", "--full", "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["weights"] == "GGUF Q8_0" and document["contents"] == "match the manifest"
    data = bytearray(small.read_bytes())
    data[-100] ^= 1
    small.write_bytes(data)
    assert main(["verify", "--model", str(small), "--full", "--quiet"]) == 5
    data[-100] ^= 1
    small.write_bytes(data)


def test_a_folder_with_a_gguf_file_alone_names_the_file(small: Path) -> None:
    with pytest.raises(ModelError) as caught:
        check_source(str(small.parent), "--model", "auto", "cpu")
    assert caught.value.cure == f"give the file itself: {small}"


def test_a_gguf_file_is_not_converted(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--model", str(small), "--codec", "lossless", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 3
    assert "they are packed: GGUF Q8_0" in capsys.readouterr().err
