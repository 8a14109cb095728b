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
from offload.model.buckets import MAX_ROWS
from offload.model.drafter import PROMPT_CHUNK_TOKENS, ModelContext, ModelDrafter
from offload.source import check_source
from planning import L40
from shapes import from_widths
from small_models import causal_lm
from tree.aim import Aim
from tree.context import TreeContext
from tree.shape import TreeShape

PROMPT = [5, 9, 33, 2, 71]
WIDE = from_widths((64, 4))  # of whose nodes as many as MAX_ROWS may be in a level


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
    devices: Sequence[Callable[[], Device]],
    folder: Path,
    rows: int = 140,
    shape: TreeShape = WIDE,
    *,
    num_texts: int = 1,
    chunk_tokens: int = PROMPT_CHUNK_TOKENS,
    vocab_size: int = VOCAB_SIZE,
) -> Iterator[list[ModelDrafter]]:
    """One on each device, in float32, for texts of at most `rows` rows. They have the memory that they need for `shape`."""
    opened = [device() for device in devices]
    drafters = []
    for device in opened:
        model = check_source(str(folder), "--model", "float32", device.torch_device.type)
        lm = causal_lm(model, device, num_segments=num_texts, segment_rows=rows)
        sizes = {"max_nodes": shape.num_nodes, "ahead_rows": 2 * MAX_ROWS}  # trees of many shapes, before more is recorded
        drafters.append(ModelDrafter(lm, device, vocab_size, Aim(shape=shape), chunk_tokens, **sizes))
    try:
        yield drafters
    finally:
        for drafter, device in zip(drafters, opened, strict=True):
            drafter.close()
            device.close()


def start_all(drafters: Sequence[ModelDrafter], text: Sequence[int] = PROMPT, place: int = 0) -> list[TreeContext]:
    return [drafter.start(place, text, len(text)) for drafter in drafters]


def run_round(contexts: list[TreeContext], shape: TreeShape, generator: torch.Generator, tolerance: float = 1e-5) -> None:
    """Every level's logits agree, for random tokens; then the path to a random node is accepted. What is not recorded by then
    is."""
    models = [model_of(context) for context in contexts]
    for model in models:
        model._drafter.prepare(Aim(shape=shape))
    assert_same([model.begin() for model in models], tolerance)
    tokens = torch.randint(VOCAB_SIZE, (shape.num_nodes,), generator=generator)
    runs = {0: -1}
    for nodes in shape.expanded[1:-1]:
        parents = [runs[shape.parents[node]] for node in nodes]
        assert_same([model.expand(parents, tokens[list(nodes)]) for model in models], tolerance)
        runs |= {node: len(runs) - 1 + place for place, node in enumerate(nodes)}
    path = shape.path(int(torch.randint(shape.num_nodes, (), generator=generator)))
    for model in models:
        model.follow((*tokens[list(path[1:])].tolist(), 7), [runs[node] for node in path[1:] if node in runs])


def model_of(context: TreeContext) -> ModelContext:
    """The text that a context of ModelDrafter's grows trees of."""
    assert isinstance(context.model, ModelContext)
    return context.model


def expand_level(model: ModelContext, shape: TreeShape, nodes: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
    """`nodes` of one level of `shape`, all levels above having been run."""
    run = [node for level in shape.expanded[1:-1] for node in level]
    return model.expand([run.index(shape.parents[node]) if shape.parents[node] else -1 for node in nodes], token_ids)


def extend(contexts: Sequence[TreeContext], token_ids: Sequence[int]) -> None:
    """As if these had been committed without a tree."""
    for context in contexts:
        if token_ids:
            context.follow((0,), tuple(token_ids), None)


def assert_same(logits: list[torch.Tensor], tolerance: float) -> None:
    scale = logits[0].abs().max().clamp(min=1)
    for other in logits[1:]:
        assert other.shape == logits[0].shape
        assert (other - logits[0]).abs().max() < tolerance * scale
