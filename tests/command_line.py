"""Run the command line in this process, and the shape that its errors have."""

from dataclasses import dataclass

import pytest

from offload.cli.main import main

USAGE, INVALID, DOES_NOT_FIT, CHANGED, NOT_FINITE, LOST = 2, 3, 4, 5, 6, 7


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str


def run_command(capsys: pytest.CaptureFixture[str], *argv: object) -> Finished:
    """What `run_70b.py ARGV` prints, and its exit code."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as leaving:  # --help
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return Finished(code, captured.out, captured.err)


def assert_usage_error(finished: Finished, *parts: str) -> None:
    """Exit code 2 and one line that holds `parts`; nothing on stdout."""
    assert (finished.code, finished.stdout) == (USAGE, ""), finished
    lines = finished.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
    assert_holds(finished.stderr, *parts)


def assert_error(finished: Finished, code: int, *parts: str, stdout: str = "") -> None:
    """`code`, and three lines: what is wrong, where, what to do. They hold `parts`; nothing on stdout but `stdout`."""
    assert (finished.code, finished.stdout) == (code, stdout), finished
    lines = finished.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["error:", "in:", "fix:"], finished.stderr
    assert all(len(line.split()) > 1 for line in lines), finished.stderr
    assert_holds(finished.stderr, *parts)


def assert_holds(text: str, *parts: str) -> None:
    assert [part for part in parts if part not in text] == [], text
    assert "Traceback" not in text
