"""What `doctor` finds out about a machine and a model, as plain values. gather.py fills them in, judge.py judges them."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..planner.cost import ModelCost

MIN_LAYERS = 2  # two slots on the device, two buffers to read from disk: the least that streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Another process with memory on the GPU; `num_bytes` is None where the driver does not tell."""

    pid: int
    name: str
    num_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuActivity:
    """What changes with load. None where the driver does not tell. An idle link saves power and is slower, so
    `under_load` says whether copies were under way."""

    link_generation: int | None
    link_width: int | None
    sm_clock_mhz: int | None
    slowdowns: tuple[str, ...]
    under_load: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """A GPU as its driver describes it. `max_*` is what card and slot can do together, `card_generation` the card alone;
    `numa_node` is None where the system has but one or does not say."""

    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...]
    max_generation: int | None
    max_width: int | None
    card_generation: int | None
    max_sm_clock_mhz: int | None
    numa_node: int | None
    activity: GpuActivity


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyFacts:
    """A test on the device: `tried_bytes` of host memory registered, `pinned_bytes` of them successfully, in `register_s`;
    then copied to the device at `bytes_per_s`."""

    tried_bytes: int
    pinned_bytes: int
    register_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFacts:
    """A test on the device: a layer that is stored as `weights` says, in `stored_bytes`, is decoded in `layer_s`."""

    weights: str
    stored_bytes: int
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """`cgroup_limit_bytes` and `memlock_bytes` are None where nothing is limited. `nodes` are the machine's NUMA nodes,
    `own_nodes` those whose CPUs this process may use. `versions` maps packages to None where they are missing;
    `untested` names those of a release that was not tested."""

    kernel: str
    available_bytes: int
    cgroup_limit_bytes: int | None
    memlock_bytes: int | None
    nodes: frozenset[int]
    own_nodes: frozenset[int]
    versions: Mapping[str, str | None]
    untested: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """Sequential reading of the model's files, `read_bytes` in `read_s`; `total_bytes` is the whole model."""

    read_bytes: int
    read_s: float
    total_bytes: int
    is_direct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of host and of device memory: `host_bytes` to stream every layer from host memory, `least_*` to run at all, with
    layers from disk and next to no context."""

    host_bytes: int
    least_host_bytes: int
    least_device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property of the model's files: `value` says what was found, or what is wrong when there is a `cure`. `exit_code` is
    0 where that does not stop a run."""

    name: str
    value: str
    cure: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """None stands for what is not there or could not be asked: no GPU, no copies without a usable one, no model named, no
    decoding without one that is decoded. `device` is as --device has it; `gpu_usable` says whether torch can use one,
    `cuda_version` what torch was built for."""

    device: str
    host: HostFacts
    gpu: GpuFacts | None
    gpu_usable: bool
    cuda_version: str | None
    copies: CopyFacts | None
    decoding: DecodeFacts | None = None
    need: Need | None
    disk: DiskFacts | None
    checks: tuple[Check, ...]


def need_of(target: ModelCost, draft: ModelCost | None, *, on_gpu: bool) -> Need:
    """What a pair needs. On the CPU device both kinds of memory are the host's."""
    buffers = MIN_LAYERS * target.slot_bytes
    draft_bytes = draft.outside_bytes + draft.computed_bytes if draft else 0
    device_bytes = target.outside_bytes + buffers + target.scratch_bytes + target.workspace_bytes + draft_bytes
    on_host = 0 if on_gpu else device_bytes
    return Need(
        host_bytes=target.stored_bytes + on_host,
        least_host_bytes=min(target.stored_bytes, buffers) + on_host,
        least_device_bytes=device_bytes,
    )
