"""A model in any packed format computes with the weights that its format says, and writes their text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import reference_model
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.errors import CheckpointError
from offload.source import check_source
from packed_models import FORMS, write_packed
from planning import L40

PROMPT = [5, 9, 33, 2, 71]
COMMON = ("fp8-blocks", "compressed-tensors-int4", "gptq-ordered", "nf4")
NUM_TOKENS, TREE = 12, "2x3:kary"


def in_ci(form: str) -> Any:
    return pytest.param(form, marks=[] if form in COMMON else pytest.mark.slow)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_read_as_its_unpacked_weights(form: str, tmp_path: Path) -> None:
    model = write_packed(form, tmp_path, num_hidden_layers=1)
    source = check_source(str(model.folder), "--model", "float32", "cpu")
    found = {name: torch.full(shape, torch.nan) for name, shape in source.architecture.expected_tensors.items()}
    with source.parameters.open() as feed:
        feed.fill(found)
    expected = load_file(model.reference_folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", [in_ci(form) for form in FORMS])
def test_a_model_writes_the_text_of_its_unpacked_weights_in_transformers(form: str, tmp_path: Path) -> None:
    """Streamed, resident, and with trees, which a draft packed alike grows."""
    model = write_packed(form, tmp_path)
    reference: Any = reference_model(model.reference_folder)
    prompt = torch.tensor([PROMPT])
    reference.generation_config.eos_token_id = None
    text = reference.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
    expected = text[0, len(PROMPT) :].tolist()
    for changes in (
        {"resident_layers": 0, "tree": "none"},
        {"resident_layers": 3, "tree": "none"},
        {"resident_layers": 1, "tree": TREE, "draft_models": (str(model.folder),)},
    ):
        settings: dict[str, Any] = {"model": str(model.folder), "device": "cpu", "dtype": "float32", **changes}
        with open_engine(EngineSettings(**settings), hardware=L40) as engine:
            result = engine.generate(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True)
            assert list(result.token_ids) == expected, changes
            document: Any = result.to_json()
            assert changes["resident_layers"] == 3 or sum(document["streaming"]["codecs"].values()) > 0


@pytest.mark.parametrize("form", ["compressed-tensors-mxfp4", "compressed-tensors-nvfp4", "gptq"])
def test_a_scale_that_is_no_number_is_named(form: str, tmp_path: Path) -> None:
    model = write_packed(form, tmp_path, num_hidden_layers=1)
    tensors = load_file(model.folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales" if form == "gptq" else "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name].view(torch.uint8)[0].fill_(255)
    save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.* multiplies weights, and .* values are not finite"):
        open_engine(EngineSettings(model=str(model.folder), device="cpu", tree="none"), hardware=L40).close()
