"""Pure: rotary embeddings whose frequencies depend on the length of the text, and which cached rows two texts share.

Longrope (arXiv 2402.13753) has one set of frequencies up to the length that the model was trained on and another beyond;
dynamic NTK scaling has a set for every length beyond. In transformers all rows of a pass have the frequencies of its last
token, and rows that are cached keep theirs. Plain decoding computes a prompt in one pass and every later token in one of its
own, so the length that counts for a row is max(prompt tokens, its position + 1), whatever passes we compute it in. Two texts
with the same beginning share its rows if the groups of their prompts' lengths are the same, and none if they are not.

Knows numbers, no tensors: planning asks, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["fixed", "longrope", "dynamic"]

# Their prepare_inputs_for_generation drops the cache when a text outgrows the native length: all is computed anew.
_STARTS_OVER = ("phi3", "phi4_multimodal", "phimoe")
_ALIASES = {"su": "longrope"}  # what Phi-3's first configurations called it
UNLIMITED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """`native_tokens` is the length up to which frequencies stay the same; `max_positions` how far the model may be taken;
    `starts_over` whether the rows before are computed anew once a text outgrows `native_tokens`."""

    kind: Kind
    native_tokens: int
    max_positions: int
    starts_over: bool = False

    def group(self, length: int) -> int:
        """Texts of lengths with the same number have the same frequencies."""
        if self.kind == "longrope":
            return int(length > self.native_tokens)
        return max(length, self.native_tokens) if self.kind == "dynamic" else 0

    def counted_prompt(self, prompt_tokens: int, num_tokens: int) -> int:
        """The length of the prompt from which rows of a text of `num_tokens` count: its own, or, where the family starts over,
        that of all that there was."""
        starts_over = self.starts_over and self.group(num_tokens) != self.group(prompt_tokens)
        return num_tokens if starts_over else prompt_tokens

    def room(self, num_tokens: int) -> int:
        """How many tokens one pass may add to a text of `num_tokens`."""
        crosses = self.starts_over and num_tokens <= self.native_tokens
        return self.native_tokens + 1 - num_tokens if crosses else UNLIMITED


def read_rope(config: Mapping[str, object]) -> Rope:
    """Of the contents of a config.json. ValueError for one whose layers differ in frequencies that depend on the length."""
    native = cast(int, config["max_position_embeddings"])
    parameters = _mapping(config.get("rope_parameters")) or _mapping(config.get("rope_scaling"))
    if any(isinstance(value, Mapping) for value in parameters.values()):
        kinds = {_kind(_mapping(value)) for value in parameters.values()}
        if kinds & {"longrope", "dynamic"}:
            raise ValueError("its layers differ in rotary frequencies that depend on the length of the text")
        return Rope(kind="fixed", native_tokens=native, max_positions=native)
    kind, factor = _kind(parameters), parameters.get("factor")
    trained = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or native
    original, scale = cast(int, trained), float(cast(float, factor)) if factor else 1.0
    if kind == "longrope":
        starts_over = config.get("model_type") in _STARTS_OVER
        return Rope(kind="longrope", native_tokens=original, max_positions=native, starts_over=starts_over)
    # What stretches the positions does so beyond the length in the config, or, if it says so itself, beyond the original one.
    stretched = {"linear": native, "dynamic": native, "yarn": original}.get(kind, 0) * scale
    kind_known: Kind = "dynamic" if kind == "dynamic" else "fixed"
    return Rope(kind=kind_known, native_tokens=native, max_positions=max(native, int(stretched)))


def _kind(parameters: Mapping[str, object]) -> str:
    name = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return _ALIASES.get(name, name)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
