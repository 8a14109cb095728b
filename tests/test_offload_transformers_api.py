"""What we use of transformers' insides, piece by piece. One that has moved fails here by its name, with the release and the
range that setup.py allows, before a model writes other tokens. `make compat` runs these with both ends of the range."""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import Cache

from conftest import TINY_SIZES, VOCAB_SIZE, reference_model
from offload.model import transformers_api
from offload.model.transformers_api import (
    Forward,
    PassCache,
    PlainForward,
    build_on_meta,
    cache_argument,
    carried,
    carry,
    keeps_float32,
    make_config,
    make_tokenizer,
    register_attention,
    rope_frequencies,
    take_quantization,
    tied_parameters,
)
from offload.releases import bounds_of

Models = Callable[..., Path]
ROOT = Path(__file__).resolve().parent.parent
HERE = f"transformers {version('transformers')}, and setup.py allows {bounds_of('transformers')}"
SIZES = {**TINY_SIZES, "max_position_embeddings": 64}


class Kept:
    """Rows that remember what each layer gave them."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert key.shape == value.shape
        self.calls.append((layer, tuple(key.shape)))
        return key, value


def test_this_release_is_in_the_range() -> None:
    bounds = bounds_of("transformers")
    assert bounds is not None and re.search(r'"transformers>=.*,<.*"', (ROOT / "setup.py").read_text(encoding="utf-8")), HERE


def test_how_weights_are_packed_is_taken_out_of_a_config_and_their_dtype_stays() -> None:
    quantization = {"quant_method": "fp8", "bits": 8}
    config = make_config({"model_type": "llama", **SIZES, "dtype": "float16", "quantization_config": quantization})
    assert take_quantization(config) == quantization and take_quantization(config) == {}, HERE
    build_on_meta(config, "sdpa")
    assert config.dtype == torch.float16, HERE


def test_a_model_takes_our_cache_under_the_name_that_it_has_here() -> None:
    model = build_on_meta(make_config({"model_type": "llama", **SIZES}), "sdpa")
    release = tuple(map(int, re.findall(r"\d+", version("transformers"))[:2]))
    assert cache_argument(model) == ("cache" if release >= (5, 24) else "past_key_values"), HERE


@pytest.mark.parametrize(
    ("family", "windows"), [("llama", [None, None]), ("mistral", [16, 16]), ("qwen2", [None, 16]), ("qwen3", [None, 16])]
)
def test_a_pass_gives_each_layer_rows_to_us_and_our_masks_to_attention(family: str, windows: list[int | None]) -> None:
    """Where a family has masks by kind, each kind is ours; transformers makes none of its own beside them. Attention is told
    the window of its layer."""
    seen: list[object] = []
    asked: list[int | None] = []

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **others: Any) -> Any:
        seen.append(carried(mask))
        asked.append(others.get("sliding_window"))
        assert query.shape[1] == 4 and key.shape[1] == 2 and others["scaling"] == 8**-0.5, HERE
        return query.transpose(1, 2), None

    register_attention("treestream-test", attention)
    sliding = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1} if family != "llama" else {}
    model = build_on_meta(make_config({"model_type": family, **SIZES, **sliding}), "treestream-test").eval()
    rows, masks = torch.zeros(3, dtype=torch.int64, device="meta"), object()
    for logit_rows in (2, torch.tensor([0, 2], device="meta")):
        kept = Kept()
        assert Forward(model, 2)(rows, rows, masks, logit_rows, kept).shape == (2, VOCAB_SIZE), HERE
        assert kept.calls == [(0, (1, 2, 3, 8)), (1, (1, 2, 3, 8))], HERE
    assert [one is masks for one in seen] == [True] * 4 and asked == windows * 2, HERE


def test_what_a_mask_carries_is_lost_with_it() -> None:
    mask = carry("ours", torch.device("cpu"))
    assert isinstance(mask, torch.Tensor) and mask.ndim == 4 and carried(mask) == "ours"
    assert carried(mask[..., :1]) is None and carried(mask.float()) is None and carried(None) is None


def test_our_cache_is_one_of_theirs_that_answers_no_question_it_does_not_know() -> None:
    cache = PassCache(2)
    assert isinstance(cache, Cache) and cache.is_sliding == [False, False] and len(cache.layers) == 2, HERE
    for question in (cache.get_seq_length, lambda: cache.get_mask_sizes(1, 0)):
        with pytest.raises(AssertionError):
            question()


def test_their_own_cache_grows_by_calls(models: Models) -> None:
    model = reference_model(models())
    forward = PlainForward(model)
    text = [5, 9, 33, 2]
    pieces = [forward(torch.tensor([part])) for part in (text[:3], text[3:])]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([text])).logits
    assert torch.allclose(pieces[1], whole[:, -1], atol=1e-5) and isinstance(forward._cache, DynamicCache), HERE


@pytest.mark.parametrize("tied", [True, False])
def test_tied_parameters_are_named_by_the_model(tied: bool) -> None:
    model = build_on_meta(make_config({"model_type": "llama", **SIZES, "tie_word_embeddings": tied}), "sdpa")
    assert tied_parameters(model) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {}), HERE


def test_modules_that_stay_in_float32_are_named_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    assert all(hasattr(PreTrainedModel, name) for name in names), HERE
    config = make_config({"model_type": "llama", **SIZES})
    model = build_on_meta(config, "sdpa")
    assert keeps_float32(model) == [], HERE
    monkeypatch.setattr(type(model), names[1], ["norm"])
    assert keeps_float32(build_on_meta(config, "sdpa")) == ["norm"], HERE


def test_a_tokenizer_of_the_library_is_one_of_theirs_with_its_roles_and_its_template() -> None:
    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "tide": 2}, unk_token="</s>"))
    made.add_special_tokens(["<s>", "</s>"])
    tokenizer = make_tokenizer(made, {"bos_token": "<s>", "eos_token": "</s>"}, "{{ messages[0].content }}")
    assert tokenizer("tide").input_ids == [2] and tokenizer.eos_token_id == 1, HERE
    assert tokenizer.chat_template == tokenizer.get_chat_template() == "{{ messages[0].content }}", HERE
    assert tokenizer.decode([0, 2], skip_special_tokens=True) == "tide", HERE
    assert make_tokenizer(made, {}, None).chat_template is None, HERE


def test_frequencies_that_depend_on_the_length_have_formulas_by_name() -> None:
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters={**longrope, "original_max_position_embeddings": 16})
    short, long = (rope_frequencies(config, "longrope", length) for length in (16, 17))
    assert torch.equal(short, 2 * long) and short.shape == (4,), HERE
    config = AutoConfig.for_model(
        "llama", **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )
    within, beyond = (rope_frequencies(config, "dynamic", length) for length in (64, 65))
    assert within[0] == beyond[0] == 1 and (beyond[1:] < within[1:]).all(), HERE


def test_every_use_of_transformers_has_its_test_here() -> None:
    """What transformers_api offers is what this file names, so that a new use brings its test."""
    source = Path(__file__).read_text(encoding="utf-8")
    offered = [
        name for name, value in vars(transformers_api).items() if getattr(value, "__module__", "") == transformers_api.__name__
    ]
    elsewhere = {
        "Rows": "a protocol of ours",
        "read_config": "tests of every folder",
        "read_tokenizer": "tests of text",
        "build": "build_on_meta",
        "watched_by_deepspeed": "needs a GPU and DeepSpeed",
    }
    public = {name for name in offered if not name.startswith("_")}
    assert {name for name in public if name not in source} == set(), "give these a test"
    assert set(elsewhere) <= public, "gone: take them off the list"
