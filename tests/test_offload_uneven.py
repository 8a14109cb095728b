"""A model whose decoder layers differ in their tensors is loaded, streamed and computed as transformers does."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import TINY_SIZES, reference_model
from fakes import EagerDevice, LateDevice, RefusingLateDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.source import check_source
from planning import L40

PROMPT = [5, 3, 20, 7, 7]


class TwoWidthsConfig(LlamaConfig):
    model_type = "two_widths"


class TwoWidths(LlamaForCausalLM):
    """A Llama whose every second MLP is narrow."""

    config_class = TwoWidthsConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        narrow = copy.deepcopy(config)
        narrow.intermediate_size = 16
        for layer in self.model.layers[1::2]:
            layer.mlp = LlamaMLP(narrow)


@pytest.fixture(scope="module")
def two_widths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AutoConfig.register(TwoWidthsConfig.model_type, TwoWidthsConfig)
    AutoModelForCausalLM.register(TwoWidthsConfig, TwoWidths)
    folder = tmp_path_factory.mktemp("two_widths")
    torch.manual_seed(0)
    config = TwoWidthsConfig(**{**TINY_SIZES, "num_hidden_layers": 6, "initializer_range": 0.4})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_layers_of_two_widths_have_two_codecs_and_costs_of_their_own(two_widths: Path) -> None:
    model = check_source(str(two_widths), "--model", "float32", "cpu").model
    codecs = model.codecs
    wide, narrow = codecs[:2]
    assert all(codec is (narrow if layer % 2 else wide) for layer, codec in enumerate(codecs))
    assert model.cost.slot_bytes == wide.stored.num_bytes > narrow.stored.num_bytes
    assert model.cost.stored_bytes == 3 * (wide.stored.num_bytes + narrow.stored.num_bytes)


@pytest.mark.matrix
@pytest.mark.parametrize("make_device", [EagerDevice, LateDevice, RefusingLateDevice])
def test_a_model_of_two_widths_writes_the_text_of_transformers(two_widths: Path, make_device: Callable[[], CpuDevice]) -> None:
    """With every number of resident layers and slots, and from disk."""
    reference = reference_model(two_widths)
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    slot_bytes = check_source(str(two_widths), "--model", "float32", "cpu").model.cost.slot_bytes
    shapes = [(0, 1, None), (0, 2, None), (1, 3, None), (3, 2, None), (5, 2, None), (6, 2, None), (1, 2, 4 * slot_bytes)]
    for resident, slots, host_memory_bytes in shapes:
        settings = EngineSettings(
            model=str(two_widths),
            tree="none",
            device="cpu",
            resident_layers=resident,
            slots=slots,
            host_memory_bytes=host_memory_bytes,
        )
        with open_engine(settings, hardware=L40, device=make_device()) as engine:
            tokens = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids
            assert list(tokens) == expected[0, len(PROMPT) :].tolist()
            assert engine.plan.bytes_per_pass == engine.loop._stream.bytes_per_pass
            assert bool(engine.plan.placement.disk) == (host_memory_bytes is not None)
