"""What a generation config asks for beside the ends of a text is said, as the model's own logits are what is sampled."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from command_line import run_command
from conftest import EOS
from offload.model.generation_config import PROCESSED, read_generation_defaults
from text_models import change_json, copy_model

Models = Callable[..., Path]
PROMPT = [5, 9, 33, 2, 71]
# Of transformers' fields, those that change no greedy text of one sequence, or that flags of ours stand for.
HARMLESS = {
    *("_from_model_config", "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("max_length", "max_new_tokens", "max_time", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values"),
    *("early_stopping", "length_penalty", "num_return_sequences", "num_beam_groups", "diversity_penalty"),  # of beams
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),  # of encoders
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config", "low_memory", "use_mtp"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
}


def with_fields(models: Models, folder: Path, **fields: Any) -> Path:
    copy_model(models(), folder)
    change_json(folder / "generation_config.json", **fields)
    return folder


def greedy(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    output = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    return output[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


def test_every_field_of_transformers_is_known() -> None:
    """One that a release adds is to be looked at: does it change a greedy text?"""
    assert set(GenerationConfig().to_dict()) - PROCESSED.keys() - HARMLESS == set()


@pytest.mark.parametrize(
    "field",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": "first"},
        {"begin_suppress_tokens": "first"},
        {"bad_words_ids": "first"},
        {"sequence_bias": "first"},
        {"min_new_tokens": 16, "eos_token_id": "first"},
        {"min_length": 20, "eos_token_id": "first"},
        {"forced_eos_token_id": 3},
        {"exponential_decay_length_penalty": [2, 9.0]},
        {"num_beams": 3},
    ],
    ids=lambda field: str(next(iter(field))),
)
def test_a_field_that_changes_the_text_of_transformers_is_named(models: Models, tmp_path: Path, field: dict[str, Any]) -> None:
    plain = greedy(models())
    spelt = {"bad_words_ids": [[plain[0]]], "sequence_bias": [[[plain[0]], -99.0]], "eos_token_id": plain[0]}
    values = {name: spelt.get(name, [plain[0]]) if value == "first" else value for name, value in field.items()}
    changed = with_fields(models, tmp_path / "changed", **values)
    without = with_fields(models, tmp_path / "without", **{name: values.get("eos_token_id") for name in ["eos_token_id"]})
    assert greedy(changed) != greedy(without if "eos_token_id" in values else models())
    assert set(read_generation_defaults(changed, (EOS,)).left_out) == {next(iter(field))}


def test_values_that_change_nothing_are_not_named(models: Models, tmp_path: Path) -> None:
    neutral = {name: values[0] if values else None for name, values in PROCESSED.items()}
    folder = copy_model(models(), tmp_path / "neutral")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**neutral, "eos_token_id": [3, 4], "temperature": 0.6, "repetition_penalty": 1.0}))
    defaults = read_generation_defaults(folder, (EOS,))
    assert (dict(defaults.left_out), defaults.warning(), defaults.eos_token_ids) == ({}, None, {3, 4})


def test_without_a_generation_config_that_of_an_older_config_counts(models: Models, tmp_path: Path) -> None:
    folder = copy_model(models(), tmp_path / "old")
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", repetition_penalty=1.3, num_beams=1)
    defaults = read_generation_defaults(folder, (EOS,))
    assert (dict(defaults.left_out), defaults.eos_token_ids) == ({"repetition_penalty": 1.3}, {EOS})


def test_one_line_names_what_is_left_out(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_fields(models, tmp_path / "model", repetition_penalty=1.05, bad_words_ids=[[7, 8, 9, 10, 11, 12, 13, 14]])
    assert run_command(capsys, "--model", folder, "--prompt-ids", "5,9", "--max-new-tokens", 2).code == 0
    lines = [record.getMessage() for record in caplog.records if "generation config" in record.getMessage()]
    assert len(lines) == 1 and lines[0].endswith("bad_words_ids [[7, 8, 9, 10, 11, 1 ..., repetition_penalty 1.05")


@pytest.mark.parametrize(("flag", "least"), [(None, logging.WARNING), ("--quiet", logging.ERROR), ("--verbose", logging.INFO)])
def test_quiet_leaves_errors_only_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str | None, least: int
) -> None:
    configured: dict[str, Any] = {}
    monkeypatch.setattr("logging.basicConfig", lambda **settings: configured.update(settings))
    run_command(capsys, "plan", "--model", "no/such", *([flag] if flag else []))
    assert (configured["level"], configured["stream"]) == (least, sys.stderr)
