"""The flags, and nothing else: importing this is cheap, so help and usage errors are instant."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from ..config import DTYPES, VERIFIERS
from ..errors import UsageError

COMMANDS = ("generate", "profile", "bench", "verify", "version")
DEMO_PROMPT = "The Congress of the United States should"


class Parser(argparse.ArgumentParser):
    """argparse, with errors as ours: one line, exit code 2, raised rather than exited."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, cure=f"see `{self.prog} --help`")


def whole(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` on that fits into 63 bits."""

    def parse(text: str) -> int:
        if len(text) > 20 or not text.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"not a whole number: {text!r}")
        if not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is too small, the least is {least}" if int(text) < least else "too large")
        return int(text)

    return parse


def number(law: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number for which `law` holds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
        if not holds(value):  # NaN holds nowhere
            raise argparse.ArgumentTypeError(f"{text} is not {law}")
        return value

    return parse


_temperature = number("0 (greedy) or positive and finite", lambda value: 0 <= value < math.inf)
_seconds = number("positive and finite", lambda value: 0 < value < math.inf)
_probability = number("in (0, 1]", lambda value: 0 < value <= 1)


def _percent(text: str) -> float:
    """5% -> 0.05."""
    return number("a percentage such as 5%", lambda value: 0 <= value < 1000)(text.removesuffix("%")) / 100


def build_parser() -> Parser:
    parser = Parser(
        prog="run_70b.py",
        description="Run a model far too big for its GPU: exact, streamed, many tokens per pass.",
        epilog="Without a command: generate. Without --model: the bundled demo pair.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    generate = commands.add_parser("generate", help="generate text (the default)", allow_abbrev=False)
    add_model_flags(generate)
    add_request_flags(generate)
    add_output_flags(generate)
    profile = commands.add_parser("profile", help="measure a model pair", allow_abbrev=False)
    add_profile_flags(profile)
    bench = commands.add_parser("bench", help="latency, side by side with baselines", allow_abbrev=False)
    add_bench_flags(bench)
    verify = commands.add_parser("verify", help="check a checkpoint before a long run", allow_abbrev=False)
    verify.add_argument("--model", required=True, metavar="PATH", help="folder or hub id")
    verify.add_argument("--full", action="store_true", help="compare contents with the manifest, too")
    verify.add_argument("--write-manifest", action="store_true", help="hash every file and write the manifest")
    verify.add_argument("--manifest", metavar="FILE", help="default: treestream.manifest.json in the model folder")
    version = commands.add_parser("version", help="versions of everything that matters", allow_abbrev=False)
    for command in (verify, version):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        add_verbosity_flags(command)
    return parser


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("acceptance",), help="acceptance: how often the k-th child is the accepted one")
    add_model_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--dataset", metavar="FILE", help="prompts, a JSON object with turns a line; default: the demo's")
    group.add_argument("--per-level", action="store_true", help="one vector per level of the tree instead of one for all")
    add_sampling_flags(group)
    group.add_argument("--output", metavar="FILE", help="write the profile to FILE rather than to stdout")
    add_verbosity_flags(parser)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    what = "latency: engines side by side (default); spec: acceptance and tokens per pass; suite: everything, with a report"
    parser.add_argument("what", nargs="?", default="latency", choices=("latency", "spec", "suite"), help=what)
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts")
    one_of = prompts.add_mutually_exclusive_group()
    add_prompt_flags(one_of)
    one_of.add_argument("--dataset", metavar="FILE", help="prompts as in Spec-Bench: an object with turns, category a line")
    prompts.add_argument("--raw", action="store_true", help="do not apply the chat template")
    add_sampling_flags(prompts)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--baseline", metavar="LIST", help="latency: any of plain,accelerate,deepspeed,transformers; default all"
    )
    group.add_argument("--runs", type=whole(1), default=3, metavar="N", help="times that each prompt is decoded, default 3")
    group.add_argument("--warmup", type=whole(0), default=1, metavar="N", help="passes that do not count, default 1")
    group.add_argument("--max-seconds", type=_seconds, metavar="S", help="time for everything, default 600; suite: 1500")
    group.add_argument("--compare", metavar="FILE", help="latency: compare with an earlier --output")
    group.add_argument("--fail-if-slower", type=_percent, metavar="5%", help="with --compare: exit 1 beyond that")
    group.add_argument("--force", action="store_true", help="compare whatever differs")
    group.add_argument("--trees", default="4x6:kary,64x10", metavar="LIST", help="spec: trees, separated by commas")
    group.add_argument("--temperatures", default="0,0.6,1", metavar="LIST", help="spec: temperatures")
    group.add_argument("--top-ps", default="1", metavar="LIST", help="spec: values of top-p")
    group.add_argument("--out", metavar="DIR", help="suite: folder of its records, figures and report; continued if it exists")
    output = parser.add_argument_group("output")
    output.add_argument("-o", dest="format", choices=("md", "json", "jsonl", "csv"), help="what stdout gets, default md")
    output.add_argument("--json", action="store_true", help="the same as -o json")
    output.add_argument("--output", metavar="FILE", help="write the JSON object to FILE as well")
    output.add_argument("--plot", metavar="FILE", help="latency: a picture of the table (.png)")
    output.add_argument("--trace", metavar="FILE", help="latency: trace of our engine (.json or .png)")
    add_verbosity_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and machine")
    group.add_argument(
        "--model", metavar="PATH|HUB_ID", help="target; default: the demo pair; scale:PRESET[:LAYERS]: see docs/cli.md"
    )
    group.add_argument("--draft-model", metavar="PATH|HUB_ID|none", help="draft model; none = no speculation")
    group.add_argument("--tree", default="auto", metavar="SPEC", help="auto, none, 768x18, 4x6:kary, or a JSON file")
    group.add_argument("--verifier", default="auto", choices=VERIFIERS, help="how sampled trees are verified, all exactly")
    group.add_argument("--acceptance", metavar="FILE", help="acceptance profile that NxL trees are optimised for")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's on CUDA, float32 on CPU")
    group.add_argument("--gpu-memory", default="auto", metavar="SIZE", help="device memory budget, e.g. 22GiB")
    group.add_argument("--host-memory", default="auto", metavar="SIZE", help="what exceeds it is streamed from disk")
    group.add_argument("--resident-layers", default="auto", metavar="N", help="layers that stay on the device")
    group.add_argument("--slots", default="auto", metavar="N", help="device buffers for streamed layers")
    group.add_argument("--max-context", default="auto", metavar="N", help="prompt + new tokens + tree")
    group.add_argument("--emulate-link", metavar="RATE", help="CPU device: throttle copies, e.g. 200MB/s")


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    add_prompt_flags(group.add_mutually_exclusive_group())
    add_sampling_flags(group)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")
    template = group.add_mutually_exclusive_group()
    template.add_argument("--chat", action="store_true", help="apply the chat template (default if there is one)")
    template.add_argument("--raw", action="store_true", help="do not apply the chat template")
    group.add_argument("--system-prompt", metavar="TEXT", help="system turn for the chat template")


def add_prompt_flags(prompt: argparse._MutuallyExclusiveGroup) -> None:
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from FILE")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids; needs no tokenizer")


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", "-n", type=whole(1), default=128, metavar="N", help="default 128")
    group.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="default 0 (greedy)")
    group.add_argument("--top-k", type=whole(1), metavar="K", help="keep the K most probable tokens")
    group.add_argument("--top-p", type=_probability, default=1.0, metavar="P", help="keep the smallest set reaching P")
    group.add_argument("--seed", type=whole(0), default=0, metavar="S", help="default 0")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    group.add_argument("--output", metavar="FILE", help="write the JSON object to FILE as well")
    group.add_argument("--stats", default="line", choices=("line", "full", "none"), help="what ends the run on stderr")
    group.add_argument("--record-acceptance", metavar="FILE", help="write the acceptance counted during the run")
    group.add_argument("--trace", metavar="FILE", help="Chrome/Perfetto trace (.json) or timeline picture (.png)")
    add_verbosity_flags(parser)


def add_verbosity_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", "-q", action="store_true", help="errors only on stderr")
    group.add_argument("--verbose", "-v", action="store_true", help="more on stderr; tracebacks")


def with_default_command(argv: list[str]) -> list[str]:
    """No command means generate, unless only help was asked for."""
    if argv and (argv[0] in COMMANDS or argv[0] in ("-h", "--help")):
        return argv
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"unknown command {argv[0]!r}", where="run_70b.py", cure=f"one of {', '.join(COMMANDS)}; see --help")
    return ["generate", *argv]
