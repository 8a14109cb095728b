"""Run by a test in a process of its own: `run_70b.py ARGUMENTS` again and again, each time with a real signal at another point
of loading. Prints a line of JSON for each: what the process ended with, and what it still held then.

    PYTHONPATH=. python tests/interrupted.py NUM_POINTS SIGNAL ARGUMENTS...

Every run is a fork of this process, which has imported everything: that takes longer than all else.
"""

import gc
import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

import offload.assemble
from fakes import WatchedDevice
from offload.cli.main import main
from test_offload_loading import fills_noted


class SignallingDevice(WatchedDevice):
    """Sends a signal to the process at the `point`-th call, from 1."""

    def __init__(self, point: int, number: int) -> None:
        super().__init__()
        self._point, self._number = point, number

    def called(self, name: str) -> None:
        super().called(name)
        if len(self.calls) == self._point:
            os.kill(os.getpid(), self._number)


def end(point: int, number: int, arguments: list[str]) -> dict[str, Any]:
    device, before = SignallingDevice(point, number), set(threading.enumerate())
    offload.assemble.device_of = lambda settings: device
    gc.collect()
    gc.disable()  # what only a collection frees counts as held
    with fills_noted(device):
        code = main(arguments)
    return {
        "code": code,
        "call": device.calls[point - 1] if point else "",
        "calls": device.calls if not point else [],
        "held_bytes": device.held_bytes,
        "under_way": device.num_under_way,
        "threads": [thread.name for thread in threading.enumerate() if thread not in before],
    }


def in_a_fork(point: int, number: int, arguments: list[str]) -> dict[str, Any]:
    reading, writing = os.pipe()
    stderr_reading, stderr_writing = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(stderr_writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            os.write(writing, json.dumps(end(point, number, arguments)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    os.close(stderr_writing)
    with open(reading) as result, open(stderr_reading) as errors:
        ended = {**json.loads(result.read() or "{}"), "stderr": errors.read()}
    os.waitpid(process, 0)
    return ended


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    num_points, number, arguments = int(sys.argv[1]), signal.Signals[sys.argv[2]], sys.argv[3:]
    whole = in_a_fork(0, number, arguments)
    last = len(whole["calls"]) - whole["calls"][::-1].index("filled")
    for point in sorted({round(1 + (last - 1) * part / (num_points - 1)) for part in range(num_points)}):
        print(json.dumps(in_a_fork(point, number, arguments)), flush=True)
