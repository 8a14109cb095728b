"""Two benchmarks of the same thing on the same machine, engine by engine; anything else is refused unless forced."""

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError, OffloadError, UsageError, reason

Document = dict[str, Any]
# What must be equal for two figures to be comparable, and what it is called in an error.
_SAME = {
    ("gpu",): "GPU",
    ("host", "processor"): "processor",
    ("host", "cores"): "number of cores",
    ("model", "target"): "target model",
    ("model", "draft"): "draft model",
    ("model", "dtype"): "dtype",
    ("model", "emulated_link_bytes_per_s"): "emulated link",
    ("request", "max_new_tokens"): "length",
    ("request", "temperature"): "temperature",
    ("request", "prompts"): "number of prompts",
    ("request", "settings", "gpu_memory_bytes"): "device memory budget",
    ("request", "settings", "host_memory_bytes"): "host memory budget",
    ("request", "settings", "resident_layers"): "number of resident layers",
}


def read_document(path: Path) -> Document:
    """An earlier `bench --json`. ModelError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != 1 or document["kind"] != "latency":
            raise ValueError(f"schema_version {document['schema_version']}, kind {document['kind']!r}")
        for row in document["summary"]:
            float(row["s_per_token_p50"] or 0), str(row["engine"])
        for keys in _SAME:
            _at(document, keys)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "not a latency benchmark: " + (reason(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}"),
            where=str(path),
            cure="compare with a file that `bench latency --output FILE` wrote",
        ) from error
    checked: Document = document
    return checked


def check_comparable(old: Document, new: Document, *, where: str) -> None:
    """UsageError naming all that differs."""
    pairs = {name: (_at(old, keys), _at(new, keys)) for keys, name in _SAME.items()}
    different = [f"{name} {was!r} and now {now!r}" for name, (was, now) in pairs.items() if was != now]
    if different:
        raise UsageError(
            f"not the same measurement: {'; '.join(different)}", where=where, cure="measure again, or add --force to compare"
        )


def compare(old: Document, new: Document) -> list[dict[str, Any]]:
    """`change` is new s/token over old less 1, for engines that both have measured."""
    before = {row["engine"]: row["s_per_token_p50"] for row in old["summary"]}
    pairs = [(row["engine"], before.get(row["engine"]), row["s_per_token_p50"]) for row in new["summary"]]
    return [{"engine": engine, "old": was, "new": now, "change": now / was - 1} for engine, was, now in pairs if was and now]


def check_not_slower(changes: list[dict[str, Any]], limit: float, *, where: str) -> None:
    """OffloadError, exit code 1, when an engine of ours has become slower by more than `limit`."""
    slower = [row for row in changes if row["engine"] in ("ours", "plain") and row["change"] > limit]
    if slower:
        words = ", ".join(f"{row['engine']} by {row['change'] * 100:.1f} %" for row in slower)
        raise OffloadError(
            f"slower than before: {words}; {limit * 100:g} % are allowed",
            where=where,
            cure="run it again on an idle machine; if it stays, find the commit",
        )


def _at(document: Document, keys: tuple[str, ...]) -> Any:
    value: Any = document
    for key in keys:
        value = value[key]
    return value
