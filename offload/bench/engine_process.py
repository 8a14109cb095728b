"""One engine in a process of its own: a Case on stdin, events on stdout, a JSON object a line each.

python -m offload.bench.engine_process < case.json
"""

import json
import os
import resource
import sys
from contextlib import AbstractContextManager

from .case_and_outcome import Case, Event
from .measure import Decoder, run_case

OURS = ("ours", "plain")


def open_decoder(case: Case) -> AbstractContextManager[Decoder]:
    if case.engine in OURS:
        from .our_engine import open_our_engine

        return open_our_engine(case)
    from .baselines import open_baseline

    return open_baseline(case)


def host_peak_bytes() -> int:
    """Most memory this process ever held, in Linux's units."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an event

    def emit(event: Event) -> None:
        if event["event"] == "end":
            event = {**event, "facts": {**event["facts"], "host_peak_bytes": host_peak_bytes()}}
        events.write(json.dumps(event) + "\n")

    run_case(Case.from_json(json.load(sys.stdin)), open_decoder, emit)


if __name__ == "__main__":
    main()
