"""Which CPUs are near which memory, as Linux tells. Asks no device."""

import os
from pathlib import Path

NODES = Path("/sys/devices/system/node")
PCI_DEVICES = Path("/sys/bus/pci/devices")


def nodes() -> dict[int, set[int]]:
    """{node: its CPUs} of this machine; empty where the system does not tell."""
    return {int(path.name[4:]): _cpus(path) for path in NODES.glob("node[0-9]*")}


def node_of(bus_id: str) -> int | None:
    """The node that a PCI device hangs on; None where there is but one, or the system does not tell. The driver writes domains
    with eight digits, the kernel with four and in lower case."""
    try:
        node = int((PCI_DEVICES / bus_id[-12:].lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def bus_id_of(properties: object) -> str | None:
    """Of a GPU, as torch describes it. Not all its versions tell."""
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    known = [number for number in numbers if number is not None]
    return "{:04x}:{:02x}:{:02x}.0".format(*known) if len(known) == len(numbers) else None


def near_cpus(bus_id: str | None) -> frozenset[int] | None:
    """The CPUs whose memory is near a device, where that makes a difference: those of its node, of several, that this process
    may use. An empty set: it may use none of them. None: there is one node, or nobody knows the device's."""
    every = nodes()
    node = node_of(bus_id) if bus_id is not None and len(every) > 1 else None
    return frozenset(every.get(node, set()) & os.sched_getaffinity(0)) if node is not None else None


def _cpus(node: Path) -> set[int]:
    """The CPUs of a node, from a list such as 0-3,8."""
    try:
        text = (node / "cpulist").read_text().strip()
    except OSError:
        return set()
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}
