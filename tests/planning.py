"""Machines and models for tests of the planner: published shapes, round rates."""

from dataclasses import replace

from offload.config import EngineSettings
from offload.planner.cost import LayerCost, ModelCost, kv_bytes_per_row
from offload.planner.hardware import HardwareProfile, ModelTimes
from offload.planner.memory import Budgets
from offload.planner.plan import Plan, plan_run
from offload.planner.prediction import DraftOption, Offer
from offload.planner.tree_flag import DEFAULT_ACCEPTANCE, read_acceptance
from offload.planner.workload import make_workload
from tree.acceptance import Acceptance
from tree.shape import TreeShape
from tree.spec import TreeRequest

GIB = 2**30


def equal_layers(num_layers: int, *, num_parameters: int, num_kv_heads: int) -> tuple[LayerCost, ...]:
    """In float16, with heads of 128, stored as they compute."""
    layer = LayerCost(
        stored_bytes=2 * num_parameters,
        computed_bytes=2 * num_parameters,
        num_parameters=num_parameters,
        kv_bytes_per_row=kv_bytes_per_row(num_kv_heads, 128, 2),
    )
    return (layer,) * num_layers


LLAMA_2_70B = ModelCost(
    layers=equal_layers(80, num_parameters=855_654_400, num_kv_heads=8),
    outside_bytes=2 * 32000 * 8192 * 2,
    hidden_size=8192,
    intermediate_size=28672,
    num_heads=64,
    head_dim=128,
    vocab_size=32000,
    dtype_bytes=2,
)
LLAMA_2_7B = replace(
    LLAMA_2_70B,
    layers=equal_layers(32, num_parameters=202_383_360, num_kv_heads=32),
    outside_bytes=2 * 32000 * 4096 * 2,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
)
REMAINDER_BITS, BASE_BITS, LOSSLESS_BITS = 7.5, 4.375, 11.28  # of 16, measured


def coded_layers(model: ModelCost, stored_bits: float, base_bits: float = 0.0) -> ModelCost:
    """`model` with its layers, which are all alike, in so many bits a weight, beside a base of so many."""
    layer = model.common_layer
    size = layer.num_parameters
    layer = replace(
        layer,
        stored_bytes=round(size * stored_bits / 8),
        base_bytes=round(size * base_bits / 8),
        scratch_bytes=layer.computed_bytes if stored_bits < 16 else 0,
    )
    return replace(model, layers=(layer,) * model.num_layers)


_LARGE = LayerCost(stored_bytes=3 * 10**9, computed_bytes=5 * 10**9, num_parameters=25 * 10**8, kv_bytes_per_row=1000)
_LITTLE = replace(_LARGE, stored_bytes=10**9, computed_bytes=10**9, num_parameters=5 * 10**8, scratch_bytes=10**8)
TWO_KINDS = replace(LLAMA_2_70B, layers=(_LARGE, _LARGE, *[_LITTLE] * 6, _LARGE))
L40 = HardwareProfile(
    device_name="an L40 in round numbers",
    device_type="cuda",
    source="tests",
    link_bytes_per_s=25e9,
    disk_bytes_per_s=5e9,
    flops_per_s=110e12,
    device_memory_bytes_per_s=864e9,
    layer_overhead_s=1e-4,
)
SETTINGS = EngineSettings(model="m")
CHAINS = TreeShape.chains(4, 6)
PUBLISHED = read_acceptance(DEFAULT_ACCEPTANCE)


def constant_times(rows: tuple[int, ...], layer_s: tuple[float, ...], rest_s: float = 0.0) -> ModelTimes:
    return ModelTimes(context_rows=0, rows=rows, layer_s=layer_s, rest_s=(rest_s,) * len(rows))


def draft_option(
    cost: ModelCost = LLAMA_2_7B,
    acceptance: Acceptance = PUBLISHED,
    hardware: HardwareProfile = L40,
    name: str = "draft",
    times: ModelTimes | None = None,
) -> DraftOption:
    times = times or hardware.times(cost, "draft", 512, "greedy")
    return DraftOption(name=name, cost=cost, times=times, acceptance=acceptance)


def budgets(device_gib: float | None, host_gib: float | None = None, *, shared: bool = False) -> Budgets:
    device = None if device_gib is None else round(device_gib * GIB)
    return Budgets(device_bytes=device, host_bytes=None if host_gib is None else round(host_gib * GIB), shared=shared)


def plan(
    settings: EngineSettings = SETTINGS,
    tree: TreeRequest | None = CHAINS,
    *,
    device_gib: float | None,
    host_gib: float | None = None,
    shared: bool = False,
    drafts: tuple[DraftOption, ...] | None = None,
    hardware: HardwareProfile = L40,
    target: ModelCost = LLAMA_2_70B,
) -> Plan:
    limits = budgets(device_gib, host_gib, shared=shared)
    workload = make_workload(settings, target, hardware, limits, max_positions=4096)
    drafts = (draft_option(hardware=hardware),) if drafts is None else drafts
    return plan_run(settings, tree, [Offer(workload=workload, drafts=drafts)], max_positions=4096, budgets=limits)


def offer(
    target: ModelCost,
    *drafts: DraftOption,
    limits: Budgets,
    hardware: HardwareProfile = L40,
    settings: EngineSettings = SETTINGS,
) -> Offer:
    return Offer(workload=make_workload(settings, target, hardware, limits, max_positions=4096), drafts=drafts)
