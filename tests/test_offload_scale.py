"""A scale model computes the function of the small model inside it, whatever its width, heads and depth."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from conftest import save_tiny_model
from fakes import RefusingDevice
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET
from offload.device import Device
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.engine.loading import LoadProgress
from offload.errors import FitError, ModelError, OffloadError, UsageError
from offload.model.architecture import Architecture
from offload.scale.geometry import Geometry, Sizes
from offload.scale.model import open_scale_model, widen
from offload.scale.preset import scale_shape
from offload.source import check_source
from offload.weights.source import TensorSource, borrowed_layers
from planning import L40

PROMPT = [20, 300, 41, 900, 7]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# hidden, intermediate, heads, kv heads, head_dim, layers
WIDE = {
    "grouped, twice in the residual": (256, 96, 16, 4, 8, 5),
    "width of no exact gain": (72, 50, 8, 4, 8, 3),
    "smaller groups": (64, 48, 4, 4, 8, 3),
    "wider heads": (128, 64, 8, 2, 16, 4),
    "much wider heads": (96, 64, 6, 3, 24, 3),
    "fewer layers": (128, 64, 8, 2, 16, 2),
}


def facts_of(sizes: tuple[int, ...], family: str = "llama", **changes: object) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    return {
        "model_type": family,
        **dict(zip(names, sizes, strict=True)),
        "vocab_size": 500,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }


def materialise(architecture: Architecture, source: TensorSource, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' own model with the source's weights."""
    tensors = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in architecture.expected_tensors.items()}
    with source.open() as feed:
        feed.fill(tensors)
    architecture.config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(architecture.config, dtype=dtype).eval()
    model.load_state_dict(tensors, strict=False)
    return model


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers normalises in float32 whatever the model's dtype, and sums of different width round differently there:
    1e-7. With the norm in the model's own dtype, what remains is the construction."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def reference(folder: Path, num_layers: int, dtype: torch.dtype) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    del model.model.layers[num_layers:]
    return model


@pytest.mark.matrix
@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_small_model(tmp_path: Path, exact_norm: None, case: str, tied: bool) -> None:
    folder = save_tiny_model(tmp_path, num_layers=3, tie_word_embeddings=tied, **SMALL)
    token_ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    _, architecture, source = widen(folder, facts_of(WIDE[case], tie_word_embeddings=tied), None, "test")
    with torch.no_grad():
        expected = reference(folder, WIDE[case][-1], torch.float64)(token_ids).logits
        logits = materialise(architecture, source, torch.float64)(token_ids).logits
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_families_of_the_same_arithmetic_serve_as_well(models: Callable[..., Path], family: str) -> None:
    folder = models(num_layers=2, tie_word_embeddings=True)
    token_ids = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(1))
    _, architecture, source = widen(folder, facts_of((128, 96, 8, 4, 8, 3), family), None, "test")
    with torch.no_grad():
        expected = reference(folder, 2, torch.float32)(token_ids).logits
        logits = materialise(architecture, source, torch.float32)(token_ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_gains_and_epsilon_of_70b_are_scaled_by_powers_of_two() -> None:
    """So that weights in 16 bit are exact: 256 of 8192 dimensions, twice, are a sixteenth."""
    small = Sizes(num_layers=6, hidden=256, intermediate=704, num_heads=2, num_kv_heads=1, head_dim=128)
    wide = Sizes(num_layers=80, hidden=8192, intermediate=28672, num_heads=64, num_kv_heads=8, head_dim=128)
    geometry = Geometry(small=small, wide=wide)
    assert (geometry.copies, geometry.share, geometry.gain, geometry.query_scale) == (2, 1 / 16, 1 / 4, 1.0)
    assert Geometry(small=small, wide=replace(wide, hidden=5120)).gain == 0.5


def engine_of(
    model: str, tree: str, device: Device | None = None, progress: LoadProgress | None = None, **changes: object
) -> Engine:
    drafts = () if tree == "none" else (str(DRAFT),)
    settings: dict[str, Any] = {"model": model, "draft_models": drafts, "tree": tree, "max_context": 120, **changes}
    return open_engine(EngineSettings(device="cpu", **settings), hardware=L40, device=device, progress=progress)


def demo_tokens(num_layers: int, num_tokens: int) -> list[int]:
    """Greedy tokens of transformers with the first layers of the demo target."""
    model = reference(TARGET, num_layers, torch.float32)
    prompt = torch.tensor([PROMPT])
    output = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.slow
def test_text_acceptance_and_layers_are_those_of_the_demo_pair(preset: None) -> None:
    """The whole demo target, in 8 layers twice as wide, streamed; the text is the demo's, and so is every pass."""
    with engine_of(str(TARGET), "4x6:kary") as engine:
        demo = engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    with engine_of("scale:small:8", "4x6:kary", resident_layers=1, slots=2) as engine:
        report = engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert report.text == demo.text and len(report.token_ids) == 40
    assert [one.emitted_tokens for one in report.stats.passes] == [one.emitted_tokens for one in demo.stats.passes]
    assert len(report.plan.placement.streamed) == 7


@pytest.mark.slow
def test_identity_layers_share_memory_when_it_is_short_and_say_so(preset: None) -> None:
    with engine_of("scale:small:12", "none", resident_layers=2, slots=2) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        layer_bytes = engine.plan.bytes_per_pass // 10
        assert expected.memory.host_shared_layers == 0
    budget = 8 * layer_bytes
    with engine_of("scale:small:12", "none", resident_layers=2, slots=2, host_memory_bytes=budget) as engine:
        report = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    document: Any = report.to_json()
    assert report.token_ids == expected.token_ids
    assert report.plan.bytes_per_pass == expected.plan.bytes_per_pass == 10 * layer_bytes
    assert document["memory"]["host_shared_layers"] == 2 and document["memory"]["host_weights_bytes"] == budget
    device = RefusingDevice()
    device.room_bytes = 3 * layer_bytes
    with engine_of("scale:small:12", "none", device, resident_layers=2, slots=2, host_memory_bytes=budget) as engine:
        assert engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids == expected.token_ids
        assert engine.memory().host_weights_bytes == budget and engine.plan.placement.pageable, "the ring is among them"
    with pytest.raises(FitError, match="layers that differ"):
        engine_of("scale:small:12", "none", resident_layers=2, slots=2, host_memory_bytes=2 * layer_bytes)


def test_equal_layers_on_a_device_are_made_once(preset: None) -> None:
    """Where the host cannot write them; the others are copies, and as many bytes are counted as if they had been read."""
    read: list[tuple[int, int]] = []
    with engine_of("scale:small:12", "none", resident_layers=7, slots=2) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids
    device = RefusingDevice()
    with engine_of("scale:small:12", "none", device, lambda *done: read.append(done), resident_layers=7, slots=2) as engine:
        assert engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids == expected
    assert read[-1][0] == read[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("make_device", [CpuDevice, RefusingDevice])
def test_a_base_of_equal_layers_is_made_once_and_drafts(preset: None, make_device: Callable[[], CpuDevice]) -> None:
    """From layers in host memory that some borrow; what travels is the same as of other models."""
    request: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
    with engine_of("scale:small:12", "none", resident_layers=2, slots=2) as engine:
        expected = engine.generate(PROMPT, **request).token_ids
    own: dict[str, Any] = {"draft_models": ("self:int8",), "codec": "residual", "resident_layers": 2, "slots": 2}
    with engine_of("scale:small:12", "1x6:kary", make_device(), **own) as engine:
        assert engine.generate(PROMPT, **request).token_ids == expected
        budget = 8 * engine.loop._stream.slot_bytes
    read: list[tuple[int, int]] = []
    short: dict[str, Any] = {**own, "host_memory_bytes": budget}
    with engine_of("scale:small:12", "1x6:kary", make_device(), lambda *done: read.append(done), **short) as engine:
        report = engine.generate(PROMPT, **request)
        assert report.token_ids == expected and report.stats.tokens_per_pass is not None
        assert report.stats.tokens_per_pass > 3 and report.memory.host_shared_layers > 0
    assert read[-1][0] == read[-1][1]


@given(st.sets(st.integers(0, 20)), st.frozensets(st.integers(0, 20)), st.integers(0, 25))
def test_no_more_layers_share_than_must(host: set[int], equal: frozenset[int], room: int) -> None:
    shared = borrowed_layers(host, equal, room)
    assert set(shared) <= equal & host and set(shared.values()) <= (equal & host) - set(shared)
    most = max(len(equal & host) - 1, 0)
    assert len(shared) == min(max(len(host) - room, 0), most)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_layers_of_the_width_of_70b_write_the_text_of_the_demo() -> None:
    """6.8 GB of float32, multiplied in full. Two layers, so the text of the demo target's first two."""
    if psutil.virtual_memory().available < 10 * 2**30:
        pytest.skip("needs 10 GiB of free memory")
    with engine_of("scale:llama-2-70b:2", "2x3:kary", resident_layers=2) as engine:
        report = engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
        assert engine.plan.device_ledger["2 resident layers"] == 2 * 855_654_400 * 4
    assert list(report.token_ids) == demo_tokens(2, 3)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset called "small" that the demo target fits into."""
    facts = facts_of((512, 768, 4, 2, 128, 8), max_position_embeddings=512)
    (tmp_path / "small.json").write_text(json.dumps({"schema_version": 1, "source": "a test", "config": facts}))
    (tmp_path / "narrow.json").write_text(
        json.dumps({"schema_version": 1, "source": "a test", "config": facts_of((128, 768, 4, 2, 128, 8))})
    )
    (tmp_path / "heads.json").write_text(
        json.dumps({"schema_version": 1, "source": "a test", "config": facts_of((512, 768, 4, 2, 64, 8))})
    )
    (tmp_path / "qwen3.json").write_text(
        json.dumps({"schema_version": 1, "source": "a test", "config": facts_of((512, 768, 4, 2, 128, 8), "qwen3")})
    )
    (tmp_path / "damaged.json").write_text("{")
    monkeypatch.setattr("offload.planner.shapes.PRESETS", tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("scale:", UsageError, "not a scale model"),
        ("scale:small:", UsageError, "not a scale model"),
        ("scale:small:0", UsageError, "not a scale model"),
        ("scale:small:two", UsageError, "not a scale model"),
        ("scale:../small", UsageError, "one of damaged, heads, narrow, qwen3, small"),
        ("scale:narrow", UsageError, "hidden size is 128, and 256 are needed"),
        ("scale:heads", UsageError, "heads of 64 dimensions are no multiple of 128"),
        ("scale:qwen3", ModelError, "a qwen3 cannot compute what a llama computes"),
        ("scale:damaged", ModelError, "not the JSON of a model"),
    ],
)
def test_a_name_that_cannot_be_built_is_refused(preset: None, name: str, error: type[OffloadError], words: str) -> None:
    with pytest.raises(error, match=words):
        engine_of(name, "none")


@pytest.mark.parametrize("name", ["scale:small", "scale:small:2", "scale:small:12"])
def test_the_shape_by_which_it_is_planned_is_that_of_what_is_made(preset: None, name: str) -> None:
    """The vocabulary is not the preset's, and there may be more layers."""
    made = check_source(name, "--model", "float32", "cpu").model
    assert scale_shape(name, "--model").cost(4) == made.cost


@pytest.mark.parametrize(
    "name", ["scale:small:0", "scale:nothing", "scale:narrow", "scale:heads", "scale:qwen3", "scale:damaged"]
)
def test_a_name_that_cannot_be_built_has_no_shape(preset: None, name: str) -> None:
    """In the words in which it is refused where it would be made."""
    refusals = []
    for ask in (scale_shape, open_scale_model):
        with pytest.raises(OffloadError) as caught:
            ask(name, "--model")
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]


def test_a_preset_that_is_shipped_is_the_shape_it_is_named_after() -> None:
    _, architecture, _ = open_scale_model("scale:llama-2-70b:7", "--model")
    assert architecture.num_layers == 7
    assert sum(math.prod(shape) for shape in architecture.layer_shapes[0].values()) == 855_654_400
