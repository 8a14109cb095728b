"""What a low-bit copy of the bundled target is worth as its draft: tests/bench_self_draft.py has the figures."""

import pytest

from bench_self_draft import prompts_of, settings_of
from offload.assemble import open_engine
from offload.bench.spec import SpecRequest, measure_acceptance
from offload.device.cpu import CpuDevice
from planning import L40


def tokens_per_pass(draft: str, tree: str, temperature: float) -> float:
    prompts, prompt_ids = prompts_of(3)
    request = SpecRequest(
        settings=settings_of(draft),
        trees=(tree,),
        temperatures=(temperature,),
        top_ps=(1.0,),
        prompts=prompts,
        prompt_ids=prompt_ids,
        max_new_tokens=192,
        runs=1,
        max_seconds=600.0,
    )
    (row,) = measure_acceptance(request, lambda _: None)["runs"]
    return float(row["tokens_per_pass"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_bits_are_accepted_for_twenty_levels_of_a_chain_and_four_for_more_than_a_draft_of_its_own() -> None:
    found = {draft: tokens_per_pass(draft, "1x47:kary", 0.0) for draft in ("self:int8", "self:int4", "bundled")}
    assert found["self:int8"] > 20
    assert found["self:int8"] > found["self:int4"] > found["bundled"], found


def test_no_layer_of_what_is_measured_is_its_own_draft() -> None:
    """One that is resident drafts as it is, and is always right."""
    with open_engine(settings_of("self:int4"), device=CpuDevice(), hardware=L40) as engine:
        assert engine.plan.placement.resident == frozenset()
