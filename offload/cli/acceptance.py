"""Counting acceptance during real decoding, and writing it down with where it came from."""

import argparse
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from tree.acceptance import AcceptanceCounter

from ..config import EngineSettings, base_of_draft, counted
from ..errors import UsageError
from ..report.report import git_commit

if TYPE_CHECKING:
    from ..engine.generation import Step


class AcceptanceRecorder:
    """Counts every pass of one or several generations."""

    def __init__(self) -> None:
        self._counter = AcceptanceCounter()
        self._num_passes = 0
        self._num_tokens = 0

    def add(self, step: "Step") -> None:
        self._counter.add(step.shape, step.verdict.path, step.tops.tolist() if step.tops is not None else None)
        self._num_passes += 1
        self._num_tokens += len(step.verdict.token_ids)

    @property
    def tokens_per_pass(self) -> float:
        return self._num_tokens / self._num_passes

    def document(self, provenance: dict[str, object], *, per_level: bool = False) -> dict[str, object]:
        """The acceptance file of docs/cli.md. UsageError when no pass had a tree."""
        source = f"measured over {counted(self._num_passes, 'pass')}"
        try:
            acceptance = self._counter.to_acceptance(source, per_level=per_level)
        except ValueError:
            raise UsageError(
                "no tree was verified, so there is nothing to count",
                where="--record-acceptance",
                cure="name a --draft-model and a --tree, and ask for more than one token",
            ) from None
        return {
            **acceptance.to_json(),
            **provenance,
            "passes": self._num_passes,
            "tokens_per_pass": self.tokens_per_pass,
            "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": git_commit(),
        }


def provenance(arguments: argparse.Namespace, settings: EngineSettings, draft: int | None) -> dict[str, object]:
    """What the acceptance depends on; `draft` is the place of the one used. Models by name: the file may travel. Of a base of
    the target its kind is told."""
    return {
        "target": Path(settings.model).name,
        "draft": _draft_name(settings.draft_models[draft]) if draft is not None else None,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "tree": Path(settings.tree).name,
        "verifier": settings.verifier,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
    }


def _draft_name(name: str) -> str:
    kind = base_of_draft(name)
    return Path(name).name if kind is None else f"self:{kind}"


def write_json(path: Path, document: object) -> None:
    """Whole or not at all. OSError when it cannot be written."""
    text = json.dumps(document, indent=1) + "\n"
    if path.exists() and not path.is_file():  # /dev/null, a named pipe: nothing to replace
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
