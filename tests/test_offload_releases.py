"""Dependencies of other releases than those that were tested: said in one line, and blamed for their own errors."""

import importlib.util
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest

import offload
from command_line import assert_error, assert_usage_error, run_command
from conftest import save_tiny_model
from offload import releases
from offload.config import parse_size
from offload.errors import FitError, OffloadError
from offload.model import transformers_api
from offload.releases import INSTALL, blamed_for, bounds_of, translated, untested, warning
from offload.serve.problems import from_error, place_of

REQUIREMENTS = ["torch<2.14,>=2.6", "transformers (>=5.16,<5.25)", 'tokenizers<0.24,>=0.23.1; python_version > "3"', "numpy"]
TESTED = {"torch": "2.13.0+cpu", "transformers": "5.24.7", "tokenizers": "0.23.1"}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make it look as if these releases were installed beside a treestream with REQUIREMENTS."""

    def pretend(**changed: str) -> None:
        found = TESTED | changed
        monkeypatch.setattr(releases, "requires", lambda name: REQUIREMENTS)
        monkeypatch.setattr(releases, "version", lambda name: found[name])

    return pretend


@pytest.fixture
def foreign(tmp_path: Path) -> ModuleType:
    """A module of a package named transformers, which calls what it is given, or fails by itself."""
    path = tmp_path / "transformers" / "newer.py"
    path.parent.mkdir()
    path.write_text(
        "def call(function):\n    return function()\n\n\ndef fail():\n    raise TypeError('no argument\\n  cache')\n"
    )
    spec = importlib.util.spec_from_file_location("transformers.newer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def caught(function: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:
        function()
    return raised.value


def tiny(tmp_path: Path, *flags: str) -> list[str]:
    """Flags of a run that takes no time."""
    model = save_tiny_model(tmp_path / "model", num_layers=1)
    words = f"--model {model} --prompt-ids 1,2 --max-new-tokens 1 --profile l40 --device cpu"
    return [*words.split(), *flags]


# -- what was tested ------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_packages_own_metadata(install: Callable[..., None]) -> None:
    install()
    found = {name: bounds_of(name) for name in ("torch", "transformers", "tokenizers", "numpy", "trans")}
    assert found == {
        "torch": ">=2.6,<2.14",
        "transformers": ">=5.16,<5.25",
        "tokenizers": ">=0.23.1,<0.24",
        "numpy": None,
        "trans": None,
    }


@pytest.mark.parametrize(
    ("name", "release", "is_told"),
    [
        ("transformers", "5.16.0", False),
        ("transformers", "5.24.99", False),
        ("transformers", "5.25.0", True),
        ("transformers", "5.25.0.dev0", True),
        ("transformers", "5.9", True),
        ("torch", "2.13.1+cu132", False),
        ("torch", "2.14.0+cpu", True),
        ("tokenizers", "0.23.0", True),
    ],
)
def test_releases_outside_their_range_are_told_with_it(
    install: Callable[..., None], name: str, release: str, is_told: bool
) -> None:
    install(**{name: release})
    assert untested() == ((f"{name} {release} (tested: {bounds_of(name)})",) if is_told else ())


def test_several_are_one_line_with_the_cure(install: Callable[..., None]) -> None:
    install(torch="3.0", transformers="6.0")
    text = warning()
    assert text is not None and "\n" not in text
    assert "torch 3.0 (tested: >=2.6,<2.14), transformers 6.0 (tested: >=5.16,<5.25)" in text and INSTALL in text


def test_a_clone_that_is_not_installed_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(releases, "requires", not_installed)
    monkeypatch.setattr(releases, "version", lambda name: "99")
    assert warning() is None and bounds_of("torch") is None


# -- said at run time -----------------------------------------------------------------------------------------------------


def test_a_run_begins_with_one_line_on_stderr(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(transformers="5.25.1")
    ran = run_command(capsys, "generate", *tiny(tmp_path, "--json", "--stats", "none"))
    assert ran.code == 0 and json.loads(ran.stdout)["finish_reason"] == "length"
    assert ran.stderr.splitlines() == [f"warning: {warning()}"]


def test_quiet_runs_and_tested_releases_say_nothing(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = tiny(tmp_path, "--json", "--stats", "none")
    install()
    assert run_command(capsys, "generate", *flags).stderr == ""
    install(transformers="5.25.1")
    assert run_command(capsys, "generate", *flags, "--quiet").stderr == ""


def test_a_usage_error_stays_one_line(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(transformers="5.25.1")
    assert_usage_error(run_command(capsys, "generate", "--tree", "nonsense"), "nonsense")


def test_load_logs_it(install: Callable[..., None], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    install(tokenizers="0.24")
    with pytest.raises(OffloadError):
        offload.load(str(tmp_path / "nowhere"))
    assert [record.getMessage() for record in caplog.records] == [warning()]


# -- whose fault it is ----------------------------------------------------------------------------------------------------


def test_the_innermost_frame_that_is_ours_or_theirs_decides(foreign: ModuleType, install: Callable[..., None]) -> None:
    install(transformers="5.25.1")
    blamed = "transformers 5.25.1 (tested: >=5.16,<5.25)"
    assert blamed_for(caught(foreign.fail)) == blamed
    assert blamed_for(caught(lambda: foreign.call(lambda: json.loads("{")))) == blamed  # the standard library is nobody's
    assert blamed_for(caught(lambda: foreign.call(lambda: parse_size("much", flag="--x")))) is None  # it called us
    assert blamed_for(caught(lambda: json.loads("{"))) is None
    assert blamed_for(ValueError("never raised")) is None


def test_a_name_that_is_gone_is_theirs(install: Callable[..., None]) -> None:
    install()

    def missing() -> None:
        from transformers import NoSuchName  # noqa: F401

    assert blamed_for(caught(missing)) == "transformers 5.24.7 (tested: >=5.16,<5.25)"
    assert blamed_for(ImportError("no such file", name="torch")) is None


def test_an_error_of_theirs_names_release_range_and_cure(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What 5.24 did: it called our cache with arguments that it had not had before."""
    install(transformers="5.25.1")
    monkeypatch.setattr(transformers_api._PassLayer, "update", lambda self: None)
    ran = run_command(capsys, "generate", *tiny(tmp_path, "--quiet"))
    assert_error(ran, 1, "error: transformers 5.25.1 (tested: >=5.16,<5.25) failed: TypeError: ", ".py line ", INSTALL)
    assert "internal error" not in ran.stderr


def test_an_error_of_theirs_is_one_line_even_if_its_message_is_not(foreign: ModuleType, install: Callable[..., None]) -> None:
    install()
    error = translated(caught(foreign.fail), "newer.py line 6")
    assert error is not None and error.exit_code == 1
    assert error.what == "transformers 5.24.7 (tested: >=5.16,<5.25) failed: TypeError: no argument cache"


def test_load_raises_an_error_of_ours_for_theirs_and_leaves_others_alone(
    monkeypatch: pytest.MonkeyPatch, foreign: ModuleType, install: Callable[..., None]
) -> None:
    install()
    for raised, expected in [(foreign.fail, OffloadError), (lambda: int("x"), ValueError), (_does_not_fit, FitError)]:
        monkeypatch.setattr("offload.assemble.open_engine", lambda *_, raised=raised, **__: raised())
        assert type(caught(lambda: offload.load("model"))) is expected


def _does_not_fit() -> None:
    raise FitError("too large", where="here", cure="less")


def test_a_server_names_the_release_and_never_the_message(foreign: ModuleType, install: Callable[..., None]) -> None:
    install()
    error = caught(foreign.fail)
    problem = from_error(error)
    assert (problem.status, problem.code) == (500, "internal_error")
    assert problem.message == "internal error in transformers 5.24.7 (tested: >=5.16,<5.25): TypeError"
    assert place_of(error) == "TypeError in newer.py line 6 of transformers 5.24.7 (tested: >=5.16,<5.25)"
