"""What other people's code relies on: names, signatures, and that importing the package is cheap and finds our tree."""

import inspect
import subprocess
import sys
from pathlib import Path

import offload
from offload.cli.parser import Parser, add_model_flags, add_request_flags
from offload.config import EngineSettings
from offload.engine.engine import Engine

ROOT = Path(__file__).resolve().parent.parent


def flags_of(parser: Parser) -> dict[str, object]:
    """Flag, as a Python name -> its default."""
    return {action.dest: action.default for action in parser._actions if action.dest != "help"}


def parameters_of(function: object) -> dict[str, object]:
    """Parameter -> its default, without self and cls."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def test_public_names_are_these() -> None:
    assert sorted(offload.__all__) == ["OffloadError", "__version__", "load"]
    assert all(getattr(offload, name) is not None for name in offload.__all__)


def test_load_takes_the_flags_of_the_command_line_with_their_defaults() -> None:
    parser = Parser()
    add_model_flags(parser)
    flags = {**flags_of(parser), "seed": 0, "model": inspect.Parameter.empty}  # without --model, the command runs the demo
    assert parameters_of(offload.load) == flags


def test_settings_are_parsed_from_the_same_names_with_the_same_defaults() -> None:
    defaults = {name: value for name, value in parameters_of(offload.load).items() if name not in ("model", "seed")}
    assert EngineSettings.parse(model="m", **defaults) == EngineSettings(model="m")


def test_requests_take_the_flags_of_the_command_line_with_their_defaults() -> None:
    parser = Parser()
    add_request_flags(parser)
    of_the_command = {"prompt_file", "prompt_ids", "chat", "raw", "system_prompt"}  # how a prompt is come by
    flags = {name: default for name, default in flags_of(parser).items() if name not in of_the_command}
    flags |= {"prompt": inspect.Parameter.empty, "seed": None, "stop": ()}  # None: the seed given to load
    assert parameters_of(Engine.generate) == parameters_of(Engine.stream) == flags


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "from sys import modules; import offload; print(sorted({'torch', 'transformers', 'numpy', 'tree'} & set(modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_another_module_called_tree_is_refused_with_its_path_and_the_cure(tmp_path: Path) -> None:
    """dm-tree installs one. Ours would be shadowed in silence, and the first import from it would fail oddly."""
    foreign = tmp_path / "tree" / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text("def map_structure(): ...\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", "import offload"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and last.startswith("ImportError: ")
    assert str(foreign) in last and str(ROOT / "tree") in last
    assert "Run from the clone's folder, or uninstall dm-tree" in last
