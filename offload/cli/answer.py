"""One answer of a chat: the prompt that fits, the text as passes accept it, and what is filed when it ends."""

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..config import counted
from ..errors import FitError, UsageError
from ..text.conversation import Message, render
from .dialogue import Dialogue
from .progress import PassDisplay, draws_on
from .terminal import full_statistics, say

if TYPE_CHECKING:
    import argparse

    from ..engine.admission import Request
    from ..engine.engine import Engine
    from ..report.report import Report

COLOURS, PLAIN = ("\033[36m", "\033[33m"), "\033[0m"


class Trimmed:
    """Text without the white space around it, piece by piece."""

    def __init__(self) -> None:
        self.text, self._held = "", ""

    def push(self, piece: str) -> str:
        """The part of `piece`, and of the white space held back before it, that is certain to belong to the text."""
        piece = self._held + piece if self.text else piece.lstrip()
        kept = piece.rstrip()
        self._held = piece[len(kept) :]
        self.text += kept
        return kept


class Answerer:
    """Asks `engine` and writes its answers to stdout. The dialogue keeps every answer, also one that was stopped. After an
    error it is as before."""

    def __init__(self, engine: "Engine", dialogue: Dialogue, arguments: "argparse.Namespace") -> None:
        self.engine, self.dialogue, self._arguments = engine, dialogue, arguments
        self.last: Report | None = None
        self._num_retries = 0
        self._colours = arguments.show_passes and draws_on(sys.stdout) and not os.environ.get("NO_COLOR")
        if arguments.show_passes and not self._colours:
            self.remark("--show-passes colours nothing here: no terminal, or NO_COLOR is set")

    def remark(self, text: str) -> None:
        if not self._arguments.quiet:
            say(text)

    def ask(self, question: str) -> None:
        self._num_retries = 0
        self._answer([*self.dialogue.messages, {"role": "user", "content": question}])

    def retry(self) -> None:
        """Another answer to the last question: sampled with the next seed. UsageError when there is none."""
        asked = self.dialogue.up_to_last_question()
        if not asked:
            raise UsageError("nothing was asked yet", where="/retry", cure="ask something")
        if self.dialogue.settings.temperature == 0:
            self.remark("at temperature 0 the answer is the same every time; /set temperature 0.7 samples one")
        self._num_retries += 1
        self._answer(asked)

    def _answer(self, asked: list[Message]) -> None:
        text, report = self._write(self._request(asked))
        self.last = report
        if not report.token_ids:
            self.remark("stopped before the first token; the question is taken back")
            return
        self.dialogue.messages = [*asked, {"role": "assistant", "content": text}]
        if report.finish_reason == "interrupted":
            self.remark("stopped; the answer up to here is kept")
        elif report.finish_reason == "length":
            self.remark(f"cut after {counted(len(report.token_ids), 'token')}; /set max-new-tokens N allows more")
        if self._arguments.stats != "none":
            self.remark(full_statistics(report) if self._arguments.stats == "full" else report.line())

    def _request(self, asked: list[Message]) -> "Request":
        """A request with the longest view of `asked` that leaves room for an answer. FitError when none does."""
        dialogue, arguments, tokenizer = self.dialogue, self._arguments, self.engine.tokenizer
        assert tokenizer is not None, "checked before the engine was loaded"
        refused: FitError | None = None
        for num_left_out, view in dialogue.views(asked):
            prompt = render(tokenizer, view, template=not arguments.raw)
            settings = asdict(dialogue.settings)
            settings["seed"] = (settings["seed"] + self._num_retries) % 2**63
            try:
                request = self.engine.admission.request(
                    prompt.token_ids, stop=[*prompt.stop, *arguments.stop], ignore_eos=arguments.ignore_eos, **settings
                )
            except FitError as error:
                refused = error
                continue
            if num_left_out > dialogue.num_left_out:
                self.remark(f"the {num_left_out} oldest messages no longer fit into the context: answered without them")
            dialogue.num_left_out = num_left_out
            return request
        assert refused is not None
        raise refused

    def _write(self, request: "Request") -> tuple[str, "Report"]:
        """Print the answer until it ends or Ctrl-C comes."""
        generation, text = self.engine.run(request), Trimmed()
        with PassDisplay(self.engine.progress, enabled=not self._arguments.quiet) as display:
            try:
                for number, step in enumerate(generation):
                    display.write(self._coloured(text.push(step.text), number))
            except KeyboardInterrupt:
                pass  # what was accepted is kept
            finally:
                display.write(text.push(generation.stop()) + "\n")
        return text.text, generation.result()

    def _coloured(self, text: str, pass_number: int) -> str:
        return f"{COLOURS[pass_number % 2]}{text}{PLAIN}" if self._colours and text else text
