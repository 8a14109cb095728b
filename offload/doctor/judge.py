"""Pure: from facts to findings. One function per line of `doctor`, each saying what is slow or impossible, and the cure."""

from dataclasses import dataclass
from typing import Literal

from ..config import bytes_text
from ..errors import FitError, ModelError
from ..planner.cost import GIB
from ..releases import INSTALL
from .facts import Check, CopyFacts, DecodeFacts, DiskFacts, Facts, GpuFacts, HostFacts, Need

Status = Literal["ok", "warn", "fail"]

# Bytes per second and lane on the wire, by PCIe generation, encoding subtracted.
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
# Healthy links carry 77 to 88 % of the wire's rate in large copies from pinned memory (docs of nvbandwidth and others).
HEALTHY_LINK_SHARE = 0.7
FREE_SHARE = 0.9  # what a GPU that nobody else uses has free
SLOW_LOAD_S = 300.0
MIN_TIMED_BYTES = 64 * 2**20  # reading less than this says nothing about a disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `cure` is None when there is nothing to do; `exit_code` is 0 unless the status is fail."""

    name: str
    status: Status
    value: str
    cure: str | None = None
    exit_code: int = 0

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "status": self.status, "value": self.value, "cure": self.cure}

    def line(self) -> str:
        status = "FAIL" if self.status == "fail" else self.status
        return f"{status:5} {self.name:12} {self.value}" + (f"  -> {self.cure}" if self.cure else "")


def judge(facts: Facts) -> list[Finding]:
    """Everything that `facts` say, in the order in which a person would look."""
    host, gpu, need = facts.host, facts.gpu, facts.need
    findings = [_versions(facts), _gpu(facts)]
    if gpu is not None:
        memory = _device_memory(gpu, need if facts.gpu_usable else None)  # else the need is that of the CPU device
        findings += [_link(gpu, facts.copies), _clocks(gpu), memory, _numa(gpu, host)]
    if facts.copies is not None:
        findings.append(_pinned(facts.copies, need))
    if facts.copies is not None and facts.decoding is not None:
        findings.append(_decoder(facts.decoding, facts.copies))
    findings += [_system(host), _host_memory(host, need), _cgroup(host, need), _memlock(host, facts.copies)]
    if facts.disk is not None:
        findings.append(_disk(facts.disk))
    return findings + [_check(check) for check in facts.checks]


def worst_status(findings: list[Finding]) -> Status:
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((finding.status for finding in findings), key=order.index, default="ok")


def exit_code(findings: list[Finding]) -> int:
    """0 when nothing failed; a model that is invalid comes before one that does not fit."""
    return min((finding.exit_code for finding in findings if finding.status == "fail"), default=0)


def _versions(facts: Facts) -> Finding:
    versions = facts.host.versions
    value = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    value += f", CUDA {facts.cuda_version or 'none'}"
    if None in versions.values():
        return _fails("versions", value, f"install the project: {INSTALL}", ModelError.exit_code)
    if facts.host.untested:
        return _warns("versions", f"{value}; untested: {', '.join(facts.host.untested)}", INSTALL)
    return Finding(name="versions", status="ok", value=value)


def _gpu(facts: Facts) -> Finding:
    gpu = facts.gpu
    if facts.device == "cpu":
        return Finding(name="GPU", status="ok", value="not asked for: --device cpu")
    if gpu is not None and facts.gpu_usable:
        return Finding(name="GPU", status="ok", value=f"{gpu.name} {bytes_text(gpu.total_bytes)}, driver {gpu.driver}")
    if gpu is None:
        value, cure = "none found: CPU device", "if there is one, see whether nvidia-smi and torch find it"
    elif facts.cuda_version is None:
        value, cure = f"{gpu.name}, but torch is built without CUDA: CPU device", "install torch with CUDA, see pytorch.org"
    else:
        value = f"{gpu.name}, but torch for CUDA {facts.cuda_version} cannot use it with driver {gpu.driver}: CPU device"
        cure = "update the driver, or see what CUDA_VISIBLE_DEVICES hides"
    return _warns("GPU", value, cure) if facts.device == "auto" else _fails("GPU", value, cure)


def _link(gpu: GpuFacts, copies: CopyFacts | None) -> Finding:
    now = gpu.activity
    if now.link_generation is None or now.link_width is None:
        rate = f", measured {_rate(copies.bytes_per_s)}" if copies else ""
        return Finding(name="PCIe", status="ok", value=f"the driver does not tell{rate}")
    load = "under load" if now.under_load else "idle"
    value = f"gen{now.link_generation} x{now.link_width} {load}" + (f", measured {_rate(copies.bytes_per_s)}" if copies else "")
    best_generation = gpu.card_generation or gpu.max_generation or now.link_generation
    best_width = gpu.max_width or now.link_width
    if now.under_load and (now.link_generation < best_generation or now.link_width < best_width):
        in_slot = gpu.max_generation is not None and gpu.max_generation < best_generation
        cure = (
            f"the slot ends at gen{gpu.max_generation}: use a faster slot, or set its generation in the BIOS"
            if in_slot
            else "use the slot next to the CPU, without a riser; check lane sharing and power saving in the BIOS"
        )
        return _warns("PCIe", f"{value}; the card can do gen{best_generation} x{best_width}", cure)
    wire = LANE_BYTES_PER_S.get(now.link_generation, 0.0) * now.link_width
    if copies is not None and copies.bytes_per_s < HEALTHY_LINK_SHARE * wire:
        cure = "look at NUMA and pinned below; let nothing else use the link"
        return _warns("PCIe", f"{value}, {copies.bytes_per_s / wire:.0%} of the wire's rate", cure)
    return Finding(name="PCIe", status="ok", value=value)


def _decoder(decoding: DecodeFacts, copies: CopyFacts) -> Finding:
    """Decoding hides under the link as long as it is the faster of the two."""
    copy_s = decoding.stored_bytes / copies.bytes_per_s
    value = f"{decoding.weights}: {decoding.layer_s * 1e3:.3g} ms a layer, {copy_s * 1e3:.3g} ms over the link"
    if decoding.layer_s > copy_s:
        return _warns(
            "decoder", value, "passes wait for it: take weights in a format with a faster decoder, see docs/formats.md"
        )
    return Finding(name="decoder", status="ok", value=value)


def _clocks(gpu: GpuFacts) -> Finding:
    now, most = gpu.activity.sm_clock_mhz, gpu.max_sm_clock_mhz
    value = "the driver does not tell" if now is None else f"SM {now} MHz" + (f" of {most}" if most else "")
    if gpu.activity.slowdowns:
        reasons = ", ".join(gpu.activity.slowdowns)
        return _warns("clocks", f"{value}, slowed down by {reasons}", "check cooling and power supply of the GPU")
    return Finding(name="clocks", status="ok", value=value)


def _device_memory(gpu: GpuFacts, need: Need | None) -> Finding:
    value = f"{bytes_text(gpu.free_bytes)} of {bytes_text(gpu.total_bytes)} free"
    held = ", ".join(
        f"{holder.name} (pid {holder.pid}{'' if holder.num_bytes is None else ', ' + bytes_text(holder.num_bytes)})"
        for holder in gpu.holders
    )
    value += f"; held by {held}" if held else ""
    if need is not None and need.least_device_bytes > gpu.free_bytes:
        value += f", and {bytes_text(need.least_device_bytes)} is the least for this model"
        can_be_freed = need.least_device_bytes <= gpu.total_bytes
        cure = "end the processes that hold it" if can_be_freed else "take a smaller draft model, or a larger GPU"
        return _fails("VRAM", value, cure)
    if gpu.free_bytes < FREE_SHARE * gpu.total_bytes:
        return _warns("VRAM", value, "what is free holds resident layers: end what you do not need")
    return Finding(name="VRAM", status="ok", value=value)


def _numa(gpu: GpuFacts, host: HostFacts) -> Finding:
    node = gpu.numa_node
    if node is None or len(host.nodes) < 2:
        return Finding(name="NUMA", status="ok", value="one node, or the driver does not tell")
    value = f"GPU on node {node}, this process on {_listed(host.own_nodes)} of {_listed(host.nodes)}"
    if host.own_nodes == {node}:
        return Finding(name="NUMA", status="ok", value=value)
    where = "its memory may be remote" if node in host.own_nodes else "its memory is remote"
    return _warns("NUMA", f"{value}: {where}", f"start with numactl --cpunodebind={node} --preferred={node}")


def _pinned(copies: CopyFacts, need: Need | None) -> Finding:
    tried, pinned = bytes_text(copies.tried_bytes), bytes_text(copies.pinned_bytes)
    if copies.pinned_bytes < copies.tried_bytes:
        cure = "raise the limits below; under WSL, run on Linux itself"
        value = f"the driver registered {pinned} of {tried} tried: layers beyond are moved into pinned memory on their way"
        return _warns("pinned", value, cure)
    wanted = f" of {bytes_text(need.host_bytes)} needed" if need is not None and need.host_bytes > copies.tried_bytes else ""
    return Finding(name="pinned", status="ok", value=f"registered {pinned}{wanted} in {copies.register_s:.1f} s (test)")


def _system(host: HostFacts) -> Finding:
    if "microsoft" in host.kernel.lower():
        cure = "under WSL, CUDA pins little host memory (about 1 GiB has been seen): run on Linux itself"
        return _warns("system", f"WSL ({host.kernel})", cure)
    return Finding(name="system", status="ok", value=host.kernel)


def _host_memory(host: HostFacts, need: Need | None) -> Finding:
    value = f"{bytes_text(host.available_bytes)} available"
    if need is None:
        return Finding(name="host memory", status="ok", value=value)
    if need.least_host_bytes > host.available_bytes:
        value += f", and {bytes_text(need.least_host_bytes)} is the least for this model"
        return _fails("host memory", value, "free memory, or take a smaller model")
    if need.host_bytes > host.available_bytes:
        short = need.host_bytes - host.available_bytes
        cure = f"free {bytes_text(short)} more, or see what --host-memory costs with plan"
        return _warns("host memory", f"{value}, {bytes_text(need.host_bytes)} needed: the rest streams from disk", cure)
    return Finding(name="host memory", status="ok", value=f"{value}, {bytes_text(need.host_bytes)} needed")


def _cgroup(host: HostFacts, need: Need | None) -> Finding:
    limit = host.cgroup_limit_bytes
    if limit is None:
        return Finding(name="cgroup", status="ok", value="no memory limit")
    if need is not None and need.host_bytes > limit:
        cure = f"raise it: docker run --memory {-(-need.host_bytes // GIB) + 2}g, or MemoryMax= of the service"
        return _warns("cgroup", f"memory limit {bytes_text(limit)} < {bytes_text(need.host_bytes)} needed", cure)
    return Finding(name="cgroup", status="ok", value=f"memory limit {bytes_text(limit)}")


def _memlock(host: HostFacts, copies: CopyFacts | None) -> Finding:
    """Most drivers pin past the limit, so it counts only where a registration was really refused."""
    limit = host.memlock_bytes
    if limit is None:
        return Finding(name="memlock", status="ok", value="unlimited")
    if copies is not None and copies.pinned_bytes < copies.tried_bytes and limit < copies.tried_bytes:
        return _warns("memlock", f"limit {bytes_text(limit)}, and a registration was refused", "ulimit -l unlimited")
    return Finding(name="memlock", status="ok", value=f"limit {bytes_text(limit)}; registering with CUDA seldom minds")


def _disk(disk: DiskFacts) -> Finding:
    rate = disk.read_bytes / max(disk.read_s, 1e-9)
    load_s = disk.total_bytes / rate
    way = "direct" if disk.is_direct else "through the page cache"
    value = f"{_rate(rate)} {way}; loading {bytes_text(disk.total_bytes)} takes {load_s:.0f} s"
    if disk.read_bytes < MIN_TIMED_BYTES:
        return Finding(name="disk", status="ok", value=f"{bytes_text(disk.total_bytes)}: too little to time")
    if load_s > SLOW_LOAD_S:
        return _warns("disk", value, "copy the model to a local NVMe disk")
    return Finding(name="disk", status="ok", value=value)


def _check(check: Check) -> Finding:
    if check.exit_code:
        return _fails(check.name, check.value, check.cure or "", check.exit_code)
    return Finding(name=check.name, status="warn" if check.cure else "ok", value=check.value, cure=check.cure)


def _fails(name: str, value: str, cure: str, code: int = FitError.exit_code) -> Finding:
    return Finding(name=name, status="fail", value=value, cure=cure, exit_code=code)


def _warns(name: str, value: str, cure: str) -> Finding:
    return Finding(name=name, status="warn", value=value, cure=cure)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _listed(nodes: frozenset[int]) -> str:
    return ",".join(map(str, sorted(nodes)))
