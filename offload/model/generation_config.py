"""What a model's generation config says of its texts: where they end, and what else transformers would do to them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError

# What changes the greedy text of transformers' generate(), with the values at which it does not. Null never does.
PROCESSED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """`eos_token_ids` end a text. `left_out` are the fields, with their values, that change the text of transformers and not
    ours: the model's own logits are what is sampled here."""

    eos_token_ids: frozenset[int]
    left_out: Mapping[str, object]

    def warning(self) -> str | None:
        """A line for the user; None when nothing is left out."""
        if not self.left_out:
            return None
        fields = ", ".join(f"{name} {_short(value)}" for name, value in self.left_out.items())
        return f"the model's generation config is left out, but for its ends of text: {fields}"


def read_generation_defaults(folder: Path, eos_token_ids: tuple[int, ...]) -> GenerationDefaults:
    """Of generation_config.json, or of a config.json from before there was one; `eos_token_ids` when it names none.
    ModelError when the former is damaged."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults(eos_token_ids=frozenset(eos_token_ids), left_out=_left_out(_old_config(folder)))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        eos = values.get("eos_token_id")
        ids = [eos] if isinstance(eos, int) else list(eos or ())
        if not all(isinstance(token_id, int) for token_id in ids):
            raise ValueError(f"eos_token_id is {eos!r}")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the generation config cannot be read: {error}", where=str(path), cure="repair or delete the file"
        ) from error
    return GenerationDefaults(eos_token_ids=frozenset(ids or eos_token_ids), left_out=_left_out(values))


def _old_config(folder: Path) -> Mapping[str, object]:
    """config.json, which whoever reads the architecture has found to be an object; nothing for a model that has no file."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _left_out(values: Mapping[str, object]) -> dict[str, object]:
    given = {name: values[name] for name in PROCESSED if values.get(name) is not None}
    return {name: value for name, value in given.items() if not any(value == neutral for neutral in PROCESSED[name])}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]} ..."
