"""A model in any packed format computes with the weights that its format says; test_offload_packed_forms.py reads its text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.errors import CheckpointError
from offload.source import check_source
from packed_models import EVERY_FORM, write_packed
from planning import L40


@pytest.mark.matrix
@pytest.mark.parametrize("form", EVERY_FORM)
def test_a_model_is_read_as_its_unpacked_weights(form: str, tmp_path: Path) -> None:
    model = write_packed(form, tmp_path, num_hidden_layers=1)
    source = check_source(str(model.folder), "--model", "float32", "cpu")
    found = {name: torch.full(shape, torch.nan) for name, shape in source.architecture.expected_tensors.items()}
    with source.parameters.open() as feed:
        feed.fill(found)
    expected = load_file(model.reference_folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["compressed-tensors-mxfp4", "compressed-tensors-nvfp4", "gptq", "residual-int4"])
def test_a_scale_that_is_no_number_is_named(form: str, tmp_path: Path) -> None:
    model = write_packed(form, tmp_path, num_hidden_layers=1)
    tensors = load_file(model.folder / "model.safetensors")
    scale = {"gptq": "scales", "residual-int4": "weight_base_scale"}.get(form, "weight_scale")
    tensors[f"model.layers.0.mlp.up_proj.{scale}"].view(torch.uint8)[0].fill_(255)
    save_file(tensors, model.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.* multiplies weights, and .* values are not finite"):
        open_engine(EngineSettings(model=str(model.folder), device="cpu", tree="none"), hardware=L40).close()
