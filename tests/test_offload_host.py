"""What the host has to give: control groups full of page cache, memory near a device, memory that children do not get."""

import mmap
import os
import threading
from pathlib import Path

import psutil
import pytest
import torch

from offload.device import cgroup, host, numa
from offload.device.cgroup import GroupMemory, cgroup_memory
from offload.device.host import HostMapping, available_bytes

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup of a process of which /proc says nothing, on a machine with plenty."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000 * GIB}))
    return tmp_path / "cgroup"


def write_group(folder: Path, **files: object) -> None:
    """`memory_max=5` is a file memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = "".join(f"{key} {number}\n" for key, number in value.items()) if isinstance(value, dict) else f"{value}\n"
        (folder / name.replace("memory_", "memory.", 1)).write_text(text)


@pytest.mark.parametrize("cached", [0, 4 * GIB, 7 * GIB])
def test_page_cache_is_not_used_up(groups: Path, cached: int) -> None:
    """However much of it there is, and whether or not it was read twice: what is left is the same."""
    stat = {"anon": GIB // 2, "inactive_file": cached // 4, "active_file": cached - cached // 4, "slab_reclaimable": 5}
    write_group(groups, memory_max=8 * GIB, memory_current=GIB // 2 + cached + 5, memory_stat=stat)
    assert cgroup_memory() == GroupMemory(8 * GIB, 8 * GIB - GIB // 2)
    assert available_bytes() == 8 * GIB - GIB // 2


@pytest.mark.parametrize("cached", [0, 7 * GIB])
def test_page_cache_is_not_used_up_in_the_first_version(groups: Path, cached: int) -> None:
    """There `inactive_file` is the group's own, `total_inactive_file` that of all below it, as is the use."""
    stat = {"inactive_file": 1, "active_file": 1, "total_inactive_file": cached - cached // 4, "total_active_file": cached // 4}
    used = {"memory_usage_in_bytes": GIB + cached, "memory_stat": stat}
    write_group(groups / "memory", memory_limit_in_bytes=8 * GIB, **used)
    assert available_bytes() == 7 * GIB


def test_shared_memory_is_used_up(groups: Path) -> None:
    """`file` counts it, and the kernel cannot give it back."""
    stat = {"file": 6 * GIB, "shmem": 6 * GIB, "inactive_anon": 6 * GIB, "inactive_file": 0}
    write_group(groups, memory_max=8 * GIB, memory_current=6 * GIB, memory_stat=stat)
    assert available_bytes() == 2 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000", "400", 600), ("1000", "4000", 0), ("max", "400", None), ("9223372036854771712", "400", None), ("", "", None)],
)
def test_what_a_group_says_is_read_as_it_is_meant(groups: Path, limit: str, used: str, left: int | None) -> None:
    write_group(groups, memory_max=limit, memory_current=used)
    found = cgroup_memory()
    assert (None if found is None else found.left_bytes) == left
    assert available_bytes() == (1000 * GIB if left is None else left)


def test_the_tightest_of_the_groups_that_a_process_lies_in_counts(groups: Path) -> None:
    """A pod's limit above a container's, or the other way round."""
    (groups.parent / "own").write_text("1:name=systemd:/elsewhere\n0::/pod/box\n")
    write_group(groups / "pod", memory_max=8 * GIB, memory_current=7 * GIB)
    write_group(groups / "pod" / "box", memory_max=6 * GIB, memory_current=GIB)
    write_group(groups / "other", memory_max=1, memory_current=1)
    assert cgroup_memory() == GroupMemory(8 * GIB, GIB)
    write_group(groups / "pod", memory_current=2 * GIB)
    assert cgroup_memory() == GroupMemory(6 * GIB, 5 * GIB)
    write_group(groups / "pod" / "box", memory_high=2 * GIB)
    assert cgroup_memory() == GroupMemory(2 * GIB, GIB)


@pytest.mark.parametrize("own", ["0::/host/path/of/this\n", "0::/../outside\n", "12:cpu,memory:/docker/abc\n", "nonsense\n"])
def test_a_group_that_a_container_sees_as_the_root_is_found(groups: Path, own: str) -> None:
    (groups.parent / "own").write_text(own)
    write_group(groups, memory_max=3000, memory_current=1000)
    write_group(groups.parent / "outside", memory_max=1, memory_current=1)
    assert available_bytes() == 2000
    write_group(groups / "memory", memory_limit_in_bytes=2500, memory_usage_in_bytes=1000)
    assert available_bytes() == 1500


def write_nodes(folder: Path, cpus: dict[int, str], device_node: str) -> None:
    for node, text in cpus.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(f"{text}\n")
    (folder / "0000:4a:00.0").mkdir()
    (folder / "0000:4a:00.0" / "numa_node").write_text(f"{device_node}\n")


@pytest.mark.parametrize(
    ("nodes", "device_node", "near"),
    [
        ({0: "0-3", 1: "4-7"}, "1", {5, 6}),
        ({0: "0-3,8", 1: "4-7"}, "0", {2, 8}),
        ({0: "0-3,8-63", 1: "4-7", 2: "64-90"}, "2", set()),  # none of its own
        ({0: "0-90"}, "0", None),  # one node: all memory is near
        ({0: "0-3", 1: "4-7"}, "-1", None),
    ],
)
def test_near_cpus_are_those_of_the_devices_node_that_may_be_used(
    nodes: dict[int, str], device_node: str, near: set[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nodes(tmp_path, nodes, device_node)
    monkeypatch.setattr(numa, "NODES", tmp_path)
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 6, 8})
    assert numa.near_cpus("00000000:4A:00.0") == near
    assert numa.near_cpus("0000:4b:00.0") is None and numa.near_cpus(None) is None


def test_memory_is_touched_by_threads_on_the_cpus_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own, cpu = os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    seen: list[tuple[int, set[int]]] = []
    zero = host.zero

    def note(tensor: torch.Tensor) -> None:
        seen.append((threading.get_ident(), os.sched_getaffinity(0)))
        zero(tensor)

    monkeypatch.setattr(host, "zero", note)
    mapping = HostMapping(100_001)
    mapping.touch(frozenset({cpu}))
    assert [cpus for _, cpus in seen] == [{cpu}]
    seen.clear()
    mapping.touch()
    assert {frozenset(cpus) for _, cpus in seen} == {frozenset(own)}
    assert os.sched_getaffinity(0) == own and threading.get_ident() not in {thread for thread, _ in seen}


def flags_of(mapping: HostMapping) -> set[str]:
    """The kernel's flags of its pages: `dc` is not copied on fork, `dd` is not dumped."""
    address = mapping.tensor.data_ptr()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("the mapping is not there")


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="Linux's")
def test_weights_are_in_no_core_file_and_what_a_device_reads_is_not_shared_with_children() -> None:
    assert "dd" in flags_of(HostMapping(5000)) and "dc" not in flags_of(HostMapping(5000))
    assert {"dd", "dc"} <= flags_of(HostMapping(5000, inherited=False))
