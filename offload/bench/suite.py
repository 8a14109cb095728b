"""Run the steps one by one, keep a record of each, go on where an earlier run stopped, and write the report.

`bench latency` answers how engines compare on a prompt. The suite is for a machine that is there for half an hour: it finds out
with one command what explains that figure, and what was measured stays when the machine goes.

DIR/manifest.json     what was run on what, and how each step ended
DIR/<step>.json       what it measured
DIR/report.md, *.png  made anew from the records at every run
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..device import cuda
from ..errors import ModelError, UsageError
from ..report.report import git_commit
from .machine import describe_gpu, describe_host
from .steps import HARDWARE, STEPS, SuiteStep
from .suite_report import write_report
from .suite_size import SuiteSize, cpu_size, gpu_size

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def run_suite(
    out: Path,
    device: str,
    max_seconds: float,
    say: Callable[[str], None],
    steps: Mapping[str, tuple[SuiteStep, int]] = STEPS,
    *,
    profile: str | None = None,
) -> Path:
    """The report. A step that is done is not run again; one that failed, or had no time or not enough, is. Engines plan with
    `profile`, or with what the first step has measured. UsageError when `out` holds the records of another machine or
    of a suite of another size."""
    end_s = time.monotonic() + max_seconds
    on_gpu = device.startswith("cuda") or (device == "auto" and cuda.is_available())
    size = gpu_size("cuda" if device == "auto" else device) if on_gpu else cpu_size()
    if profile is not None:
        steps = {name: step for name, step in steps.items() if name != HARDWARE}
    out.mkdir(parents=True, exist_ok=True)
    manifest = _open_manifest(out, size)
    ended = [name for name, step in manifest["steps"].items() if step["status"] == "done"]
    for name, (step, weight) in steps.items():
        if name in ended:
            say(f"{name}: done before")
            continue
        left = sum(other for key, (_, other) in steps.items() if key not in ended)
        share_s = (end_s - time.monotonic()) * weight / left
        ended.append(name)
        if profile is None and (measured := out / f"{HARDWARE}.json").exists():
            profile = str(measured.absolute())
        planning = replace(size, settings=replace(size.settings, profile=profile))
        manifest["steps"][name] = _run_step(out, name, step, planning, share_s)
        _write(out / MANIFEST, manifest)
        say(f"{name}: {_words(manifest['steps'][name])}")
    records = {name: _read(out / f"{name}.json") for name in steps if (out / f"{name}.json").exists()}
    return write_report(out, size, manifest, records)


def _run_step(out: Path, name: str, step: SuiteStep, size: SuiteSize, share_s: float) -> dict[str, Any]:
    """How it ended: done, partial, skipped or failed. An error of one step, whatever it is, does not end the suite."""
    if share_s < size.step_seconds:
        return {"status": "skipped", "reason": f"{max(share_s, 0):.0f} s were left, {size.step_seconds:.0f} s are the least"}
    start_s = time.monotonic()
    try:
        record = step(size, share_s)
    except Exception as error:  # it may be the driver's: hours of other steps are not lost for it
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    _write(out / f"{name}.json", record)
    status = {} if record.get("complete", True) else {"status": "partial", "reason": "its time was over"}
    return {"status": "done", **status, "seconds": time.monotonic() - start_s, "commit": git_commit()}


def _open_manifest(out: Path, size: SuiteSize) -> dict[str, Any]:
    host = describe_host()
    machine = {"extent": size.name, "gpu": describe_gpu(), "processor": host["processor"], "cores": host["cores"]}
    if not (out / MANIFEST).exists():
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {"schema_version": SCHEMA_VERSION, "started_at": started, "machine": machine, "busy": host["busy"], "steps": {}}
    manifest = _read(out / MANIFEST)
    if manifest.get("machine") != machine or not isinstance(manifest.get("steps"), dict):
        raise UsageError(
            f"{out} holds the records of another machine: {manifest.get('machine')}, and this is {machine}",
            where="--out",
            cure="name a folder of its own for each machine",
        )
    return manifest


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"not a record of the suite: {error}", where=str(path), cure="delete the file, or the folder"
        ) from error
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _words(ended: dict[str, Any]) -> str:
    return f"{ended['seconds']:.0f} s" if ended["status"] == "done" else f"{ended['status']}: {ended['reason']}"
