"""One pass over a model on the meta device: that it runs as we run it, what its layers hand to the cache, and within which
windows they attend. No weight is read for it, and no number computed."""

from collections.abc import Sequence

import torch

from ..errors import ModelError
from ..releases import untested
from .attention import Block
from .rope import Rope
from .rotary import rebuild_rotary
from .transformers_api import Forward, PreTrainedModel

NUM_ROWS = 2
_SLIDING = "sliding_attention"


class _Seen:
    """Rows of a pass that remember what each layer gave them, and which window it asked for."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}  # by layer: keys, values
        self.windows: dict[int, int | None] = {}  # by layer

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes[layer] = key.shape, value.shape
        return key, value


class _AnyWindow(dict[int | None, tuple[Block, ...]]):
    """Masks of a pass that are there for every window. A layer asks for them after it has given its rows."""

    def __init__(self, block: Block, seen: _Seen) -> None:
        self._block, self._seen = block, seen

    def __missing__(self, window: int | None) -> tuple[Block, ...]:
        self._seen.windows[next(reversed(self._seen.shapes))] = window
        return (self._block,)


def probe_layers(
    model: PreTrainedModel, rope: Rope, num_layers: int
) -> tuple[tuple[tuple[int, int], ...], tuple[int | None, ...]]:
    """Of every layer of `model`, which is on the meta device: (key/value heads, head dimension), and its attention's window.

    A window of w shows a row the w tokens up to and with its own; None shows it all. ValueError with the reason for a model
    that cannot be run as ours are: whose layers cache anything else than keys and values of one shape, say.
    """
    meta = torch.device("meta")
    rebuild_rotary(model, rope, meta)
    rows = torch.zeros(NUM_ROWS, dtype=torch.int64, device=meta)
    mask = torch.ones(1, 1, NUM_ROWS, NUM_ROWS, dtype=torch.bool, device=meta)
    seen = _Seen()
    masks = _AnyWindow(Block(slice(NUM_ROWS), slice(NUM_ROWS), mask), seen)
    try:
        logits = Forward(model, num_layers)(rows, rows, masks, rows[-1:], seen)
    except ModelError as error:
        raise ValueError(error.what) from error
    except Exception as error:  # transformers' own code, over a cache and a mask that it has not made
        if untested():  # then the release is the likelier reason, and whoever called says so
            raise
        raise ValueError(f"a pass over it fails: {type(error).__name__} {' '.join(str(error).split())[:200]}") from error
    numbers = range(num_layers)
    if set(seen.shapes) != set(numbers) or any(keys != values or len(keys) != 4 for keys, values in seen.shapes.values()):
        raise ValueError("its layers do not cache keys and values of one shape each")
    if set(seen.windows) != set(numbers):
        raise ValueError("its layers do not all attend as ours do")
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError("its logits are not one row a token")
    windows = tuple(seen.windows[layer] for layer in numbers)
    _check_windows(model.config, windows, rope.max_positions)
    keys = [seen.shapes[layer][0] for layer in numbers]  # [1, K, N, C] each
    return tuple((shape[1], shape[3]) for shape in keys), windows


def _check_windows(config: object, windows: Sequence[int | None], max_positions: int) -> None:
    """ValueError where the masks that transformers would make are not those that the attention of the layers asks for."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        if [kind == _SLIDING for kind in kinds[: len(windows)]] != [window is not None for window in windows]:
            raise ValueError("its layers attend within other windows than its config says")
        return
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < max_positions and set(windows) != {window}:
        raise ValueError(f"its config names a window of {window} tokens, for which its attention does not ask")
