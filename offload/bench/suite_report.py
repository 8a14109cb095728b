"""The suite's records as report.md and pictures: the table and the physical floor first."""

from pathlib import Path
from typing import Any

from ..report.trace import Trace
from .engines import LABELS
from .latency import SCALE_NOTE
from .plots import save_curve
from .suite_size import SuiteSize

Record = dict[str, Any]


def write_report(out: Path, size: SuiteSize, manifest: Record, records: dict[str, Record]) -> Path:
    sections = [_heading(size, manifest)]
    for name, section in _SECTIONS.items():
        if name in records:
            sections.append(section(size, records[name]))
    sections.append(_steps(manifest))
    _pictures(out, records)
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _heading(size: SuiteSize, manifest: Record) -> str:
    machine = manifest["machine"]
    link = size.settings.emulate_link_bytes_per_s
    lines = [
        f"# {size.settings.model} on {machine['gpu'] or machine['processor']}",
        "",
        f"What it is: {SCALE_NOTE}. {machine['cores']} cores, load {manifest['busy']:.1f} when it began, "
        f"started {manifest['started_at']}.",
    ]
    if link:
        lines.append(
            f"A small shape on the CPU over an emulated link of {link / 1e9:g} GB/s: a test of the suite, not a figure."
        )
    return "\n".join(lines)


def _table(size: SuiteSize, record: Record) -> str:
    """s/token against the floor: bytes per pass / link rate / tokens per pass."""
    lines = [
        "## Seconds a token, and the physical floor",
        "",
        "| budget GiB | engine | T | tree | resident | tokens/pass | s/token | floor | over floor | predicted | over it |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = [row for row in record["rows"] if row["facts"]]
    for row in record["rows"]:
        facts = row["facts"]
        if not facts:
            refused = [f"{row['budget_bytes'] / 2**30:.2f}", LABELS[row["engine"]], f"{row['temperature']:g}", row["reason"]]
            lines.append("| " + " | ".join(refused) + " |" * 8)
            continue
        cells = [
            f"{row['budget_bytes'] / 2**30:.2f}",
            LABELS[row["engine"]],
            f"{row['temperature']:g}",
            f"{facts['tree_nodes']}x{facts['tree_levels']}",
            f"{facts['resident_layers']} of {facts['resident_layers'] + facts['streamed_layers']}",
            *(_number(row[key]) for key in ("tokens_per_pass", "s_per_token_p50", "floor_s_per_token", "over_floor")),
            *(_number(row[key]) for key in ("predicted_s_per_token", "over_predicted")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(_blame(row) for row in measured if row["over_floor"] and row["over_floor"] > 1.03)]
    shared = max((row["facts"]["host_shared_layers"] for row in measured), default=0)
    if shared:
        lines += ["", f"Up to {shared} identical layers shared host memory; the bytes per pass are those of all layers."]
    lines += ["", "Device memory, planned and measured at its peak:", ""]
    lines += [_memory(row) for row in measured]
    return "\n".join(lines)


def _blame(row: Record) -> str:
    """Which term of the cost is to blame for what lies above the floor."""
    facts, tokens = row["facts"], row["tokens_per_pass"]
    excess_s = (row["s_per_token_p50"] - row["floor_s_per_token"]) * tokens
    terms = {"drafting": facts["draft_s"] or 0.0, "verifying and committing": facts["verify_s"] or 0.0}
    named = ", ".join(f"{name} takes {seconds * 1e3:.3g} ms" for name, seconds in terms.items())
    name = f"{row['engine']}, {row['budget_bytes'] / 2**30:.2f} GiB, T = {row['temperature']:g}"
    above = f"{excess_s * 1e3:.3g} ms a round above the floor"
    return f"- {name}: {above}; {named}; the pass itself {facts['pass_s'] * 1e3:.3g} ms."


def _memory(row: Record) -> str:
    planned = sum(row["facts"]["plan"]["device_bytes"].values())
    measured = row["facts"]["device_peak_bytes"]
    return f"- {row['engine']}, T = {row['temperature']:g}: {planned / 2**30:.3f} GiB planned, {measured / 2**30:.3f} measured"


def _baselines(size: SuiteSize, record: Record) -> str:
    lines = [
        "## Baselines, extrapolated from the depths that fit",
        "",
        "| engine | measured s/token at layers | s per layer | at full depth | worst distance from the line |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        points = ", ".join(f"{seconds:.3g} at {depth}" for depth, seconds in row["points"]) or row["reason"]
        numbers = [_number(row["s_per_layer"]), _number(row["extrapolated_s_per_token"])]
        worst = f"{row['worst'] * 100:.1f} %" if row["worst"] is not None else "-"
        lines.append("| " + " | ".join([LABELS[row["engine"]], points, *numbers, worst]) + " |")
    return "\n".join(lines)


def _pass_time(size: SuiteSize, record: Record) -> str:
    lines = ["## Pass time by nodes", "", "| nodes | pass s | over the flat part |", "|---|---|---|"]
    lines += [f"| {nodes} | {pass_s:.4g} | {pass_s / record['flat_s']:.3f} |" for nodes, pass_s in record["curve"]]
    knee = record["knee_nodes"]
    return "\n".join([*lines, "", f"Knee (5 % above): {knee} nodes." if knee else "No knee: 5 % above the flat part nowhere."])


def _utilisation(size: SuiteSize, record: Record, title: str = "Link utilisation") -> str:
    lines = [
        f"## {title}",
        "",
        "| tree | slots | resident | link busy | over floor | tokens/pass | s/token |",
        "|---" * 7 + "|",
    ]
    for row in record["rows"]:
        facts = row["facts"]
        if not facts:
            lines.append(f"| {row['tree']} | {row['reason']} |" + " |" * 5)
            continue
        busy = f"{facts['link_utilisation'] * 100:.1f} %" if facts["link_utilisation"] else "-"
        numbers = [_number(row[key]) for key in ("over_floor", "tokens_per_pass", "s_per_token_p50")]
        cells = [row["tree"], str(facts["slots"]), str(facts["resident_layers"]), busy, *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sweep(size: SuiteSize, record: Record) -> str:
    return _utilisation(size, record, "Trees around the planner's choice")


def _verification(size: SuiteSize, record: Record) -> str:
    rows = [f"- {row['method']}: {row['median_s'] * 1e3:.3g} ms" for row in record["rows"]]
    return "\n".join([f"## Verifying {record['nodes']} nodes, vocabulary {record['vocabulary']}", "", *rows])


def _link(size: SuiteSize, record: Record) -> str:
    rates = [f"- {int(copied) / 2**20:.0f} MiB: {rate / 1e9:.3g} GB/s" for copied, rate in record["bytes_per_s"].items()]
    registered = record["registration_bytes"] / max(record["registration_s"], 1e-9) / 1e9
    return "\n".join(["## Link", "", *rates, f"- mapping and registering host memory: {registered:.3g} GB/s"])


def _steps(manifest: Record) -> str:
    rows = []
    for name, step in manifest["steps"].items():
        seconds = f", {step['seconds']:.0f} s" if "seconds" in step else ""
        reason = f": {step['reason']}" if "reason" in step else ""
        rows.append(f"- {name}: {step['status']}{seconds}{reason}")
    return "\n".join(["## Steps", "", *rows])


_SECTIONS = {
    "table": _table,
    "baselines": _baselines,
    "pass_time": _pass_time,
    "sweep": _sweep,
    "utilisation": _utilisation,
    "verification": _verification,
    "link": _link,
}


def _pictures(out: Path, records: dict[str, Record]) -> None:
    if "timeline" in records:
        trace = Trace()
        for lane, name, start_s, end_s in records["timeline"]["spans"]:
            trace.add(lane, name, start_s, end_s)
        trace.save(out / "timeline.png")
    if "pass_time" in records:
        save_curve(records["pass_time"]["curve"], out / "pass_time.png", x="nodes", y="pass, s", log=True)
    if "sweep" in records:
        points = [(row["facts"]["tree_nodes"], row["s_per_token_p50"]) for row in records["sweep"]["rows"] if row["facts"]]
        save_curve(points, out / "s_per_token_by_nodes.png", x="nodes", y="s/token", log=True)
    if "table" in records:
        rows = [
            row
            for row in records["table"]["rows"]
            if row["s_per_token_p50"] and row["engine"] == "ours" and not row["temperature"]
        ]
        points = [(row["budget_bytes"] / 2**30, row["s_per_token_p50"]) for row in rows]
        save_curve(points, out / "s_per_token_by_memory.png", x="device budget, GiB", y="s/token")


def _number(value: float | None) -> str:
    return f"{value:.4g}" if value is not None else "-"
