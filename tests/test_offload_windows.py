"""Attention within a window shorter than the text: exactly transformers', in prompts, plain passes, trees and drafts, whatever
rows nodes lie in. Layers with windows and without in one model; layers of two shapes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from conftest import TINY_SIZES, VOCAB_SIZE, reference_model
from drafters import expand_level, extend, model_of, open_drafters, run_round, start_all
from fakes import RecordingDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.errors import ModelError
from offload.model.architecture import architecture_of
from offload.model.causal_lm import CausalLM
from offload.model.drafter import ModelDrafter
from offload.model.masks import tree_mask
from offload.source import check_source
from planning import L40
from shapes import chain, from_widths
from small_models import assert_close, causal_lm, open_model, text_part, tree_logits, tree_part
from test_offload_device_ops import Audit, MetaDevice
from test_offload_model import expected_logits, poison_tails, random_tokens
from tree.aim import Aim
from tree.shape import TreeShape

Models = Callable[..., Path]
WINDOW = 5
ALTERNATING = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "qwen2": ALTERNATING,
    "qwen3": ALTERNATING,
}
WINDOWS = {"mistral": (WINDOW,) * 3, "qwen2": (WINDOW, None, WINDOW)}
SHAPES = [from_widths([2, 3, 1]), chain(9), TreeShape.chains(3, 4), TreeShape.root_only()]
PROMPT = [3 + 7 * position % 89 for position in range(14)]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, models: Models) -> Path:
    return models(request.param, **FAMILIES[request.param])


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_are_those_of_the_layers(models: Models, family: str) -> None:
    with open_model(models(family, **FAMILIES[family])) as model:
        assert model.architecture.windows == WINDOWS[family]
    with open_model(models(family)) as model:
        assert model.architecture.windows == (None, None, None)


@pytest.mark.matrix
@pytest.mark.parametrize("first_piece", [0, 3, 9])
def test_every_node_sees_the_window_of_its_path(folder: Path, first_piece: int) -> None:
    """Prompts that are read at once and in two pieces; trees longer than the window; siblings, whose rows lie apart."""
    reference, generator = reference_model(folder), torch.Generator().manual_seed(1)
    with open_model(folder) as model:
        segment, context = model.cache.segments[0], list(PROMPT)
        if first_piece:
            model.forward((text_part(segment, context[:first_piece], 0),))
            segment.commit(range(first_piece))
        for shape in SHAPES:
            prefix, tokens = context[segment.length :], random_tokens(generator, shape.num_nodes)
            poison_tails(model)
            assert_close(tree_logits(model, prefix, tokens, shape), expected_logits(reference, context, tokens, shape))
            path = shape.path(shape.num_nodes - 1)
            segment.commit([*range(len(prefix)), *(len(prefix) + node for node in path)])
            context += [tokens[node] for node in path]


@pytest.mark.matrix
def test_texts_of_several_lengths_share_a_pass(folder: Path) -> None:
    reference, generator, shape = reference_model(folder), torch.Generator().manual_seed(2), SHAPES[0]
    with open_model(folder, num_segments=3) as model:
        texts = [PROMPT[:2], PROMPT, PROMPT[:7]]
        for _ in range(2):
            tokens = [random_tokens(generator, shape.num_nodes) for _ in texts]
            poison_tails(model)
            prefixes = [text[segment.length :] for text, segment in zip(texts, model.cache.segments, strict=True)]
            parts = [tree_part(*part, shape) for part in zip(model.cache.segments, prefixes, tokens, strict=True)]
            for text, of_text, output in zip(texts, tokens, model.forward(parts), strict=True):
                assert_close(output.logits, expected_logits(reference, text, of_text, shape))
            path = shape.path(shape.num_nodes - 1)
            for number, segment in enumerate(model.cache.segments):
                begin = len(prefixes[number])
                segment.commit([*range(begin), *(begin + node for node in path)])
                texts[number] = [*texts[number], *(tokens[number][node] for node in path)]


def greedy(model: CausalLM, prompt: list[int], num_new: int) -> list[int]:
    segment, text = model.cache.segments[0], list(prompt)
    while len(text) < len(prompt) + num_new:
        (output,) = model.forward((text_part(segment, text[segment.length :], 1),))
        segment.commit(range(len(text) - segment.length))
        text.append(int(output.logits[0].argmax()))
    return text[len(prompt) :]


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    with open_model(folder) as model, torch.no_grad():
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference_model(folder).generate(torch.tensor([PROMPT]), max_new_tokens=24, **options)
        assert greedy(model, PROMPT, 24) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.matrix
def test_a_draft_grows_within_its_windows_recorded_or_not(folder: Path) -> None:
    """Against a draft without graphs, level by level; and that one against transformers."""
    generator, reference = torch.Generator().manual_seed(3), reference_model(folder)
    with open_drafters((CpuDevice, RecordingDevice), folder, rows=600) as drafters:
        contexts = start_all(drafters, PROMPT)
        for shape in (*SHAPES[:3], SHAPES[0]):
            run_round(contexts, shape, generator)
        text, shape = model_of(contexts[0])._token_ids, SHAPES[0]
        tokens = [text[-1], *random_tokens(generator, shape.num_nodes - 1)]
        expected = expected_logits(reference, text[:-1], tokens, shape)
        for context in contexts:
            model = model_of(context)
            assert_close(model.begin(), expected[:1])
            for nodes in shape.expanded[1:-1]:
                logits = expand_level(model, shape, nodes, torch.tensor([tokens[node] for node in nodes]))
                assert_close(logits, expected[list(nodes)])
        extend(contexts, [11] * 510)  # into the next bucket of attended rows
        run_round(contexts, shape, generator)


@pytest.mark.matrix
@pytest.mark.parametrize("tree", ["none", "4x4:kary"])
def test_an_engine_writes_the_text_of_transformers(folder: Path, tree: str) -> None:
    """Target and draft have the window."""
    drafts = () if tree == "none" else (str(folder),)
    settings = EngineSettings(model=str(folder), draft_models=drafts, device="cpu", tree=tree, resident_layers=1, slots=2)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with open_engine(settings, hardware=L40) as engine, torch.no_grad():
        result = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True)
        expected = reference_model(folder).generate(torch.tensor([PROMPT]), max_new_tokens=24, **options)
        assert list(result.token_ids) == expected[0, len(PROMPT) :].tolist()
        if drafts:  # the draft is the target: a mask that was off in one of them would reject
            assert max(one.emitted_tokens for one in result.stats.passes) == 5


def test_the_window_decides_and_no_other_length_is_right(models: Models) -> None:
    """The comparison would find a window that is off by one."""
    folder = models("mistral", **FAMILIES["mistral"])
    expected = expected_logits(reference_model(folder), PROMPT, [1], TreeShape.root_only())
    with open_model(folder) as model:
        for window in (WINDOW - 1, WINDOW + 1, 100):
            folder = models("mistral", sliding_window=window)
            with open_model(folder) as other:
                logits = tree_logits(other, PROMPT, [1], TreeShape.root_only())
            assert (logits - expected).abs().max() > 1e-2
        assert_close(tree_logits(model, PROMPT, [1], TreeShape.root_only()), expected)


def test_a_window_that_nothing_would_keep_is_refused() -> None:
    """Llama knows of no windows: transformers computes without, whatever the config says."""
    sizes = {**TINY_SIZES, "max_position_embeddings": 64}
    architecture_of(AutoConfig.for_model("llama", **sizes, sliding_window=64), "test")
    with pytest.raises(ModelError, match="names a window of 16 tokens, for which its attention does not ask"):
        architecture_of(AutoConfig.for_model("llama", **sizes, sliding_window=16), "test")


def test_chunked_attention_is_refused() -> None:
    config = AutoConfig.for_model("qwen2", **TINY_SIZES, max_position_embeddings=64)
    config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="chunked_attention"):
        architecture_of(config, "test")


def test_masks_by_kind_are_made_without_a_wait_for_the_device(models: Models) -> None:
    """For several texts, and level by level, recorded or not."""
    folder, shape = models("qwen2", **ALTERNATING), SHAPES[0]
    for replays in (True, False):
        device: Any = MetaDevice(replays=replays)
        model = causal_lm(check_source(str(folder), "--model", "float32", "cpu"), device, num_segments=2)
        drafter = ModelDrafter(model, device, VOCAB_SIZE, Aim(shape=shape), 8, max_nodes=shape.num_nodes)
        drafter.prepare(Aim(shape=shape))
        first, second = model.cache.segments
        with Audit() as audit:
            for _ in range(2):
                text, tree = text_part(first, PROMPT, 2), tree_part(second, PROMPT, [1] * shape.num_nodes, shape)
                mask = tree_mask(shape, device)
                parts = (replace(text, tree_mask=mask[:0, :0]), replace(tree, tree_mask=mask))
                model.forward(parts, feature_layers=(0, 2))
                for part in parts:
                    part.segment.commit(range(len(PROMPT)))
            context = model_of(drafter.start(0, [*PROMPT, *PROMPT, 3], len(PROMPT)))
            context.begin()
            for nodes in shape.expanded[1:-1]:
                token_ids = torch.zeros(len(nodes), dtype=torch.int64, device=device.torch_device)
                expand_level(context, shape, nodes, token_ids)
        assert audit.found == []


# -- layers of two shapes ---------------------------------------------------------------------------------------------------


class UnevenConfig(LlamaConfig):
    """Every other layer has a wider MLP, and as many key/value heads as there are heads."""

    model_type = "uneven"


class UnevenForCausalLM(LlamaForCausalLM):
    config_class = UnevenConfig

    def __init__(self, config: UnevenConfig) -> None:
        super().__init__(config)
        for layer in list(self.model.layers)[1::2]:
            wide = LlamaConfig(**{**config.to_dict(), "intermediate_size": 80})
            layer.mlp = LlamaMLP(wide)
            attention, width = layer.self_attn, config.num_attention_heads * config.head_dim
            attention.k_proj = nn.Linear(config.hidden_size, width, bias=False)
            attention.v_proj = nn.Linear(config.hidden_size, width, bias=False)
            attention.num_key_value_groups = 1
        self.post_init()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AutoConfig.register("uneven", UnevenConfig, exist_ok=True)
    AutoModelForCausalLM.register(UnevenConfig, UnevenForCausalLM, exist_ok=True)
    folder = tmp_path_factory.mktemp("uneven")
    torch.manual_seed(0)
    sizes = {**TINY_SIZES, "num_hidden_layers": 4, "max_position_embeddings": 160, "initializer_range": 0.4}
    UnevenForCausalLM(UnevenConfig(**sizes)).save_pretrained(folder)
    return folder


def test_layers_of_two_shapes_run_exactly(uneven: Path) -> None:
    reference, generator = reference_model(uneven), torch.Generator().manual_seed(4)
    with open_model(uneven, num_segments=2) as model:
        assert model.architecture.kv_shapes == ((2, 8), (4, 8), (2, 8), (4, 8))
        assert [len(buffer) for buffer in model.cache._memory.buffers] == [2, 2]
        texts = [list(PROMPT), PROMPT[:3]]
        for shape in SHAPES:
            prefixes = [text[segment.length :] for text, segment in zip(texts, model.cache.segments, strict=True)]
            tokens = [random_tokens(generator, shape.num_nodes) for _ in texts]
            poison_tails(model)
            parts = [tree_part(*part, shape) for part in zip(model.cache.segments, prefixes, tokens, strict=True)]
            for text, of_text, output in zip(texts, tokens, model.forward(parts), strict=True):
                assert_close(output.logits, expected_logits(reference, text, of_text, shape))
            path = shape.path(shape.num_nodes - 1)
            for number, segment in enumerate(model.cache.segments):
                begin = len(prefixes[number])
                segment.commit([*range(begin), *(begin + node for node in path)])
                texts[number] += [tokens[number][node] for node in path]


def test_a_draft_of_layers_of_two_shapes_is_the_same_recorded_or_not(uneven: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    with open_drafters((CpuDevice, RecordingDevice), uneven, rows=100, vocab_size=VOCAB_SIZE) as drafters:
        contexts = start_all(drafters, PROMPT)
        for shape in SHAPES:
            run_round(contexts, shape, generator)
