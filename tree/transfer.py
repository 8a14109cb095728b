"""What goes to the device and comes back: indices up without a wait, results down in one. Knows nothing of what they mean."""

from collections.abc import Sequence

import torch
from torch import Tensor


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on `device`, without waiting for what is queued there (torch.tensor(..., device=) would)."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def to_host(*columns: Tensor) -> list[list[float]]:
    """The columns [n] as lists, in one transfer. float64 holds token ids and nodes exactly."""
    packed = torch.cat([column.double() for column in columns]).cpu().split([len(column) for column in columns])
    return [column.tolist() for column in packed]
