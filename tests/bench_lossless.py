"""The code of 16-bit weights by the numbers: bytes, and how fast it is made and decoded, here.

    python tests/bench_lossless.py [--weights 64M] [--runs 5] [--threads N]

Prints one JSON object. Rates are bytes of raw weights a second, the best of `--runs`; `cpu_s_per_gb` is the processor time that
a GB took then, of all threads, which says more where others use the machine, too. To encode is to look at the tensor, to code
it, and to decode and compare what was written. With a GPU: decoding there, by the kernel and by plain torch.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import offload.demo
from coding import NAME, CodedTensor, encode, normal
from offload.coding.lossless import LosslessKernel, decode_anywhere, decode_on_cpu
from offload.coding.lossless_encode import Encoder
from offload.coding.lossless_layout import Coded, prefix_of
from offload.config import parse_size
from offload.report.report import environment

Row = dict[str, float]


def best_of(runs: int, num_bytes: int, work: Callable[[], object]) -> Row:
    rows: list[Row] = []
    for _ in range(runs):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        rows.append({"bytes_per_s": num_bytes / wall_s, "cpu_s_per_gb": cpu_s / num_bytes * 1e9})
    return max(rows, key=lambda row: row["bytes_per_s"])


def rates(tensor: torch.Tensor, runs: int, threads: int | None) -> dict[str, Any]:
    num_bytes, code = 2 * tensor.numel(), encode(tensor)
    with Encoder(threads) as encoder:
        survey = encoder.survey(tensor)
        assert survey is not None

        def look_and_encode() -> None:
            found = encoder.survey(tensor)
            assert found is not None
            encoder.encode(tensor, found, code.coded)

        rows = {
            "look": best_of(runs, num_bytes, lambda: encoder.survey(tensor)),
            "look, encode, compare": best_of(runs, num_bytes, look_and_encode),
        }
    for dtype in (tensor.dtype, torch.float32):
        into = torch.empty(tensor.shape, dtype=dtype)
        rows[f"decode into {dtype} on the CPU"] = best_of(runs, num_bytes, lambda into=into: decode_on_cpu(code.coded, into))  # type: ignore[misc]
    twin = torch.empty_like(tensor)
    rows["decode in plain torch on the CPU"] = best_of(runs, num_bytes, lambda: decode_anywhere(code.coded, twin))
    if torch.cuda.is_available():
        rows |= rates_on_gpu(tensor, code, runs)
    return {"ratio": code.num_bytes / num_bytes, **rows}


def rates_on_gpu(tensor: torch.Tensor, code: CodedTensor, runs: int) -> dict[str, Row]:
    parts = {name: part.cuda() for name, part in code.parts.items()}
    into = torch.empty_like(tensor, device="cuda")
    coded, kernel = Coded.of(parts, prefix_of(NAME)), LosslessKernel(prefix_of(NAME))
    decoders: dict[str, Callable[[], None]] = {
        "decode by the kernel": lambda: kernel(parts, into),
        "decode in plain torch on the GPU": lambda: decode_anywhere(coded, into),
    }
    found: dict[str, Row] = {}
    for name, decode in decoders.items():
        decode()
        assert torch.equal(into.cpu().view(torch.int16), tensor.view(torch.int16))

        def decode_and_wait(decode: Callable[[], None] = decode) -> None:
            decode()
            torch.cuda.synchronize()

        found[name] = best_of(runs, 2 * tensor.numel(), decode_and_wait)
    return found


def demo_ratio(dtype: torch.dtype) -> float:
    """Of the matrices of the bundled target's layers."""
    tensors = [load_file(path) for path in (Path(offload.demo.__file__).parent / "target").glob("*.safetensors")]
    layers = [tensor.to(dtype) for file in tensors for name, tensor in file.items() if ".layers." in name and tensor.dim() == 2]
    return sum(encode(layer).num_bytes for layer in layers) / sum(2 * layer.numel() for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description="the code of 16-bit weights by the numbers")
    parser.add_argument("--weights", default="64M")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    num_weights = parse_size(arguments.weights, flag="--weights")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    document: dict[str, Any] = {"environment": environment(device), "weights": num_weights}
    for dtype in (torch.bfloat16, torch.float16):
        document[f"{dtype}, from bfloat16"] = {
            "ratio of the bundled target's layers": demo_ratio(dtype),
            **rates(normal(num_weights, dtype), arguments.runs, arguments.threads),
        }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
