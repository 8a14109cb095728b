"""What setup.py allows, what constraints.txt fixes, and how `make compat` picks the ends and names a culprit."""

import re
import runpy
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import compat
from compat import CannotInstall, Step, brings_cuda, find_culprit, lowest, pinned_versions, pip_errors, wanted

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LINES = [Requirement(line) for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FREE = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py$).*")  # torch, and what its builds for a GPU bring


@pytest.fixture
def requirements(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """All that setup.py names, extras included."""
    said: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: said.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    lists = [said["install_requires"], *said["extras_require"].values()]
    return [Requirement(text) for text in dict.fromkeys(text for texts in lists for text in texts)]


# -- bounds and pins ------------------------------------------------------------------------------------------------------


def test_every_dependency_is_bounded_on_both_sides(requirements: list[Requirement]) -> None:
    unbounded = [str(one) for one in requirements if sorted(bound.operator for bound in one.specifier) != ["<", ">="]]
    assert unbounded == [] and len(requirements) > 20


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_fix_one_version_of_each_within_its_bounds(requirements: list[Requirement], python: str) -> None:
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    holding = [line for line in LINES if line.marker is None or line.marker.evaluate(machine)]
    fixed = {canonicalize_name(line.name): line for line in holding}
    assert len(fixed) == len(holding)
    assert [str(line) for line in holding if [bound.operator for bound in line.specifier] != ["=="]] == []
    for one in requirements:
        if not FREE.fullmatch(one.name):  # torch, and what its builds bring
            (pin,) = fixed[canonicalize_name(one.name)].specifier
            assert one.specifier.contains(pin.version), f"{one} and {pin}: make constraints"


def test_constraints_name_all_that_an_installation_brings_and_no_torch() -> None:
    """By name, so that it holds in environments of other versions too."""
    named = {canonicalize_name(line.name) for line in LINES}
    assert [name for name in named if FREE.fullmatch(name)] == []
    waiting, seen = [("treestream", frozenset({"test"}))], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or FREE.fullmatch(name):
            continue
        seen.add((name, extras))
        assert name == "treestream" or name in named, f"{name} is not in constraints.txt: make constraints"
        try:
            needs = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue  # for another platform or another Python
        for need in needs:
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    assert len(seen) > 60


def test_constraints_hold_no_address_and_no_path() -> None:
    assert [line for line in CONSTRAINTS.splitlines() if re.search(r"://|^-|[/\\@]", line)] == []


# -- make compat ----------------------------------------------------------------------------------------------------------


def test_the_oldest_of_a_requirement_is_its_lower_bound(requirements: list[Requirement]) -> None:
    assert lowest(Requirement("torch>=2.6,<2.14")) == "torch==2.6"
    assert lowest(Requirement("lm-eval[api]>=0.4.13,<0.5")) == "lm-eval[api]==0.4.13"
    assert all(Requirement(lowest(one)).name == one.name for one in requirements)


def test_requirements_are_read_with_their_extras_and_for_this_python() -> None:
    metadata = ["torch>=2.6", 'openai>=2; extra == "test"', 'six>=1; python_version < "3"', 'Fast_API>=1; extra == "serve"']
    assert sorted(wanted(metadata, "serve")) == ["fast-api", "torch"]
    assert sorted(wanted(metadata, "test")) == ["openai", "torch"]


def test_pins_are_those_of_this_python() -> None:
    text = "# made\nnumpy==1 ; python_full_version < '3.8'\nnumpy==2 ; python_full_version >= '3.8'\nhuggingface_hub==3\n"
    assert pinned_versions(text) == {"numpy": "2", "huggingface-hub": "3"}


def test_a_torch_for_cuda_is_known_by_what_it_needs() -> None:
    assert brings_cuda(["sympy", 'nvidia-cublas-cu12 (==12.4) ; platform_system != "nowhere"'])
    assert not brings_cuda(["sympy", 'nvidia-cublas-cu12==12.4; platform_system == "nowhere"', 'cuda-x; extra == "all"'])


def test_releases_that_do_not_go_together_are_named_in_pips_words() -> None:
    said = (
        "WARNING: something else\nERROR: Cannot install anyio==4.10 and openai==1.3.0 because these package versions have "
        "conflicting dependencies.\nERROR: ResolutionImpossible: for help visit https://pip.pypa.io\n"
    )
    conflict = "Cannot install anyio==4.10 and openai==1.3.0 because these package versions have conflicting dependencies."
    assert pip_errors(said) == conflict
    assert pip_errors("Killed\n") == "Killed"


class FakeEnvironment:
    def __init__(self, installed: dict[str, str], bad: dict[str, str]) -> None:
        self.now, self._bad = dict(installed), bad

    def install(self, requirement: str) -> None:
        name, _, release = requirement.partition("==")
        if name == "stuck":
            raise CannotInstall("it goes with nothing")
        self.now[name] = release
        if name == "transformers":
            self.now["hub"] = "3"

    def installed(self) -> dict[str, str]:
        return dict(self.now)

    def fails(self) -> bool:
        return any(self.now[name] == release for name, release in self._bad.items())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            {"transformers": "2"},
            "transformers 2 breaks it: it passes with transformers 1, which brings hub 3 "
            "(put back before it, to no avail: torch 1)",
        ),
        ({"torch": "2"}, "torch 2 breaks it: it passes with torch 1"),
        ({"stuck": "2"}, "it is no dependency's version alone: it fails with torch 1, transformers 1 too"),
        ({"numpy": "1"}, "it is no dependency's version alone: it fails with torch 1, transformers 1 too"),
    ],
)
def test_the_dependency_that_breaks_us_is_named(monkeypatch: pytest.MonkeyPatch, bad: dict[str, str], says: str) -> None:
    installed = {"torch": "2", "numpy": "1", "stuck": "2", "transformers": "2"}
    environment = FakeEnvironment(installed, bad)
    monkeypatch.setattr(compat, "pinned_versions", lambda text: {"torch": "1", "numpy": "1", "stuck": "1", "transformers": "1"})
    monkeypatch.setattr(compat, "check", lambda step, place, lm_eval: "it failed" if place.fails() else None)
    assert find_culprit(Step("demo", []), environment, installed, "") == says  # type: ignore[arg-type]
