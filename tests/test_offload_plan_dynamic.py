"""Plans of trees that follow the text: what is drafted ahead, and what nodes and levels have to bring."""

from dataclasses import replace

import pytest

from offload.planner.marginal import WARY
from planning import L40, LLAMA_2_7B, SETTINGS, constant_times, draft_option, plan
from tree.acceptance import Acceptance, Context
from tree.spec import DynamicTree, OptimalTree


def test_drafts_go_on_while_layers_stream_and_hold_no_layer_up() -> None:
    made = plan(tree=DynamicTree(64), device_gib=48)
    off = plan(replace(SETTINGS, grow_ahead="off"), DynamicTree(64), device_gib=48)
    assert made.ahead_steps > 0 and made.prediction.hidden_draft_s > 0 and made.prediction.round_s < off.prediction.round_s
    assert off.ahead_steps == 0 and off.prediction.hidden_draft_s == 0
    assert made.prediction.pass_s <= 1.01 * off.prediction.pass_s
    assert plan(tree=OptimalTree(64, 8), device_gib=48).ahead_steps == 0, "a static tree does not grow"


def test_nothing_is_drafted_ahead_where_nothing_is_waited_for() -> None:
    assert plan(tree=DynamicTree(64), device_gib=300).ahead_steps == 0, "nothing is streamed"
    busy = replace(L40, link_bytes_per_s=1e14)
    assert plan(tree=DynamicTree(64), device_gib=48, hardware=busy).ahead_steps == 0, "the link waits for compute"


def test_a_level_and_a_row_have_to_bring_what_their_time_brings_otherwise() -> None:
    """Without a stream to hide under: seconds of a level, and of a row, times tokens per second; of that, a wary part."""
    slow = draft_option(times=constant_times((1, 64), (0.01, 0.01)))
    made = plan(tree=DynamicTree(64), device_gib=300, drafts=(slow,))
    level_s = LLAMA_2_7B.num_layers * 0.01
    assert made.aim.least_gain == pytest.approx(WARY * level_s / made.prediction.s_per_token, rel=1e-6)
    assert 0 <= made.aim.least_value < 1
    hidden = plan(tree=DynamicTree(64), device_gib=48)
    assert hidden.least_value < 1e-4, "rows cost nothing while layers stream"
    static = plan(tree=OptimalTree(64, 8), device_gib=300)
    assert static.least_gain == static.least_value == 0


def test_auto_follows_the_text_unless_what_was_counted_speaks_against_it() -> None:
    """Ties go to trees that follow the text, but for drawn ones, which must win by a twentieth."""
    drawn = replace(SETTINGS, sampling="sampled", grow_ahead="off")
    assert plan(tree=None, device_gib=48).dynamic and not plan(drawn, None, device_gib=48).dynamic
    assert plan(drawn, DynamicTree(64), device_gib=48).dynamic, "who asks for them gets them"
    sure, unsure = (0.98,), (0.4, 0.2, 0.1, 0.05)
    mean = tuple(0.5 * one + 0.5 * other for one, other in zip((*sure, 0.0, 0.0, 0.0), unsure, strict=True))
    parted = Acceptance((mean,), contexts=(Context(0.7, 0.5, unsure), Context(1.0, 0.5, sure)))
    assert plan(drawn, None, device_gib=48, drafts=(draft_option(acceptance=parted),)).dynamic
    worse = Acceptance(((0.9, 0.05),), contexts=(Context(1.0, 1.0, (0.5, 0.05)),))
    assert not plan(tree=None, device_gib=48, drafts=(draft_option(acceptance=worse),)).dynamic
