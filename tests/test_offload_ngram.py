"""Trees of what the text, or a datastore, has said before: the text is plain decoding's, in fewer passes, and a plan knows what
a row costs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import INVALID, assert_error, assert_usage_error, run_command
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.datastore.build import build
from offload.demo import TARGET
from offload.engine.engine import Engine
from offload.errors import FitError, UsageError
from offload.planner.fallback import Fallbacks
from offload.planner.found import (
    MOST_NODES,
    MOST_VALUE,
    NO_ROOM,
    NOTE,
    TOO_DEAR,
    TOO_QUICK,
    FoundTrees,
    found_trees,
    with_found,
)
from offload.planner.notes import NO_TREE
from offload.planner.plan import Plan
from offload.planner.prediction import Workload, rounds
from offload.planner.tree_flag import read_tree
from offload.planner.workload import make_workload
from offload.text.tokenizer import Tokenizer
from planning import L40, LLAMA_2_70B, SETTINGS, budgets, constant_times, plan
from tree.spec import DynamicTree, TreeRequest

Models = Callable[..., Path]
LIST = "First: the commerce of the States. Second: the commerce of the States. Third: the commerce of"


def open_target(**changes: Any) -> Engine:
    """The bundled target without a draft, as if its layers came over a link that makes rows free."""
    fields: dict[str, Any] = {"device": "cpu", "dtype": "float32", "resident_layers": 0, "ngram": ("on",), **changes}
    if fields.get("tree") == "none":
        fields["ngram"] = ("off",)
    return open_engine(EngineSettings(model=str(TARGET), **fields), hardware=L40)


def generated(
    prompt: str | list[int], num_tokens: int = 48, params: Any = None, **changes: Any
) -> tuple[tuple[int, ...], float]:
    """Its tokens, and how many a pass brought."""
    with open_target(**changes) as engine:
        report = engine.generate(prompt, max_new_tokens=num_tokens, ignore_eos=True, **(params or {}))
    return report.token_ids, len(report.token_ids) / len(report.stats.passes)


def test_a_text_that_repeats_itself_takes_few_passes_and_is_the_same() -> None:
    plain, one = generated(LIST, tree="none")
    found, several = generated(LIST)
    assert found == plain and one == 1.0
    assert several >= 2.0


def test_without_look_up_a_model_without_a_draft_has_no_tree() -> None:
    _, tokens_per_pass = generated(LIST, 8, ngram=("off",))
    assert tokens_per_pass == 1.0


@pytest.fixture(scope="module")
def own_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], tuple[int, ...]]:
    """A datastore of what the target says after a prompt that does not repeat itself, that prompt, and those tokens."""
    prompt = Tokenizer(TARGET).encode("In the spring of that year our harbours were")
    said, _ = generated(prompt, 40, tree="none")
    path = tmp_path_factory.mktemp("datastore") / "store"
    tokenizer = Tokenizer(TARGET)
    texts = [[7, 8, 9, 10], [*prompt, *said, 5, 6], [11, 12, 13]]
    build(path, texts, vocab_size=len(tokenizer.vocabulary()), tokenizer=tokenizer.vocabulary_digest())
    return path, prompt, said


def test_a_datastore_knows_what_the_text_has_not_said(own_words: tuple[Path, list[int], tuple[int, ...]]) -> None:
    path, prompt, said = own_words
    found, with_store = generated(prompt, 40, ngram=(str(path),))
    _, without = generated(prompt, 40, ngram=("on",))
    assert found == said
    assert with_store >= 4.0 and with_store > without


def test_a_seed_repeats_a_sampled_text_and_a_tree_is_drawn_from_as_plain_decoding_is() -> None:
    """Of a low temperature, at which texts repeat themselves: found nodes are accepted, and accepted nodes are the text."""
    params = {"temperature": 0.3, "seed": 5}
    once, tokens_per_pass = generated(LIST, 40, params)
    again, _ = generated(LIST, 40, params)
    assert once == again and tokens_per_pass > 1.3


def test_texts_that_share_passes_are_those_that_they_are_alone() -> None:
    prompts = [LIST, "The army and the navy; the army and the navy; the army and"]
    alone = [generated(prompt, 24, tree="none")[0] for prompt in prompts]
    with open_target(max_sequences=2) as engine:
        streams = [engine.stream(prompt, max_new_tokens=24, ignore_eos=True) for prompt in prompts]
        together: list[list[int]] = [[], []]
        while any(len(text) < 24 for text in together):
            for text, stream in zip(together, streams, strict=True):
                if (step := next(stream, None)) is not None:
                    text.extend(step.token_ids)
    assert [tuple(text) for text in together] == alone


def test_a_draft_model_and_the_text_share_a_tree(models: Models) -> None:
    """A draft that is always wrong, and a text that repeats itself."""
    with open_target(draft_models=(str(models(vocab_size=4096, seed=3)),), tree="32:dynamic", ngram=("on",)) as engine:
        assert engine.plan.ngram and engine.plan.draft is not None
        report = engine.generate(LIST, max_new_tokens=32, ignore_eos=True)
    assert report.token_ids == generated(LIST, 32, tree="none")[0]
    assert len(report.token_ids) / len(report.stats.passes) >= 1.5


# -- plans ------------------------------------------------------------------------------------------------------------------


def planned(settings: EngineSettings = SETTINGS, asked: TreeRequest | None = None, device_gib: float = 24) -> Plan:
    return plan(settings, asked, device_gib=device_gib, drafts=())


def test_where_rows_hide_under_the_stream_trees_are_large_and_hold_what_is_hardly_likely() -> None:
    made = planned()
    assert made.ngram and made.dynamic and made.draft is None
    assert made.tree.num_nodes == made.room_nodes == MOST_NODES and made.least_value < 0.05
    assert NOTE in made.notes and made.why_no_tree is None and made.to_json()["ngram"] is True
    plain = planned(replace(SETTINGS, ngram=("off",)))
    assert not plain.ngram and plain.tree.num_nodes == 1 and plain.why_no_tree is not None
    assert made.prediction.s_per_token <= 1.01 * plain.prediction.s_per_token


def workload_of(layer_s: tuple[float, ...], rows: tuple[int, ...] = (1, 2, 16, 64), **changes: Any) -> Workload:
    """Of a model that is resident whole, whose layers take as long over so many rows."""
    made = make_workload(SETTINGS, LLAMA_2_70B, L40, budgets(250), max_positions=4096)
    return replace(made, times=constant_times(rows, layer_s), verify=replace(made.verify, rows=(1,), task_s=(0.0,)), **changes)


def found(workload: Workload, settings: EngineSettings = SETTINGS, asked: TreeRequest | None = None) -> Any:
    return found_trees(settings, asked, workload, workload.memory(None, 1, 2, False))


def test_passes_that_are_over_in_no_time_are_not_kept_waiting() -> None:
    quick = workload_of((0.0001, 0.0001, 0.0001, 0.0001))
    assert found(quick) == TOO_QUICK
    assert isinstance(found(quick, replace(SETTINGS, ngram=("on",))), FoundTrees)


def test_rows_that_cost_as_much_as_a_pass_are_for_who_asks_for_them() -> None:
    dear = workload_of((0.01, 0.02, 0.16, 0.64))
    assert found(dear) == TOO_DEAR
    asked = found(dear, replace(SETTINGS, ngram=("on",)))
    assert isinstance(asked, FoundTrees) and asked.least_value == MOST_VALUE
    assert with_found([f"{NO_TREE}why", "else"], TOO_DEAR) == (f"{NO_TREE}why; {TOO_DEAR}", "else")


@pytest.mark.parametrize("num_texts", [1, 4])
def test_trees_of_nodes_worth_their_rows_never_make_a_token_dearer(num_texts: int) -> None:
    """Whatever size a tree turns out to have: if finds are as good as they are thought to be."""
    layer_s = (0.010, 0.0105, 0.014, 0.030)
    workload, settings = workload_of(layer_s), replace(SETTINGS, max_sequences=num_texts)
    trees = found(workload, settings)
    nodes = np.arange(1, trees.tree.num_nodes + 1)
    rows, nothing = nodes * num_texts, np.zeros(len(nodes))
    round_s = rounds(workload, trees.memory, rows, nothing, workload.after_s(rows)).round_s
    tokens = 1 + (nodes - 1) * trees.least_value
    assert (round_s / tokens <= round_s[0] * (1 + 1e-9)).all() and 0.01 < trees.least_value < 0.5


def test_a_text_keeps_its_room_where_somebody_bounded_the_context() -> None:
    assert planned(replace(SETTINGS, max_context=256)).tree.num_nodes == 32
    tight = planned(replace(SETTINGS, max_context=256, text_tokens=250))
    assert tight.tree.num_nodes == 4 and tight.text_tokens >= 250
    full = planned(replace(SETTINGS, max_context=256, text_tokens=256))
    assert full.tree.num_nodes == 1 and full.why_no_tree is not None and full.why_no_tree.endswith(NO_ROOM)


def test_a_tree_that_was_asked_for_is_that_large_or_does_not_fit() -> None:
    made = planned(asked=DynamicTree(200))
    assert (made.tree.num_nodes, made.ngram, made.dynamic) == (200, True, True)
    with pytest.raises(FitError):
        planned(asked=DynamicTree(60_000), device_gib=8)


def test_a_smaller_tree_is_given_up_first_when_memory_runs_out() -> None:
    limits = budgets(24)
    workload = make_workload(SETTINGS, LLAMA_2_70B, L40, limits, max_positions=4096)
    made = planned()
    smaller = Fallbacks(settings=SETTINGS, workload=workload, draft=None, budgets=limits).smaller_tree(made)
    assert smaller is not None and smaller.tree.num_nodes == MOST_NODES // 2


# -- what flags say ---------------------------------------------------------------------------------------------------------


def test_trees_without_a_draft_are_those_that_follow_the_text() -> None:
    assert read_tree("64:dynamic", has_draft=False, ngram=("auto",)) == DynamicTree(64)
    for spec, ngram in (("64:dynamic", ("off",)), ("64x8", ("auto",)), ("4x6:kary", ("on",))):
        with pytest.raises(UsageError, match="needs a draft model"):
            read_tree(spec, has_draft=False, ngram=ngram)


@pytest.mark.parametrize("spec", ["none", "64x8", "4x6:kary"])
@pytest.mark.parametrize("ngram", [("on",), ("a", "b")])
def test_asking_for_finds_in_a_tree_that_has_none_is_a_contradiction(spec: str, ngram: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="trees that follow the text"):
        read_tree(spec, has_draft=True, ngram=ngram)
    for fine in ("auto", "8:dynamic"):
        read_tree(fine, has_draft=True, ngram=ngram)


def test_datastores_that_are_none_are_refused_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own_words: tuple[Path, list[int], tuple[int, ...]]
) -> None:
    def run(*argv: object) -> Any:
        return run_command(capsys, "--model", TARGET, "--prompt-ids", "5,9", "--max-new-tokens", 2, *argv)

    assert_error(run("--ngram", tmp_path / "none"), INVALID, "not a datastore", str(tmp_path / "none"))
    (tmp_path / "cut").write_bytes(own_words[0].read_bytes()[:5000])
    assert_error(run("--ngram", tmp_path / "cut"), INVALID, "not a datastore", "says that it has")
    other = tmp_path / "other"
    build(other, [[1, 2, 3]], vocab_size=4096, tokenizer=bytes(32))
    assert_error(run("--ngram", own_words[0], "--ngram", other), INVALID, "another vocabulary", str(other))
    assert_usage_error(run("--ngram", "on", "--ngram", own_words[0]), "--ngram", "at once")
    assert_usage_error(run("--ngram", "on", "--tree", "none"), "--ngram on with --tree none")
