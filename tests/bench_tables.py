"""Writes the tables of README.md, docs/residual.md and docs/benchmarks/README.md from the JSON files in docs/benchmarks.

    python tests/bench_tables.py

A table stands between `<!-- table FILE -->` and `<!-- end -->`. A test compares them.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/benchmarks"
PAGES = (ROOT / "README.md", FOLDER / "README.md", ROOT / "docs/residual.md")
MARKED = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Document = dict[str, Any]
TREES = {
    "auto": "the planner's own choice, {nodes} nodes{kind} (no flags)",
    "none": "plain streaming (`--tree none`)",
    "64:dynamic": "64 nodes that follow the text (`--tree 64:dynamic`)",
    "4x6:kary": "four chains of six (`--tree 4x6:kary`)",
}
ENGINES = {
    "ours": "treestream, the planner's tree of {tree_nodes} nodes",
    "plain": "treestream, one token a pass",
    "accelerate-disk": "Accelerate `disk_offload`",
    "transformers": "transformers, nothing offloaded",
    "deepspeed-tuned": "DeepSpeed ZeRO-Inference",
}


def trees(document: Document) -> str:
    """One row per tree: what a pass yields and what a token takes."""
    rows = []
    for row in document["rows"]:
        if row["tree"] == "none" and row["temperature"]:
            continue
        name = TREES.get(row["tree"], "tree of {nodes} nodes (`--tree {tree}`)").format(
            kind=" that follow the text" if row["dynamic"] else "", **row
        )
        rows.append(
            (
                name + (f", temperature {row['temperature']:g}" if row["temperature"] else ""),
                f"{row['tokens_per_pass']:.1f}",
                f"{row['s_per_token']:.3f}",
                f"{min(row['link_utilisation'], 1.0) * 100:.0f} %",
                f"{row['speedup']:.1f}",
            )
        )
    rate = document["emulated_link_bytes_per_s"] / 1e6
    head = f"bundled pair, {document['machine']['cores']} CPU cores, emulated link of {rate:.0f} MB/s"
    return table((head, "tokens per pass", "s/token", "link busy", "speedup"), rows)


def predictions(document: Document) -> str:
    """The same rows beside their floor and their prediction."""
    head = ("tree", "nodes", "temperature", "tokens/pass", "s/token", "floor", "over floor", "predicted")
    return table(
        head,
        [
            (
                row["tree"],
                str(row["nodes"]),
                f"{row['temperature']:g}",
                f"{row['tokens_per_pass']:.2f}",
                f"{row['s_per_token']:.4f}",
                f"{row['floor_s_per_token']:.4f}",
                f"{row['s_per_token'] / row['floor_s_per_token']:.3f}",
                f"{row['predicted_s_per_token']:.4f}",
            )
            for row in document["rows"]
        ],
    )


def engines(document: Document) -> str:
    """One row per engine. Rows with an emulated link and rows without are not compared."""
    emulated = document["model"]["emulated_link_bytes_per_s"] is not None
    return table(
        ("engine", "s/token", "ours is quicker by", "tokens/pass", "link busy", "tokens"),
        [_engine(row, document["facts"].get(row["engine"], {}), emulated=emulated) for row in document["summary"]],
    )


def _engine(row: Document, facts: Document, *, emulated: bool) -> Sequence[str]:
    name = ENGINES[row["engine"]].format(**facts)
    own = row["engine"] in ("ours", "plain")
    if emulated and not own:
        name += ", no link emulated"
    if row["s_per_token_p50"] is None:
        return (name, row["reason"], "", "", "", "")
    quicker = "-"
    if row["engine"] == "ours":
        quicker = "1"
    elif row["ours_by"] is not None:  # which rows with a link and rows without one do not have
        low, high = row["ours_by_interval"]
        quicker = f"{row['ours_by']:.2f} x ({low:.2f} - {high:.2f})"
    return (
        name,
        f"{row['s_per_token_p50']:.4f}",
        quicker,
        f"{row['tokens_per_pass']:.2f}",
        f"{min(row['link_utilisation'], 1.0) * 100:.0f} %" if row["link_utilisation"] is not None else "-",
        "identical" if row["identical_tokens"] else "differ",
    )


def predicted(document: Document) -> str:
    """Trees over links: what was measured, in parentheses what had been predicted, and by how much they differ."""
    parts = {"pass_s": "pass", "round_s": "round", "s_per_token": "s/token"}
    head = ["link", "tree"]
    for part in parts.values():
        head += [f"{part} (predicted)", "off"]
    rows = []
    for row in [*document["cases"], document["own"], *document["sweep"]]:
        cells = [f"{row['link_bytes_per_s'] / 1e6:.0f} MB/s", f"{row['tree']} ({_span(row['nodes'])} nodes)"]
        for name in parts:
            cells += [f"{row[f'measured_{name}']:.4f} ({row[f'predicted_{name}']:.4f})", f"{row[f'{name}_off'] * 100:+.1f} %"]
        rows.append(cells)
    return table(head, rows)


def _span(value: int | list[int]) -> str:
    return str(value) if isinstance(value, int) else f"{min(value)} to {max(value)}"


def acceptance(document: Document) -> str:
    """Tokens per pass by tree, temperature and top-p, with standard errors."""
    cells: dict[str, list[str]] = {}
    columns: dict[str, None] = {}
    for row in document["summary"]:
        columns[f"T = {row['temperature']:g}" + (f", top-p {row['top_p']:g}" if row["top_p"] < 1 else "")] = None
        name = f"{row['tree']} ({row['nodes']} nodes)"
        cells.setdefault(name, [name]).append(f"{row['tokens_per_pass']:.2f} +- {row['tokens_per_pass_error']:.2f}")
    return table(("tree", *columns), list(cells.values()))


def self_drafts(document: Document) -> str:
    """Tokens per pass by draft and tree, and temperature, with standard errors."""
    temperatures = sorted({row["temperature"] for row in document["summary"]})
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for row in document["summary"]:
        tree = "chain of 48" if row["tree"] == "1x47:kary" else f"{row['nodes']} nodes"
        text = f"{row['tokens_per_pass']:.1f} +- {row['tokens_per_pass_error']:.1f}"
        cells.setdefault((row["draft"], tree), {})[row["temperature"]] = text
    rows = [(draft, tree, *(of.get(one, "-") for one in temperatures)) for (draft, tree), of in cells.items()]
    return table(("draft", "tree", *(f"T = {one:g}" for one in temperatures)), rows)


def base_link(document: Document) -> str:
    """One row per case: what a pass carries and yields, and how far its prediction was off."""
    head = ("draft and code", "of 16 bits", "tokens/pass", "s/token", "link busy", "as fast as plain", "round, of predicted")
    rows = [
        (
            row["case"],
            f"{row['of_raw_bytes']:.3f}",
            f"{row['tokens_per_pass']:.1f}",
            f"{row['s_per_token']:.3f}",
            f"{min(row['link_utilisation'], 1.0) * 100:.0f} %",
            f"{row['speedup']:.1f}",
            f"{1 + row['over_predicted']:.2f}",
        )
        for row in document["rows"]
    ]
    return table(head, rows)


def dynamic_trees(document: Document) -> str:
    """Trees that follow the text beside the best static ones, below the same tokens."""
    head = ("nodes", "temperature", "static", "dynamic", "dynamic over static", "contexts")
    rows = [
        (
            str(row["nodes"]),
            f"{row['temperature']:g}",
            f"{row['static_expected']:.2f}",
            f"{row['dynamic_expected']:.2f}",
            f"{row['ratio']:.3f}" + (f" +- {row['ratio_error']:.3f}" if row["ratio_error"] is not None else ""),
            str(row["contexts"]),
        )
        for row in document["rows"]
    ]
    return table(head, rows)


def ngrams(document: Document) -> str:
    """Tokens per pass on edited copies and on other prompts, by what drafted."""
    head = ("target", "prompts", "drafted by", "tokens per pass", "found in the text", "s/token of plain")
    rows = [
        (
            row["target"],
            row["prompts"],
            row["way"],
            f"{row['tokens_per_pass']:.2f}",
            f"{row['ngram_share'] * 100:.0f} %",
            f"{row['s_per_token_of_plain']:.2f}",
        )
        for row in document["rows"]
    ]
    return table(head, rows)


def growth_ahead(document: Document) -> str:
    """Rounds with and without growing ahead, over a link on which a pass takes twice as long as drafting."""
    head = ("`--grow-ahead`", "round s", "drafting s", "tokens per pass", "nodes foreseen", "link busy")
    rows = [
        (
            row["grow_ahead"],
            f"{row['round_s']:.4f}",
            f"{row['draft_s']:.4f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['foreseen_nodes']:.1f} of {row['nodes_per_pass']:.1f}",
            f"{row['link_utilisation'] * 100:.0f} %",
        )
        for row in document["rows"]
    ]
    return table(head, rows)


RENDERERS: dict[str, Callable[[Document], str]] = {
    "demo_cpu.json": trees,
    "demo_cpu.json:predictions": predictions,
    "side_by_side_cpu.json": engines,
    "side_by_side_cpu_memory.json": engines,
    "prediction_cpu.json": predicted,
    "spec_cpu.json": acceptance,
    "self_draft_cpu.json": self_drafts,
    "base_link_cpu.json": base_link,
    "dynamic_trees_cpu.json": dynamic_trees,
    "ngram_cpu.json": ngrams,
    "grow_ahead_cpu.json": growth_ahead,
    "grow_ahead_same_cpu.json": growth_ahead,
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def rendered(page: str) -> str:
    """`page` with all its tables as their files say. KeyError for a table that nothing renders."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        document = json.loads((FOLDER / name.partition(":")[0]).read_text(encoding="utf-8"))
        return match[1] + RENDERERS[name](document) + match[4]

    return MARKED.sub(fill, page)


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
