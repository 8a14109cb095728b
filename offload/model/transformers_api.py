"""All that we use of transformers, in the one file that knows what moves between its releases.

Its own classes are subclassed where it has them, so that what a release adds to them is there. setup.py bounds the versions;
`make compat` and the parity tests run the oldest and the newest. What each release moved, as far as it met us:

    5.20   `generate` computes all rows anew where Phi-3 drops its cache; before, it went on from the last token alone, and
           ours did not
    5.24   layers hand more to `Cache.update` than keys, values and the layer's number; a model's argument `past_key_values`
           is called `cache`
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["PreTrainedModel"]


# -- configurations, models, tokenizers ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> Any:
    """The configuration in `folder`. transformers raises anything: OSError, ValueError, KeyError, StrictDataclassError."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def make_config(values: Mapping[str, Any]) -> Any:
    """A configuration from the contents of a config.json."""
    return AutoConfig.for_model(**values)


def take_quantization(config: Any) -> dict[str, Any]:
    """What `config` says of how weights are stored, which is taken out of it: we unpack them, not transformers. ValueError when
    it is no object."""
    found: dict[str, Any] = {}
    for name in ("quantization_config", "compression_config"):
        if (value := getattr(config, name, None)) is not None:
            if not isinstance(value, dict) and not hasattr(value, "to_dict"):
                raise ValueError(f"{name} is {value!r}, not an object")
            found = dict(value if isinstance(value, dict) else value.to_dict())
            delattr(config, name)
    return found


def build_on_meta(config: Any, attention: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model of `config` with parameters that have shapes and no memory. Raises anything, as above."""
    with torch.device("meta"):
        return build(config, attention, dtype)


def build(config: Any, attention: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`build_on_meta` where the caller has said where parameters go."""
    named = config.dtype
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)
    finally:
        config.dtype = named  # in its place is what was asked for, and a packed model's files say it nowhere else


def read_tokenizer(folder: Path) -> Any:
    """Raises anything, as `read_config` does."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def make_tokenizer(tokenizer: Any, roles: Mapping[str, str], template: str | None) -> Any:
    """A `tokenizers.Tokenizer` as one of transformers; `roles` are its special tokens, such as "eos_token"."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
    made.chat_template = template
    return made


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{name: the name of the parameter that it is one with}, as the model's configuration has it."""
    return dict(model.all_tied_weights_keys)


def keeps_float32(model: PreTrainedModel) -> list[str]:
    """Names of modules that transformers leaves in float32 whatever dtype is asked for."""
    kept = [getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    return sorted({name for names in kept for name in names})


def rope_frequencies(config: Any, kind: str, length: int) -> torch.Tensor:
    """Inverse frequencies [C / 2] float32 of a text of `length` tokens, by the formula that transformers calls `kind`."""
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=torch.tensor(length))[0]
    return frequencies


def watched_by_deepspeed(config: Mapping[str, Any]) -> Any:
    """Makes `build` fit what DeepSpeed's ZeRO-3 does to parameters, for as long as the result lives."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def register_attention(name: str, attention: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """A model built with attention `name` calls it with (module, query, key, value, mask) and keywords of its family, of which
    `sliding_window` is that of the layer."""
    AttentionInterface.register(name, attention)


# -- one pass -----------------------------------------------------------------------------------------------------------------


class Rows(Protocol):
    """Where a pass's keys and values go."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in [1, K, N, C] of one layer; give back all [1, K, T, C] that the pass attends to."""


class _Box:
    """The rows of the pass under way. Layers know the box and not the cache: in a circle, memory would wait for the garbage
    collector, which knows nothing of GiB on a device."""

    rows: Rows | None = None


class _PassLayer(CacheLayerMixin):  # type: ignore[misc]  # Any, as transformers is not read by mypy
    """One layer of a `PassCache`."""

    is_sliding = False

    def __init__(self, box: _Box, layer: int) -> None:
        super().__init__()
        self._box, self._layer = box, layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._box.rows is not None
        return self._box.rows.update(key_states, value_states, self._layer)

    # What transformers makes masks and positions from. We give it both, so nobody has a right answer to ask for.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("the memory of a pass is ours")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise AssertionError("the mask of a pass is ours")

    def get_seq_length(self) -> int:
        raise AssertionError("the positions of a pass are ours")

    def get_max_length(self) -> int:
        return -1


class PassCache(Cache):  # type: ignore[misc]
    """transformers' cache over rows of ours, which change from pass to pass."""

    def __init__(self, num_layers: int) -> None:
        self._box = _Box()
        super().__init__(layers=[_PassLayer(self._box, layer) for layer in range(num_layers)])

    @contextmanager
    def over(self, rows: Rows) -> Iterator[None]:
        self._box.rows = rows
        try:
            yield
        finally:
            self._box.rows = None


class _MaskCarrier(torch.Tensor):
    """Passes for a mask with a model, which hands it on to its layers as it is, whatever it calls their kinds."""

    masks: Any


def carry(masks: object, device: torch.device) -> torch.Tensor:
    """A tensor of four dimensions, as transformers takes a mask, that carries `masks`, which may be anything."""
    carrier = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(_MaskCarrier)
    carrier.masks = masks
    return carrier


def carried(mask: torch.Tensor | None) -> Any:
    """What `mask` carries, as attention is given it; None if a model has put something else in its place."""
    return getattr(mask, "masks", None)


class Forward:
    """A model's forward pass, whatever its arguments are called in this release."""

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        self._model, self._cache = model, PassCache(num_layers)
        self._cache_argument = cache_argument(model)

    @torch.no_grad()
    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, masks: object, logit_rows: int | torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """Logits [n, V] of some rows of `token_ids` [N] at `positions` [N].

        masks: anything; attention finds it by `carried`.
        logit_rows: the last so many rows (>= 1), or those of an index, int64 [n].
        """
        with self._cache.over(rows):
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                attention_mask=carry(masks, token_ids.device),
                use_cache=True,
                logits_to_keep=logit_rows,
                **{self._cache_argument: self._cache},
            )
        logits: torch.Tensor = output.logits[0]
        return logits


def cache_argument(model: nn.Module) -> str:
    """`cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


class PlainForward:
    """A model with transformers' own cache and masks, one text: what baselines run."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache()
        self._cache_argument = cache_argument(model)

    @torch.no_grad()
    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] behind `token_ids` [1, N], which continue those of earlier calls."""
        arguments = {"use_cache": True, "logits_to_keep": 1, self._cache_argument: self._cache}
        logits: torch.Tensor = self._model(input_ids=token_ids, **arguments).logits[:, -1]
        return logits
