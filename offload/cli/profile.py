"""`profile acceptance`: decode a set of prompts for real and count which children are accepted."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.prompts import read_prompts
from ..config import EngineSettings
from ..demo import PROMPTS
from ..errors import UsageError
from .acceptance import AcceptanceRecorder, provenance, write_json
from .flags_to_settings import check_and_announce_models, check_small_files, check_writable, engine_settings
from .signals import leaving_at_once
from .terminal import LoadBar, say

if TYPE_CHECKING:
    from ..engine.engine import Engine

# Wide at the top and deep along the first children, so that many ranks and many levels are tried in every pass.
MEASURING_TREE = "256x12"


def run(arguments: argparse.Namespace) -> int:
    settings = engine_settings(arguments, emulate_demo_link=False)
    if len(settings.draft_models) != 1:
        raise UsageError("a pair is a target and one draft", where="profile acceptance", cure="name a --draft-model")
    if settings.tree == "auto":
        settings = replace(settings, tree=MEASURING_TREE)
    if arguments.output:
        check_writable("--output", Path(arguments.output))
    check_small_files(settings)
    prompts = [prompt.text for prompt in read_prompts(Path(arguments.dataset) if arguments.dataset else PROMPTS)]
    check_and_announce_models(arguments, settings)
    with leaving_at_once():
        from ..assemble import open_engine

    with LoadBar(enabled=not arguments.quiet) as progress:
        engine = open_engine(settings, seed=arguments.seed, progress=progress.update)
    with engine:
        document = _measure(engine, prompts, arguments, settings)
    if arguments.output:
        write_json(Path(arguments.output), document)
    else:
        print(json.dumps(document))
    return 0


def _measure(
    engine: "Engine", prompts: list[str], arguments: argparse.Namespace, settings: EngineSettings
) -> dict[str, object]:
    recorder = AcceptanceRecorder()
    for number, prompt in enumerate(prompts, start=1):
        generation = engine.stream(
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed + number,
        )
        for step in generation:
            recorder.add(step)
        if not arguments.quiet:
            say(f"prompt {number} of {len(prompts)}: {generation.stats.tokens_per_pass:.2f} tokens/pass")
    return recorder.document({**provenance(arguments, settings, 0), "prompts": len(prompts)}, per_level=arguments.per_level)
