"""`chat`: a conversation in a terminal or a pipe. Answers go to stdout and nothing else does."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import counted
from ..errors import DeviceError, OffloadError, UsageError
from ..text.conversation import check_message, render
from .answer import Answerer
from .dialogue import AnswerSettings, Dialogue
from .flags_to_settings import check_and_announce_models, check_small_files, engine_settings
from .signals import leaving_at_once
from .terminal import LoadBar, full_statistics, say, say_plan, say_weights
from .turns import Turn, line_reader, read_turn

if TYPE_CHECKING:
    from ..engine.admission import Admission

HELP = '''/help                 this list
/stats                the numbers of the last answer
/set [NAME VALUE]     max-new-tokens, temperature, top-k, top-p, seed; VALUE off resets
/system [TEXT]        what the conversation begins with; off removes it
/save FILE            write messages and settings
/load FILE            take them over from a file
/retry                another answer to the last question
/undo                 take the last question back, and its answer
/clear                forget everything but the system message
/exit                 leave; so does the end of input
"""                   begins and ends a text of several lines
Ctrl-C                stops an answer, which is kept as far as it came; at the prompt it leaves'''


def run(arguments: argparse.Namespace) -> int:
    settings = engine_settings(arguments, emulate_demo_link=True)
    check_small_files(settings)
    dialogue = Dialogue(AnswerSettings(**{one.name: getattr(arguments, one.name) for one in fields(AnswerSettings)}))
    dialogue.set_system(arguments.system_prompt)
    check_and_announce_models(arguments, settings)
    with leaving_at_once():
        from ..assemble import open_engine  # torch, after everything that can be refused without it

    def admit(admission: "Admission") -> None:
        _check_model(admission, dialogue, arguments)

    with LoadBar(enabled=not arguments.quiet) as progress:
        engine = open_engine(settings, seed=arguments.seed, progress=progress.update, admit=admit)
    say_weights(engine.weights, quiet=arguments.quiet)
    say_plan(engine.plan, arguments)
    with engine:
        return _converse(Answerer(engine, dialogue, arguments), settings.model)


def _check_model(admission: "Admission", dialogue: Dialogue, arguments: argparse.Namespace) -> None:
    """Refuses, before the weights are read, a model without a tokenizer or with a template that cannot lay out a question."""
    if admission.tokenizer is None:
        raise UsageError("the model folder has no tokenizer", where="--model", cure="a chat needs one; add its files")
    question = {"role": "user", "content": "Hello"}
    prompt = render(admission.tokenizer, [*dialogue.messages, question], template=not arguments.raw)
    if not prompt.templated and not arguments.raw and not arguments.quiet:
        say("the model has no chat template: it gets a plain transcript with lines User: and Assistant:")


def _converse(answerer: Answerer, model: str) -> int:
    """Takes turns until the input ends, and returns the exit code. An error is shown and the conversation goes on, unless the
    device is lost. A script learns from the exit code that an answer is missing."""
    read, interactive, exit_code = line_reader(), sys.stdin.isatty(), 0
    if interactive:
        answerer.remark("/help lists the commands, Ctrl-D leaves")
    while (turn := read_turn(read)) is not None:
        if turn.is_command and turn.text == "/exit":
            break
        error = _take(answerer, turn, model)
        if error is not None:
            say(f"error: {error}")
            if not interactive and not turn.is_command:
                exit_code = error.exit_code
    return exit_code


def _take(answerer: Answerer, turn: Turn, model: str) -> OffloadError | None:
    """Does what a turn says. Returns the error that kept it from being done."""
    try:
        if turn.is_command:
            _command(answerer, turn, model)
        elif turn.text:
            answerer.ask(turn.text)
    except KeyboardInterrupt:
        answerer.remark("stopped")
    except DeviceError:
        raise
    except OffloadError as error:
        return error
    return None


def _command(answerer: Answerer, turn: Turn, model: str) -> None:
    name, _, argument = turn.text.partition(" ")
    commands: dict[str, Callable[[], None]] = {
        "/help": lambda: say(HELP),
        "/stats": lambda: _stats(answerer),
        "/set": lambda: _set(answerer, argument.split()),
        "/system": lambda: _system(answerer, argument.strip()),
        "/save": lambda: _save(answerer, argument.strip(), model),
        "/load": lambda: _load(answerer, argument.strip()),
        "/retry": answerer.retry,
        "/undo": lambda: _undo(answerer),
        "/clear": answerer.dialogue.clear,
    }
    if name not in commands:
        raise UsageError(f"no such command: {name}", where="chat", cure="see /help; quote a message that begins with a slash")
    commands[name]()


def _stats(answerer: Answerer) -> None:
    say(full_statistics(answerer.last) if answerer.last is not None else "no answer yet")


def _set(answerer: Answerer, words: list[str]) -> None:
    dialogue = answerer.dialogue
    if not words:
        say("\n".join(f"{name.replace('_', '-')} {value}" for name, value in asdict(dialogue.settings).items()))
    elif len(words) == 2:
        dialogue.settings = dialogue.settings.changed(*words)
    else:
        raise UsageError("a name and a value, please", where="/set", cure="for example: /set temperature 0.7")


def _system(answerer: Answerer, text: str) -> None:
    if text:
        check_message({"role": "system", "content": text}, 0)
        answerer.dialogue.set_system(None if text == "off" else text)
    else:
        say(answerer.dialogue.system or "no system message")


def _file(name: str, command: str) -> Path:
    if not name:
        raise UsageError("no file named", where=command, cure=f"{command} FILE")
    return Path(name).expanduser()


def _save(answerer: Answerer, name: str, model: str) -> None:
    path = _file(name, "/save")
    answerer.dialogue.save(path, Path(model).name)
    answerer.remark(f"saved {counted(len(answerer.dialogue.messages), 'message')} to {path}")


def _load(answerer: Answerer, name: str) -> None:
    answerer.dialogue.load(_file(name, "/load"))
    answerer.remark(f"loaded {counted(len(answerer.dialogue.messages), 'message')}")


def _undo(answerer: Answerer) -> None:
    asked = answerer.dialogue.up_to_last_question()
    if not asked:
        raise UsageError("nothing was asked yet", where="/undo", cure="ask something")
    answerer.dialogue.messages = asked[:-1]
