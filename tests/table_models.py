"""A draft model that is a table: logits by the last two tokens. What TextModel promises, it checks."""

from collections.abc import Sequence

import torch


class TableModel:
    """Implements tree.draft.TextModel for `text` over `table` [V, V, V]. num_passes: how often it was asked for logits."""

    def __init__(self, table: torch.Tensor, text: Sequence[int], *, most: int = 10_000) -> None:
        self.table, self.text, self.most = table, list(text), most
        self.parents: list[int] = []
        self.token_ids: list[int] = []
        self.begun = False
        self.num_passes = 0
        self.widest = 0

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def room(self) -> int:
        return self.most - self.num_nodes

    def begin(self) -> torch.Tensor:
        self.parents, self.token_ids, self.begun = [], [], True
        self.num_passes += 1
        return self.table[self.text[-2], self.text[-1]][None]

    def expand(self, parents: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
        assert self.begun and 0 < len(parents) == len(token_ids) <= self.room
        self.num_passes += 1
        self.widest = max(self.widest, len(parents))
        rows = []
        for parent, token_id in zip(parents, token_ids.tolist(), strict=True):
            assert -1 <= parent < self.num_nodes
            before = self.text[-1] if parent < 0 else self.token_ids[parent]
            self.parents.append(parent)
            self.token_ids.append(token_id)
            rows.append(self.table[before, token_id])
        return torch.stack(rows)

    def follow(self, token_ids: Sequence[int], accepted: Sequence[int], kept: Sequence[int] = ()) -> None:
        before = -1
        for node, token_id in zip(accepted, token_ids, strict=False):
            assert self.parents[node] == before and self.token_ids[node] == token_id
            before = node
        assert list(kept) == sorted(set(kept))
        assert not kept or len(accepted) == len(token_ids)
        places = {before: -1} | {node: place for place, node in enumerate(kept)}
        self.parents = [places[self.parents[node]] for node in kept]
        self.token_ids = [self.token_ids[node] for node in kept]
        self.text += token_ids
        self.begun = len(accepted) == len(token_ids)
