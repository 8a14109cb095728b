"""Drafts without a model: trees of what sources find to follow a text."""

from collections.abc import Sequence

from .aim import Aim
from .context import Left, TreeContext
from .estimates import Estimates
from .sources import TokenSources


class SourceDrafter:
    """Implements `tree.draft.Drafter`: all that is proposed was found by one of `sources`. Where nothing is found, a tree is
    its root alone. Texts share what is learned of how good finds are, unless they are to be repeatable."""

    feature_layers: tuple[int, ...] = ()  # sources want nothing of the target but tokens

    def __init__(self, sources: Sequence[TokenSources], aim: Aim) -> None:
        self._sources, self._aim, self._estimates = tuple(sources), aim, Estimates(aim.acceptance)

    def aim(self, aim: Aim, max_rows: int) -> None:
        self._aim = aim

    def start(
        self,
        place: int,
        token_ids: Sequence[int],
        prompt_tokens: int,
        *,
        repeatable: bool = False,
        before: object | None = None,
    ) -> TreeContext:
        estimates = Estimates(self._aim.acceptance) if repeatable else self._estimates
        sources = [source.start(token_ids) for source in self._sources]
        assert before is None or isinstance(before, Left)
        return TreeContext(None, token_ids[-1], lambda: self._aim, sources, estimates, before)
