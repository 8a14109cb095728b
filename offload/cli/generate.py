"""`generate`: text to stdout as it is accepted, everything else to stderr."""

import argparse
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineSettings
from ..errors import DeviceError, UsageError, reason
from ..report.trace import Trace
from .acceptance import AcceptanceRecorder, provenance, write_json
from .flags_to_settings import check_and_announce_models, check_small_files, check_writable, engine_settings
from .parser import DEMO_PROMPT
from .signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, leaving_at_once
from .terminal import LoadBar, full_statistics, plan_summary, say, say_weights

if TYPE_CHECKING:
    from ..engine.admission import Admission, Request
    from ..engine.engine import Engine
    from ..engine.generation import Generation
    from ..report.report import Report
    from ..text.tokenizer import Tokenizer


def run(arguments: argparse.Namespace) -> int:
    settings = engine_settings(arguments, emulate_demo_link=True)
    _check(arguments, settings)
    prompt = read_prompt(arguments)
    check_and_announce_models(arguments, settings)
    with leaving_at_once():
        from ..assemble import open_engine  # torch, after everything that can be refused without it

    trace = Trace() if arguments.trace else None
    asked = Asked(prompt, arguments)
    with LoadBar(enabled=not arguments.quiet) as progress:
        engine = open_engine(
            settings, seed=arguments.seed, progress=progress.update, trace=trace, expect=asked.expect, admit=asked.admit
        )
    say_weights(engine.weights, quiet=arguments.quiet)
    if arguments.verbose:
        say(plan_summary(engine.plan))
    with engine:
        assert asked.request is not None
        generation = engine.run(asked.request)
        recorder = AcceptanceRecorder()
        exit_code = _print_text(engine, generation, recorder, silent=arguments.json)
        report = generation.result()
    _print_report(arguments, report)
    _write_files(arguments, report, trace, recorder, provenance(arguments, settings, engine.draft_place))
    return exit_code


def _check(arguments: argparse.Namespace, settings: EngineSettings) -> None:
    """UsageError or ModelError for what the flags, and the small files that they name, tell before any model is read."""
    check_small_files(settings)
    check_template(arguments)
    files = {"--output": arguments.output, "--trace": arguments.trace, "--record-acceptance": arguments.record_acceptance}
    for flag, name in files.items():
        if name is not None:
            check_writable(flag, Path(name))
    if arguments.record_acceptance is not None and not settings.draft_models:
        raise UsageError("nothing to count without a draft", where="--record-acceptance", cure="name a --draft-model")
    if arguments.trace and arguments.trace.endswith(".png") and find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib", where="--trace", cure="install matplotlib, or name a .json file")


def check_template(arguments: argparse.Namespace) -> None:
    """UsageError for flags that ask for the chat template beside one that goes without."""
    templated = "--chat" if arguments.chat else "--system-prompt" if arguments.system_prompt is not None else None
    against = "--raw" if arguments.raw else "--prompt-ids" if arguments.prompt_ids is not None else None
    if templated and against:
        raise UsageError(
            f"{templated} needs the chat template, {against} goes without", where=templated, cure="leave one of the two out"
        )


def read_prompt(arguments: argparse.Namespace) -> str | list[int]:
    """Text, or token ids. UsageError when it cannot be read."""
    if arguments.prompt_ids is not None:
        try:
            return [int(token_id) for token_id in arguments.prompt_ids.split(",")]
        except ValueError:
            raise UsageError(
                f"not token ids: {arguments.prompt_ids!r}", where="--prompt-ids", cure="write them like 1,2,3"
            ) from None
    try:
        (arguments.system_prompt or "").encode()  # bytes that were not UTF-8 arrive as surrogates, which no tokenizer takes
        if arguments.prompt_file is not None:
            return Path(arguments.prompt_file).read_bytes().decode("utf-8")
        if arguments.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        if arguments.prompt is not None:
            return str(arguments.prompt.encode().decode("utf-8"))
    except (OSError, UnicodeError) as error:
        where = "--prompt, --system-prompt" if arguments.prompt_file is None else f"--prompt-file {arguments.prompt_file}"
        cure = "name a file that you may read" if isinstance(error, OSError) else "give UTF-8 text"
        raise UsageError(f"the prompt cannot be read: {reason(error)}", where=where, cure=cure) from error
    if arguments.model is not None:
        raise UsageError(
            "no prompt",
            where=arguments.command,
            cure="give --prompt TEXT, --prompt-file FILE, --prompt-ids 1,2,3 or --prompt -",
        )
    return DEMO_PROMPT


class Asked:
    """The one request of this run. The planner is told of it before it plans, and it is admitted before weights are read."""

    def __init__(self, prompt: str | list[int], arguments: argparse.Namespace) -> None:
        self._prompt, self._arguments = prompt, arguments
        self.request: Request | None = None

    def expect(self, settings: EngineSettings, tokenizer: "Tokenizer | None", max_positions: int) -> EngineSettings:
        from ..engine.admission import check_positions  # torch

        arguments = self._arguments
        if isinstance(self._prompt, str):
            if tokenizer is None:
                return settings  # which admit refuses
            templated = arguments.chat or arguments.system_prompt or tokenizer.has_chat_template
            if templated and not arguments.raw:
                self._prompt = tokenizer.encode_chat(self._prompt, arguments.system_prompt)
            else:
                self._prompt = tokenizer.encode(self._prompt)
        num_prompt, num_new = len(self._prompt), arguments.max_new_tokens
        check_positions(num_prompt, num_new, max_positions)
        return replace(settings, text_tokens=num_prompt + num_new, context_tokens=num_prompt + num_new // 2)

    def admit(self, admission: "Admission") -> None:
        arguments = self._arguments
        self.request = admission.request(
            self._prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop=arguments.stop,
            ignore_eos=arguments.ignore_eos,
            seed_is_chance=arguments.seed_is_chance,
        )


def _print_text(engine: "Engine", generation: "Generation", recorder: AcceptanceRecorder, *, silent: bool) -> int:
    """Writes text as it becomes final, and returns the exit code. What there is at Ctrl-C or SIGTERM is written, too."""

    def write(text: str) -> None:
        if not silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    exit_code = 0
    try:
        for step in generation:
            recorder.add(step)
            write(step.text if engine.tokenizer is not None else "".join(f"{token_id} " for token_id in step.token_ids))
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    except Terminated:
        exit_code = EXIT_TERMINATED
    write(generation.stop())
    if not silent and sys.stdout.isatty():
        sys.stdout.write("\n")
    return exit_code


def _print_report(arguments: argparse.Namespace, report: "Report") -> None:
    if arguments.json:
        print(json.dumps(report.to_json()), flush=True)
    if arguments.stats != "none" and not arguments.quiet:
        if report.plan.why_no_tree is not None:
            say(report.plan.why_no_tree)
        say(full_statistics(report) if arguments.stats == "full" else report.line())


def _write_files(
    arguments: argparse.Namespace,
    report: "Report",
    trace: Trace | None,
    recorder: AcceptanceRecorder,
    acceptance_of: dict[str, object],
) -> None:
    try:
        if arguments.output:
            write_json(Path(arguments.output), report.to_json())
        if trace is not None:
            trace.save(Path(arguments.trace))
        if arguments.record_acceptance:
            write_json(Path(arguments.record_acceptance), recorder.document(acceptance_of))
    except OSError as error:
        raise DeviceError(
            f"the text above is complete, but a file could not be written: {reason(error)}",
            where=" and ".join(filter(None, (arguments.output, arguments.trace, arguments.record_acceptance))),
            cure="check the folder and the space on its disk",
        ) from error
