"""The draft model as `tree.draft` sees it: something that grows a tree level by level and keeps up with what was accepted."""

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from tree.shape import TreeShape

from ..device import Device
from ..errors import FitError
from .attention import pass_mask
from .buckets import CATCH_UP_ROWS, MAX_ROWS, widest_pass
from .causal_lm import CausalLM
from .fixed_pass import FixedPasses
from .kv_cache import KVCache
from .masks import TreeMasks
from .rope import Rope

PROMPT_CHUNK_TOKENS = 1024


class ModelDrafter:
    """Implements tree.draft.TreeModel over a CausalLM with its own cache.

    `vocab_size` is the target's: draft logits are cut or padded (never proposed) to it, for families whose sizes pad one
    vocabulary differently. Passes that were prepared have fixed shapes where the device replays recordings; all others are as
    large as they must be, which is the same but for rounding. A prompt is read in chunks of at most `chunk_tokens`: only its
    last token's logits are wanted. Recordings have memory for levels of `max_nodes`; wider ones are computed as they come.
    """

    def __init__(
        self,
        model: CausalLM,
        device: Device,
        vocab_size: int,
        masks: TreeMasks,
        *,
        chunk_tokens: int = PROMPT_CHUNK_TOKENS,
        max_nodes: int = MAX_ROWS,
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._model, self._device, self._vocab_size, self._masks = model, device, vocab_size, masks
        self._fixed = FixedPasses(model, device, widest_pass(max_nodes)) if device.replays else None
        self._context: list[int] = []
        self._shape = TreeShape.root_only()
        self._nodes: list[int] = []  # expanded nodes, in the order of their pending cache rows

    @property
    def cache(self) -> KVCache:
        return self._model.cache

    @property
    def rope(self) -> Rope:
        return self._model.rope

    def close(self) -> None:
        """Give back the model's memory, and that of recordings."""
        self._fixed = None
        self._model.close()

    def prepare(self, shape: TreeShape) -> None:
        """Record the passes that trees of `shape` take, if any are to be. The cache needs room for a row."""
        if self._fixed is not None:
            self._fixed.prepare([*CATCH_UP_ROWS, *(len(nodes) for nodes in shape.expanded[1:-1])])

    def follow(self, shape: TreeShape) -> None:
        """Grow trees of `shape` from here on: their mask is held, and where passes are recorded, those of theirs are, too. A
        device that records no more has all computed as they come."""
        self._masks.hold(shape)
        try:
            self.prepare(shape)
        except (RuntimeError, FitError):
            self.record_nothing()

    def record_nothing(self) -> None:
        """Compute all passes as they come from here on, and give back the memory of recordings."""
        self._fixed = None

    def limit(self, chunk_tokens: int, shape: TreeShape) -> None:
        """Take less memory from here on: pieces of a prompt or the tree may be smaller than before."""
        self._chunk_tokens = min(self._chunk_tokens, chunk_tokens)
        if self._fixed is not None and (max_rows := widest_pass(shape.num_nodes)) < self._fixed.max_rows:
            self._fixed = None  # its memory goes before the smaller one's comes
            with suppress(FitError, torch.OutOfMemoryError):
                self._fixed = FixedPasses(self._model, self._device, max_rows)
        self.follow(shape)

    def restart(self, token_ids: Sequence[int], prompt_tokens: int) -> None:
        """Another sequence, the first `prompt_tokens` of it a prompt. The cache, which is the caller's to cut, holds rows of a
        beginning of it, not all."""
        self._context = list(token_ids)
        self._model.begin_text(prompt_tokens, len(token_ids))
        if self._fixed is not None:
            self._fixed.restart()

    def extend_context(self, token_ids: Sequence[int]) -> None:
        """Committed tokens, the last of which is the next root. Host only; `begin` catches up."""
        self._context.extend(token_ids)
        self._model.start_over_if_outgrown(len(self._context))

    def begin(self, shape: TreeShape) -> torch.Tensor:
        """Logits [1, V] of the token after the context; drops what is left of an earlier tree."""
        cache = self._model.cache
        cache.truncate(cache.length)
        self._shape, self._nodes = shape, []
        no_nodes = self._masks.of(shape, 0)
        logits = None
        while missing := self._context[cache.length :][: self._chunk_tokens]:
            positions = torch.arange(cache.length, cache.length + len(missing))
            mask = pass_mask(cache.length, len(missing), no_nodes)
            logits = self._forward(torch.tensor(missing), positions, mask, 1)
            cache.commit(range(len(missing)))
        assert logits is not None, "the context did not grow since the last round"
        return logits

    def expand(self, nodes: tuple[int, ...], token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] at `nodes` of one level, whose tokens are `token_ids` [n]; they become pending rows."""
        columns = [*self._nodes, *nodes]
        rows, seen = (self._device.upload(torch.tensor(numbers)) for numbers in (nodes, columns))
        tree_mask = self._masks.of(self._shape).index_select(0, rows).index_select(1, seen)
        positions = torch.tensor([len(self._context) - 1 + self._shape.depths[node] for node in nodes])
        mask = pass_mask(self._model.cache.rows, 0, tree_mask)
        logits = self._forward(token_ids, positions, mask, len(nodes))
        self._nodes = columns
        return logits

    def commit(self, path: Sequence[int]) -> None:
        """Keep the rows of the accepted nodes (root first; the root is context). Accepted leaves have no row and are read
        again by the next `begin`."""
        rows = {node: row for row, node in enumerate(self._nodes)}
        self._model.cache.commit([rows[node] for node in path[1:] if node in rows])
        self._nodes = []

    def _forward(self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, num_logits: int) -> torch.Tensor:
        known = self._model.architecture.vocab_size
        token_ids, positions = self._device.upload(token_ids).clamp(max=known - 1), self._device.upload(positions)
        if self._fixed is not None and self._fixed.has(len(token_ids)):
            logits = self._fixed.run(token_ids, positions, mask)[-num_logits:]
        else:
            logits = self._model.forward(token_ids, positions, mask, num_logits).float()
        if known < self._vocab_size:
            return F.pad(logits, (0, self._vocab_size - known), value=-torch.inf)
        return logits[:, : self._vocab_size]
