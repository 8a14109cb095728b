"""A draft model as `tree.draft` sees it: something that grows trees level by level and keeps up with what was accepted."""

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from tree.aim import Aim
from tree.context import Left, TreeContext
from tree.estimates import Estimates
from tree.sources import TokenSources

from ..device import Device
from ..errors import FitError
from .buckets import CATCH_UP_ROWS, widest_pass, width_buckets
from .causal_lm import CausalLM, WeightSource
from .fixed_pass import FixedPasses
from .kv_cache import KVCache, Segment
from .masks import NodeMask
from .pass_inputs import Part

PROMPT_CHUNK_TOKENS = 1024


class ModelDrafter:
    """Implements tree.draft.Drafter over a CausalLM with a cache of its own. What is learned of one text's verdicts serves all,
    but for those that are to be repeated.

    vocab_size: the target's. Draft logits are cut or padded (never proposed) to it, for families whose sizes pad one vocabulary
        differently.
    aim: what the trees to come are like, of at most `max_nodes` nodes. Prepared passes have fixed shapes where the device
        replays CUDA graphs, with memory for the widest level that a tree of `max_nodes` may have; all others are as large as
        they must be, which is the same but for rounding.
    ahead_rows: of each text's cache are for nodes beyond those of a tree.
    sources: of tokens that enter the same trees.
    max_rows: a prompt is read in pieces of at most so many tokens, and no more than PROMPT_CHUNK_TOKENS.
    """

    feature_layers: tuple[int, ...] = ()  # of the target: a draft model wants nothing of it but tokens

    def __init__(
        self,
        model: CausalLM,
        device: Device,
        vocab_size: int,
        aim: Aim,
        max_rows: int,
        *,
        max_nodes: int,
        ahead_rows: int = 0,
        sources: Sequence[TokenSources] = (),
    ) -> None:
        self._model, self.device, self._vocab_size = model, device, vocab_size
        self._aim, self.chunk_tokens = aim, min(PROMPT_CHUNK_TOKENS, max_rows)
        self._sources, self._estimates = tuple(sources), Estimates(aim.acceptance)
        self.most_nodes = max_nodes + ahead_rows
        self.masks = {segment: NodeMask(device, self.most_nodes) for segment in model.cache.segments}
        self._fixed = FixedPasses(model, device, widest_pass(max_nodes)) if device.replays else None

    @property
    def cache(self) -> KVCache:
        return self._model.cache

    @property
    def last_token_id(self) -> int:
        """The largest that the draft knows. It is read in place of the target's tokens beyond."""
        return self._model.architecture.vocab_size - 1

    def aim(self, aim: Aim, max_rows: int) -> None:
        """Grow such trees from here on. Their passes are recorded, if any are, in no more memory than before. A device that
        records no more has all computed as they come."""
        self._aim, self.chunk_tokens = aim, min(PROMPT_CHUNK_TOKENS, max_rows)
        if self._fixed is not None and (fixed_rows := widest_pass(aim.shape.num_nodes)) < self._fixed.max_rows:
            self._fixed = None  # its memory goes before the smaller one's comes
            with suppress(FitError, torch.OutOfMemoryError):
                self._fixed = FixedPasses(self._model, self.device, fixed_rows)
        try:
            self.prepare(aim)
        except (RuntimeError, FitError):
            self.record_nothing()

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> TreeContext:
        """A text in segment `place` of the cache. The segment is the caller's to cut: it holds rows of a beginning of the text,
        not of all."""
        segment = self.cache.segments[place]
        segment.begin_text(prompt_tokens, len(token_ids))
        if self._fixed is not None:
            self._fixed.restart(segment)
        estimates = Estimates(self._aim.acceptance) if repeatable else self._estimates
        model, sources = ModelContext(self, segment, token_ids), [each.start(token_ids) for each in self._sources]
        assert before is None or isinstance(before, Left)
        return TreeContext(model, token_ids[-1], lambda: self._aim, sources, estimates, before)

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

    def prepare(self, aim: Aim) -> None:
        """Record the passes that such trees take, if any are to be: of dynamic ones all up to the widest. Every segment needs
        room for a row."""
        if self._fixed is not None:
            levels = width_buckets(self._fixed.max_rows) if aim.dynamic else [len(nodes) for nodes in aim.shape.expanded[1:-1]]
            self._fixed.prepare([*CATCH_UP_ROWS, *levels])

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
        self.masks.clear()
        self._model.close()


class ModelContext:
    """Implements tree.draft.TextModel: one text in a segment of the draft's cache.

    `token_ids` are committed. `segment` holds rows of a beginning of them, and pending ones of the nodes that were run.
    """

    def __init__(self, drafter: ModelDrafter, segment: Segment, token_ids: Sequence[int]) -> None:
        self._drafter, self.segment, self._token_ids = drafter, segment, list(token_ids)
        # Of nodes, in the order of their pending rows: their parents among them, and how far they are below the first.
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._mask = drafter.masks[segment]
        self._mask.forget()

    @property
    def num_nodes(self) -> int:
        return self.segment.pending

    @property
    def room(self) -> int:
        rows_left = self.segment.capacity - 1 - max(self.segment.rows, len(self._token_ids))  # one for a pass to be recorded
        return min(rows_left, self._drafter.most_nodes - self.num_nodes)

    def begin(self) -> torch.Tensor:
        segment, token_ids = self.segment, self._token_ids
        segment.truncate(min(segment.length, len(token_ids) - 1))  # the last token always goes through a pass
        self._renumber((), 0)
        while True:
            piece = token_ids[segment.length :][: self._drafter.chunk_tokens]
            is_last = segment.length + len(piece) == len(token_ids)
            logits = self._read(piece, num_logits=int(is_last))
            segment.commit(range(len(piece)))
            if is_last:
                return logits

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        all_parents, depths, num_old = [*self._parents, *parents], list(self._depths), self.num_nodes
        assert len(depths) == num_old, "the nodes are gone: `begin` comes first"
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        part = Part(
            segment=self.segment,
            prefix=(),
            node_ids=token_ids.clamp(max=self._drafter.last_token_id),
            depths=depths[num_old:],  # of the root's children 0, as the root is committed
            tree_mask=self._mask.rows(all_parents, num_old),  # [n, M]
            num_logits=len(parents),
        )
        logits = self._drafter.forward(part)
        self._parents, self._depths = all_parents, depths
        return logits

    def follow(self, token_ids: Sequence[int], accepted: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Where a family computes all rows anew, as the text has become longer, none are kept."""
        self.segment.commit(accepted, kept)
        self._token_ids.extend(token_ids)
        self.segment.grown(len(self._token_ids))
        self._renumber(kept if self.num_nodes else (), len(token_ids))

    def _renumber(self, kept: Sequence[int], num_levels: int) -> None:
        """Nodes `kept` are nodes 0, 1, ... now, `num_levels` levels higher than they were; there are no others."""
        places = {node: place for place, node in enumerate(kept)}
        self._parents = [places.get(self._parents[node], -1) for node in kept]
        self._depths = [self._depths[node] - num_levels for node in kept]
        self._mask.forget()

    def _read(self, token_ids: Sequence[int], num_logits: int) -> torch.Tensor:
        """Logits [num_logits, V] of the last of these tokens, which continue the committed rows and become pending ones."""
        part = Part(
            segment=self.segment,
            prefix=[min(token_id, self._drafter.last_token_id) for token_id in token_ids],
            node_ids=torch.empty(0, dtype=torch.int64),
            depths=(),
            tree_mask=self._mask.rows((), 0),  # [0, 0]
            num_logits=num_logits,
        )
        return self._drafter.forward(part)
