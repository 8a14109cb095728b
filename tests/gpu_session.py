"""The steps of gpu_session.sh that are not commands of their own. Each writes what it has measured as soon as it has it.

python tests/gpu_session.py facts|latency|light|figure --out DIR [--seconds N] [--small]

`--small`: the same on a CPU, with models of the same make a thousandth as large.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpu_notes import GIB, SMALL, Notes, Size
from gpu_texts import figure, light
from offload.device import Device, open_device, pinned
from offload.doctor.gather import gather_facts, time_copies
from offload.doctor.judge import judge
from offload.report.report import environment

UPLOAD = torch.arange(2**13)  # 64 KiB


def facts(size: Size, notes: Notes, seconds: float) -> None:
    def machine() -> Any:
        found = gather_facts(model=None, draft_model=None, device=size.device)
        for finding in judge(found):
            print(finding.status, finding.name, finding.value, finding.cure or "")
        return asdict(found)

    def copies() -> Any:
        device = open_device(size.device)
        try:
            found = asdict(time_copies(device, size.register_bytes, lambda: None))
            print(f"touched and registered at {found['tried_bytes'] / found['register_s'] / 1e9:.2f} GB/s; ", end="")
            print(f"copied {found['bytes_per_s'] / 1e9:.2f} GB/s; free on the device {device.free_bytes() / GIB:.1f} GiB")
            return {**found, "free_bytes": device.free_bytes()}
        finally:
            device.close()

    notes.add("environment", lambda: environment(size.device))
    notes.add("machine", machine)
    notes.add("copies", copies)


def latency(size: Size, notes: Notes, seconds: float) -> None:
    for way in ("copy", "mapped") if size.device != "cpu" else ("copy",):

        def measure(way: str = way) -> Any:
            device = open_device(size.device, small_uploads=way)
            try:
                with pinned(device, size.layer_bytes, ()) as source:
                    return _latencies(device, source.tensor, size.samples)
            finally:
                device.close()

        for name, found in (notes.add(way, measure) or {}).items():
            print(f"{way:7} {name:30}", *(f"{key} {value * 1e6:.0f} us" for key, value in found.items() if key.endswith("_s")))


def _latencies(device: Device, source: torch.Tensor, samples: int) -> dict[str, dict[str, float]]:
    """Of an upload that compute has seen, and of a few numbers on the host, idle and beside a copy that is begun anew when it
    has ended. What waits for it takes as long as the rest of it."""
    slot, few = device.alloc(source.numel()), device.upload(torch.arange(20))

    def upload() -> None:
        device.upload(UPLOAD)
        device.drain(device.mark())

    found = {}
    for name, work in (("upload of 64 KiB", upload), ("download of 20 numbers", lambda: device.download(few))):
        work()
        for busy in (False, True):
            copy, before, times = None, device.mark(), []
            for _ in range(samples):
                if busy and (copy is None or device.passed(copy)):
                    copy = device.copy_async(slot, source, before)
                start_s = time.perf_counter()
                work()
                times.append(time.perf_counter() - start_s)
            if copy is not None:
                device.drain(copy)
            ordered = sorted(times)
            quantiles = {"p50_s": ordered[samples // 2], "p99_s": ordered[-1 - samples // 100], "most_s": ordered[-1]}
            found[f"{name}, {'busy' if busy else 'idle'}"] = quantiles
        if copy is not None:
            interval = device.interval(copy)
            found[f"{name}, busy"]["copy_s"] = interval.end_s - interval.start_s
    return found


STEPS = {"facts": facts, "latency": latency, "light": light, "figure": figure}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    notes = Notes(arguments.out / f"{arguments.step}.json")
    STEPS[arguments.step](SMALL if arguments.small else Size(), notes, arguments.seconds)
    return int(notes.failed)


if __name__ == "__main__":
    sys.exit(main())
