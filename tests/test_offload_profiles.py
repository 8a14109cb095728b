"""Every file of profiles/hardware loads through the loader of the product and says where each figure comes from."""

import json
from pathlib import Path

import pytest

from offload.planner.hardware_file import from_json, read_hardware, to_json

HARDWARE = sorted((Path(__file__).resolve().parent.parent / "profiles/hardware").iterdir())
PUBLISHED = ("l40", "rtx-4090", "rtx-3090", "rtx-4070-ti", "a100-80gb", "h100-sxm")
FIGURES = ("device_memory_bytes", "link_bytes_per_s", "flops_per_s", "device_memory_bytes_per_s")


def test_the_published_machines_are_there() -> None:
    assert {f"{name}.json" for name in PUBLISHED} <= {path.name for path in HARDWARE}


@pytest.mark.parametrize("path", HARDWARE, ids=lambda path: path.stem)
def test_hardware_files_load_and_survive_being_written_again(path: Path) -> None:
    profile = read_hardware(path)
    assert profile.source and from_json(json.loads(json.dumps(to_json(profile)))) == profile
    assert profile.published == (path.stem in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_plausible_and_each_has_its_source(name: str) -> None:
    profile = read_hardware(HARDWARE[0].with_name(f"{name}.json"))
    assert all(len(str(profile.facts[figure])) > 10 for figure in FIGURES)
    pcie = 63e9 if name == "h100-sxm" else 31.5e9  # the wire's rate, x16, generation 5 and 4
    assert 0.75 * pcie < profile.link_bytes_per_s < 0.9 * pcie
    assert profile.device_memory_bytes is not None and 12 * 2**30 <= profile.device_memory_bytes <= 80 * 2**30
    assert 4e11 < profile.device_memory_bytes_per_s < 4e12 and 4e13 < profile.flops_per_s < 1e15
