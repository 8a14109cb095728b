"""The flags of each command, in groups that several of them share."""

import argparse

from ..config import CODECS, DECODE_KERNELS, DRAFT_DEVICES, DRAFT_PASSES, DTYPES, GROW_AHEAD, SMALL_UPLOADS, VERIFIERS
from .flag_types import flops, percent, positive, probability, rate, seconds, temperature, top_k, whole


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--model", metavar="PATH|HUB_ID|PRESET", help="a folder with config.json, or a preset: llama-2-70b")
    group.add_argument(
        "--draft-model", action="append", metavar="PATH|HUB_ID|PRESET|self|auto|none", help="several: the best is taken"
    )
    group.add_argument(
        "--tree", default="auto", metavar="SPEC", help="auto, none, 256:dynamic, 768x18, 4x6:kary, or a JSON file"
    )
    group.add_argument("--acceptance", action="append", metavar="FILE", help="acceptance profile of each draft, or of all")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: the model's own")
    group.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="above 0: time for sampling; default 0"
    )
    add_codec_flag(group)
    group.add_argument("--weights", metavar="NAME", help="a preset with weights stored so: fp8, int4, q4_k_m, lossless, ...")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--profile", metavar="FILE|NAME", help="hardware profile, or one of profiles/hardware: l40")
    machine.add_argument("--link", type=rate("--link"), metavar="RATE", help="host to device, e.g. 25GB/s")
    machine.add_argument("--flops", type=flops, metavar="RATE", help="matrix multiplication, e.g. 90TFLOP/s")
    machine.add_argument("--disk", type=rate("--disk"), metavar="RATE", help="sequential reads, e.g. 3GB/s")
    machine.add_argument("--gpu-memory", default="auto", metavar="SIZE", help="device memory budget, e.g. 22GiB")
    machine.add_argument("--host-memory", "--ram", default="auto", metavar="SIZE", help="what exceeds it comes from disk")
    machine.add_argument("--resident-layers", default="auto", metavar="N", help="layers that stay on the device")
    machine.add_argument("--slots", default="auto", metavar="N", help="device buffers for streamed layers")
    machine.add_argument("--max-context", default="auto", metavar="N", help="rows of the key/value caches")
    machine.add_argument("--draft-passes", default="auto", choices=DRAFT_PASSES, help="CUDA graphs for the draft, or not")
    add_drafting_flags(machine)
    machine.add_argument("--context", type=whole(1), metavar="N", help="tokens that attention looks back on, for timing")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    output.add_argument("--draw", metavar="FILE", help="draw the tree to FILE.svg or FILE.png")
    output.add_argument("--compare-drafts", action="store_true", help="what each draft brings, with its best tree")
    output.add_argument(
        "--sweep", metavar="RESOURCE=LOW..HIGH", help="gpu-memory, host-memory or link, e.g. gpu-memory=12GiB..80GiB"
    )
    output.add_argument("--plot", metavar="FILE", help="draw the sweep")
    add_verbosity_flags(parser)


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("acceptance", "hardware"),
        help="acceptance: how often the k-th child is the accepted one; hardware: what this machine does, and how fast",
    )
    add_model_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--dataset", metavar="FILE", help="prompts, a JSON object with turns a line; default: the demo's")
    group.add_argument("--per-level", action="store_true", help="one vector per level of the tree instead of one for all")
    group.add_argument(
        "--compare", action="store_true", help="which of several --draft-model (self, n-gram) is worth most here"
    )
    group.add_argument("--json", action="store_true", help="with --compare: one JSON object on stdout, no table")
    add_sampling_flags(group)
    group.add_argument("--output", metavar="FILE", help="write the profile to FILE; default: stdout, or profiles/hardware")
    add_verbosity_flags(parser)


def add_datastore_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="build|verify", required=True, parser_class=type(parser))
    build = what.add_parser("build", help="make one of texts", allow_abbrev=False)
    build.add_argument("--model", required=True, metavar="PATH|HUB_ID", help="whose tokenizer makes the tokens")
    build.add_argument("--output", required=True, metavar="FILE", help="the datastore")
    build.add_argument("--memory", default="1GiB", metavar="SIZE", help="for sorting, about; default 1GiB")
    build.add_argument("texts", nargs="+", metavar="TEXTS", help='files in UTF-8, .jsonl with a "text" a line, folders of them')
    verify = what.add_parser("verify", help="read all of one and compare it with its checksums", allow_abbrev=False)
    verify.add_argument("file", metavar="FILE", help="the datastore")
    for command in (build, verify):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        add_verbosity_flags(command)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")
    group.add_argument("--port", type=whole(0, 65535), default=8000, metavar="N", help="default 8000; 0: any that is free")
    key = group.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help="ask for this key; others on this machine see it in your command")
    key.add_argument("--api-key-file", metavar="FILE", help="ask for the key in FILE")
    key.add_argument("--allow-unauthenticated", action="store_true", help="no key, though other machines reach --host")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="answer to this name, too (repeatable)"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call the model; default: its folder's name")
    group.add_argument("--max-queue", type=whole(0), default=16, metavar="N", help="requests that may wait; default 16")
    group.add_argument(
        "--grace", type=seconds, default=30.0, metavar="S", help="seconds to finish in after SIGTERM; default 30"
    )
    add_verbosity_flags(parser)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    what = "latency: engines side by side (default); spec: acceptance and tokens per pass; suite: everything, with a report"
    parser.add_argument("what", nargs="?", default="latency", choices=("latency", "spec", "suite"), help=what)
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts")
    one_of = prompts.add_mutually_exclusive_group()
    add_prompt_flags(one_of)
    one_of.add_argument("--dataset", metavar="FILE", help="prompts as in Spec-Bench: an object with turns, category a line")
    add_template_flags(prompts)
    prompts.add_argument("--ignore-eos", action="store_true", help="always so here, as lengths must be equal")
    add_sampling_flags(prompts)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--baseline", metavar="LIST", help="latency: any of plain,accelerate,deepspeed,transformers; default all"
    )
    group.add_argument("--runs", type=whole(1), default=3, metavar="N", help="times that each prompt is decoded, default 3")
    group.add_argument("--warmup", type=whole(0), default=1, metavar="N", help="passes that do not count, default 1")
    group.add_argument("--max-seconds", type=positive, metavar="S", help="time for everything, default 600; suite: 1500")
    group.add_argument("--compare", metavar="FILE", help="latency: compare with an earlier --output")
    group.add_argument("--fail-if-slower", type=percent, metavar="5%", help="with --compare: exit 1 beyond that")
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
    group.add_argument(
        "--draft-model",
        action="append",
        metavar="PATH|HUB_ID|self|auto|none",
        help="draft; self[:int8|int4|int3] = a low-bit copy of the target; several: the best is taken; auto = self, too",
    )
    group.add_argument(
        "--tree", default="auto", metavar="SPEC", help="auto, none, 256:dynamic, 768x18, 4x6:kary, or a JSON file"
    )
    group.add_argument("--verifier", default="auto", choices=VERIFIERS, help="how sampled trees are verified, all exactly")
    group.add_argument(
        "--acceptance", action="append", metavar="FILE", help="acceptance profile of the draft, which trees are optimised for"
    )
    group.add_argument("--profile", metavar="FILE", help="hardware profile for the planner; default: a quick measurement")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's on CUDA, float32 on CPU")
    add_codec_flag(group)
    group.add_argument(
        "--decode-kernels", default="auto", choices=DECODE_KERNELS, help="CUDA: kernels for packed weights, or plain torch"
    )
    group.add_argument("--gpu-memory", default="auto", metavar="SIZE", help="device memory budget, e.g. 22GiB")
    group.add_argument("--host-memory", default="auto", metavar="SIZE", help="what exceeds it is streamed from disk")
    group.add_argument("--resident-layers", default="auto", metavar="N", help="layers that stay on the device")
    group.add_argument("--slots", default="auto", metavar="N", help="device buffers for streamed layers")
    group.add_argument("--max-context", default="auto", metavar="N", help="prompt + new tokens + tree")
    group.add_argument("--emulate-link", metavar="RATE", help="CPU device: throttle copies, e.g. 200MB/s")
    group.add_argument("--draft-passes", default="auto", choices=DRAFT_PASSES, help="CUDA graphs for the draft, or not")
    group.add_argument(
        "--small-uploads", default="auto", choices=SMALL_UPLOADS, help="CUDA: how small tensors get past layers under way"
    )
    add_drafting_flags(group)
    group.add_argument("--fixed-plan", action="store_true", help="never choose another tree while running")


def add_drafting_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ngram",
        action="append",
        metavar="auto|on|off|FILE",
        help="nodes from what the text has said before, or from a datastore (repeatable); default auto",
    )
    group.add_argument("--grow-ahead", default="auto", choices=GROW_AHEAD, help="go on drafting while layers stream")
    group.add_argument("--draft-device", default="auto", choices=DRAFT_DEVICES, help="where the draft model computes")


def add_codec_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--codec", default="auto", choices=CODECS, help="how 16-bit layers travel; packed ones stay packed")


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    add_prompt_flags(group.add_mutually_exclusive_group())
    add_sampling_flags(group)
    add_ending_flags(group)
    add_template_flags(group)


def add_template_flags(group: argparse._ArgumentGroup) -> None:
    template = group.add_mutually_exclusive_group()
    template.add_argument("--chat", action="store_true", help="apply the chat template (default if there is one)")
    template.add_argument("--raw", action="store_true", help="do not apply the chat template")
    group.add_argument("--system-prompt", metavar="TEXT", help="system turn for the chat template")


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    add_sampling_flags(group)
    add_ending_flags(group)
    group.add_argument("--raw", action="store_true", help="a plain transcript rather than the model's chat template")
    group.add_argument("--system-prompt", metavar="TEXT", help="what the conversation begins with")
    group.add_argument("--show-passes", action="store_true", help="colour what each pass accepted, in turns")
    group.add_argument("--stats", default="none", choices=("line", "full", "none"), help="what follows an answer on stderr")
    add_verbosity_flags(parser)


def add_ending_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")


def add_prompt_flags(prompt: argparse._MutuallyExclusiveGroup) -> None:
    prompt.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from FILE")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="token ids; needs no tokenizer")


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", "-n", type=whole(1), default=128, metavar="N", help="default 128")
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="default 0 (greedy)")
    group.add_argument("--top-k", type=top_k, metavar="K", help="keep the K most probable tokens; 0: all")
    group.add_argument("--top-p", type=probability, default=1.0, metavar="P", help="keep the smallest set reaching P")
    group.add_argument("--seed", type=whole(0), metavar="S", help="default 0")


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
