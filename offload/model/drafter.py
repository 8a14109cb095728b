"""A draft model as `tree.draft` sees it: something that grows trees level by level and keeps up with what was accepted."""

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from tree.draft import DraftTree, grow
from tree.sampling import SamplingParams
from tree.shape import TreeShape

from ..device import Device
from ..errors import FitError
from .buckets import CATCH_UP_ROWS, widest_pass
from .causal_lm import CausalLM, WeightSource
from .fixed_pass import FixedPasses
from .kv_cache import KVCache, Segment
from .masks import TreeMasks
from .pass_inputs import Part

PROMPT_CHUNK_TOKENS = 1024


class ModelDrafter:
    """Implements tree.draft.Drafter over a CausalLM with a cache of its own: trees are of the planned shape, or its beginning.

    vocab_size: the target's. Draft logits are cut or padded (never proposed) to it, for families whose sizes pad one vocabulary
        differently.
    shape: of the trees to come, of at most `max_nodes` nodes. Passes that were prepared have fixed shapes where the device
        replays CUDA graphs, with memory for the widest level that a tree of `max_nodes` may have; all others are as large as
        they must be, which is the same but for rounding.
    max_rows: a prompt is read in pieces of at most so many tokens, and no more than PROMPT_CHUNK_TOKENS.
    """

    feature_layers: tuple[int, ...] = ()  # of the target: a draft model wants nothing of it but tokens

    def __init__(
        self,
        model: CausalLM,
        device: Device,
        vocab_size: int,
        masks: TreeMasks,
        shape: TreeShape,
        max_rows: int,
        *,
        max_nodes: int,
    ) -> None:
        self._model, self.device, self._vocab_size, self.masks = model, device, vocab_size, masks
        self.shape, self.chunk_tokens = shape, min(PROMPT_CHUNK_TOKENS, max_rows)
        self._fixed = FixedPasses(model, device, widest_pass(max_nodes)) if device.replays else None

    @property
    def cache(self) -> KVCache:
        return self._model.cache

    @property
    def last_token_id(self) -> int:
        """The largest that the draft knows. It is read in place of the target's tokens beyond."""
        return self._model.architecture.vocab_size - 1

    def aim(self, shape: TreeShape, max_rows: int) -> None:
        """Grow trees of `shape` from here on. Their mask is held, and their passes are recorded, if any are, in no more memory
        than before. A device that records no more has all computed as they come. What an unfinished round left is dropped."""
        for segment in self.cache.segments:
            segment.truncate(segment.length)
        self.shape, self.chunk_tokens = shape, min(PROMPT_CHUNK_TOKENS, max_rows)
        if self._fixed is not None and (fixed_rows := widest_pass(shape.num_nodes)) < self._fixed.max_rows:
            self._fixed = None  # its memory goes before the smaller one's comes
            with suppress(FitError, torch.OutOfMemoryError):
                self._fixed = FixedPasses(self._model, self.device, fixed_rows)
        self.masks.hold(shape)
        try:
            self.prepare(shape)
        except (RuntimeError, FitError):
            self.record_nothing()

    def start(self, place: int, token_ids: Sequence[int], prompt_tokens: int) -> "ModelContext":
        """A text in segment `place` of the cache. The segment is the caller's to cut: it holds rows of a beginning of the text,
        not of all."""
        segment = self.cache.segments[place]
        segment.begin_text(prompt_tokens, len(token_ids))
        if self._fixed is not None:
            self._fixed.restart(segment)
        return ModelContext(self, segment, token_ids)

    def forward(self, part: Part) -> torch.Tensor:
        """Logits [n, V] float32 of the rows of `part` that have some; V is the target's."""
        if self._fixed is not None and self._fixed.has(part):
            logits = self._fixed.run(part)[part.num_rows - part.num_logits :]
        else:
            logits = self._model.forward((part,))[0].logits.float()
        known = logits.shape[-1]
        if known < self._vocab_size:
            return F.pad(logits, (0, self._vocab_size - known), value=-torch.inf)
        return logits[:, : self._vocab_size]

    def prepare(self, shape: TreeShape) -> None:
        """Record the passes that trees of `shape` take, if any are to be. Every segment needs room for a row."""
        if self._fixed is not None:
            self._fixed.prepare([*CATCH_UP_ROWS, *(len(nodes) for nodes in shape.expanded[1:-1])])

    def record_nothing(self) -> None:
        """Compute all passes as they come from here on, and give back the memory of recordings."""
        self._fixed = None

    def rebind(self, weights: WeightSource) -> None:
        """Draft with other weights from here on, as they come: recordings knew where the old ones lay. Between rounds."""
        self.record_nothing()
        self._model.rebind(weights)

    def close(self) -> None:
        """Give back the model's memory, and that of recordings."""
        self._fixed = None
        self._model.close()


class ModelContext:
    """Implements tree.draft.DraftContext, and tree.draft.TreeModel for the trees of one text.

    `token_ids` are committed. `segment` holds rows of a beginning of them, and pending ones of the nodes that were run.
    """

    def __init__(self, drafter: ModelDrafter, segment: Segment, token_ids: Sequence[int]) -> None:
        self._drafter, self.segment, self._token_ids = drafter, segment, list(token_ids)
        self._shape = TreeShape.root_only()
        self._nodes: list[int] = []  # that were run, in the order of their pending rows

    # -- DraftContext -----------------------------------------------------------------------------------------------------

    def grow(
        self, max_nodes: int, max_levels: int, params: SamplingParams, generator: torch.Generator, *, sampled: bool
    ) -> DraftTree:
        """The planned tree, or as much of its beginning as is asked for."""
        shape = self._drafter.shape.truncated(max_levels)
        if shape.num_nodes > max_nodes:
            shape = TreeShape(shape.parents[:max_nodes])
        return grow(self, self._token_ids[-1], shape, params, generator, sampled=sampled)

    def grow_ahead(self) -> None:
        pass

    def follow(self, path: tuple[int, ...], token_ids: tuple[int, ...], features: torch.Tensor | None) -> None:
        """Keeps the rows of the accepted nodes; the root's is committed. Accepted leaves have no row and are read by the next
        `grow`."""
        rows = {node: row for row, node in enumerate(self._nodes)}
        self.segment.commit([rows[node] for node in path[1:] if node in rows])
        self._nodes = []
        self._token_ids.extend(token_ids)
        self.segment.grown(len(self._token_ids))

    # -- TreeModel --------------------------------------------------------------------------------------------------------

    def begin(self, shape: TreeShape) -> torch.Tensor:
        """Logits [1, V] of the token after the text; drops what is left of an earlier tree."""
        segment, token_ids = self.segment, self._token_ids
        segment.truncate(min(segment.length, len(token_ids) - 1))  # the last token always goes through a pass
        self._shape, self._nodes = shape, []
        while True:
            piece = token_ids[segment.length :][: self._drafter.chunk_tokens]
            is_last = segment.length + len(piece) == len(token_ids)
            logits = self._read(piece, num_logits=int(is_last))
            segment.commit(range(len(piece)))
            if is_last:
                return logits

    def expand(self, nodes: tuple[int, ...], token_ids: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] at `nodes` of one level, whose tokens are `token_ids` [n]; they become pending rows."""
        upload, tree_mask = self._drafter.device.upload, self._drafter.masks.of(self._shape)  # [N, N]
        rows, columns = (upload(torch.tensor(numbers)) for numbers in (nodes, [*self._nodes, *nodes]))  # [n], [M] int64
        part = Part(
            segment=self.segment,
            prefix=(),
            node_ids=token_ids.clamp(max=self._drafter.last_token_id),
            depths=[self._shape.depths[node] - 1 for node in nodes],  # the root is committed
            tree_mask=tree_mask.index_select(0, rows).index_select(1, columns),  # [n, M]
            num_logits=len(nodes),
        )
        logits = self._drafter.forward(part)
        self._nodes += nodes
        return logits

    def _read(self, token_ids: Sequence[int], num_logits: int) -> torch.Tensor:
        """Logits [num_logits, V] of the last of these tokens, which continue the committed rows and become pending ones."""
        part = Part(
            segment=self.segment,
            prefix=[min(token_id, self._drafter.last_token_id) for token_id in token_ids],
            node_ids=torch.empty(0, dtype=torch.int64),
            depths=(),
            tree_mask=self._drafter.masks.of(self._shape, 0),  # [0, 0]
            num_logits=num_logits,
        )
        return self._drafter.forward(part)
