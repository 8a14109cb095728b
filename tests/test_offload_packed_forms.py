"""A tiny model in every packed format writes the text that transformers' model writes with the same weights unpacked in
float32: plain and with a tree, streamed and resident."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import reference_model
from offload.assemble import open_engine
from offload.config import EngineSettings
from offload.planner.plan import Plan
from packed_models import EVERY_FORM, QUICK_FORMS, write_packed
from planning import L40

PROMPT = [5, 9, 33, 2, 71]
NUM_NEW = 10
# Where layers lie, and trees.
WAYS: tuple[dict[str, Any], ...] = (
    {"resident_layers": 0, "tree": "none"},
    {"resident_layers": 1, "tree": "2x3:kary"},
    {"resident_layers": 3, "tree": "none"},
)


def theirs(folder: Path) -> list[int]:
    model = reference_model(folder)
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.matrix
@pytest.mark.parametrize(
    "form", [form if form in QUICK_FORMS else pytest.param(form, marks=pytest.mark.slow) for form in EVERY_FORM]
)
def test_greedy_text_is_that_of_the_unpacked_model(tmp_path: Path, form: str) -> None:
    model = write_packed(form, tmp_path)
    expected, plans = theirs(model.reference_folder), list[Plan]()
    for way in WAYS:
        drafts = (str(model.folder),) if way["tree"] != "none" else ()
        settings = EngineSettings(model=str(model.folder), draft_models=drafts, device="cpu", **way)
        with open_engine(settings, hardware=L40) as engine:
            assert list(engine.generate(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True).token_ids) == expected
            assert engine.weights.is_coded
            plans.append(engine.plan)
    assert plans[0].bytes_per_pass < 0.6 * plans[0].raw_bytes_per_pass  # which are float32's
    assert plans[2].bytes_per_pass == 0
