"""Run by a test in a process of its own: converts a folder again and again, and is killed at a later point each time until it
gets to the end. Prints a line of JSON for each: the files that were there afterwards; and what became of the last.

    PYTHONPATH=. python tests/converting.py STEP MODEL OUTPUT CODEC
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offload.cli.convert import conversion_of, scheme_of
from offload.weights import conversion, conversion_state


def killing(point: int) -> Callable[..., None]:
    """Ends the process without notice at the `point`-th call."""
    calls = 0

    def call(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def convert_until(point: int, model: str, output: str, codec: str) -> None:
    kill, write = killing(point), conversion.write_atomically

    def write_and_kill(path: Path, text: str) -> None:
        kill()
        write(path, text)
        kill()

    patched: Any
    for patched in (conversion, conversion_state):
        patched.write_atomically = write_and_kill
    torch.set_num_threads(1)
    converted = conversion.convert(conversion_of(model, output, scheme_of(codec, None)), kill)
    print(json.dumps({"kept": converted.num_kept}), flush=True)


def main(step: str, model: str, output: str, codec: str) -> None:
    for point in itertools.count(1, int(step)):
        process = os.fork()
        if not process:
            convert_until(point, model, output, codec)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"status": status, "files": sorted(os.listdir(output))}), flush=True)
        if status == 0:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
