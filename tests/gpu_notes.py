"""What the steps of a GPU session share: how large things are, and a file for what they find."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """`host_memory_bytes` is what identical layers share where it does not hold them all: the same bytes per pass, loaded in
    seconds. `accelerate_layers` are tried one after another until one fits into the time and the memory."""

    device: str = "cuda"
    dtype: str = "float16"  # near ties fall eight times less often than in bfloat16
    preset: str = "llama-2-70b"
    light_layers: int = 8
    light_tree: str = "64x10"
    layers: int = 80
    gpu_memory_bytes: int = 48 * GIB
    host_memory_bytes: int = 24 * GIB
    register_bytes: int = 4 * GIB
    layer_bytes: int = 1632 * MIB
    samples: int = 300
    tokens: int = 48
    accelerate: str = "accelerate"
    accelerate_layers: tuple[int, ...] = (24, 8)


SMALL = Size(
    device="cpu",
    dtype="float32",
    preset="tiny-llama-shape",
    light_layers=6,
    light_tree="4x4:kary",
    layers=6,
    gpu_memory_bytes=170 * MIB,
    host_memory_bytes=200 * MIB,
    register_bytes=16 * MIB,
    layer_bytes=64 * MIB,
    samples=20,
    tokens=12,
    accelerate="accelerate-disk",
    accelerate_layers=(2,),
)


class Notes:
    """A JSON file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._found, self.folder = path, dict[str, Any](), path.parent
        self.failed = False

    def found(self, name: str) -> Any:
        return self._found[name]

    def add(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` finds, or how it failed: the others are measured all the same."""
        start_s = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            self.failed, found = True, None
            traceback.print_exc()
            self._found[name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            self._found[name] = found
        self._path.write_text(json.dumps(self._found, indent=1, default=str))
        print(f"-- {name}: {time.monotonic() - start_s:.1f} s", flush=True)
        return found
