"""A base in plans that need no weights: what flags ask for, what is offered, what is believed of it and said about it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_line import assert_usage_error, run_command
from offload.cli.convert import conversion_of, scheme_of
from offload.coding.base_kinds import BASE_KINDS
from offload.coding.base_layout import base_parts
from offload.config import EngineSettings
from offload.demo import TARGET
from offload.errors import UsageError
from offload.planner.cost import base_draft as cost_of_draft
from offload.planner.offered import offered_targets, wanted_base
from offload.planner.shapes import ModelShape, find_shape, shape_from_config
from offload.planner.tree_flag import DEFAULT_ACCEPTANCE, assumed_acceptance, read_acceptance, read_acceptances
from offload.planner.what_if import coded_beside_base, coded_without_loss, with_base, with_weights, without_code
from offload.source import check_source
from offload.typed_model import base_draft
from offload.weights.codec import coded
from offload.weights.conversion import convert
from offload.weights.layout import LayerLayout
from tree.optimizer import best_tree, expected_tokens

Capsys = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[1]
LLAMA = find_shape("llama-2-7b", "--model")
CONFIG = json.loads((ROOT / "profiles/models/llama-2-7b.json").read_text(encoding="utf-8"))["config"]


def converted(bits: int = 4, group_size: int = 64) -> ModelShape:
    quantization = {"quant_method": "treestream_residual", "version": 1, "bits": bits, "group_size": group_size}
    return shape_from_config({**CONFIG, "quantization_config": quantization}, where="here")


def wanted(*draft_models: str, codec: str = "auto") -> EngineSettings:
    return EngineSettings(model="m", draft_models=draft_models, codec=codec)


def said_of(shape: ModelShape) -> tuple[str, str]:
    return (shape.stored.codec, shape.stored.base) if shape.stored is not None else ("", "")


@pytest.mark.parametrize("kind", BASE_KINDS)
@pytest.mark.parametrize("preset", ["llama-2-7b", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_a_base_takes_what_its_layout_says(kind: str, preset: str) -> None:
    """With its biases and norms, which lie beside it as they are; a layer that travels as it is has them in both places."""
    shape = find_shape(preset, "--model")
    based = with_base(shape, kind)
    matrices = {name: one for name, one in shape.layer_tensors.items() if len(one) == 2}
    bases = {name: base_parts(name, one, BASE_KINDS[kind]) for name, one in matrices.items()}
    codec = coded(shape.layer_tensors, {}, torch.bfloat16, kernels=False, bases=bases)
    layer = based.cost(2).common_layer
    assert (layer.base_bytes, layer.stored_bytes) == (codec.base.num_bytes, codec.stored.num_bytes)
    assert not layer.is_decoded and layer.stored_bytes == layer.computed_bytes == shape.cost(2).common_layer.computed_bytes
    weights = sum(map(math.prod, matrices.values()))
    assert 8 * layer.base_bytes / weights == pytest.approx(BASE_KINDS[kind].bits_per_weight, rel=0.03)


def test_beside_a_base_only_matrices_travel() -> None:
    for kind, bits in (("int8", 3.8), ("int4", 7.5), ("int3", 8.4)):
        layer = coded_beside_base(LLAMA, kind).cost(2).common_layer
        weights = sum(math.prod(one) for one in LLAMA.layer_tensors.values() if len(one) == 2)
        assert 8 * layer.stored_bytes / weights == pytest.approx(bits, rel=1e-4)
        assert layer.is_decoded and layer.scratch_bytes == layer.computed_bytes
    lossless = coded_without_loss(LLAMA).cost(2).common_layer
    beside = with_base(coded_without_loss(LLAMA), "int4").cost(2).common_layer
    assert beside.stored_bytes == lossless.stored_bytes and beside.base_bytes > 0 == lossless.base_bytes
    norms = LayerLayout.pack([(name, one, torch.bfloat16) for name, one in LLAMA.layer_tensors.items() if len(one) == 1])
    assert beside.base_bytes - sum(with_base(LLAMA, "int4").stored.bases[0].values()) == norms.num_bytes  # type: ignore[union-attr]


def test_a_config_alone_tells_of_the_base() -> None:
    shape = converted()
    assert said_of(shape) == ("residual", "int4") and shape.weights == "16 bit, coded beside a base of int4"
    assert (
        shape.cost(2).layers
        == with_weights(LLAMA, "residual").cost(2).layers
        == coded_beside_base(LLAMA, "int4").cost(2).layers
    )
    assert said_of(converted(8, 128)) == ("residual", "int8")
    assert without_code(shape) == replace(LLAMA, name="llama")


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        (wanted(), [("", "")]),
        (wanted("d"), [("", "")]),
        (wanted("self"), [("", ""), ("residual", "int4")]),
        (wanted("d", "auto"), [("", ""), ("residual", "int4")]),
        (wanted("self:int8"), [("", ""), ("residual", "int8")]),
        (wanted("self", codec="none"), [("", ""), ("", "int4")]),
        (wanted("self", codec="lossless"), [("lossless", ""), ("lossless", "int4")]),
        (wanted("self", codec="residual"), [("residual", "int4")]),
        (wanted("d", codec="residual"), [("residual", "int4")]),
    ],
)
def test_what_is_offered_of_16_bit_weights(settings: EngineSettings, offered: list[tuple[str, str]]) -> None:
    assert [said_of(shape) for shape in offered_targets(settings, LLAMA)] == offered


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        (wanted(), [("residual", "int4")]),
        (wanted("self", "d"), [("residual", "int4")]),
        (wanted("auto", codec="lossless"), [("residual", "int4")]),
        (wanted(codec="none"), [("", "")]),
        (wanted("self", codec="none"), [("", ""), ("", "int4")]),
    ],
)
def test_what_is_offered_of_a_folder_that_was_coded_beside_a_base(
    settings: EngineSettings, offered: list[tuple[str, str]]
) -> None:
    assert [said_of(shape) for shape in offered_targets(settings, converted())] == offered


def test_a_folder_coded_without_loss_may_have_a_base_beside_it() -> None:
    """Then it travels as what that lacks, unless somebody says that it stays as it is."""
    shape = coded_without_loss(LLAMA)
    for codec, travels in (("auto", "residual"), ("residual", "residual"), ("lossless", "lossless"), ("none", "")):
        assert said_of(offered_targets(wanted("self", codec=codec), shape)[-1]) == (travels, "int4")
    assert said_of(offered_targets(wanted("self"), shape)[0]) == ("lossless", "")


def test_weights_of_32_bits_have_a_base_and_no_remainder() -> None:
    shape = replace(LLAMA, dtype="float32")
    assert [said_of(one) for one in offered_targets(wanted("self"), shape)] == [("", ""), ("", "int4")]
    assert [said_of(one) for one in offered_targets(wanted(codec="residual"), shape)] == [("", "")]


def test_a_base_of_packed_weights_is_refused_and_auto_does_without() -> None:
    packed = with_weights(LLAMA, "fp8")
    for settings, flag in ((wanted("self:int8"), "--draft-model self:int8"), (wanted(codec="residual"), "--codec residual")):
        with pytest.raises(UsageError, match="packed \\(FP8\\)") as caught:
            offered_targets(settings, packed)
        assert caught.value.where == flag and caught.value.cure
    assert offered_targets(wanted("auto"), packed) == (packed,)


def test_another_base_than_a_folder_has_is_refused() -> None:
    with pytest.raises(UsageError, match="beside a base of int4") as caught:
        offered_targets(wanted("self:int8"), converted())
    assert caught.value.where == "--draft-model self:int8" and "self:int4" in caught.value.cure
    assert wanted_base(wanted("auto"), base="int8") == "int8"


def test_the_published_figure_is_what_the_acceptance_of_self_expects() -> None:
    """A tree of the paper's kind, 6 wide and 48 deep below the root."""
    acceptance = read_acceptances(wanted("self"))[0]
    tree = best_tree(acceptance, 1 + 6 * 48, 49, max_level_width=6, max_branching=6)
    assert (tree.num_nodes, tree.num_levels) == (289, 49)
    assert expected_tokens(tree, acceptance) == pytest.approx(28.35, abs=0.005)
    assert "published" in acceptance.source and "SubSpec" in acceptance.source and "not measured" in acceptance.source


def test_what_nobody_named_is_assumed_by_kind_and_said() -> None:
    default = read_acceptance(DEFAULT_ACCEPTANCE)
    int4, int8, int3 = (read_acceptances(wanted(f"self:{kind}", "d")) for kind in ("int4", "int8", "int3"))
    assert int4[0] == int8[0] != default and int3[0] == default
    assert int4[1] == int8[1] == int3[1] == default
    assert "SubSpec" in assumed_acceptance("self") and "int8 has more" in assumed_acceptance("self:int8")
    assert "nobody has published what int3 has" in assumed_acceptance("self:int3")
    assert "not this pair's" in assumed_acceptance("d")
    given = EngineSettings(model="m", draft_models=("self", "d"), acceptances=(str(DEFAULT_ACCEPTANCE),))
    assert read_acceptances(given) == (default, default)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", BASE_KINDS)
def test_sizes_of_a_folder_coded_beside_a_base_are_those_of_the_model_that_runs(kind: str, tmp_path: Path) -> None:
    """From its headers; and what a config alone lets one believe is near."""
    folder = tmp_path / "converted"
    convert(conversion_of(str(TARGET), str(folder), scheme_of("residual", kind)), lambda *_: None)
    shape = find_shape(str(folder), "--model")
    assert said_of(shape) == ("residual", kind) and shape.stored is not None and not shape.stored.is_estimated
    for dtype in ("float32", "bfloat16"):
        model = check_source(str(folder), "--model", dtype, "cpu").model
        kept = {name: codec.kept for name, codec in model.packed.items()}
        model = replace(model, bases=kept, base=BASE_KINDS[kind])
        cost = shape.cost(model.dtype.itemsize)
        assert cost == model.cost
        assert cost_of_draft(cost) == base_draft(model).cost
        raw = check_source(str(folder), "--model", dtype, "cpu", codec="none").model
        assert replace(without_code(shape).cost(model.dtype.itemsize), weights=raw.weights) == raw.cost
    believed = coded_beside_base(find_shape(str(TARGET), "--model"), kind).cost(2)
    assert believed.base_bytes == shape.cost(2).base_bytes
    assert believed.stored_bytes == pytest.approx(shape.cost(2).stored_bytes, rel=0.03)


def test_a_folder_coded_beside_a_base_is_planned_without_torch(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(conversion_of(str(TARGET), str(folder), scheme_of("residual", None)), lambda *_: None)
    code = (
        "from sys import modules; from offload.cli.main import main; "
        f"code = main(['plan', '-q', '--model', {str(folder)!r}, '--draft-model', 'self', '--json']); "
        "print(code, [m for m in ('torch', 'transformers', 'numba') if m in modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *_, document, last = ran.stdout.splitlines()
    assert last == "0 []" and ran.stderr == ""
    assert json.loads(document)["codec"] == "residual"


def plan_json(capsys: Capsys, *flags: object) -> dict[str, object]:
    finished = run_command(capsys, "plan", "-q", "--json", *flags)
    assert finished.code == 0, finished.stderr
    document: dict[str, object] = json.loads(finished.stdout)
    return document


BIG = ("--model", "llama-2-70b", "--profile", "l40", "--ram", "192GiB")


def test_a_70b_on_an_l40_sends_less_than_half_and_has_more_tokens(capsys: Capsys) -> None:
    """The first table of the idea: 63 GB a pass where nothing is resident, 2.5 s, and 20 to 28 tokens."""
    made = plan_json(capsys, *BIG, "--draft-model", "self", "--resident-layers", 0)
    assert (made["codec"], made["base"], made["draft_model"]) == ("residual", "int4", "self:int4")
    assert made["bytes_per_pass"] == pytest.approx(0.46 * made["raw_bytes_per_pass"], rel=0.03)  # type: ignore[operator]
    assert made["bytes_per_pass"] == pytest.approx(64e9, rel=0.02) and made["predicted_pass_s"] == pytest.approx(2.55, rel=0.02)
    tree, memory = made["tree"], made["memory"]
    assert isinstance(tree, dict) and isinstance(memory, dict)
    assert 20 <= tree["expected_tokens_per_pass"] <= 32
    assert memory["device_bytes"]["base of 80 layers"] == pytest.approx(4.375 / 8 * 80 * 855_654_400, rel=0.001)
    notes = str(made["notes"])
    for part in (
        "7.5 bits a weight",
        "base 4.38",
        "bfloat16 before",
        "SubSpec",
        "nobody measured it",
        "estimated from the bytes",
    ):
        assert part in notes


def test_auto_takes_the_quicker_of_self_and_what_else_is_named(capsys: Capsys) -> None:
    other = plan_json(capsys, *BIG, "--draft-model", "llama-2-7b")
    own = plan_json(capsys, *BIG, "--draft-model", "self")
    auto = plan_json(capsys, *BIG, "--draft-model", "auto", "--draft-model", "llama-2-7b")
    assert own["predicted_s_per_token"] < other["predicted_s_per_token"]  # type: ignore[operator]
    assert (auto["draft_model"], auto["predicted_s_per_token"]) == (own["draft_model"], own["predicted_s_per_token"])
    small = ("--profile", "rtx-4090")  # which cannot hold the base of a 70B
    auto = plan_json(capsys, *BIG, *small, "--draft-model", "auto", "--draft-model", "llama-2-7b")
    other = plan_json(capsys, *BIG, *small, "--draft-model", "llama-2-7b")
    assert (auto["draft_model"], auto["base"], auto["codec"]) == ("llama-2-7b", None, "none")
    assert auto["predicted_s_per_token"] == other["predicted_s_per_token"]


def test_every_draft_is_compared_in_its_own_offer(capsys: Capsys) -> None:
    compared = plan_json(capsys, *BIG, "--draft-model", "auto", "--draft-model", "llama-2-7b", "--compare-drafts")
    assert isinstance(compared["drafts"], list)
    assert [draft["name"] for draft in compared["drafts"]] == ["self:int4", "llama-2-7b"]


def test_the_screen_shows_the_base_and_what_drafts(capsys: Capsys) -> None:
    finished = run_command(capsys, "plan", *BIG, "-q", "--draft-model", "self")
    assert finished.code == 0
    for part in ("coded beside a base of int4 | self:int4 |", "base of 80 layers", "decoded layer"):
        assert part in finished.stdout


def test_a_32b_on_24_gib_sends_half_and_is_told_what_its_tree_needs(capsys: Capsys) -> None:
    """All but the last bytes of the card are base, embedding and caches: a context of half the size makes room for a tree.
    28 GB a pass, 1.15 s, some 15 tokens a second."""
    flags = ("--model", "qwen3-32b", "--profile", "rtx-4090", "--ram", "128GiB", "--draft-model", "self")
    made = plan_json(capsys, *flags, "--max-context", 2048)
    assert made["bytes_per_pass"] == pytest.approx(28.7e9, rel=0.03) and made["predicted_pass_s"] == pytest.approx(
        1.13, rel=0.03
    )
    assert 0.05 < made["predicted_s_per_token"] < 0.075  # type: ignore[operator]
    tight = plan_json(capsys, *flags)
    assert isinstance(tight["tree"], dict) and tight["tree"]["nodes"] < 16
    finished = run_command(capsys, "plan", "-q", *flags)
    assert "win: --max-context 2048: 0.06" in finished.stdout
    beside = run_command(capsys, "plan", "-q", *flags[:-1], "auto", "--draft-model", "qwen3-0.6b").stdout
    assert "| qwen3-0.6b |" in beside and "win: --max-context 2048: 0.06" in beside


def test_a_base_is_a_win_where_nobody_named_it(capsys: Capsys) -> None:
    win = "win: --draft-model self, accepted as is published of others: "
    said = run_command(capsys, "plan", "-q", *BIG, "--draft-model", "llama-2-7b").stdout
    assert win in said
    seconds = float(said.partition(win)[2].split()[0])
    own = plan_json(capsys, *BIG, "--draft-model", "self")
    assert own["predicted_s_per_token"] <= seconds <= own["predicted_s_per_token"] * 1.2  # type: ignore[operator]
    for flags in (("--profile", "rtx-3090"), ("--weights", "fp8"), ("--codec", "none"), ("--draft-model", "self")):
        assert win not in run_command(capsys, "plan", "-q", *BIG, *flags).stdout


def test_a_base_is_refused_by_plan_in_one_line(capsys: Capsys) -> None:
    finished = run_command(capsys, "plan", "--model", "llama-2-7b", "--weights", "fp8", "--draft-model", "self")
    assert_usage_error(finished, "packed (FP8)")
    assert_usage_error(run_command(capsys, "plan", "--model", "llama-2-7b", "--draft-model", "self:int5"), "int5")
