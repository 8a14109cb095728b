"""`generate`: text to stdout as it is accepted, everything else to stderr."""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineSettings
from ..demo import DRAFT, LINK, TARGET
from ..errors import DeviceError, UsageError
from ..planner.tree_choice import read_acceptance, read_tree
from ..trace import Trace
from .main import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated
from .parser import DEMO_PROMPT
from .terminal import LoadProgress, full_statistics, say

if TYPE_CHECKING:
    from ..engine import Engine, Generation
    from ..report import Report


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _check(arguments, settings)
    prompt = _read_prompt(arguments)
    from ..assemble import open_engine  # torch, after everything that can be refused without it

    trace = Trace() if arguments.trace else None
    with LoadProgress(enabled=not arguments.quiet) as progress:
        engine = open_engine(settings, seed=arguments.seed, progress=progress.update, trace=trace)
    with engine:
        generation = engine.stream(
            prompt if isinstance(prompt, list) else _encode(engine, prompt, arguments),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            stop=arguments.stop,
            ignore_eos=arguments.ignore_eos,
        )
        exit_code = _print_text(engine, generation, silent=arguments.json)
        report = generation.result()
    _print_rest(arguments, report, trace)
    return exit_code


def _settings(arguments: argparse.Namespace) -> EngineSettings:
    model, draft_model, emulate_link = arguments.model, arguments.draft_model, arguments.emulate_link
    if model is None:
        model, draft_model = str(TARGET), str(DRAFT) if draft_model is None else draft_model
        if emulate_link is None and not arguments.device.startswith("cuda"):
            emulate_link = LINK
        if not arguments.quiet:
            say(
                "no --model given: the bundled demo pair (5.5 M parameters and a draft of 0.5 M)"
                + (f", streamed over an emulated link of {emulate_link}" if emulate_link else "")
                + "\n  a real model: --model PATH_OR_HUB_ID --draft-model PATH_OR_HUB_ID"
            )
    return EngineSettings.parse(
        model=model,
        draft_model=draft_model,
        tree=arguments.tree,
        verifier=arguments.verifier,
        acceptance=arguments.acceptance,
        device=arguments.device,
        dtype=arguments.dtype,
        gpu_memory=arguments.gpu_memory,
        host_memory=arguments.host_memory,
        resident_layers=arguments.resident_layers,
        slots=arguments.slots,
        max_context=arguments.max_context,
        emulate_link=emulate_link,
    )


def _check(arguments: argparse.Namespace, settings: EngineSettings) -> None:
    """UsageError or ModelError for what the flags, and the small files that they name, tell before any model is read."""
    read_tree(settings.tree, has_draft=settings.draft_model is not None)
    if settings.acceptance is not None:
        read_acceptance(Path(settings.acceptance))
    templated = "--chat" if arguments.chat else "--system-prompt" if arguments.system_prompt is not None else None
    against = "--raw" if arguments.raw else "--prompt-ids" if arguments.prompt_ids is not None else None
    if templated and against:
        raise UsageError(
            f"{templated} needs the chat template, {against} goes without", where=templated, cure="leave one of the two out"
        )
    for flag, name in (("--output", arguments.output), ("--trace", arguments.trace)):
        if name is not None:
            _check_writable(flag, Path(name))
    if arguments.trace and arguments.trace.endswith(".png") and find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib", where="--trace", cure="install matplotlib, or name a .json file")


def _check_writable(flag: str, path: Path) -> None:
    """Said before a run of an hour, not after it."""
    try:
        reason = "it is a folder" if path.is_dir() else None
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            reason = f"{path.parent} is not a folder that can be written to"
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        raise UsageError(f"cannot write {path}: {reason}", where=flag, cure="name a file in an existing folder")


def _read_prompt(arguments: argparse.Namespace) -> str | list[int]:
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
        raise UsageError(f"the prompt cannot be read: {error}", where=where, cure="give UTF-8 text") from error
    if arguments.model is not None:
        raise UsageError(
            "no prompt",
            where="generate",
            cure="give --prompt TEXT, --prompt-file FILE, --prompt-ids 1,2,3 or --prompt -",
        )
    return DEMO_PROMPT


def _encode(engine: "Engine", text: str, arguments: argparse.Namespace) -> list[int]:
    has_template = engine.codec is not None and engine.codec.has_chat_template
    if engine.codec is not None and (arguments.chat or arguments.system_prompt or (has_template and not arguments.raw)):
        return engine.codec.encode_chat(text, arguments.system_prompt)
    return engine.encode(text)


def _print_text(engine: "Engine", generation: "Generation", *, silent: bool) -> int:
    """Write text as it becomes final; the exit code. After Ctrl-C or SIGTERM, what there is has been written, too."""

    def write(text: str) -> None:
        if not silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    exit_code = 0
    try:
        for step in generation:
            write(step.text if engine.codec is not None else "".join(f"{token_id} " for token_id in step.token_ids))
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    except Terminated:
        exit_code = EXIT_TERMINATED
    write(generation.stop())
    if not silent and sys.stdout.isatty():
        sys.stdout.write("\n")
    return exit_code


def _print_rest(arguments: argparse.Namespace, report: "Report", trace: Trace | None) -> None:
    if arguments.json:
        print(json.dumps(report.to_json()), flush=True)
    if arguments.stats != "none" and not arguments.quiet:
        say(full_statistics(report) if arguments.stats == "full" else report.line())
    try:
        if arguments.output:
            _write_atomically(Path(arguments.output), json.dumps(report.to_json(), indent=1) + "\n")
        if trace is not None:
            trace.save(Path(arguments.trace))
    except OSError as error:
        raise DeviceError(
            f"the text above is complete, but a file could not be written: {error}",
            where=f"{' and '.join(filter(None, (arguments.output, arguments.trace)))}",
            cure="check the folder and the space on its disk",
        ) from error


def _write_atomically(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # /dev/null, a named pipe: nothing to replace
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
