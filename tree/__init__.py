"""Trees of speculated tokens: which shape is best, how a draft fills it, how a target verifies it without loss.

Mathematics on values: knows nothing of devices, streams, checkpoints or models. Import the modules themselves, as in
`from tree.shape import TreeShape`. This file imports nothing: shape, spec, acceptance, aim and optimizer work without torch.
"""

__all__ = [
    "acceptance",
    "aim",
    "blocks",
    "candidates",
    "context",
    "draft",
    "draw",
    "dynamic",
    "estimates",
    "growing",
    "logprobs",
    "ngram",
    "nodes",
    "optimizer",
    "residual",
    "sampling",
    "shape",
    "source_drafter",
    "sources",
    "spec",
    "verify",
]
