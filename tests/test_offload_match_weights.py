"""A config and the tensors beside it, put together as transformers puts them: its greedy tokens are the reference. What it
leaves out we leave out, and say so; what it makes up at random we refuse."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from conftest import VOCAB_SIZE, reference_model, save_tiny_model
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.errors import CheckpointError, ModelError
from offload.model import architecture
from offload.model.architecture import architecture_of
from offload.typed_model import resolve_dtype
from planning import L40

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PROMPT = [5, 9, 33, 2, 71]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three layers and a head of its own, in one file."""
    folder = save_tiny_model(tmp_path / "model")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, changed: Callable[[dict[str, torch.Tensor]], None] = lambda _: None, **config: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def ours(folder: Path) -> list[int]:
    with open_engine(EngineSettings(model=str(folder), device="cpu", tree="none"), hardware=L40) as engine:
        return list(engine.generate(PROMPT, max_new_tokens=10, ignore_eos=True).token_ids)


def theirs(folder: Path) -> list[int]:
    with torch.no_grad():
        output = reference_model(folder).generate(
            torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return output[0, len(PROMPT) :].tolist()


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("offload"))


def test_a_head_of_its_own_is_used_whatever_the_config_ties(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    untied = ours(model)
    change(model, tie_word_embeddings=True)
    assert ours(model) == theirs(model) == untied
    assert HEAD in warnings_of(caplog) and EMBEDDING in warnings_of(caplog)


def test_a_head_that_repeats_the_embedding_is_tied_and_takes_no_memory(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    change(model, repeat, tie_word_embeddings=True)
    assert ours(model) == theirs(model)
    assert warnings_of(caplog) == ""
    checkpoint = architecture.read_architecture(model)
    assert HEAD not in checkpoint.outside_shapes


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING])
def test_of_two_tied_tensors_either_is_enough(model: Path, missing: str) -> None:
    change(model, without(missing), tie_word_embeddings=True)
    assert ours(model) == theirs(model)


def test_a_head_that_is_neither_there_nor_tied_is_not_made_up(model: Path) -> None:
    change(model, without(HEAD))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' is missing"):
        ours(model)


EXTRAS: dict[str, Mapping[str, torch.Tensor]] = {
    "scales of an FP8 cache": {f"model.layers.{layer}.self_attn.k_scale": torch.ones(1) for layer in range(3)},
    "a value head": {"v_head.summary.weight": torch.zeros(1, 32)},
    "a head that drafts": {"model.layers.3.eh_proj.weight": torch.zeros(32, 64), "mtp.fc.weight": torch.zeros(32, 64)},
    "a bias that the config has not": {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_tensors_that_the_model_has_no_place_for_are_left_out_and_named(
    model: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    change(model, lambda tensors: tensors.update(EXTRAS[name]))
    assert ours(model) == theirs(model)
    assert next(iter(EXTRAS[name])) in warnings_of(caplog)


def test_tables_that_everyone_computes_are_left_out_without_a_word(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.{what}" for layer in range(3) for what in ("inv_freq", "cos_cached")]
    change(model, lambda tensors: tensors.update({name: torch.ones(4) for name in names}))
    assert ours(model) == theirs(model)
    assert warnings_of(caplog) == ""


def test_a_config_of_fewer_layers_runs_the_first_ones(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(model, num_hidden_layers=2)
    assert ours(model) == theirs(model)
    assert "model.layers.2." in warnings_of(caplog) and "and 6 more" in warnings_of(caplog)


def test_a_scale_beside_a_weight_is_not_left_out(model: Path) -> None:
    """Weights of eight bits without their config: the numbers in the file are not the model's."""
    change(model, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight_scale": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"says that .* is packed"):
        ours(model)


def tiny_config(family: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(family, **sizes, num_hidden_layers=2, vocab_size=VOCAB_SIZE, pad_token_id=None, **changes)


def test_modules_that_stay_in_float32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """We give all layers one dtype, and transformers would not."""
    from transformers import LlamaForCausalLM

    architecture_of(tiny_config("llama"), "test")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["norm"])
    with pytest.raises(ModelError, match=r"stays in float32 whatever the dtype \(norm\)"):
        architecture_of(tiny_config("llama"), "test")


def test_tensors_that_are_neither_weights_nor_buffers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in no file, and nothing would fill them."""
    from transformers.models.llama import modeling_llama

    class Scaled(modeling_llama.LlamaMLP):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gain = torch.ones(1)

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Scaled)
    with pytest.raises(ModelError, match="not weights \\(gain\\)"):
        architecture_of(tiny_config("llama"), "test")


def test_auto_is_a_dtype_that_layers_are_computed_in() -> None:
    stored = (torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int32)
    on_gpu = [resolve_dtype("auto", dtype, "cuda") for dtype in stored]
    assert on_gpu == [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.bfloat16]
    assert {resolve_dtype("auto", dtype, "cpu") for dtype in stored} == {torch.float32}
    assert resolve_dtype("float16", torch.int8, "cuda") == torch.float16
