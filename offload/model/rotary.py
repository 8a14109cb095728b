"""Rotary embeddings of a model whose parameters are ours: transformers' own modules, except where frequencies depend on the
length of the text, as those look at a whole pass where a tree has rows of many lengths (see rope.py)."""

from collections.abc import Iterator

import torch
from torch import nn

from .rope import Rope
from .transformers_api import PreTrainedModel, rope_frequencies

_PROBE_ROWS = 3


def rebuild_rotary(model: PreTrainedModel, rope: Rope | None, device: torch.device) -> list["RowRotary"]:
    """Tables of rotary embeddings are in no checkpoint and were lost on the meta device: build the modules again. Those
    whose frequencies depend on the length, as `rope` has it, become RowRotary and are returned; None leaves all as they are.
    ValueError for a family whose frequencies we would not compute exactly."""
    rows: list[RowRotary] = []
    for name, made in _rotaries(model, rope):
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, made.to(device))
        if isinstance(made, RowRotary):
            rows.append(made)
    return rows


def _rotaries(model: PreTrainedModel, rope: Rope | None) -> Iterator[tuple[str, nn.Module]]:
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "rotary_emb":
            kind = module.plain_kind if isinstance(module, RowRotary) else type(module)
            plain = kind(model.config)
            yield name, plain if rope is None or rope.kind == "fixed" else RowRotary(plain, model.config, rope)


class RowRotary(nn.Module):
    """Cosines and sines [1, N, C] of rows [1, N], each with the frequencies of its own length.

    `counted_prompts`, int64 [N] or [1], is set before a pass: for each row the prompt's length as it counts in its text. That
    and positions are tensors, so that a pass can be recorded as a CUDA graph.
    """

    def __init__(self, plain: nn.Module, config: object, rope: Rope) -> None:
        super().__init__()
        self.plain_kind = type(plain)
        self._rope, self._scaling = rope, float(plain.attention_scaling)  # type: ignore[arg-type]
        short = rope_frequencies(config, rope.kind, rope.native_tokens)  # [C / 2]
        self.counted_prompts: torch.Tensor = nn.Buffer(torch.zeros(1, dtype=torch.int64), persistent=False)
        self.short = nn.Buffer(short, persistent=False)
        if rope.kind == "longrope":
            self.long = nn.Buffer(rope_frequencies(config, rope.kind, rope.native_tokens + 1), persistent=False)
        else:
            parameters = config.rope_parameters  # type: ignore[attr-defined]
            dim = 2 * len(short)
            self._base, self._factor = float(parameters["rope_theta"]), float(parameters["factor"])
            self._power = dim / (dim - 2)
            self.exponents = nn.Buffer(torch.arange(0, dim, 2).float() / dim, persistent=False)
        self._check(plain, config)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.maximum(position_ids + 1, self.counted_prompts)[..., None]  # [1, N, 1]
        angles = position_ids[..., None].float() * self._frequencies(lengths)  # [1, N, C / 2]
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * self._scaling).to(x.dtype), (both.sin() * self._scaling).to(x.dtype)

    def _frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        if self._rope.kind == "longrope":
            return torch.where(lengths > self._rope.native_tokens, self.long, self.short)
        # NTK-aware scaling, as transformers has it under "dynamic".
        native, factor = self._rope.native_tokens, self._factor
        stretch = (factor * lengths.clamp(min=native) / native) - (factor - 1)
        return 1.0 / ((self._base * stretch**self._power) ** self.exponents)

    @torch.no_grad()
    def _check(self, plain: nn.Module, config: object) -> None:
        """ValueError unless the family lays angles out as we do, and frequencies are those of transformers."""
        rows, native = torch.zeros(1, _PROBE_ROWS, 1), self._rope.native_tokens
        positions = torch.arange(_PROBE_ROWS)[None]
        same = native < _PROBE_ROWS or all(map(torch.equal, self(rows, positions), plain(rows, position_ids=positions)))
        for length in (native, native + 1, 2 * native + 1):
            theirs = rope_frequencies(config, self._rope.kind, length)
            same = same and torch.equal(self._frequencies(torch.tensor([[[length]]])).expand(1, 1, -1)[0, 0], theirs)
        if not same:
            raise ValueError(f"its {self._rope.kind} rotary embedding is laid out in a way of its own")
