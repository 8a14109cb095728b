"""Acceptance counted in real decoding: files that load again, and values that are known for known drafts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.assemble import open_engine
from offload.cli.acceptance import AcceptanceRecorder
from offload.cli.main import main
from offload.config import EngineSettings
from offload.errors import UsageError
from offload.planner.tree_flag import DEFAULT_ACCEPTANCE, read_acceptance
from planning import L40
from tree.acceptance import Acceptance

Models = Callable[..., Path]


def recorded(folder: Path, draft: Path, tree: str, temperature: float) -> dict[str, object]:
    recorder = AcceptanceRecorder()
    settings = EngineSettings(model=str(folder), draft_models=(str(draft),), device="cpu", tree=tree, ngram=("off",))
    with open_engine(settings, hardware=L40) as engine:
        for step in engine.stream([1, 2, 3], max_new_tokens=60, temperature=temperature, ignore_eos=True):
            recorder.add(step)
    return recorder.document({})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_perfect_draft_is_always_accepted_at_the_first_child(models: Models, temperature: float) -> None:
    """Sampled children of a perfect draft, too: the first is accepted with probability min(1, P/Q) = 1."""
    document = recorded(models(), models(), "2x3:kary", temperature)
    assert document["acceptance"][0] == pytest.approx(1.0)  # type: ignore[index]


@pytest.mark.parametrize("tree", ["2x3:kary", "6:dynamic"])
def test_acceptance_is_parted_by_how_sure_the_draft_was(models: Models, tree: str) -> None:
    """A draft that is the target: wherever it is how sure, its first child is accepted."""
    document = recorded(models(), models(), tree, 1.0)
    acceptance = Acceptance.from_json(json.loads(json.dumps(document)))
    assert acceptance.contexts and sum(context.share for context in acceptance.contexts) == pytest.approx(1)
    assert all(context.acceptance[0] == pytest.approx(1) for context in acceptance.contexts)


def test_without_a_tree_there_is_nothing_to_count(models: Models) -> None:
    with pytest.raises(UsageError, match="nothing to count"):
        recorded(models(), models(), "none", 0.0)


def test_record_acceptance_writes_a_file_that_trees_can_be_optimised_for(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "acceptance.json"
    flags = ["--model", str(models()), "--draft-model", str(models(num_layers=1, seed=1)), "--device", "cpu", "-q"]
    request = ["--prompt-ids", "1,2,3", "-n", "40", "--ignore-eos", "--temperature", "1"]
    assert main([*flags, *request, "--tree", "24x4", "--record-acceptance", str(path)]) == 0
    document = json.loads(path.read_text())
    assert sum(document["acceptance"]) <= 1 + 1e-9 and document["passes"] > 0 and document["temperature"] == 1
    assert len(read_acceptance(path).levels) == 1 and read_acceptance(path).contexts
    capsys.readouterr()
    assert main([*flags, *request, "--tree", "12x3", "--acceptance", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speculation"]["tree_nodes"] <= 12


def test_the_published_profile_loads_and_is_marked_published() -> None:
    profile = read_acceptance(DEFAULT_ACCEPTANCE)
    assert profile.levels[0][0] == 0.7732 and profile.source.startswith("published")


def test_every_bundled_profile_loads() -> None:
    files = list(DEFAULT_ACCEPTANCE.parent.glob("*.json"))
    assert files
    for path in files:
        assert read_acceptance(path).source


@pytest.mark.parametrize(
    "contents",
    ["", "{}", '{"turns": []}', '{"turns": 3}', "[1]", "\xff"],
    ids=["empty", "none", "no-turn", "int", "list", "raw"],
)
def test_a_dataset_with_other_fields_is_refused(
    tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str], contents: str
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(contents, encoding="latin-1")
    pair = ["--model", str(models()), "--draft-model", str(models())]
    assert main(["profile", "acceptance", *pair, "--dataset", str(path)]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and str(path) in captured.err and "Traceback" not in captured.err
