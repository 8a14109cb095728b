"""A benchmark's document as people and spreadsheets read it."""

import csv
import io
import json
from typing import Any

from ..config import bytes_text, counted
from .engines import LABELS

Document = dict[str, Any]
_COLUMNS = (
    "engine",
    "s/token p50",
    "p90",
    "first token s",
    "tokens/pass",
    "over plain",
    "ours is faster by",
    "tokens",
    "link busy",
    "over floor",
    "device",
    "host",
)
FORMATS = ("md", "json", "jsonl", "csv")


def render(document: Document, form: str) -> str:
    """`md`, `json`, `jsonl` (a sample a line) or `csv` (a row an engine)."""
    if form == "json":
        return json.dumps(document) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in document["runs"])
    return _csv(document["summary"]) if form == "csv" else _markdown(document)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(document: Document) -> str:
    lines = [*heading(document), "", *latency_table(document["summary"])]
    if document["categories"]:
        lines += ["", *category_table(document["categories"])]
    return "\n".join(lines) + "\n"


def heading(document: Document) -> list[str]:
    """What was run, on what: before any number."""
    model, host, asked = document["model"], document["host"], document["request"]
    lines = [f"{model['target']}" + (f", draft {model['draft']}" if model["draft"] else ", no draft")]
    if model["scale"]:
        lines.append(f"What it is: {model['scale']}.")
    shared = max((facts.get("host_shared_layers") or 0 for facts in document["facts"].values()), default=0)
    if shared:
        lines.append(f"{shared} identical layers share host memory: the bytes per pass are those of all layers.")
    if model["emulated_link_bytes_per_s"]:
        rate = model["emulated_link_bytes_per_s"] / 1e6
        lines.append(
            f"treestream copies over an emulated link of {rate:g} MB/s; the baselines read memory or disk at full speed"
        )
    machine = document["gpu"] or host["processor"]
    lines.append(
        f"{machine}, {host['cores']} cores, load {host['busy']:.1f} at the start; commit {document['environment']['commit']}"
    )
    sampling = "greedy" if asked["temperature"] == 0 else f"temperature {asked['temperature']:g} (baselines greedy)"
    counts = (asked["prompts"], "prompt"), (asked["runs"], "run"), (asked["max_new_tokens"], "token")
    lines.append(" x ".join(counted(*count) for count in counts) + f", {sampling}; medians")
    return [f"{line}  " for line in lines]


def latency_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        label = LABELS[row["engine"]]
        if row["s_per_token_p50"] is None:
            lines.append(f"| {label} | {row['reason']} |" + " |" * (len(_COLUMNS) - 2))
            continue
        cells = [
            label + (f" ({row['reason']})" if row["reason"] else ""),
            _number(row["s_per_token_p50"]),
            _number(row["s_per_token_p90"]),
            _number(row["first_token_s_p50"]),
            f"{row['tokens_per_pass']:.2f}",
            _ratio(row["speedup"], row["speedup_interval"]),
            _ratio(row["ours_by"], row["ours_by_interval"]),
            {True: "identical", False: "DIFFERENT", None: "-"}[row["identical_tokens"]],
            f"{row['link_utilisation'] * 100:.0f} %" if row["link_utilisation"] else "-",
            f"{row['over_floor']:.3f}" if row["over_floor"] else "-",
            _size(row["device_peak_bytes"]),
            _size(row["host_peak_bytes"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def category_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| category | engine | s/token p50 | tokens/pass | samples |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["category"], LABELS[row["engine"]], _number(row["s_per_token_p50"]), f"{row['tokens_per_pass']:.2f}"]
        lines.append("| " + " | ".join([*cells, str(row["samples"])]) + " |")
    return lines


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value is not None else "-"


def _ratio(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} x" + (f" ({interval[0]:.3g} - {interval[1]:.3g})" if interval else "")


def _size(num_bytes: int | None) -> str:
    return bytes_text(num_bytes) if num_bytes is not None else "-"
