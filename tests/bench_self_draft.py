"""Tokens per pass of drafts that are low-bit copies of their target, beside the bundled draft, on the bundled target.

    python tests/bench_self_draft.py > docs/benchmarks/self_draft_cpu.json

Of each draft and temperature: a look at acceptance by ranks, over other random numbers; the best trees of 64 and 256 nodes for
it; then these trees and a chain of 48, on every prompt. Of the bundled draft the acceptance is that of its profile. Prints one
JSON object: tokens per pass with their standard errors, acceptance by rank and by level. No clock plays a part but the limit.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from offload.bench.prompts import Prompt, read_prompts
from offload.bench.spec import SpecRequest, measure_acceptance
from offload.config import EngineSettings
from offload.demo import DRAFT, PROMPTS, TARGET, acceptance_at
from offload.text.tokenizer import open_tokenizer
from tree.acceptance import Acceptance
from tree.optimizer import best_tree

DRAFTS = ("bundled", "self:int8", "self:int4", "self:int3")
TREES = ("1x47:kary", "64x48", "256x48")  # the first is a chain of 48 nodes, its root counted
TEMPERATURES = (0.0, 0.6, 1.0)
LOOK_NODES, LOOK_LEVELS, LOOKED_FOR = 96, 24, Acceptance(((0.8, 0.08, 0.03, 0.02),))
RANKS = 16  # that trees are made of; further ones are noise
PROFILE = str(Path(__file__).parents[1] / "profiles/hardware/l40.json")  # of any machine: all that it would choose is given


def settings_of(draft: str, acceptance: Path | None = None) -> EngineSettings:
    return EngineSettings(
        model=str(TARGET),
        draft_models=(str(DRAFT) if draft == "bundled" else draft,),
        dtype="float32",
        codec="none",
        resident_layers=0,  # those would draft as they are: a target that is resident whole is its own draft
        acceptances=(str(acceptance),) if acceptance is not None else (),
        fixed_plan=True,
        profile=PROFILE,
    )


def look(request: SpecRequest, draft: str, folder: Path) -> Path:
    """The acceptance file that trees are optimised for."""
    temperature = request.temperatures[0]
    if draft == "bundled":
        return acceptance_at(temperature)
    tree = folder / "look.json"
    tree.write_text(json.dumps(best_tree(LOOKED_FOR, LOOK_NODES, LOOK_LEVELS).to_json()), encoding="utf-8")
    half = len(request.prompts) // 2 or 1  # of the prompts: ranks are alike
    fewer = replace(request, prompts=request.prompts[:half], prompt_ids=request.prompt_ids[:half], runs=1)
    looked = measure(replace(fewer, seed=request.seed + 1000), settings_of(draft), (str(tree),))
    (row,) = looked["runs"]
    acceptance = Acceptance((tuple(row["acceptance_by_rank"][:RANKS]),), f"{draft} at {temperature}, {row['passes']} passes")
    path = folder / f"{draft.replace(':', '_')}_{temperature}.json"
    path.write_text(json.dumps(acceptance.to_json()), encoding="utf-8")
    return path


def measure(request: SpecRequest, settings: EngineSettings, trees: tuple[str, ...]) -> dict[str, Any]:
    def say(text: str) -> None:
        print(f"{settings.draft_models[0]}: {text}", file=sys.stderr, flush=True)

    return measure_acceptance(replace(request, settings=settings, trees=trees), say)


def prompts_of(number: int) -> tuple[tuple[Prompt, ...], tuple[tuple[int, ...], ...]]:
    prompts, tokenizer = tuple(read_prompts(PROMPTS))[:number], open_tokenizer(TARGET)
    assert tokenizer is not None
    is_chat, encode = tokenizer.has_chat_template, tokenizer.encode
    return prompts, tuple(tuple(tokenizer.encode_chat(one.text, None) if is_chat else encode(one.text)) for one in prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", default=",".join(DRAFTS))
    parser.add_argument("--trees", default=",".join(TREES))
    parser.add_argument("--temperatures", default=",".join(map(str, TEMPERATURES)))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="of each text: a chain of 48 needs room to end by itself")
    parser.add_argument("--runs", type=int, default=2, help="of each prompt where tokens are drawn")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, for each draft and temperature")
    arguments = parser.parse_args()
    prompts, prompt_ids = prompts_of(arguments.prompts)
    document: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for draft in arguments.drafts.split(","):
            for temperature in map(float, arguments.temperatures.split(",")):
                request = SpecRequest(
                    settings=settings_of(draft),
                    trees=(),
                    temperatures=(temperature,),
                    top_ps=(1.0,),
                    prompts=prompts,
                    prompt_ids=prompt_ids,
                    max_new_tokens=arguments.tokens,
                    runs=arguments.runs,
                    max_seconds=arguments.seconds,
                )
                acceptance = look(request, draft, Path(name))
                found = measure(request, settings_of(draft, acceptance), tuple(arguments.trees.split(",")))
                document = document or {**found, "complete": True}
                document["complete"] = document["complete"] and found["complete"]
                rows += [{"draft": draft, **row} for row in found["runs"]]
    document |= {"kind": "self_draft", "runs": rows, "summary": [short(row) for row in rows]}
    print(json.dumps(document, indent=1))


def short(row: dict[str, Any]) -> dict[str, Any]:
    names = ("draft", "tree", "nodes", "temperature", "verifier", "passes", "tokens_per_pass", "tokens_per_pass_error")
    return {name: row[name] for name in names}


if __name__ == "__main__":
    main()
