"""The script for a machine with a GPU runs small on a CPU: what can go wrong there is what only a GPU can tell."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs/benchmarks/gpu_session.sh"
CALL_S = {"first": 360, "second": 300, "rest": 120, "base": 180}
STEPS = ["facts", "latency", "tests", "light", "figure", "sanitizer", "formats", "base"]


def run(call: str, folder: Path) -> str:
    small = {"SMALL": "1", "OUT": str(folder / "out"), "WORK": str(folder / "work"), "PYTHON": sys.executable}
    environment = {**os.environ, **small, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["bash", SCRIPT, call], capture_output=True, text=True, env=environment)
    assert ran.stderr == ""
    return ran.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_calls_end_well_and_what_they_find_is_packed(tmp_path: Path) -> None:
    said = "".join(run(call, tmp_path) for call in CALL_S)
    assert re.findall(r"^(\w+) ok after", said, re.MULTILINE) == STEPS, said + (tmp_path / "out/summary.txt").read_text()
    with tarfile.open(tmp_path / "out/results.tar.gz") as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {f"{step}.json" for step in ("facts", "latency", "light", "figure")} <= names
    found = json.loads((tmp_path / "work/figure.json").read_text())
    assert found["ours"]["figures"]["tokens_per_pass"] > 1 and found["plain"]["figures"]["tokens_per_pass"] == 1
    assert found["two rounds"] and found["accelerate, 2 layers"]["pass_s"] > 0
    texts = [found[name]["report"]["token_ids"] for name in ("ours", "plain")]
    assert texts[0][: len(texts[1])] == texts[1]
    busy = json.loads((tmp_path / "work/latency.json").read_text())["copy"]["upload of 64 KiB, busy"]
    assert "|fp8|8.00|" in (tmp_path / "work/formats.txt").read_text()
    assert "|int4|256|" in (tmp_path / "work/base.txt").read_text()
    assert 0 < busy["p50_s"] <= busy["p99_s"] <= busy["most_s"]


def test_limits_of_steps_fit_into_their_call_and_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    text = SCRIPT.read_text(encoding="utf-8")

    def table(name: str) -> dict[str, str]:
        found = re.search(rf"declare -A {name}=\((.*)\)", text)
        assert found is not None
        return {key: quoted or plain for key, quoted, plain in re.findall(r'\[(\w+)\]=(?:"([^"]*)"|(\d+))', found[1])}

    limits, totals = table("LIMIT"), table("TOTAL")
    for call, steps in table("CALLS").items():
        assert sum(int(limits[step]) for step in steps.split()) <= int(totals[call]) + 10 <= CALL_S[call]
    assert "no step third" in run("third", tmp_path)
