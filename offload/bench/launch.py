"""Run a case in a process of its own and read its events as they come. What has arrived when its time is over counts."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from .case_and_outcome import Case, Event, Outcome, outcome_of

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 10.0  # for a pass that is under way, and for closing


def run_isolated(case: Case, *, patient: bool) -> Outcome:
    """Runs `case` to its end. With `patient` loading has no limit, so that the process can say how long a budget it needs."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-m", "offload.bench.engine_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        events, complaints = _listen(process, case, patient=patient)
    outcome = outcome_of(case.engine, events)
    if outcome.load_s is None and not any(event["event"] == "refused" for event in events):
        last = next((line.strip() for line in reversed(complaints) if line.strip()), "")
        outcome.reason = f"failed: {last[:200]}" if last else f"still loading after {case.max_seconds:.0f} s"
    return outcome


def _listen(process: subprocess.Popen[str], case: Case, *, patient: bool) -> tuple[list[Event], list[str]]:
    """Events, and what the process said on stderr. It has ended afterwards, whatever happens here."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    complaints: list[str] = []
    reader = threading.Thread(target=lambda stream: complaints.extend(stream), args=(process.stderr,))
    reader.start()
    watchdog = threading.Timer(case.max_seconds + GRACE_S, process.kill)
    if not patient:
        watchdog.start()
    try:
        with process.stdin:
            json.dump(case.to_json(), process.stdin)
        return [json.loads(line) for line in process.stdout if line.endswith("\n")], complaints
    finally:
        watchdog.cancel()
        process.kill()  # interrupted, or done already
        process.wait()
        reader.join()
