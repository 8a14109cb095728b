"""What every benchmark script says of where its figures come from, and how it writes them."""

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from offload.bench.machine import describe_host
from offload.report.report import environment


def described(kind: str) -> dict[str, Any]:
    """The beginning of a document: when, where, by which command and commit."""
    return {
        "schema_version": 1,
        "kind": kind,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"tests/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "host": describe_host(),
        "environment": environment("cpu"),
    }


def write_document(document: dict[str, Any], output: str | None) -> None:
    if output:
        Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
