"""Memory as planned is memory as used: the ledger fills the budget, and a run's measured peak is what the ledger says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allocations import working_bytes
from conftest import VOCAB_SIZE
from fakes import RecordingDevice, RefusingDevice
from layered import FORMS, open_placed, save_layers
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.device.cpu import CpuDevice
from offload.planner.cost import LayerCost, activation_bytes, stored_bytes
from offload.planner.memory import host_ledger
from offload.planner.residency import layers_ledger
from offload.source import check_source
from offload.weights.codec import LayerCodec
from offload.weights.placement import Placement
from planning import L40, LLAMA_2_70B

Models = Callable[..., Path]
CONTEXT = 256
# Weights outweigh the rest, as they do in models that are streamed: a layer has 2.8 MB, eight have 22 MB.
HEAVY = {"num_layers": 8, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "head_dim": 32}
GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 1.0}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("tree", "budget_mib", "params", "changes"),
    [
        ("none", 12, GREEDY, {}),
        ("none", 16, SAMPLED, {"num_key_value_heads": 8}),
        ("2x4:kary", 24, GREEDY, {}),
        ("3x8:kary", 30, SAMPLED, {"vocab_size": 1024}),
        ("3x8:kary", 20, GREEDY, {"family": "qwen3"}),
    ],
)
def test_the_ledger_fills_the_budget_and_the_peak_is_within_5_percent_of_it(
    models: Models, tree: str, budget_mib: int, params: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Device buffers as the device counts them, activations and logits as torch's allocator counts them, over a request that
    uses the context to its last row."""
    shape: dict[str, Any] = {**HEAVY, "max_position_embeddings": CONTEXT, **changes}
    family = shape.pop("family", "llama")
    folder = models(family, **shape)
    settings = EngineSettings(
        model=str(folder),
        draft_models=() if tree == "none" else (str(models(family, **{**shape, "num_layers": 2})),),
        tree=tree,
        device="cpu",
        max_context=CONTEXT,
        gpu_memory_bytes=budget_mib * 2**20,
        host_memory_bytes=2**30,
    )
    with open_engine(settings, hardware=L40) as engine:
        plan = engine.plan
        ledger_bytes, layer_bytes = sum(plan.device_ledger.values()), engine.loop._stream.slot_bytes
        assert budget_mib * 2**20 - layer_bytes < ledger_bytes <= budget_mib * 2**20
        assert plan.placement.streamed
        new_tokens = 12
        prompt = [token % VOCAB_SIZE for token in range(plan.text_tokens - new_tokens)]
        most = working_bytes(lambda: engine.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, **params))
        measured_bytes = engine.memory().device_peak_bytes + most
    ledger = plan.device_ledger
    assert 0.85 < most / (ledger["activations"] + ledger["logits and laws"]) <= 1, "weights must not hide what is wrong here"
    assert measured_bytes == pytest.approx(ledger_bytes, rel=0.05), (ledger, most)


def test_a_pass_that_is_recorded_works_in_the_memory_planned_for_it(models: Models) -> None:
    folder = models(**{**HEAVY, "num_layers": 2, "vocab_size": 4096, "max_position_embeddings": 700})
    settings = EngineSettings(
        model=str(folder), draft_models=(str(folder),), dtype="float32", tree="8x3:kary", device="cpu", max_context=600
    )
    cost = check_source(str(folder), "--model", "float32", "cpu").model.cost
    device = RecordingDevice()
    with open_engine(settings, hardware=L40, device=device) as engine:
        assert engine.loop._drafter is not None and engine.loop._drafter._fixed is not None
        passes = engine.loop._drafter._fixed
        for num_attended in (512, 600):
            most = working_bytes(passes._work(passes.max_rows, num_attended, 0))
            parts = activation_bytes(cost, passes.max_rows, num_attended), passes.max_rows * cost.vocab_size * 4
            assert 0.85 < most / max(parts) <= 1
        assert 2 * sum(parts) < engine.plan.device_ledger["draft recordings"]


@pytest.mark.parametrize("device_of", [CpuDevice, RefusingDevice])
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_several_sizes_take_what_the_ledgers_say(tmp_path: Path, form: str, device_of: type[CpuDevice]) -> None:
    """To the byte, wherever they lie: on a device with memory of its own and on one without, with a ring and without one."""
    layers = save_layers(tmp_path, 6, form)
    target = replace(LLAMA_2_70B, layers=tuple(map(layer_cost, layers.codecs)))
    for resident, disk in [(set(), set()), ({1, 2}, set()), ({0}, {3, 4}), ({0, 2, 3, 4, 5}, {1}), (set(range(6)), set())]:
        placement, device = Placement(num_layers=6, resident=frozenset(resident), disk=frozenset(disk)), device_of()
        num_slots = 2 if placement.streamed else 0
        with open_placed(device, layers, placement, num_slots) as (stream, store):
            on_device = layers_ledger(target, placement.resident, num_slots)
            on_device.pop("decoder's workspace", None)  # of which this decoder takes none
            assert on_device.get("decoded layer", 0) == stream.scratch_bytes
            # Resident layers without a base are decoded from a slot; where there is none, from memory that is free again once
            # they are loaded.
            are_decoded = any(codec.decode is not None and not codec.base.fields for codec in layers.codecs)
            landing_bytes = target.slot_bytes if are_decoded and not placement.streamed else 0
            assert sum(on_device.values()) + landing_bytes == device.peak_bytes()
            on_host = host_ledger(target, placement, shared=device.host_addressable)
            assert sum(on_host.values()) == store.host_bytes
            assert stream.bytes_per_pass == stored_bytes(target, placement.streamed)
        device.close()


def layer_cost(codec: LayerCodec) -> LayerCost:
    return LayerCost(
        stored_bytes=codec.stored.num_bytes,
        computed_bytes=codec.computed.num_bytes,
        num_parameters=codec.computed.num_elements,
        kv_bytes_per_row=2,
        scratch_bytes=codec.scratch_bytes,
        base_bytes=codec.base.num_bytes,
    )
