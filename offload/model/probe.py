"""One pass over a model on the meta device: that it runs as we run it, and what its layers hand to the cache. No weight is
read for it, and no number computed."""

import torch

from ..errors import ModelError
from ..releases import untested
from .rope import Rope
from .rotary import rebuild_rotary
from .transformers_api import Forward, PreTrainedModel

NUM_ROWS = 2


class _Shapes:
    """Rows that remember what they were given."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Size, torch.Size]] = {}  # by layer: keys, values

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[layer] = key.shape, value.shape
        return key, value


def cached_shape(model: PreTrainedModel, rope: Rope, num_layers: int) -> tuple[int, int]:
    """(key/value heads, head dimension) of every layer of `model`, which is on the meta device. ValueError with the reason for
    one that cannot be run as ours are: whose layers cache anything else than keys and values of one shape, say."""
    meta = torch.device("meta")
    rebuild_rotary(model, rope, meta)
    shapes, rows = _Shapes(), torch.zeros(NUM_ROWS, dtype=torch.int64, device=meta)
    mask = torch.ones(1, 1, NUM_ROWS, NUM_ROWS, dtype=torch.bool, device=meta)
    try:
        logits = Forward(model, num_layers)(rows, rows, mask, NUM_ROWS, shapes)
    except ModelError as error:
        raise ValueError(error.what) from error
    except Exception as error:  # transformers' own code, over a cache and a mask that it has not made
        if untested():  # then the release is the likelier reason, and whoever called says so
            raise
        raise ValueError(f"a pass over it fails: {type(error).__name__} {' '.join(str(error).split())[:200]}") from error
    keys = shapes.seen.get(0, (torch.Size(),))[0]
    if set(shapes.seen) != set(range(num_layers)) or any(seen != (keys, keys) for seen in shapes.seen.values()):
        raise ValueError("its layers do not cache keys and values of one shape each")
    if logits.ndim != 2 or len(logits) != NUM_ROWS:
        raise ValueError("its logits are not one row a token")
    return keys[1], keys[3]
