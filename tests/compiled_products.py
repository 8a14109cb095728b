"""Compiles the product with a base for a GPU, which this machine need not have, and says how it multiplies.

    python tests/compiled_products.py [compute capability, such as 90]

Prints a JSON object: of each kind of base, dtype and number of rows, the matrix instructions in it and the bytes of shared
memory that it takes. It is a process of its own, as Triton's interpreter, which other tests use, compiles nothing.
"""

import json
import os
import re
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime.jit import JITFunction

from compiled_kernels import compiled
from offload.coding.base_kinds import BASE_KINDS
from offload.coding.base_layout import Base, base_parts
from offload.coding.base_product_kernel import product_by_kernel

MATRIX = re.compile(r"wgmma\.mma_async\S*|mma\.sync\S*")
OUTPUTS, COLUMNS = 1000, 8192
CASES = ((torch.bfloat16, 1), (torch.float16, 64), (torch.bfloat16, 256), (torch.float32, 256))


def main(capability: int = 90) -> None:
    code: list[Any] = []

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        code.append(compiled(kernel, arguments, named, capability))

    JITFunction.run = compile_only
    found: dict[str, Any] = {}
    for name, kind in BASE_KINDS.items():
        parts = base_parts("weight", (OUTPUTS, COLUMNS), kind)
        base = Base.of({part.name: torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts}, "weight_base_")
        for dtype, rows in CASES:
            code.clear()
            x = torch.empty(rows, COLUMNS, dtype=dtype, device="meta")
            product_by_kernel(x, base, kind, torch.empty(rows, OUTPUTS, dtype=dtype, device="meta"))
            found[f"{name} {dtype} {rows}"] = {
                "matrix": sorted({name for kernel in code for name in MATRIX.findall(kernel.asm["ptx"])}),
                "shared_bytes": max(kernel.metadata.shared for kernel in code),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
