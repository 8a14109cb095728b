"""A draft model that computes on a device of its own, such as a CPU beside the GPU that has the target (DuoDecoding, arXiv
2503.00784): it takes no memory of the target's device, and none of its time.

Trees are grown over there and brought here. What is grown ahead is grown while the pass computes here, as a pass is queued and
not waited for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tree.aim import Aim
from tree.draft import DraftContext, DraftTree
from tree.sampling import SamplingParams

from ..device import Device
from .drafter import ModelDrafter
from .kv_cache import KVCache

PIECE_BYTES = 2**16  # of one upload: a larger one may have to wait for a layer that is being copied


class ApartDrafter:
    """Implements tree.draft.Drafter for a target on `device` over `inner`, whose model is on another one."""

    feature_layers: tuple[int, ...] = ()

    def __init__(self, inner: ModelDrafter, device: Device) -> None:
        self._inner, self._device = inner, device

    @property
    def cache(self) -> KVCache:
        return self._inner.cache

    def aim(self, aim: Aim, max_rows: int) -> None:
        self._inner.aim(aim, max_rows)

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> DraftContext:
        assert before is None or isinstance(before, ApartLeft)
        inner_left = before.inner if before is not None else None
        inner = self._inner.start(place, token_ids, prompt_tokens, repeatable=repeatable, before=inner_left)
        return ApartContext(inner, len(token_ids), self._device, before)

    def prepare(self, aim: Aim) -> None:
        self._inner.prepare(aim)

    def record_nothing(self) -> None:
        self._inner.record_nothing()

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True)
class ApartLeft:
    """What a text leaves: what `inner` does, its own randomness, and the state of that when the last verdict was known."""

    inner: object
    generator: torch.Generator | None
    state: Tensor | None


class ApartContext:
    """Implements tree.draft.DraftContext over `inner`, a text of `num_tokens` tokens on a CPU.

    Its randomness is its own, on that device: it follows from the seed of the text's generator and from where the text was
    taken up, so that a seed repeats a text, and it is none of the numbers that the verifier draws.
    """

    def __init__(self, inner: DraftContext, num_tokens: int, device: Device, before: ApartLeft | None = None) -> None:
        self._inner, self._num_tokens, self._device = inner, num_tokens, device
        self._generator: torch.Generator | None = before.generator if before is not None else None
        self._state: Tensor | None = before.state if before is not None else None  # when the last verdict was known

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        if self._generator is None or self._state is None:
            self._generator = torch.Generator().manual_seed(_own_seed(generator.initial_seed(), self._num_tokens))
            self._state = self._generator.get_state()
        self._generator.set_state(self._state)  # a round may be taken back
        tree = self._inner.grow(max_nodes, max_levels, params, self._generator, sampled=sampled)
        rows = self._brought(tree.probabilities) if tree.probabilities is not None else None
        return replace(tree, token_ids=self._brought(tree.token_ids), probabilities=rows)

    def grow_ahead(self) -> int:
        return self._inner.grow_ahead()

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: Tensor | None) -> None:
        self._inner.follow(path, token_ids, features)
        if self._generator is not None:
            self._state = self._generator.get_state()

    def leave(self) -> ApartLeft:
        return ApartLeft(self._inner.leave(), self._generator, self._state)

    def _brought(self, tensor: Tensor) -> Tensor:
        """To the target's device, piece by piece, without waiting for it."""
        if tensor.nbytes <= PIECE_BYTES:
            return self._device.upload(tensor)
        flat = tensor.contiguous().view(-1)
        pieces = flat.split(PIECE_BYTES // tensor.element_size())
        return torch.cat([self._device.upload(piece) for piece in pieces]).view(tensor.shape)


def _own_seed(seed: int, num_tokens: int) -> int:
    """For a text that is taken up after `num_tokens` tokens: what was drawn before is not drawn again."""
    digest = hashlib.blake2b(f"draft {seed} {num_tokens}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
