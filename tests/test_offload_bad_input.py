"""Every input that is wrong: its exit code, the lines that say what, where and what to do, no traceback, no half answer."""

import json
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from command_line import (
    DOES_NOT_FIT,
    INVALID,
    LOST,
    NOT_FINITE,
    Finished,
    assert_error,
    assert_holds,
    assert_usage_error,
    run_command,
)
from conftest import VOCAB_SIZE
from text_models import byte_level_tokenizer, change_json, change_tensors, copy_model, save_text_model, save_tokenizer

Models = Callable[..., Path]
Run = Callable[..., Finished]
PROMPT = ("--prompt-ids", "5,9,33", "--max-new-tokens", "4", "--device", "cpu", "--stats", "none")


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(folder, "--flag", ...)`: four tokens of the model in `folder`."""
    return lambda folder, *argv: run_command(capsys, "--model", folder, *PROMPT, *argv)


@pytest.fixture
def model(models: Models, tmp_path: Path) -> Path:
    """A model in three shards without tokenizer, to be damaged."""
    return copy_model(models(), tmp_path / "model")


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Let `change` lie in the header of a safetensors file; the bytes of the tensors stay."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[end:])


def write_json(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


# -- weights -----------------------------------------------------------------------------------------------------------


def test_missing_shards_are_named(run: Run, model: Path) -> None:
    _, *others = shards_of(model)
    for path in others:
        path.unlink()
    assert_error(run(model), INVALID, f"{len(others)} of {len(others) + 1} files are missing", others[0].name, "hf download")


def test_a_truncated_shard_is_named_with_both_sizes(run: Run, model: Path) -> None:
    path = shards_of(model)[1]
    size = path.stat().st_size
    os.truncate(path, size - 100)
    assert_error(run(model), INVALID, path.name, "is truncated", f"{size:,}", f"{size - 100:,}", str(model))


def test_overlapping_tensors_are_named(run: Run, model: Path) -> None:
    names: list[str] = []

    def overlap(header: dict[str, dict[str, object]]) -> None:
        by_shape: dict[str, str] = {}
        for name, entry in header.items():
            if name != "__metadata__" and (twin := by_shape.setdefault(str(entry["shape"]), name)) != name and not names:
                entry["data_offsets"] = header[twin]["data_offsets"]
                names.extend((twin, name))

    change_header(shards_of(model)[1], overlap)
    assert_error(run(model), INVALID, "overlaps", *names)


@pytest.mark.parametrize(
    ("field", "lie", "expected"),
    [
        ("shape", [3, 3], "36 bytes by shape and dtype"),
        ("dtype", "F4", "dtype 'F4', which we do not read"),
        ("data_offsets", [0, 10**12], "but the data_offsets 0, 1000000000000"),
    ],
)
def test_a_shard_that_lies_about_a_tensor_is_refused(run: Run, model: Path, field: str, lie: object, expected: str) -> None:
    changed: list[str] = []

    def change(header: dict[str, dict[str, object]]) -> None:
        changed.append(next(name for name in header if name != "__metadata__"))
        header[changed[0]][field] = lie

    change_header(shards_of(model)[0], change)
    assert_error(run(model), INVALID, changed[0], expected, shards_of(model)[0].name)


def test_a_shard_that_is_no_safetensors_file_is_refused(run: Run, model: Path) -> None:
    shards_of(model)[0].write_bytes(b"<html>404 not found</html>" * 10)
    assert_error(run(model), INVALID, shards_of(model)[0].name, "declares a header of")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(run: Run, model: Path, name: str) -> None:
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weight_map, next(iter(weight_map)): name})
    assert_error(run(model), INVALID, repr(name), "reach outside of its folder")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\0"])
def test_an_index_with_rubbish_is_refused(run: Run, model: Path, content: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    assert_error(run(model), INVALID, "model.safetensors.index.json")


def test_an_index_that_lies_is_refused(run: Run, model: Path) -> None:
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = shards_of(model)[-1].name
    name = next(name for name, shard in weight_map.items() if shard != other)
    change_json(index, weight_map={**weight_map, name: other})
    assert_error(run(model), INVALID, name, f"is in {other} according to the index")


def test_a_folder_without_weights_is_refused(run: Run, model: Path) -> None:
    for path in [*shards_of(model), model / "model.safetensors.index.json"]:
        path.unlink()
    assert_error(run(model), INVALID, "neither model.safetensors nor", str(model))
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert_error(run(model), INVALID, "'pytorch_model.bin'", "save_pretrained")


def test_integers_are_no_weights(run: Run, model: Path) -> None:
    """As in a quantised checkpoint, whose config we cannot follow."""
    change_tensors(model, lambda name, tensor: tensor.to(torch.int32) if "layers.1.mlp.up_proj" in name else tensor)
    assert_error(run(model), INVALID, "model.layers.1.mlp.up_proj.weight", "torch.int32")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
        ({"vocab_size": 98}, "has shape (97, 32), the model needs (98, 32)"),
        ({"intermediate_size": 64}, "has shape (48, 32), the model needs (64, 32)"),
        ({"num_key_value_heads": 4}, "has shape (16, 32), the model needs (32, 32)"),
        ({"attention_bias": True}, "self_attn.q_proj.bias' is missing"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "self_attn.q_norm.weight' is missing"),
    ],
    ids=str,
)
def test_config_and_tensors_that_disagree_are_refused(
    run: Run, model: Path, changes: Mapping[str, object], expected: str
) -> None:
    change_json(model / "config.json", **changes)
    assert_error(run(model), INVALID, expected, "config.json that belongs to these weights")


# -- which model -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    assert_error(run(tmp_path / "none"), INVALID, f"no such folder or GGUF file: {tmp_path / 'none'}", "--model")
    assert_error(run(tmp_path), INVALID, f"there is no config.json in {tmp_path}", "--model")


def test_a_draft_that_is_not_there_is_named_by_its_own_flag(run: Run, model: Path, tmp_path: Path) -> None:
    assert_error(run(model, "--draft-model", tmp_path / "none"), INVALID, f"{tmp_path / 'none'}", "in: --draft-model")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "x" * 5000, "/" + "x" * 5000, "", "a b", "no\nfolder"])
def test_a_name_that_cannot_be_a_folder_is_refused(run: Run, name: str) -> None:
    assert_error(run(name), INVALID, "--model")


def test_a_hub_id_that_cannot_be_fetched_says_what_the_hub_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("no\nroute to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    assert_error(run("someone/some-model"), INVALID, "someone/some-model", "no route to host", "hf download")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"model_type": "unheard-of"}',
        '{"model_type": 5}',
        '{"model_type": "llama", "hidden_size": "many"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
    ids=lambda content: content[:40],
)
def test_a_config_of_no_model_that_we_know_is_refused_with_the_families(run: Run, model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    assert_error(run(model), INVALID, str(model / "config.json"), "a dense decoder such as Llama")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\0" * 100, b"[" * 100_000, b"{\x80}"], ids=lambda content: content[:9]
)
def test_a_config_that_is_damaged_is_to_be_downloaded_again(run: Run, model: Path, content: bytes) -> None:
    """Once it was called another architecture, and the cure was another model."""
    (model / "config.json").write_bytes(content)
    assert_error(run(model), INVALID, "config.json: is not", str(model / "config.json"), "copy the files again")


def test_a_download_that_broke_off_is_one_error(run: Run, model: Path) -> None:
    (model / "config.json").write_text("{")
    shards_of(model)[0].unlink()
    assert_error(
        run(model), INVALID, "2 problems", "config.json: is not JSON", "1 of 4 files are missing", "copy the files again"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 0},
        {"vocab_size": -5},
        {"max_position_embeddings": 0},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 2.5},
        {"intermediate_size": -1},
        {"hidden_act": "none-such"},
        {"rope_parameters": {"rope_type": "none-such"}},
    ],
    ids=str,
)
def test_a_config_that_lies_about_sizes_is_refused_before_anything_is_built(
    run: Run, model: Path, changes: Mapping[str, object]
) -> None:
    change_json(model / "config.json", **changes)
    assert_error(run(model), INVALID, str(model / "config.json"))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", {"num_local_experts": 4}, "mixture of experts"),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}, "mixture of experts"),
        ("gpt2", {}, "gpt2 is not supported"),
        ("opt", {}, "opt is not supported"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "gemma2 is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ("bert", {}, "bert"),
        ("t5", {}, "t5"),
    ],
)
def test_an_architecture_that_we_would_not_compute_exactly_is_refused(
    run: Run, model: Path, family: str, changes: Mapping[str, object], expected: str
) -> None:
    common = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 160}
    AutoConfig.for_model(family, **{**common, **changes}).save_pretrained(model)
    assert_error(run(model), INVALID, expected, "config.json")


@pytest.mark.parametrize("content", ["", "[", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}', "[" * 100_000])
def test_a_damaged_generation_config_is_refused(run: Run, model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    assert_error(run(model), INVALID, str(model / "generation_config.json"))


def test_a_damaged_tokenizer_is_refused(run: Run, model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    assert_error(run(model), INVALID, "the tokenizer cannot be read", str(model))


def test_a_draft_of_another_vocabulary_is_refused_with_the_first_token_that_differs(run: Run, tmp_path: Path) -> None:
    target = save_text_model(tmp_path / "target")
    draft = save_tokenizer(copy_model(target, tmp_path / "draft"), byte_level_tokenizer(renamed={258: "other", 260: "last"}))
    finished = run(target, "--draft-model", draft)
    assert_error(finished, INVALID, "token 258 is 'other' in the draft and 'he' in the target", "in: --draft-model")


def test_a_draft_of_another_size_is_refused_without_tokenizers(run: Run, models: Models) -> None:
    finished = run(models(), "--draft-model", models(vocab_size=90, eos_token_id=89))
    assert_error(finished, INVALID, "90 tokens", "97", "the first that differs is token 90", "in: --draft-model")


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_text_and_tree_beyond_the_context_are_refused_with_their_sum(run: Run, models: Models) -> None:
    finished = run(models(), "--draft-model", models(), "--tree", "4x6:kary", "--max-context", "30")
    assert_error(finished, DOES_NOT_FIT, "prompt 3 + new 4 + tree 24 tokens > 30 rows", "at most 3 new tokens", "--max-context")
    assert run(models(), "--draft-model", models(), "--tree", "4x6:kary", "--max-context", "31").code == 0


def test_a_tree_that_leaves_no_room_for_text_is_refused(run: Run, models: Models) -> None:
    finished = run(models(), "--draft-model", models(), "--tree", "4x6:kary", "--max-context", "25")
    assert_error(finished, DOES_NOT_FIT, "a tree of 25 nodes", "a context of 25 rows", "--max-context")


def test_more_resident_layers_than_there_are_are_refused(run: Run, models: Models) -> None:
    assert_error(run(models(), "--resident-layers", "4"), DOES_NOT_FIT, "4 resident layers", "the model has 3")


def summed(stderr: str) -> tuple[float, float, float]:
    """(sum of the parts, the sum as printed, the budget) of a message `name 1.0 + name 2.0 = 3.0 KiB > 2.0 KiB`."""
    parts, total, budget = re.search(r"error: (.+) = ([\d.]+) KiB > ([\d.]+) KiB\n", stderr).groups()  # type: ignore[union-attr]
    return sum(float(part.split()[-1]) for part in parts.split(" + ")), float(total), float(budget)


@pytest.mark.parametrize("flags", [("--gpu-memory", "40KiB"), ("--gpu-memory", "0"), ("--gpu-memory", "40KiB", "--slots", "3")])
def test_a_budget_that_cannot_hold_the_slots_is_refused_with_the_sum(run: Run, models: Models, flags: tuple[str, ...]) -> None:
    finished = run(models(), *flags)
    slots = flags[-1] if "--slots" in flags else "2"
    assert_error(finished, DOES_NOT_FIT, f"{slots} slots", "key/value cache", "activations", "in: --gpu-memory")
    parts, total, budget = summed(finished.stderr)
    assert parts == pytest.approx(total, abs=0.01) and total > budget


def test_a_host_budget_that_cannot_hold_the_ring_is_refused_with_the_sum(run: Run, models: Models) -> None:
    finished = run(models(), "--host-memory", "20KiB", "--resident-layers", "0")
    assert_error(finished, DOES_NOT_FIT, "ring of 2 layers", "in: --host-memory")
    parts, total, budget = summed(finished.stderr)
    assert parts == pytest.approx(total, abs=0.01) and total > budget == 20


@pytest.mark.parametrize("flag", ["--gpu-memory", "--host-memory"])
def test_the_budget_that_the_cure_names_is_enough(run: Run, models: Models, flag: str) -> None:
    refused = run(models(), flag, "1KiB", "--resident-layers", "0")
    size = re.search(r"allow at least (\w+)", refused.stderr)
    assert refused.code == DOES_NOT_FIT and size is not None
    assert run(models(), flag, size[1], "--resident-layers", "0").code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA device")
def test_a_device_that_is_not_there_is_named(run: Run, models: Models) -> None:
    assert_error(run(models(), "--device", "cuda"), LOST, "no CUDA device 0: 0 found", "--device cpu")
    assert_error(run(models(), "--device", "cuda:7"), LOST, "no CUDA device 7")


# -- numbers that are none ---------------------------------------------------------------------------------------------


def poisoned(folder: Path, name: str, value: float = torch.nan, row: int | None = None) -> Path:
    """Write `value` into the tensors whose name ends in `name`: into all of it, or into one row."""

    def change(tensor_name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor_name.endswith(name):
            tensor[slice(None) if row is None else row] = value
        return tensor

    change_tensors(folder, change)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("flags", [(), ("--temperature", "1"), ("--json",)], ids=["greedy", "sampled", "json"])
def test_logits_that_are_not_finite_end_the_run_before_a_token(
    run: Run, model: Path, value: float, flags: tuple[str, ...]
) -> None:
    assert_error(run(poisoned(model, "norm.weight", value), *flags), NOT_FINITE, "logits at node 0 of 1", "verify --full")


@pytest.mark.parametrize("method", ["sample", "traversal", "rejection"])
def test_no_verifier_samples_from_logits_that_are_not_finite(run: Run, model: Path, models: Models, method: str) -> None:
    flags = ("--draft-model", models(), "--tree", "2x2:kary", "--temperature", "1", "--verifier", method)
    assert_error(run(poisoned(model, "layers.1.mlp.down_proj.weight"), *flags), NOT_FINITE, "logits at node 0 of 5")


def test_tokens_before_logits_that_are_not_finite_are_sound_and_none_follows(run: Run, model: Path) -> None:
    tokens = run(model, "--tree", "none", "--ignore-eos").stdout.split()
    assert len(tokens) == 4
    used = {"5", "9", "33", *tokens[:2]}
    assert tokens[2] not in used, "choose a prompt whose third token is a new one"
    broken = poisoned(model, "embed_tokens.weight", row=int(tokens[2]))
    finished = run(broken, "--tree", "none", "--ignore-eos")
    assert_error(finished, NOT_FINITE, "logits at node 0 of 1", "after 6 tokens", stdout=" ".join(tokens[:3]) + " ")
    assert_error(run(broken, "--tree", "none", "--ignore-eos", "--json"), NOT_FINITE, "logits at node 0 of 1")


def test_a_draft_that_is_not_finite_does_not_change_greedy_text(run: Run, model: Path, models: Models) -> None:
    """The draft only proposes. Whatever it proposes is checked against the target."""
    finished = run(models(), "--draft-model", poisoned(model, "norm.weight"), "--tree", "2x2:kary")
    assert (finished.code, finished.stdout) == (0, run(models(), "--tree", "none").stdout)


@pytest.mark.parametrize("method", ["traversal", "rejection"])
def test_a_draft_that_is_not_finite_is_not_sampled_from(run: Run, model: Path, models: Models, method: str) -> None:
    flags = ("--tree", "2x2:kary", "--temperature", "1", "--verifier", method)
    assert_error(
        run(models(), "--draft-model", poisoned(model, "norm.weight"), *flags), NOT_FINITE, "the draft's probabilities"
    )


# -- tree and acceptance files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"schema_version": 1, "parents": [-1, 2, 1]}, "node 1 is on a cycle: 1 -> 2 -> 1"),
        ({"schema_version": 1, "parents": [-1, 1]}, "node 1 is on a cycle"),
        ({"schema_version": 1, "parents": [-1, 2, 0]}, "node 1 comes before its parent 2"),
        ({"schema_version": 1, "parents": [-1, -1]}, "two roots: node 0 and node 1"),
        ({"schema_version": 1, "parents": [0, 0]}, "node 0 must be the root"),
        ({"schema_version": 1, "parents": [-1, 7]}, "node 1 has parent 7, outside the 2 nodes"),
        ({"schema_version": 1, "parents": [-1, 0.5]}, "parent 0.5, which is not an integer"),
        ({"schema_version": 1, "parents": [-1, True]}, "parent True, which is not an integer"),
        ({"schema_version": 1, "parents": []}, "parents is empty"),
        ({"schema_version": 1}, '"parents" must be a list'),
        ({"schema_version": 2, "parents": [-1]}, "schema_version is 2, expected 1"),
        ([-1, 0], "holds a JSON object, not list"),
        ("", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_tree_file_that_is_no_tree_is_refused(
    run: Run, models: Models, tmp_path: Path, document: object, expected: str
) -> None:
    path = write_json(tmp_path / "tree.json", document)
    assert_error(run(models(), "--draft-model", models(), "--tree", path), INVALID, expected, f"in: {path}")


def test_a_tree_file_that_cannot_be_read_is_named(run: Run, models: Models, tmp_path: Path) -> None:
    flags = ("--draft-model", models(), "--tree")
    assert_error(run(models(), *flags, tmp_path / "none.json"), INVALID, "No such file", "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    assert_error(run(models(), *flags, tmp_path / "bytes.json"), INVALID, "utf-8", "bytes.json")
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 2**35)  # sparse
    assert_error(run(models(), *flags, tmp_path / "large.json"), INVALID, "too large", "large.json")


@pytest.mark.parametrize(
    ("acceptance", "expected"),
    [
        ([0.7, 0.4], "sums to 1.1"),
        ([[0.5], [0.7, 0.4]], "acceptance of level 1 sums to 1.1"),
        ([], "acceptance is empty"),
        ([[0.5], []], "acceptance of level 1 is empty"),
        ([float("nan")], "the probability of child 0 is nan"),
        ([0.5, -0.1], "the probability of child 1 is -0.1"),
        ([[0.5], 0.5], "must be numbers, or lists of numbers: entry 0 is [0.5]"),
        ([0.5, [0.5]], "must be numbers, or lists of numbers: entry 1 is [0.5]"),
        ([True], "entry 0 is True"),
        ([10**400], "a number of 401 digits is too large"),
        ("0.5", "must be a list, not str"),
        (None, "must be a list, not NoneType"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_acceptance_file_that_is_none_is_refused(
    run: Run, models: Models, tmp_path: Path, acceptance: object, expected: str
) -> None:
    path = write_json(tmp_path / "acceptance.json", {"schema_version": 1, "acceptance": acceptance, "source": "test"})
    for tree in ("16x5", "auto"):  # also where nothing is optimised for it yet
        finished = run(models(), "--draft-model", models(), "--tree", tree, "--acceptance", path)
        assert_error(finished, INVALID, expected, f"in: {path}")


def test_an_acceptance_file_that_is_not_there_is_named(run: Run, models: Models, tmp_path: Path) -> None:
    assert_error(run(models(), "--acceptance", tmp_path / "none.json"), INVALID, "No such file", "none.json")


# -- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no-such-flag"], ["unrecognized arguments: --no-such-flag"]),
        (["--no\nsuch", "a\nb"], ["unrecognized arguments"]),
        (["--max-new"], ["unrecognized arguments: --max-new"]),  # no abbreviations: they break when a flag is added
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0 is too small"]),
        (["--max-new-tokens", "ten"], ["--max-new-tokens", "not a whole number: 'ten'"]),
        (["--max-new-tokens", "9" * 30], ["--max-new-tokens", "not a whole number"]),
        (["--max-new-tokens"], ["--max-new-tokens", "expected one argument"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--temperature", "inf"], ["--temperature", "inf"]),
        (["--top-p", "0"], ["--top-p", "0 is not in (0, 1]"]),
        (["--top-p", "1.1"], ["--top-p", "1.1 is not in (0, 1]"]),
        (["--top-k", "-2"], ["--top-k", "-2 is too small, the least is 1"]),
        (["--top-k", "2.5"], ["--top-k", "not a whole number: '2.5'"]),
        (["--seed", "-1"], ["--seed", "-1 is too small"]),
        (["--seed", str(2**63)], ["--seed", "too large"]),
        (["--dtype", "int4"], ["--dtype", "'int4'", "bfloat16"]),
        (["--verifier", "hope"], ["--verifier", "'hope'", "traversal"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cuda:N"]),
        (["--gpu-memory", "lots"], ["--gpu-memory", "'lots'", "24GiB"]),
        (["--host-memory", "-5"], ["--host-memory"]),
        (["--resident-layers", "-1"], ["--resident-layers", "-1 is too small"]),
        (["--slots", "0"], ["--slots", "0 is too small"]),
        (["--max-context", "1"], ["--max-context", "1 is too small"]),
        (["--emulate-link", "fast"], ["--emulate-link", "'fast'", "200MB/s"]),
        (["--emulate-link", "1GB/s", "--device", "cuda"], ["--emulate-link with --device cuda"]),
        (["--tree", "16x5", "--draft-model", "none"], ["a tree of 16 nodes needs a draft model", "--draft-model"]),
        (["--tree", "4x6:kary"], ["a tree of 25 nodes needs a draft model"]),
        (["--tree", "7"], ["--tree", "'7'", "768x18"]),
        (["--tree", "0x0"], ["--tree", "'0x0'"]),
        (["--tree", "99999999x9"], ["--tree", "99999999 nodes"]),
        (["--tree", "a\nb"], ["--tree"]),
        (["--tree", "x" * 5000], ["--tree"]),
        (["--prompt", "x"], ["--prompt", "not allowed with argument --prompt-ids"]),
        (["--chat"], ["--chat", "--prompt-ids", "leave one of the two out"]),
        (["--chat", "--raw"], ["--raw", "--chat"]),
        (["--raw", "--system-prompt", "be"], ["--system-prompt", "--raw"]),
        (["--quiet", "--verbose"], ["--verbose", "--quiet"]),
        (["--stats", "all"], ["--stats", "'all'"]),
        (["--output", "/no/such/folder/x.json"], ["--output", "/no/such/folder"]),
        (["--trace", "/"], ["--trace", "it is a folder"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_flags_are_one_line_and_touch_no_model(
    capsys: pytest.CaptureFixture[str], flags: list[str], expected: list[str]
) -> None:
    argv = ["--model", "/no/such/model", "--prompt-ids", "1,2", *flags]
    assert_usage_error(run_command(capsys, *argv), *expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["transmogrify"], ["unknown command 'transmogrify'", "generate"]),
        (["generate", "stray"], ["unrecognized arguments: stray"]),
        (["verify"], ["--model"]),
        (["version", "--no"], ["--no"]),
        (["--model", "/no/such/model"], ["no prompt", "--prompt-ids"]),
        (["--model", "/no/such/model", "--prompt-ids", "1,two"], ["--prompt-ids", "'1,two'"]),
        (["--model", "/no/such/model", "--prompt-ids", ""], ["--prompt-ids"]),
        (
            ["--model", "/no/such/model", "--prompt-file", "/no/such/file"],
            ["--prompt-file /no/such/file", "No such file", "name a file"],
        ),
        (["--model", "/no/such/model", "--prompt-file", "/"], ["--prompt-file /", "directory"]),
        (["--model", "/no/such/model", "--prompt", "\udcff"], ["--prompt", "UTF-8"]),
        (["--model", "/no/such/model", "--prompt", "x", "--system-prompt", "\udcff"], ["--system-prompt", "UTF-8"]),
    ],
    ids=lambda value: " ".join(value)[:60].encode("ascii", "replace").decode() if isinstance(value, list) else None,
)
def test_wrong_commands_and_prompts_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: list[str]
) -> None:
    assert_usage_error(run_command(capsys, *argv), *expected)


@pytest.mark.parametrize("argv", [["--tree", "8"], ["--prompt-ids", "x"], ["plan", "--tree", "8"], ["chat", "--top-p", "2"]])
def test_a_usage_error_without_a_model_is_one_line_too(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    """What runs when no model is named is told only when it does run."""
    assert_usage_error(run_command(capsys, *argv))


def test_an_unknown_flag_is_sent_to_the_help_that_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert_usage_error(run_command(capsys, "--bogus"), "see `run_70b.py generate --help`")
    assert_usage_error(run_command(capsys, "plan", "--bogus"), "see `run_70b.py plan --help`")


@pytest.mark.parametrize(
    ("name", "what"),
    [("", "the name is empty"), ("no-such-model", "no such folder"), ("llama-2-70b", "a preset, a shape without weights")],
)
def test_a_model_that_cannot_be_is_refused_before_an_engine_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.delattr("offload.assemble.open_engine")
    assert_error(run_command(capsys, "--model", name, "--prompt", "x"), INVALID, what, "--model")


def test_a_prompt_file_that_is_not_text_is_refused_with_the_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"good \xff bad")
    finished = run_command(capsys, "--model", "/no/such/model", "--prompt-file", tmp_path / "prompt")
    assert_usage_error(finished, f"--prompt-file {tmp_path / 'prompt'}", "position 5", "give UTF-8 text")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt-ids", "5,97"], ["token id 97", "97 tokens", "--prompt-ids", "0 to 96"]),
        (["--prompt-ids", "-3"], ["token id -3"]),
        (["--prompt", "text"], ["no tokenizer", "--prompt-ids"]),
        (["--prompt-ids", "5", "--stop", "x"], ["--stop", "tokenizer"]),
        (["--prompt-ids", "5", "--tree", "98x1:kary", "--draft-model", "SAME"], ["--tree", "97 tokens"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value[0].startswith("--") else None,
)
def test_requests_that_this_model_cannot_serve_are_one_line(
    capsys: pytest.CaptureFixture[str], models: Models, flags: list[str], expected: list[str]
) -> None:
    argv = [str(models()) if flag == "SAME" else flag for flag in flags]
    assert_usage_error(run_command(capsys, "--model", models(), "--device", "cpu", *argv), *expected)


# -- faults of our own -------------------------------------------------------------------------------------------------


def test_an_internal_failure_is_three_lines_and_a_traceback_only_when_asked_for(
    run: Run, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("our own\nmistake")

    monkeypatch.setattr("offload.assemble.open_engine", fail)
    assert_error(run(models()), 1, "ZeroDivisionError: our own mistake", "test_offload_bad_input.py line", "--verbose")
    verbose = run(models(), "--verbose")
    assert verbose.code == 1 and verbose.stdout == ""
    assert "Traceback" in verbose.stderr and verbose.stderr.splitlines()[-3].startswith("error: internal error")


def test_a_checkpoint_with_a_flipped_bit_fails_its_manifest(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    written = run_command(capsys, "verify", "--model", model, "--write-manifest")
    assert written.code == 0 and f"manifest written to {model}" in written.stdout
    path = shards_of(model)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    finished = run_command(capsys, "verify", "--model", model)
    assert finished.code == 0
    assert_holds(finished.stdout, "structure sound", "not compared")
    finished = run_command(capsys, "verify", "--model", model, "--full")
    assert_error(finished, 5, f"'{path.name}' has other contents", "treestream.manifest.json")
