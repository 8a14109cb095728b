"""Resident layers that the planner keeps packed: the text is the same, and the ledger is what they take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import EagerDevice, LateDevice, layer_fault
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.engine.engine import Engine
from offload.planner.hardware import DecodeTime
from packed_models import write_packed
from planning import L40

PROMPT = [5, 9, 33, 2, 71]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
NUM_LAYERS = 6
# A link so slow that it is all that counts, beside a decoder that takes no time.
FAST = replace(
    L40, link_bytes_per_s=1e6, decoders=(DecodeTime(weights="FP8", dtype_bytes=4, computed_bytes=2**20, layer_s=1e-9),)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed("fp8", tmp_path_factory.mktemp("fp8"), num_hidden_layers=NUM_LAYERS).folder


@contextmanager
def opened(folder: Path, device: CpuDevice | None = None, **changes: Any) -> Iterator[Engine]:
    settings = EngineSettings(
        **{"model": str(folder), "device": "cpu", "tree": "none", "max_context": 64, "host_memory_bytes": 2**30, **changes}
    )
    with open_engine(settings, device=device, hardware=FAST) as engine:
        yield engine


def needed_bytes(folder: Path, num_resident: int) -> int:
    """Of a device on which so many layers are resident and coded, to the byte."""
    with opened(folder, resident_layers=0) as engine:
        ledger, slot_bytes = engine.plan.device_ledger, engine.loop._stream.slot_bytes
        return sum(ledger.values()) + num_resident * slot_bytes


@pytest.mark.matrix
@pytest.mark.parametrize(
    "device_of", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in (CpuDevice, EagerDevice)), LateDevice]
)
@pytest.mark.parametrize("num_resident", [1, 3])
def test_what_stays_packed_on_the_device_changes_no_token(
    folder: Path, device_of: Callable[[], CpuDevice], num_resident: int
) -> None:
    with opened(folder, resident_layers=0) as engine:
        expected = engine.generate(PROMPT, **GREEDY).token_ids
        streamed_bytes = engine.plan.bytes_per_pass
    with opened(folder, device_of(), gpu_memory_bytes=needed_bytes(folder, num_resident), slots=2) as engine:
        plan = engine.plan
        assert len(plan.placement.resident) == num_resident and plan.placement.coded == plan.placement.resident
        assert plan.bytes_per_pass == streamed_bytes * (NUM_LAYERS - num_resident) // NUM_LAYERS
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected


def test_a_packed_model_of_which_all_layers_fit_packed_streams_nothing(folder: Path) -> None:
    with opened(folder, resident_layers=0) as engine:
        expected = engine.generate(PROMPT, **GREEDY).token_ids
    with opened(folder, gpu_memory_bytes=needed_bytes(folder, NUM_LAYERS - 2)) as engine:  # in place of two slots
        plan = engine.plan
        assert len(plan.placement.resident) == NUM_LAYERS and plan.placement.coded and plan.num_slots == 0
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected


@pytest.mark.matrix
@pytest.mark.parametrize("device_of", [EagerDevice, LateDevice])
@pytest.mark.parametrize("num_resident", [3, NUM_LAYERS - 2])
def test_packed_layers_leave_a_device_that_runs_out_of_memory(
    folder: Path, device_of: Callable[[], CpuDevice], num_resident: int
) -> None:
    """From a stream, one layer; where nothing was streamed, as many as free more than the slots take."""
    with opened(folder, resident_layers=0) as engine:
        expected = engine.generate(PROMPT, **GREEDY).token_ids
    with opened(folder, device_of(), gpu_memory_bytes=needed_bytes(folder, num_resident)) as engine:
        planned = engine.plan
        with layer_fault(engine, 0, lambda: engine.plan is planned) as failed:
            assert engine.generate(PROMPT, **GREEDY).token_ids == expected
        plan = engine.plan
        assert len(failed) == 1 and len(plan.placement.resident) < len(planned.placement.resident)
        assert plan.placement.coded == planned.placement.coded & plan.placement.resident
        assert sum(plan.device_ledger.values()) < sum(planned.device_ledger.values())
        assert engine.memory().host_weights_bytes == sum(plan.host_ledger.values())
        assert engine.generate(PROMPT, **GREEDY).token_ids == expected
