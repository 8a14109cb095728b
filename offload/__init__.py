"""treestream: run a model far too big for its GPU, exactly. `offload.load(...)` gives an Engine; see docs/cli.md.

Importing this package is cheap: torch and transformers are imported by `load`.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .config import EngineSettings
from .errors import OffloadError
from .version import __version__

if TYPE_CHECKING:
    from .engine.engine import Engine

__all__ = ["OffloadError", "__version__", "load"]

logger = logging.getLogger(__name__)


def _refuse_foreign_tree() -> None:
    # dm-tree installs a top-level module of the same name; importing that one instead of ours fails much later and oddly.
    ours = Path(__file__).resolve().parent.parent / "tree" / "shape.py"
    found = importlib.util.find_spec("tree")
    shape = Path(found.origin).resolve().with_name("shape.py") if found is not None and found.origin else None
    if shape != ours:
        raise ImportError(
            f"the module `tree` that Python finds is {found.origin if found else None}, not treestream's {ours.parent}. "
            "Run from the clone's folder, or uninstall dm-tree from this environment."
        )


_refuse_foreign_tree()


def load(
    model: str,
    *,
    draft_model: str | Sequence[str] | None = None,
    tree: str = "auto",
    verifier: str = "auto",
    acceptance: str | Sequence[str] | None = None,
    profile: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    gpu_memory: str | int = "auto",
    host_memory: str | int = "auto",
    resident_layers: str | int = "auto",
    slots: str | int = "auto",
    max_context: str | int = "auto",
    emulate_link: str | float | None = None,
    ngram: str | Sequence[str] | None = None,
    grow_ahead: str = "auto",
    draft_device: str = "auto",
    draft_passes: str = "auto",
    small_uploads: str = "auto",
    codec: str = "auto",
    decode_kernels: str = "auto",
    fixed_plan: bool = False,
    seed: int = 0,
) -> "Engine":
    """Load a model, and a draft model, and return an Engine that serves any number of calls. Arguments are the command
    line's flags; `draft_model="self"` is a low-bit copy of the model's own layers; sizes may be bytes. Raises the errors of
    `offload.errors`, all of them OffloadError."""
    settings = EngineSettings.parse(
        model=str(model),
        draft_model=draft_model,
        tree=str(tree),
        verifier=verifier,
        acceptance=acceptance,
        profile=profile,
        device=device,
        dtype=dtype,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        resident_layers=resident_layers,
        slots=slots,
        max_context=max_context,
        emulate_link=emulate_link,
        ngram=ngram,
        grow_ahead=grow_ahead,
        draft_device=draft_device,
        draft_passes=draft_passes,
        small_uploads=small_uploads,
        codec=codec,
        decode_kernels=decode_kernels,
        fixed_plan=fixed_plan,
    )
    return _open(settings, seed)


def _open(settings: EngineSettings, seed: int) -> "Engine":
    from .releases import errors_translated, warning

    if (text := warning()) is not None:
        logger.warning(text)
    with errors_translated():
        from .assemble import open_engine

        return open_engine(settings, seed=seed)
