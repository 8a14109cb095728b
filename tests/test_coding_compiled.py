"""Kernels compile for GPUs as they are, and round there as they do in the interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from every_codec import EVERY_CODEC
from offload.coding.base_kinds import BASE_KINDS

pytest.importorskip("triton")
LEAST_SHARED_BYTES = 99 * 2**10  # that a program may have: of compute capability 8.6, 8.9 and 12.0
ROOT = Path(__file__).resolve().parent.parent


def compiled_by(script: str, capability: int, folder: Path) -> dict[str, Any]:
    """What the script prints."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / script), str(capability)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder), "HOME": str(folder)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=590)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_and_approximate_nothing(capability: int, tmp_path: Path) -> None:
    found = compiled_by("compiled_kernels.py", capability, tmp_path)
    assert found.keys() == {name for name, make in EVERY_CODEC.items() if make(48, 256)[0].kernel is not None}
    assert {name: instructions for name, instructions in found.items() if instructions} == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_products_with_a_base_take_the_matrix_units_and_no_more_memory_than_any_gpu_has(
    capability: int, instruction: str, tmp_path: Path
) -> None:
    found = compiled_by("compiled_products.py", capability, tmp_path)
    assert {name.split()[0] for name in found} == BASE_KINDS.keys()
    for name, program in found.items():
        assert program["shared_bytes"] <= LEAST_SHARED_BYTES, name
        if "float32" in name:
            assert not program["matrix"], name  # which would be TF32's
        else:
            assert program["matrix"], name
            assert all(matrix.startswith(instruction) and ".f32." in matrix for matrix in program["matrix"]), name
