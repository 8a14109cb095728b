"""`bench`: the result on stdout as a table, or in another form; how it goes on stderr."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..bench.compare import check_comparable, check_not_slower, compare, read_document
from ..bench.engines import BASELINES, engines_for, parse_baselines
from ..bench.prompts import Prompt, read_prompts
from ..bench.table import render
from ..config import EngineSettings
from ..demo import TARGET
from ..errors import DeviceError, UsageError, reason
from ..planner.hardware_file import find_hardware
from ..planner.shapes import is_preset
from ..scale.preset import PREFIX as SCALE_PREFIX
from ..scale.preset import parse_scale_name, read_preset
from .acceptance import write_json
from .flags_to_settings import check_and_announce_models, check_small_files, check_writable, engine_settings
from .generate import check_template, read_prompt
from .parser import DEMO_PROMPT
from .signals import EXIT_INTERRUPTED, leaving_at_once
from .terminal import say

LATENCY_SECONDS, SUITE_SECONDS = 600.0, 1500.0


def run(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    _make_presets(arguments)
    if arguments.what == "latency":
        return _run_latency(arguments)
    if arguments.what == "spec":
        return _run_spec(arguments)
    return _run_suite(arguments)


def _make_presets(arguments: argparse.Namespace) -> None:
    """A preset has no weights: a model of its shape is made, as scale:PRESET says in full."""
    if arguments.model is not None and is_preset(arguments.model):
        arguments.model = SCALE_PREFIX + arguments.model
    drafts = arguments.draft_model or []
    arguments.draft_model = [SCALE_PREFIX + name if is_preset(name) else name for name in drafts] or None


def _run_latency(arguments: argparse.Namespace) -> int:
    baselines = parse_baselines(arguments.baseline if arguments.baseline is not None else ",".join(BASELINES))
    old = read_document(Path(arguments.compare)) if arguments.compare else None
    settings = engine_settings(arguments, emulate_demo_link=True)
    check_small_files(settings)
    prompts, prompt_ids = _prompts(arguments, settings)
    check_and_announce_models(arguments, settings)
    with leaving_at_once():  # torch, after everything that can be refused without it
        from ..bench.latency import LatencyRequest, measure_latency
        from ..bench.machine import uses_gpu

    request = LatencyRequest(
        settings=settings,
        engines=engines_for(baselines, on_gpu=uses_gpu(settings)),
        prompts=tuple(prompts),
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=arguments.max_new_tokens,
        runs=arguments.runs,
        warmup=arguments.warmup,
        max_seconds=arguments.max_seconds or LATENCY_SECONDS,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        trace=str(Path(arguments.trace).absolute()) if arguments.trace else None,
    )
    document = measure_latency(request, _teller(arguments))
    changes = None
    try:
        if old is not None:
            if not arguments.force:
                check_comparable(old, document, where=f"--compare {arguments.compare}")
            changes = document["compared"] = compare(old, document)
    finally:
        _write(arguments, document)  # comparable or not: it took minutes
    if changes is not None:
        for row in changes:
            say(f"{row['engine']}: {row['old']:.3g} -> {row['new']:.3g} s/token, {row['change'] * 100:+.1f} %")
        if arguments.fail_if_slower is not None:
            check_not_slower(changes, arguments.fail_if_slower, where=f"--compare {arguments.compare}")
    return EXIT_INTERRUPTED if document["interrupted"] else 0


def _run_spec(arguments: argparse.Namespace) -> int:
    with leaving_at_once():
        from ..bench.spec import SpecRequest, measure_acceptance, parse_numbers, spec_table

    settings = engine_settings(arguments, emulate_demo_link=False)
    check_small_files(settings)
    if not settings.draft_models:
        raise UsageError("nothing is speculated without a draft", where="bench spec", cure="name a --draft-model")
    temperatures = parse_numbers(arguments.temperatures, flag="--temperatures", least=0.0, most=100.0)
    top_ps = parse_numbers(arguments.top_ps, flag="--top-ps", least=1e-6, most=1.0)
    prompts, prompt_ids = _prompts(arguments, settings)
    check_and_announce_models(arguments, settings)
    request = SpecRequest(
        settings=settings,
        trees=tuple(arguments.trees.split(",")),
        temperatures=temperatures,
        top_ps=top_ps,
        prompts=tuple(prompts),
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=arguments.max_new_tokens,
        runs=arguments.runs,
        max_seconds=arguments.max_seconds or LATENCY_SECONDS,
        seed=arguments.seed,
    )
    document = measure_acceptance(request, _teller(arguments))
    _write(arguments, document, table="\n".join(spec_table(document)) + "\n")
    return 0


def _run_suite(arguments: argparse.Namespace) -> int:
    from ..bench.suite import run_suite

    if arguments.profile is not None:
        find_hardware(arguments.profile)  # that it can be read
    budget_s = arguments.max_seconds or SUITE_SECONDS
    report = run_suite(Path(arguments.out), arguments.device, budget_s, _teller(arguments), profile=arguments.profile)
    print(report.read_text(encoding="utf-8"), end="", flush=True)
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    """UsageError for flags of another kind of benchmark, and for files that cannot be written."""
    if arguments.json and arguments.format not in (None, "json"):
        raise UsageError(f"--json and -o {arguments.format}", where="bench", cure="leave one of the two out")
    check_template(arguments)
    arguments.format = "json" if arguments.json else arguments.format or "md"
    of_latency = {
        "--baseline": arguments.baseline,
        "--compare": arguments.compare,
        "--fail-if-slower": arguments.fail_if_slower,
        "--plot": arguments.plot,
        "--trace": arguments.trace,
    }
    misplaced = [flag for flag, value in of_latency.items() if value is not None and arguments.what != "latency"]
    if misplaced:
        raise UsageError(f"{misplaced[0]} belongs to bench latency", where=f"bench {arguments.what}", cure="leave it out")
    if (arguments.out is not None) != (arguments.what == "suite"):
        raise UsageError("--out and suite go together", where=f"bench {arguments.what}", cure="bench suite --out DIR")
    if arguments.fail_if_slower is not None and arguments.compare is None:
        raise UsageError("slower than what?", where="--fail-if-slower", cure="name an earlier --output with --compare FILE")
    for flag in ("--output", "--plot", "--trace"):
        name = getattr(arguments, flag.removeprefix("--"))
        if name is not None:
            check_writable(flag, Path(name))
            if (flag == "--plot" or name.endswith(".png")) and find_spec("matplotlib") is None:
                raise UsageError("a picture needs matplotlib", where=flag, cure="install the bench extra")


def _prompts(arguments: argparse.Namespace, settings: EngineSettings) -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Prompts and their token ids: from the dataset, from the flags, or the demo's default prompt."""
    is_scale = settings.model.startswith(SCALE_PREFIX)
    if is_scale:
        read_preset(parse_scale_name(settings.model, "--model")[0], "--model")  # refused here, not after a process has started
    if arguments.dataset:
        prompts = read_prompts(Path(arguments.dataset))
    else:
        given = any(getattr(arguments, name) is not None for name in ("prompt", "prompt_file", "prompt_ids"))
        text = DEMO_PROMPT if is_scale and not given else read_prompt(arguments)
        if not isinstance(text, str):
            return [Prompt(text="", category="")], [tuple(text)]
        prompts = [Prompt(text=text, category="")]
    from ..model.locate import locate_model
    from ..text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(TARGET if is_scale else locate_model(settings.model, "--model"))
    if tokenizer is None:
        raise UsageError("the model folder has no tokenizer", where="--model", cure="give token ids with --prompt-ids 1,2,3")
    system = arguments.system_prompt
    if not arguments.raw and (arguments.chat or system or tokenizer.has_chat_template):
        return prompts, [tuple(tokenizer.encode_chat(one.text, system)) for one in prompts]
    return prompts, [tuple(tokenizer.encode(one.text)) for one in prompts]


def _write(arguments: argparse.Namespace, document: dict[str, Any], *, table: str | None = None) -> None:
    """The result on stdout, whole; then the files."""
    text = table if table is not None and arguments.format == "md" else render(document, arguments.format)
    print(text, end="", flush=True)
    try:
        if arguments.output:
            write_json(Path(arguments.output), document)
        if arguments.plot:
            from ..bench.plots import save_bars

            save_bars(document["summary"], Path(arguments.plot))
    except OSError as error:
        raise DeviceError(
            f"the result above is complete, but a file could not be written: {reason(error)}",
            where=" and ".join(filter(None, (arguments.output, arguments.plot))),
            cure="check the folder and the space on its disk",
        ) from error


def _teller(arguments: argparse.Namespace) -> Any:
    return (lambda text: None) if arguments.quiet else say
