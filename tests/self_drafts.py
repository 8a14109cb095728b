"""Engines whose draft is a base of their own target, with layers wherever a test wants them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.engine.engine import Engine
from offload.engine.loading import LoadProgress
from offload.planner.cost import ModelCost
from offload.planner.residency import Residency
from offload.weights.placement import spread_evenly
from planning import L40

PROMPT = [5, 9, 33, 2, 71]
TREE = "3x4:kary"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 5}
NUM_LAYERS = 4


@dataclass(frozen=True)
class Kept:
    """How many layers are resident as they compute, and how many as they are stored: where that is the same, all are."""

    num_raw: int
    num_coded: int = 0


RESIDENCIES = {
    "none": Kept(0),
    "some raw": Kept(2),
    "some coded": Kept(0, 2),
    "some of each": Kept(1, 2),
    "all coded": Kept(0, NUM_LAYERS),
    "all of either": Kept(1, NUM_LAYERS - 1),
    "all": Kept(NUM_LAYERS),
}


@contextmanager
def open_self(
    folder: Path,
    draft: str | None = "self",
    *,
    codec: str = "auto",
    residency: str = "none",
    device: Device | None = None,
    progress: LoadProgress | None = None,
    **changes: Any,
) -> Iterator[Engine]:
    """With the base `draft`, or none. No tree without it."""
    kept = RESIDENCIES[residency]
    settings: dict[str, Any] = {
        "model": str(folder),
        "draft_models": (draft,) if draft is not None else (),
        "tree": TREE if draft is not None else "none",
        "codec": codec,
        "device": "cpu",
        "slots": 2,
        "host_memory_bytes": 2**30,
        **changes,
    }

    def residency(settings: EngineSettings, target: ModelCost, *_: Any, **__: Any) -> Residency:
        resident = spread_evenly(kept.num_raw + kept.num_coded, target.num_layers)
        coded = [layer for layer in sorted(resident)[kept.num_raw :] if target.layers[layer].is_decoded]
        num_slots = (settings.slots or 2) if len(resident) < target.num_layers else 0
        return Residency(resident=resident, coded=frozenset(coded), num_slots=num_slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.planner.memory.residency", residency)
        with open_engine(EngineSettings(**settings), device=device, hardware=L40, progress=progress) as engine:
            yield engine


def text(engine: Engine, **request: Any) -> tuple[int, ...]:
    return engine.generate(PROMPT, **{**GREEDY, **request}).token_ids
