"""How much of a machine to measure."""

from dataclasses import dataclass

from ..config import SamplingKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. `sampling_kinds`: how tokens are drawn and verified, first the way in which drafts draw.
    Work is repeated `repeats` times at least, and for `point_s`; a table ends at the first point that takes longer than
    `longest_s`."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    sampling_kinds: tuple[SamplingKind, ...]
    repeats: int
    point_s: float
    longest_s: float
    copy_bytes: int
    disk_s: float


QUICK = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    contexts=(512,),
    sampling_kinds=("greedy", "sampled", "nucleus"),
    repeats=3,
    point_s=0.04,
    longest_s=0.03,
    copy_bytes=2**26,
    disk_s=0.3,
)
FULL = Effort(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096),
    contexts=(64, 1024, 4096),
    sampling_kinds=("greedy", "sampled", "nucleus"),
    repeats=3,
    point_s=0.2,
    longest_s=0.5,
    copy_bytes=2**30,
    disk_s=3.0,
)
