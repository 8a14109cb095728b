"""`profile acceptance`: decode a set of prompts for real and count which children are accepted."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.prompts import read_prompts
from ..config import EngineSettings
from ..demo import PROMPTS
from ..errors import UsageError
from . import compare_drafts
from .acceptance import AcceptanceRecorder, provenance, write_json
from .flags_to_settings import check_and_announce_models, check_small_files, check_writable, engine_settings
from .signals import leaving_at_once
from .terminal import LoadBar, say

if TYPE_CHECKING:
    from ..engine.engine import Engine

# Wide at the top and deep along the first children, so that many ranks and many levels are tried in every pass.
MEASURING_TREE = "256x12"


def run(arguments: argparse.Namespace) -> int:
    drafts = arguments.draft_model or []
    if arguments.compare:  # each has settings of its own, later
        arguments = argparse.Namespace(**{**vars(arguments), "draft_model": ["none"]})
    settings = engine_settings(arguments, emulate_demo_link=False)
    if len(settings.draft_models) != 1 and not arguments.compare:
        raise UsageError(
            "a pair is a target and one draft", where="profile acceptance", cure="name a --draft-model; several: --compare"
        )
    tree = MEASURING_TREE if settings.tree == "auto" else settings.tree
    # Ranks are a model's own: no other nodes come between them, unless they are asked for.
    ngram = ("off",) if settings.ngram == ("auto",) else settings.ngram
    settings = replace(settings, tree="auto" if arguments.compare else tree, ngram=ngram)
    if arguments.output:
        check_writable("--output", Path(arguments.output))
    check_small_files(settings)
    prompts = [prompt.text for prompt in read_prompts(Path(arguments.dataset) if arguments.dataset else PROMPTS)]
    check_and_announce_models(arguments, settings)
    measurement = Measurement(arguments, tree, tuple(prompts))
    if arguments.compare:
        return compare_drafts.run(arguments, drafts, settings, measurement)
    with measurement.opened(settings) as engine:
        document = measurement.document(engine, settings)
    if arguments.output:
        write_json(Path(arguments.output), document)
    else:
        print(json.dumps(document))
    return 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the flags ask to be decoded, with whatever draft; `tree` is the spec of all trees."""

    arguments: argparse.Namespace
    tree: str
    prompts: tuple[str, ...]

    def opened(self, settings: EngineSettings) -> "Engine":
        """What `settings` name, loaded."""
        with leaving_at_once():
            from ..assemble import open_engine
        arguments = self.arguments
        with LoadBar(enabled=not arguments.quiet) as progress:
            return open_engine(settings, seed=arguments.seed, progress=progress.update)

    def document(self, engine: "Engine", settings: EngineSettings) -> dict[str, object]:
        """The acceptance file of decoding all prompts. UsageError when no pass had a tree."""
        facts = {**provenance(self.arguments, settings, 0), "prompts": len(self.prompts)}
        return self.decoded(engine).document(facts, per_level=self.arguments.per_level)

    def decoded(self, engine: "Engine") -> AcceptanceRecorder:
        """What was counted while decoding all prompts."""
        recorder, arguments = AcceptanceRecorder(), self.arguments
        for number, prompt in enumerate(self.prompts, start=1):
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
                say(f"prompt {number} of {len(self.prompts)}: {generation.stats.tokens_per_pass:.2f} tokens/pass")
        return recorder
