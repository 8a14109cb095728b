"""lm-eval on a task of our own, through the server: its log-likelihoods are transformers' own.

lm-eval lives in an environment of its own (`make clients`): it needs no torch here, and its 57 packages would change what
transformers imports in all other tests.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conftest import reference_model
from offload.demo import TARGET
from offload.serve.server import Server
from serving import MODEL, demo_engine, running

ROOT = Path(__file__).resolve().parent.parent
PLACES = (os.environ.get("LM_EVAL"), str(ROOT / ".venv-clients/bin/lm_eval"), shutil.which("lm_eval"))
LM_EVAL = next((found for found in PLACES if found and Path(found).exists()), None)
QUESTIONS = [
    {"question": "The Congress of the United", "choices": [" States", " Nations"], "answer": 0},
    {"question": "To the Senate and House of", "choices": [" Representatives of the people", " Congress", " the"], "answer": 0},
    {"question": "We must", "choices": [" not fail", " be"], "answer": 1},
]
TASK = """\
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl}}
test_split: train
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(lambda _: demo_engine()) as server:
        yield server


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed; `make clients` installs it")
def test_log_likelihoods_through_lm_eval_are_those_of_transformers(server: Server, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    (tmp_path / "ours.yaml").write_text(TASK.format(folder=tmp_path))
    arguments = f"model={MODEL},base_url={server.url}/v1/completions,num_concurrent=1,max_retries=1"
    command = [str(LM_EVAL), "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "ours"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)
    for sample in found:
        question = QUESTIONS[sample["doc_id"]]
        for choice, ((value, is_greedy),) in zip(question["choices"], sample["resps"], strict=True):  # type: ignore[call-overload]
            expected, greedy = log_likelihood(str(question["question"]), choice)
            assert float(value) == pytest.approx(expected, abs=1e-4)
            assert (is_greedy in (True, "True")) == greedy


def log_likelihood(context: str, continuation: str) -> tuple[float, bool]:
    """Of `continuation` after `context`, and whether it is what greedy decoding would have written. As lm-eval splits them."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    split = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        laws = reference_model(TARGET)(torch.tensor([whole])).logits[0].log_softmax(-1)
    rows = range(split - 1, len(whole) - 1)
    return sum(float(laws[row, whole[row + 1]]) for row in rows), all(int(laws[row].argmax()) == whole[row + 1] for row in rows)
