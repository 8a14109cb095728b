"""How fast weights of each format are decoded here: by plain torch and, on a GPU, by kernels. Prints a Markdown table.

    python tests/bench_formats.py [--device cuda] [--rows 6144 --columns 8192] [--only gptq]

A rate is of the bytes of 16-bit weights that come out, or of the stored bytes that go in: a format hides under the stream where
the latter is more than the link's. One parameter is decoded over and over, and the median counts; on a GPU it should be larger
than its caches.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from every_codec import EVERY_CODEC, computed_shape
from offload.coding.kernels import has_kernels
from offload.coding.tensor_codec import Decoder

HEAD = ("format", "bits per weight", "plain torch, GB/s out", "GB/s in", "kernel, GB/s out", "GB/s in")
NUM_WARM = 2  # compiles, and fills caches


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of one call, of as many as take `seconds`, three at least."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(NUM_WARM):
        once()
    times = [once() for _ in range(3)]
    while sum(times) < seconds:
        times.append(once())
    return median(times)


def row_of(name: str, rows: int, columns: int, device: torch.device, seconds: float) -> tuple[str, ...]:
    codec, stored = EVERY_CODEC[name](rows, columns)
    stored = {part: tensor.to(device) for part, tensor in stored.items()}
    dtype = torch.float16 if name == "lossless float16" else torch.bfloat16
    parameter = torch.empty(computed_shape(name, rows, columns), dtype=dtype, device=device)
    stored_bytes = sum(tensor.numel() * tensor.itemsize for tensor in stored.values())

    def rates(decode: Decoder) -> tuple[str, str]:
        taken_s = seconds_of(lambda: decode(stored, parameter), device, seconds)
        return f"{parameter.numel() * 2 / taken_s / 1e9:.2f}", f"{stored_bytes / taken_s / 1e9:.2f}"

    has_kernel = device.type == "cuda" and codec.kernel is not None and has_kernels()
    by_kernel = rates(codec.kernel) if has_kernel and codec.kernel is not None else ("", "")
    return name, f"{stored_bytes * 8 / parameter.numel():.2f}", *rates(codec.decode), *by_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1536, help="of the parameter, a multiple of 48")
    parser.add_argument("--columns", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each format and way")
    parser.add_argument("--only", default="", help="formats whose name has this")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{arguments.rows} x {arguments.columns}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("|" + "|".join(HEAD) + "|\n" + "|---" * len(HEAD) + "|")
    for name in EVERY_CODEC:
        if arguments.only in name:
            print("|" + "|".join(row_of(name, arguments.rows, arguments.columns, device, arguments.seconds)) + "|", flush=True)


if __name__ == "__main__":
    main()
