"""`generate`: text to stdout as it is accepted, everything else to stderr."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..assemble import open_engine
from ..config import EngineSettings
from ..demo import DRAFT, LINK, TARGET
from ..engine import Engine, Generation
from ..errors import DeviceError, UsageError
from ..report import Report
from ..trace import Trace
from .main import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated
from .parser import DEMO_PROMPT
from .terminal import LoadProgress, full_statistics, say


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    prompt = _read_prompt(arguments)
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
        if arguments.prompt_file is not None:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        if arguments.prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        where = "--prompt -" if arguments.prompt_file is None else f"--prompt-file {arguments.prompt_file}"
        raise UsageError(f"the prompt cannot be read: {error}", where=where, cure="give UTF-8 text") from error
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.model is not None:
        raise UsageError(
            "no prompt",
            where="generate",
            cure="give --prompt TEXT, --prompt-file FILE, --prompt-ids 1,2,3 or --prompt -",
        )
    return DEMO_PROMPT


def _encode(engine: Engine, text: str, arguments: argparse.Namespace) -> list[int]:
    has_template = engine.codec is not None and engine.codec.has_chat_template
    if engine.codec is not None and (arguments.chat or arguments.system_prompt or (has_template and not arguments.raw)):
        return engine.codec.encode_chat(text, arguments.system_prompt)
    return engine.encode(text)


def _print_text(engine: Engine, generation: Generation, *, silent: bool) -> int:
    """Write text as it becomes final; the exit code. After Ctrl-C or SIGTERM, what there is has been written, too."""
    written = 0

    def write(text: str) -> None:
        nonlocal written
        if not silent and engine.codec is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
            written += len(text)

    exit_code = 0
    try:
        for step in generation:
            if engine.codec is None and not silent:
                sys.stdout.write("".join(f"{token_id} " for token_id in step.token_ids))
                sys.stdout.flush()
            write(step.text)
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    except Terminated:
        exit_code = EXIT_TERMINATED
    write((generation.result().text or "")[written:])
    if not silent and sys.stdout.isatty():
        sys.stdout.write("\n")
    return exit_code


def _print_rest(arguments: argparse.Namespace, report: Report, trace: Trace | None) -> None:
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
            where="--output, --trace",
            cure="check the folder and the space on its disk",
        ) from error


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
