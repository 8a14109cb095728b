"""Opens an engine, breaks an answer off and closes it, over and over: what the process holds must not grow.

python tests/gpu_leaks.py --device cuda
"""

import argparse
import sys

import psutil

from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.demo import DRAFT
from offload.device import open_device

ROUNDS = 6
ALLOWED_BYTES = 64 * 2**20  # per process, from the second round to the last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default="scale:tiny-llama-shape")
    arguments = parser.parse_args()
    settings = EngineSettings(model=arguments.model, draft_models=(str(DRAFT),), device=arguments.device, resident_layers=2)
    held = []
    for _ in range(ROUNDS):
        with open_engine(settings) as engine:
            answer = engine.stream([20, 300, 41, 900, 7], max_new_tokens=200, ignore_eos=True)
            next(answer), next(answer)
            pinned_bytes = engine.memory().host_pinned_bytes
        device = open_device(arguments.device)
        held.append((psutil.Process().memory_info().rss, device.free_bytes()))
        device.close()
        print(f"pinned {pinned_bytes / 2**20:.0f} MiB while open; after closing: host {held[-1][0] / 2**20:.0f} MiB, ", end="")
        print(f"device {held[-1][1] / 2**20:.0f} MiB free", flush=True)
    host_grown, device_grown = held[-1][0] - held[1][0], held[1][1] - held[-1][1]
    print(f"grown from round 2 to {ROUNDS}: host {host_grown / 2**20:.1f} MiB, device {device_grown / 2**20:.1f} MiB")
    on_gpu = settings.device != "cpu"  # on the CPU, "device" is the machine's free memory, which is everybody's
    return int(host_grown > ALLOWED_BYTES or (on_gpu and device_grown > ALLOWED_BYTES))


if __name__ == "__main__":
    sys.exit(main())
