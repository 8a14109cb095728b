"""Drafts compared by the law: the terms are those of plans, and one draft's fault is not the others'."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offload.cli.main import main
from offload.demo import DRAFT, TARGET
from offload.planner.draft_law import terms_of
from planning import CHAINS, L40, SETTINGS, plan
from tree.shape import TreeShape

FLAGS = ["--device", "cpu", "-q", "-n", "12", "--tree", "8x4"]


def test_nothing_hides_where_nothing_is_streamed() -> None:
    made = plan(device_gib=200)
    terms = terms_of("draft", made)
    assert terms.levels == CHAINS.num_levels - 1 and terms.draft_s == pytest.approx(made.prediction.draft_s)
    assert terms.hidden_s == pytest.approx(0, abs=1e-9)
    assert terms.law_s_per_token == pytest.approx(terms.s_per_token) == pytest.approx(made.prediction.s_per_token)


def test_what_hides_under_the_stream_is_what_the_law_says_too_much() -> None:
    made = plan(replace(SETTINGS, slots=3), device_gib=24)
    terms = terms_of("draft", made)
    assert terms.hidden_s > 0 and terms.limit == "link"
    shown_s = terms.draft_s - terms.hidden_s + terms.pass_s
    assert made.prediction.pass_s < made.prediction.round_s <= shown_s < terms.draft_s + terms.pass_s
    assert terms.law_s_per_token > terms.s_per_token


def test_a_plan_without_a_draft_has_no_levels() -> None:
    terms = terms_of("n-gram", plan(tree=TreeShape.root_only(), device_gib=24))
    assert terms.levels == 0 and terms.level_s == 0 and terms.tokens_per_pass == 1


def test_what_limits_a_round_is_what_most_of_it_is() -> None:
    slow = replace(L40, layer_overhead_s=0.05)
    assert terms_of("d", plan(device_gib=200, hardware=L40)).limit == "compute"
    assert terms_of("d", plan(tree=TreeShape.chains(1, 60), device_gib=200, hardware=slow)).limit == "drafting"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"turns": ["The tide turns"]}\n')
    return path


def compare(questions: Path, *drafts: Path | str) -> list[str]:
    flags = [part for draft in drafts for part in ("--draft-model", str(draft))]
    return ["profile", "acceptance", "--compare", *flags, "--dataset", str(questions), *FLAGS]


@pytest.mark.slow
def test_drafts_are_compared_and_a_fault_is_one_drafts_own(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "verdict.json"
    drafts = (TARGET, DRAFT, tmp_path / "nowhere", "self:int5")
    assert main([*compare(questions, *drafts), "--json", "--output", str(output)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(output.read_text())
    twin, small, nowhere, unknown = document["drafts"]
    assert twin["acceptance"]["acceptance"][0] == pytest.approx(1.0)  # the target's twin
    assert small["acceptance"]["draft"] == DRAFT.name and small["tokens_per_pass"] >= 1
    assert "nowhere" in nowhere["error"] and "int5" in unknown["error"] and "s_per_token" not in nowhere
    quickest = min((twin, small), key=lambda one: one["s_per_token"])
    pays = quickest["s_per_token"] < document["plain_s_per_token"]
    assert document["winner"] == (quickest["name"] if pays else None)


def test_what_the_text_has_said_before_is_compared_as_a_draft_is(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no levels; its tokens per pass are those that were counted, one where nothing was found."""
    assert main([*compare(questions, "n-gram", DRAFT), "--json"]) == 0
    found, _ = json.loads(capsys.readouterr().out)["drafts"]
    assert found["name"] == "n-gram" and found["levels"] == 0 and found["draft_s"] == 0
    assert found["tokens_per_pass"] == 1 and found["acceptance"] is None


def test_another_machine_is_another_verdict(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*compare(questions, DRAFT, "nowhere"), "--profile", "l40"]) == 0
    head, _, known, unknown, _, verdict = capsys.readouterr().out.splitlines()
    assert head.startswith("| draft | tokens/pass")
    assert known.startswith(f"| {DRAFT}") and unknown.startswith("| nowhere | no such folder")
    assert verdict.startswith(("best: ", "none of them pays"))


def test_without_a_draft_that_can_be_measured_the_first_fault_is_the_answer(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(compare(questions, tmp_path / "a", tmp_path / "b")) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and f"no such folder or GGUF file: {tmp_path / 'a'}" in captured.err


@pytest.mark.parametrize("drafts", [("a",), ()], ids=["one", "none"])
def test_one_draft_is_no_comparison(drafts: tuple[str, ...], questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(compare(questions, *drafts)) == 2
    assert "nothing to compare" in capsys.readouterr().err
