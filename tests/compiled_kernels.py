"""Compiles the kernels of every format for a GPU, which this machine need not have, and says what is not exact in them.

    python tests/compiled_kernels.py [compute capability, such as 90]

Prints a JSON object: of each format that has a kernel, the instructions that round otherwise than torch. It is a process of its
own, as Triton's interpreter, which other tests use, compiles nothing.
"""

import inspect
import json
import os
import re
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from every_codec import EVERY_CODEC, computed_shape

TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
# Numbers below the normal ones taken for zero, division and roots that are near enough, products added before they are rounded
INEXACT = re.compile(r"\S*(?:\.ftz|\.approx|div\.full|fma)\S*")
ROWS, COLUMNS = 384, 256


def compiled(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any], capability: int) -> Any:
    """What Triton makes of a launch with these arguments, machine code included."""
    parameters = {parameter.name: parameter for parameter in kernel.params}
    options = {name: value for name, value in named.items() if name not in parameters}
    given = inspect.signature(kernel.fn).bind(*arguments, **{name: named[name] for name in named.keys() - options.keys()})
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}  # as a launch finds them: memory is aligned, and sizes may be multiples of 16
    for number, (name, value) in enumerate(given.arguments.items()):
        if parameters[name].is_constexpr:
            signature[name], constants[number,] = "constexpr", value
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameters[name].do_not_specialize):
                attributes[number,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int = 90) -> None:
    code: list[str] = []

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        code.append(compiled(kernel, arguments, named, capability).asm["ptx"])

    JITFunction.run = compile_only
    found: dict[str, list[str]] = {}
    for name, make in EVERY_CODEC.items():
        codec, stored = make(ROWS, COLUMNS)
        if codec.kernel is not None:
            code.clear()
            codec.kernel(stored, torch.empty(computed_shape(name, ROWS, COLUMNS), dtype=torch.bfloat16))
            found[name] = sorted(set(INEXACT.findall("\n".join(code))))
            assert code, f"{name} launched nothing"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
