"""Text that leaves while tokens arrive: whole characters, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from .tokenizer import REPLACEMENT, Tokenizer


class TextStream:
    """Turns an answer's tokens into text as they come, and ends at a stop string. `context` is the prompt: a decoder may write
    a token in another way where a text begins.

    `push` takes one token and returns the text that has become final: characters are complete, and no suffix of what was
    given out could still turn into a stop string. When a stop string appears, `stopped` is True and the text ends before it.
    A stop string may name special tokens, which the text leaves out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # `_window_text` is the part of the window's text that `text` or the prompt has already; the first `_num_taken` tokens
        # made it.
        self._token_ids, self._window_text = _tail(tokenizer, context)
        self._window_start = 0  # tokens from here on are decoded together, so that the cost per token stays constant
        # The prompt's last bytes may be a part of a character, and a window may not begin inside one.
        self._num_taken = 0 if self._window_text.endswith(REPLACEMENT) else len(self._token_ids)
        self._stops = StopSearch(stop)
        self.text = ""
        self.stopped = False
        self._given = 0

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        window = self._tokenizer.decode(self._token_ids[self._window_start :])
        if not window.endswith(REPLACEMENT):
            self._take(window)
            # The next window begins with what was just taken. That is whole characters: a decoder gives up a run of byte
            # tokens that begins inside one. And it is some text: a decoder drops the space in front of the first word.
            taken = self._tokenizer.decode(self._token_ids[self._num_taken :])
            if taken:
                self._window_start, window = self._num_taken, taken
            self._window_text, self._num_taken = window, len(self._token_ids)
        if self._tokenizer.is_special(token_id) and not self.stopped:
            self._end_at(self._stops.add(self._tokenizer.token_text(token_id), shown=False))
        return self._give(len(self.text) if self.stopped else self._stops.num_certain())

    def finish(self) -> str:
        """The rest: what was held back, and bytes that never became a character."""
        if not self.stopped:
            self._take(self._tokenizer.decode(self._token_ids[self._window_start :]))
            self._window_text = ""
            self._window_start = self._num_taken = len(self._token_ids)
        return self._give(len(self.text))

    def _take(self, window: str) -> None:
        """Add what `window` has more than before. Only bytes that were no character yet can have become other text."""
        fresh = _behind(self._window_text, window)
        self.text += fresh
        self._end_at(self._stops.add(fresh, shown=True))

    def _end_at(self, end: int | None) -> None:
        if end is not None:
            self.text, self.stopped = self.text[:end], True

    def _give(self, end: int) -> str:
        given, self._given = self.text[self._given : end], max(end, self._given)
        return given


def _behind(beginning: str, whole: str) -> str:
    """The end of `whole`, from the first character in which it differs from `beginning`."""
    pairs = zip(beginning, whole, strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(beginning), len(whole)))
    return whole[same:]


def _tail(tokenizer: Tokenizer, context: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of `context`, and their text. They are enough for a decoder to write what follows as it would behind the
    whole of `context`: they show a letter, and do not begin inside a character."""
    num_tokens = 8
    while num_tokens < len(context):
        text = tokenizer.decode(context[-num_tokens:])
        if text.strip().strip(REPLACEMENT) and tokenizer.decode(context[-2 * num_tokens :]).endswith(text):
            return list(context[-num_tokens:]), text
        num_tokens *= 2
    return list(context), tokenizer.decode(context)


class StopSearch:
    """Searches for `stop` strings in two texts. The one that is shown must not hold any. The one with the special tokens, which
    are not shown, ends for whoever stops at `<|end|>` where a model writes that."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._longest = max((len(text) for text in self._stop), default=1)
        self._shown, self._all = "", ""
        self._hidden: list[tuple[int, int]] = []  # places in `_all`: from, to

    def add(self, piece: str, *, shown: bool) -> int | None:
        """Where the text ends, in characters shown, when `piece` completes a stop string; else None."""
        from_shown, from_all = (max(0, len(text) - self._longest + 1) for text in (self._shown, self._all))
        self._all += piece
        if shown:
            self._shown += piece
        else:
            self._hidden.append((len(self._all) - len(piece), len(self._all)))
        ends = [at for stop in self._stop if (at := self._shown.find(stop, from_shown)) >= 0]
        ends += [self._place_shown(at) for stop in self._stop if (at := self._all.find(stop, from_all)) >= 0]
        return min(ends, default=None)

    def num_certain(self) -> int:
        """How many characters shown no stop string can begin in any more: all but the longest suffix that one begins with."""
        begun = (self._begun(self._shown), self._place_shown(self._begun(self._all)))
        return min(begun)

    def _begun(self, text: str) -> int:
        """Where the longest suffix begins that is the beginning of a stop string."""
        longest = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return len(text) - longest

    def _place_shown(self, at: int) -> int:
        """The place in the text of place `at` in the text with special tokens."""
        return at - sum(min(end, at) - start for start, end in self._hidden if start < at)
