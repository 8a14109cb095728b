"""`doctor`: what on this machine will make it slow or fail, one line each, with the cure."""

import argparse
import json

from ..config import EngineSettings, base_of_draft, counted
from ..doctor.judge import exit_code, judge, worst_status
from .signals import leaving_at_once
from .terminal import say


def run(arguments: argparse.Namespace) -> int:
    EngineSettings(model=arguments.model or "", device=arguments.device)  # which refuses a device that cannot exist
    with leaving_at_once():
        from ..doctor.gather import gather_facts  # torch; what the flags say was checked without it

    named = arguments.draft_model
    has_own_files = named not in (None, "none") and base_of_draft(named) is None  # a base is made of the target's
    draft_model = named if has_own_files else None
    findings = judge(gather_facts(model=arguments.model, draft_model=draft_model, device=arguments.device))
    if arguments.json:
        document = {"schema_version": 1, "findings": [finding.to_json() for finding in findings]}
        print(json.dumps({**document, "status": worst_status(findings)}))
    else:
        print("\n".join(finding.line() for finding in findings))
    if not arguments.quiet:
        counts = [sum(finding.status == status for finding in findings) for status in ("fail", "warn")]
        say(f"{counts[0]} failed, {counted(counts[1], 'warning')}, {len(findings) - sum(counts)} ok")
    return exit_code(findings)
