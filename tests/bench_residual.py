"""Matrices apart, into a base and what it lacks, by the numbers: bytes, and how fast they are made and decoded, here.

    python tests/bench_residual.py [--rows 8192] [--columns 8192] [--runs 5] [--threads N] [--kinds int4,int8,int3]

Prints one JSON object. Rates are bytes of raw weights a second, the best of `--runs`; `cpu_s_per_gb` is the processor time
that a GB took then, of all threads, and `ns_per_weight` the same for a weight: they say more where others use the machine, too.
Encoding is `survey`, which fits the base and looks at the matrix, and `encode`, which writes base and remainder, decodes what
was written and compares. With a GPU: decoding there, by the kernel and by plain torch.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from safetensors.torch import load_file

from bench_lossless import Row, best_of
from coding import NAME
from offload.coding.base import decode_base
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_layout import Base, base_prefix
from offload.coding.lossless_layout import prefix_of
from offload.coding.residual import ResidualKernel, decode_anywhere
from offload.coding.residual_cpu import decode_on_cpu
from offload.coding.residual_encode import ResidualEncoder
from offload.coding.residual_layout import Remainder
from offload.demo import TARGET
from offload.report.report import environment
from residual_coding import ResidualTensor, normal_matrix, take_apart

GROUPS: Final = (32, 64, 128)
ROWS, COLUMNS = 1024, 4096  # of what is only counted


def matrices(dtype: torch.dtype) -> Mapping[str, list[torch.Tensor]]:
    """What is counted. The bundled target's are trained; rows of the third differ by a factor of four and more."""
    files = [load_file(path) for path in sorted(TARGET.glob("*.safetensors"))]
    layers = [tensor for file in files for name, tensor in file.items() if ".layers." in name and tensor.dim() == 2]
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(ROWS, COLUMNS, generator=generator)
    chi = torch.randn(5, ROWS, COLUMNS, generator=generator).square().mean(0).sqrt()
    rows = torch.randn(ROWS, 1, generator=generator).exp()
    found = {"bundled target": layers, "normal": [normals * 0.02], "Student-t(5), rows apart": [normals / chi * rows * 0.02]}
    if dtype == torch.float16:
        found["normal, none of bfloat16"] = [normals.mul(0.02).half()]
    return {
        name: [tensor if tensor.dtype == torch.float16 else tensor.bfloat16().to(dtype) for tensor in tensors]
        for name, tensors in found.items()
    }


def counted(tensors: list[torch.Tensor], kind: BaseKind) -> dict[str, float]:
    codes = [take_apart(tensor, kind) for tensor in tensors]
    num_weights = sum(tensor.numel() for tensor in tensors)
    streamed_bytes = sum(code.streamed_bytes for code in codes)
    exceptions = sum(code.survey.num_exceptions for code in codes)
    lost, all_of_it = 0.0, 0.0
    for tensor, code in zip(tensors, codes, strict=True):
        values = torch.empty(tensor.shape)
        decode_base(code.base, kind, values)
        lost += float((values - tensor.float()).square().sum())
        all_of_it += float(tensor.float().square().sum())
    return {
        "streamed, of 16 bits": streamed_bytes / (2 * num_weights),
        "streamed bits": streamed_bytes * 8 / num_weights,
        "exceptions": exceptions / num_weights,
        "error of the base": math.sqrt(lost / all_of_it),
    }


def measured(runs: int, num_weights: int, work: Callable[[], object]) -> Row:
    row = best_of(runs, 2 * num_weights, work)
    return {**row, "ns_per_weight": row["cpu_s_per_gb"] * 2}


def rates(tensor: torch.Tensor, kind: BaseKind, runs: int, threads: int | None) -> dict[str, Any]:
    code, size = take_apart(tensor, kind), tensor.numel()
    with ResidualEncoder(kind, threads) as encoder:

        def survey_and_encode() -> None:
            survey = encoder.survey(tensor)
            assert survey is not None
            encoder.encode(tensor, survey, code.base, code.remainder)

        steps: dict[str, Callable[[], object]] = {
            "fit": lambda: encoder.fit(tensor),
            "survey, with the fit": lambda: encoder.survey(tensor),
            "write the base": lambda: encoder.encode_base(tensor, code.survey.fit, code.base),
            "encode, with the base": lambda: encoder.encode(tensor, code.survey, code.base, code.remainder),
            "whole": survey_and_encode,
        }
        rows = {name: measured(runs, size, step) for name, step in steps.items()}
    for dtype in dict.fromkeys((tensor.dtype, torch.bfloat16, torch.float32)):
        into = torch.empty(tensor.shape, dtype=dtype)
        decoders: dict[str, Callable[[], object]] = {
            f"decode into {dtype}": lambda into=into: decode_on_cpu(code.remainder, code.base, kind, into),  # type: ignore[misc]
            f"the base into {dtype}": lambda into=into: decode_base(code.base, kind, into),  # type: ignore[misc]
        }
        rows |= {name: measured(runs, size, decode) for name, decode in decoders.items()}
    few = take_apart(tensor[: max(2**21 // tensor.shape[1], 1)].contiguous(), kind)  # plain torch is a twin, and slow here
    twin = torch.empty(few.base.codes.shape[0], tensor.shape[1], dtype=tensor.dtype)
    rows["decode in plain torch"] = measured(1, twin.numel(), lambda: decode_anywhere(few.remainder, few.base, kind, twin))
    if torch.cuda.is_available():
        rows |= rates_on_gpu(tensor, code, runs)
    return rows


def rates_on_gpu(tensor: torch.Tensor, code: ResidualTensor, runs: int) -> dict[str, Row]:
    parts = {name: part.cuda() for name, part in code.parts.items()}
    into = torch.empty_like(tensor, device="cuda")
    remainder, base = Remainder.of(parts, prefix_of(NAME)), Base.of(parts, base_prefix(NAME))
    kernel = ResidualKernel(prefix_of(NAME), code.kind)
    decoders: dict[str, Callable[[], None]] = {
        "decode by the kernel": lambda: kernel(parts, into),
        "decode in plain torch on the GPU": lambda: decode_anywhere(remainder, base, code.kind, into),
    }
    found: dict[str, Row] = {}
    for name, decode in decoders.items():
        decode()
        assert torch.equal(into.cpu().view(torch.int16), tensor.view(torch.int16))

        def decode_and_wait(decode: Callable[[], None] = decode) -> None:
            decode()
            torch.cuda.synchronize()

        found[name] = measured(runs, tensor.numel(), decode_and_wait)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="matrices apart, into a base and what it lacks, by the numbers")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the encoder; decoders take as many as torch")
    parser.add_argument("--kinds", default=",".join(BASE_KINDS))
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    size = {"rows": arguments.rows, "columns": arguments.columns, "torch_threads": torch.get_num_threads()}
    document: dict[str, Any] = {"environment": environment(device), **size, "bytes": {}, "rates": {}}
    started = time.perf_counter()
    take_apart(normal_matrix(1, 9), BASE_KINDS["int4"])
    document["first_use_s"] = time.perf_counter() - started  # loops are compiled, or found where they were kept
    for name in arguments.kinds.split(","):
        for group in GROUPS:
            kind = BaseKind(bits=BASE_KINDS[name].bits, group=group)
            for dtype in (torch.bfloat16, torch.float16):
                rows = {what: counted(tensors, kind) for what, tensors in matrices(dtype).items()}
                document["bytes"][f"{name}, groups of {group}, {dtype}"] = {"base bits": kind.bits_per_weight, **rows}
        halves = normal_matrix(arguments.rows, arguments.columns).float().add(1e-5).half()
        for what, tensor in {
            "bfloat16": normal_matrix(arguments.rows, arguments.columns),
            "float16, from bfloat16": normal_matrix(arguments.rows, arguments.columns, torch.float16),
            "float16": halves,
        }.items():
            found = rates(tensor, BASE_KINDS[name], arguments.runs, arguments.threads)
            document["rates"][f"{what} beside {name}"] = found
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
