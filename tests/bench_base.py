"""How long a level of a draft that is a base takes here: all products of its layers, against reading their bytes once.

    python tests/bench_base.py [--device cuda] [--hidden 8192 --intermediate 28672 --kv 1024 --layers 4] [--rows 1,16,64,256]

Of each kind of base and number of rows: the median time of the products of a layer, the rate at which it reads codes and
scales, and what 16-bit weights take in torch. On a GPU the layers together should be larger than its caches. `copy` is the rate
at which memory is copied, each byte counted as read and as written, which is what there is to reach. Prints a Markdown table.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from bases import any_base
from bench_formats import seconds_of
from offload.coding.base_kinds import BASE_KINDS, BaseKind
from offload.coding.base_layout import Base
from offload.coding.base_product import base_product
from offload.coding.kernels import has_kernels

HEAD = ("base", "rows", "layer, ms", "base read at GB/s", "of copy", "16-bit layer, ms")


def shapes_of(hidden: int, intermediate: int, kv: int) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of the maps of a layer: query, key, value, output, gate, up, down."""
    return (hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), *[(intermediate, hidden)] * 2, (hidden, intermediate)


def layer_of(shapes: tuple[tuple[int, int], ...], kind: BaseKind, device: torch.device) -> list[Base]:
    bases = [any_base(*shape, kind) for shape in shapes]
    return [Base(codes=b.codes.to(device), scale=b.scale.to(device), zero=b.zero.to(device)) for b in bases]


def copy_rate(device: torch.device, num_bytes: int, seconds: float) -> float:
    """Bytes read and written a second."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--kv", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype, kernels = (torch.bfloat16, has_kernels()) if on_gpu else (torch.float32, False)
    shapes = shapes_of(arguments.hidden, arguments.intermediate, arguments.kv)
    copied = copy_rate(device, 2**30 if on_gpu else 2**27, arguments.seconds)
    print(f"{arguments.layers} layers of {shapes}, {device}, {dtype}, kernels {kernels}, torch {torch.__version__}")
    print(f"copy: {copied / 1e9:.1f} GB/s\n\n|" + "|".join(HEAD) + "|\n" + "|---" * len(HEAD) + "|")
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = {columns: torch.randn(512, columns, dtype=dtype, device=device) for _, columns in shapes}

    def time_of(layer: Callable[[], object]) -> float:
        return seconds_of(layer, device, arguments.seconds)

    for name, kind in BASE_KINDS.items():
        layers = [layer_of(shapes, kind, device) for _ in range(arguments.layers)]
        num_bytes = sum(tensor.nbytes for base in layers[0] for tensor in (base.codes, base.scale, base.zero))
        for rows in map(int, arguments.rows.split(",")):
            turns = cycle(layers)

            def level(rows: int = rows, kind: BaseKind = kind, turns: "cycle[list[Base]]" = turns) -> None:
                for base, (_, columns) in zip(next(turns), shapes, strict=True):
                    base_product(inputs[columns][:rows], base, kind, kernels=kernels)

            def plain(rows: int = rows) -> None:
                for weight in weights:
                    F.linear(inputs[weight.shape[1]][:rows], weight)

            layer_s, plain_s = time_of(level), time_of(plain)
            rate = num_bytes / layer_s
            cells = f"{layer_s * 1e3:.3f}", f"{rate / 1e9:.1f}", f"{rate / copied:.2f}", f"{plain_s * 1e3:.3f}"
            print("|" + "|".join((name, str(rows), *cells)) + "|", flush=True)


if __name__ == "__main__":
    main()
