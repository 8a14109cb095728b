"""How torch's allocator is asked to go about it."""

from collections.abc import MutableMapping

import torch

NAME, NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
NEW_NAME_SINCE = (2, 9)  # from there on torch calls the other one deprecated


def prefer_growing_segments(environment: MutableMapping[str, str], version: object = torch.__version__) -> None:
    """Sizes of a round's tensors change with the text, and plans fill the device: pieces of memory that cannot be joined would
    run out before the memory does. To be called before CUDA starts; whoever has settings of his own keeps them."""
    if NAME not in environment and NEW_NAME not in environment:
        environment[NEW_NAME if version >= NEW_NAME_SINCE else NAME] = "expandable_segments:True"  # type: ignore[operator]
