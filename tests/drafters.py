"""The same draft model on several devices, driven through the same rounds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from conftest import VOCAB_SIZE
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device import Device
from offload.engine.engine import Engine
from offload.model.drafter import ModelDrafter
from planning import L40
from tree.shape import TreeShape

PROMPT = [5, 9, 33, 2, 71]


def open_tiny(
    folder: Path, device: Device, *, max_context: int = 128, tree: str = "3x3:kary", draft_passes: str = "auto"
) -> Engine:
    """A model that is its own draft, in float32."""
    settings = EngineSettings(
        model=str(folder),
        draft_models=(str(folder),),
        dtype="float32",
        tree=tree,
        max_context=max_context,
        draft_passes=draft_passes,
    )
    return open_engine(settings, device=device, hardware=L40)


@contextmanager
def open_drafters(
    devices: Sequence[Callable[[], Device]], folder: Path, max_context: int = 128, tree: str = "3x3:kary"
) -> Iterator[list[ModelDrafter]]:
    """One on each device; each knows PROMPT. They have the memory that they need for `tree`."""
    engines = [open_tiny(folder, device(), max_context=max_context, tree=tree) for device in devices]
    try:
        drafters = [engine.loop._drafter for engine in engines if engine.loop._drafter is not None]
        assert len(drafters) == len(devices)
        for drafter in drafters:
            drafter.restart(PROMPT, len(PROMPT))
        yield drafters
    finally:
        for engine in engines:
            engine.close()


def run_round(drafters: list[ModelDrafter], shape: TreeShape, generator: torch.Generator, tolerance: float = 1e-5) -> None:
    """Every level's logits agree, for random tokens; then the path to a random node is accepted. What is not recorded by then
    is."""
    for drafter in drafters:
        drafter.prepare(shape)
    assert_same([drafter.begin(shape) for drafter in drafters], tolerance)
    tokens = torch.randint(VOCAB_SIZE, (shape.num_nodes,), generator=generator)
    for nodes in shape.expanded[1:-1]:
        assert_same([drafter.expand(nodes, tokens[list(nodes)]) for drafter in drafters], tolerance)
    path = shape.path(int(torch.randint(shape.num_nodes, (), generator=generator)))
    for drafter in drafters:
        drafter.commit(path)
        drafter.extend_context([*tokens[list(path[1:])].tolist(), 7])


def assert_same(logits: list[torch.Tensor], tolerance: float) -> None:
    scale = logits[0].abs().max().clamp(min=1)
    for other in logits[1:]:
        assert other.shape == logits[0].shape
        assert (other - logits[0]).abs().max() < tolerance * scale
