"""The flags, and nothing else: importing this is cheap, so help and usage errors are instant."""

import argparse
from typing import NoReturn

from ..coding.base_kinds import BASE_KINDS, DEFAULT_BASE
from ..errors import UsageError
from .flag_groups import (
    add_bench_flags,
    add_chat_flags,
    add_datastore_flags,
    add_model_flags,
    add_output_flags,
    add_plan_flags,
    add_profile_flags,
    add_request_flags,
    add_serve_flags,
    add_verbosity_flags,
)

COMMANDS = ("generate", "chat", "serve", "plan", "bench", "profile", "doctor", "convert", "datastore", "verify", "version")
DEMO_NAME = "treestream-demo"
DEMO_PROMPT = "The Congress of the United States should"


class Parser(argparse.ArgumentParser):
    """argparse, with errors as ours: one line, exit code 2, raised rather than exited."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, cure=f"see `{self.prog} --help`")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """What the command line says. UsageError names the command at fault, and so the help that lists its flags."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(with_default_command(argv))
    if unknown:
        command = f"{parser.prog} {arguments.command}"
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}", where=command, cure=f"see `{command} --help`")
    if "seed" in arguments:
        arguments.seed_is_chance = arguments.seed is None  # nobody named one: 0, but no promise rests on it
        arguments.seed = arguments.seed or 0
    return arguments


def build_parser() -> Parser:
    parser = Parser(
        prog="run_70b.py",
        description="Run a model far too big for its GPU: exact, streamed, many tokens per pass.",
        epilog="COMMAND --help lists a command's flags. Without a command: generate. Without --model: the bundled demo pair.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    generate = commands.add_parser("generate", help="generate text (the default)", allow_abbrev=False)
    add_model_flags(generate)
    add_request_flags(generate)
    add_output_flags(generate)
    plan = commands.add_parser("plan", help="what would run and how fast, without a GPU or weights", allow_abbrev=False)
    add_plan_flags(plan)
    chat = commands.add_parser("chat", help="a conversation, in a terminal or a pipe", allow_abbrev=False)
    add_model_flags(chat)
    add_chat_flags(chat)
    profile = commands.add_parser("profile", help="measure this machine, or a model pair", allow_abbrev=False)
    add_profile_flags(profile)
    doctor = commands.add_parser("doctor", help="what on this machine will make it slow or fail", allow_abbrev=False)
    doctor.add_argument(
        "--model", metavar="PATH|HUB_ID|PRESET", help="look at this model too; scale:PRESET[:LAYERS] for its size"
    )
    doctor.add_argument("--draft-model", metavar="PATH|HUB_ID|PRESET|none", help="and whether this draft fits it")
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    serve = commands.add_parser("serve", help="an OpenAI-compatible server, and a page to talk to it", allow_abbrev=False)
    add_model_flags(serve)
    add_serve_flags(serve)
    bench = commands.add_parser("bench", help="latency, side by side with baselines", allow_abbrev=False)
    add_bench_flags(bench)
    convert = commands.add_parser("convert", help="code a model's 16-bit weights, without loss", allow_abbrev=False)
    convert.add_argument("--model", required=True, metavar="PATH", help="folder or hub id")
    convert_help = "lossless: seven tenths of the bytes (default); residual: a base, and what it lacks in half of the bytes"
    convert.add_argument("--codec", default="lossless", choices=("lossless", "residual"), help=convert_help)
    convert.add_argument("--base", choices=tuple(BASE_KINDS), help=f"with --codec residual; default {DEFAULT_BASE}")
    convert.add_argument(
        "--output", required=True, metavar="DIR", help="a new folder, or one in which this was interrupted: it goes on"
    )
    datastore = commands.add_parser("datastore", help="texts to find continuations in: --ngram FILE", allow_abbrev=False)
    add_datastore_flags(datastore)
    verify = commands.add_parser("verify", help="check a checkpoint before a long run", allow_abbrev=False)
    verify.add_argument("--model", required=True, metavar="PATH", help="folder or hub id")
    verify.add_argument("--full", action="store_true", help="compare contents with the manifest, too")
    verify.add_argument("--write-manifest", action="store_true", help="hash every file and write the manifest")
    verify.add_argument("--manifest", metavar="FILE", help="default: treestream.manifest.json in the model folder")
    version = commands.add_parser("version", help="versions of everything that matters", allow_abbrev=False)
    for command in (doctor, convert, verify, version):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        add_verbosity_flags(command)
    return parser


def with_default_command(argv: list[str]) -> list[str]:
    """No command means generate, unless only help was asked for."""
    if argv[:1] == ["--version"]:
        return ["version", *argv[1:]]
    if argv and (argv[0] in COMMANDS or argv[0] in ("-h", "--help")):
        return argv
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"unknown command {argv[0]!r}", where="run_70b.py", cure=f"one of {', '.join(COMMANDS)}; see --help")
    return ["generate", *argv]
