"""`make compat`: the project with the oldest and with the newest dependencies that setup.py allows, each set in a fresh virtual
environment: parity with transformers, the README's first run, a chat, a request through the openai client, and lm-eval.

    python tests/compat.py [oldest] [newest]

Where a set fails, dependencies are put back to the versions of constraints.txt, which the whole suite runs with, one more at a
time: the one that makes it pass is named. Two things are large and are shared where that changes nothing: torch is copied from
the environment that runs this if it is of the version wanted, and lm-eval runs in that of `make clients` on the same terms.
A torch of which the index has no build without CUDA, gigabytes, is left to machines whose own has it; that is said.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("openai", "httpx2", "pytest", "pytest-timeout", "hypothesis")  # of the extra `test`, what STEPS need
PYTEST = ["-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", "-W", "default", "--timeout", "300"]


class Step(NamedTuple):
    name: str
    arguments: list[str]  # for the environment's Python
    input: str = ""


STEPS = [
    Step(
        "parity",
        [
            *PYTEST,
            "tests/test_offload_engine.py::test_greedy_text_is_that_of_transformers",
            "tests/test_offload_model.py::test_every_node_sees_exactly_its_path_also_after_commits",
            "tests/test_offload_rope.py::test_a_text_beyond_the_native_length_is_that_of_transformers",
            "tests/test_offload_match_weights.py",
            "tests/test_offload_packed_forms.py",
            "tests/test_offload_transformers_api.py",
        ],
    ),
    Step("demo", ["run_70b.py"]),
    Step("chat", ["run_70b.py", "chat", "--max-new-tokens", "16"], "Tell me about the Congress\n"),
    Step("serve", [*PYTEST, "tests/test_serve_openai.py::test_a_streamed_chat_is_the_whole_one_in_pieces"]),
    Step("lm-eval", [*PYTEST, "tests/test_serve_lm_eval.py"]),
]


def lowest(requirement: Requirement) -> str:
    """The requirement of its lower bound alone: "torch==2.6" for "torch>=2.6,<2.14"."""
    (bound,) = [one.version for one in requirement.specifier if one.operator == ">="]
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={bound}"


def wanted(requirements: list[str], extra: str) -> dict[str, Requirement]:
    """{name: requirement} of those that hold with `extra` and on this Python, from a package's metadata."""
    found = [Requirement(text) for text in requirements]
    return {canonicalize_name(one.name): one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})}


def pinned_versions(constraints: str) -> dict[str, str]:
    """{name: version} of constraints.txt on this Python."""
    lines = [Requirement(line) for line in constraints.splitlines() if line and not line.startswith("#")]
    holding = [line for line in lines if line.marker is None or line.marker.evaluate()]
    return {canonicalize_name(line.name): next(iter(line.specifier)).version for line in holding}


def brings_cuda(needs: list[str]) -> bool:
    holding = [need for need in map(Requirement, needs) if need.marker is None or need.marker.evaluate({"extra": ""})]
    return any(need.name.startswith(("nvidia-", "cuda-")) for need in holding)


class CannotInstall(Exception):
    """Says why, in pip's words."""


class Environment:
    """A fresh virtual environment in `folder` with a new pip."""

    def __init__(self, folder: Path) -> None:
        self._python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.install("--upgrade", "pip")

    def install(self, *arguments: str) -> None:
        ran = self.run(["-m", "pip", "install", "-q", "--no-compile", *arguments])
        if ran.returncode != 0:
            raise CannotInstall(pip_errors(ran.stderr))

    def python(self, *arguments: str) -> str:
        """What it prints. CalledProcessError, its output shown, when it fails."""
        ran = self.run(list(arguments))
        if ran.returncode != 0:
            print(ran.stdout + ran.stderr, flush=True)
            ran.check_returncode()
        return ran.stdout

    def run(self, arguments: list[str], text: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "", **changes}
        command = [str(self._python), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, input=text, capture_output=True, text=True, check=False)

    def requirements(self) -> list[str]:
        """treestream's, as setup.py has them now."""
        self.install("--no-deps", "-e", str(ROOT))
        return list(
            json.loads(self.python("-c", "import importlib.metadata as m, json; print(json.dumps(m.requires('treestream')))"))
        )

    def offered(self, requirement: str) -> tuple[str, list[str]]:
        """The version that pip would take, and what that needs."""
        flags = ["--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
        report = self.python("-m", "pip", "install", "-q", *flags, requirement)
        (found,) = [one["metadata"] for one in json.loads(report)["install"]]
        return found["version"], found.get("requires_dist", [])

    def installed(self) -> dict[str, str]:
        listed = json.loads(self.python("-m", "pip", "list", "--format", "json"))
        return {canonicalize_name(one["name"]): one["version"] for one in listed}

    def copy_torch(self) -> None:
        """The torch that runs this. A copy, as a link would let pip write into where it is from."""
        site = Path(self.python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        own = distribution("torch")
        for name in sorted({file.parts[0] for file in own.files or []} - {"..", "__pycache__"}):
            shutil.copytree(str(own.locate_file(name)), site / name)


def pip_errors(text: str) -> str:
    """What pip says last, after all that it tried, in one line."""
    said = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
    return " ".join(line for line in said if "for help visit" not in line) or text.strip()


class Set:
    """One end of what setup.py allows: `end` is "oldest" or "newest"."""

    def __init__(self, end: str, folder: Path) -> None:
        self.end, self._folder = end, folder
        self.environment = Environment(folder / "main")
        requirements = self.environment.requirements()
        main, test = wanted(requirements, "serve"), wanted(requirements, "test")
        self._wanted = {**main, **{name: test[name] for name in TOOLS}}
        self._lm_eval = wanted(requirements, "lm-eval")["lm-eval"]
        self.remarks: list[str] = []

    def text_of(self, requirement: Requirement) -> str:
        requirement.marker = None
        return lowest(requirement) if self.end == "oldest" else str(requirement)

    def build(self) -> str:
        """Install everything; the path of lm_eval."""
        texts = {name: self.text_of(requirement) for name, requirement in self._wanted.items()}
        if (own := self._shared_torch(texts["torch"])) is not None:
            self.environment.copy_torch()
            texts["torch"] = f"torch=={own}"
        self.environment.install(*texts.values())
        return self._find_lm_eval()

    def _shared_torch(self, text: str) -> str | None:
        """The version of the torch that runs this, where it is to be copied."""
        own, (offered, needs) = version("torch"), self.environment.offered(text)
        own_cuda = brings_cuda(distribution("torch").requires or [])
        if own == offered and not own_cuda:
            self.remarks.append(f"torch {own} is a copy of the one that runs this")
            return own
        if brings_cuda(needs) and not own_cuda:
            self.remarks.append(f"torch {own}, that runs this, in place of {offered}, which there is with CUDA only: gigabytes")
            return own
        return None

    def _find_lm_eval(self) -> str:
        text = self.text_of(self._lm_eval)
        offered, _ = self.environment.offered(text)
        clients = ROOT / ".venv-clients" / "bin"
        ask = [str(clients / "python"), "-c", "from importlib.metadata import version; print(version('lm-eval'))"]
        if (clients / "lm_eval").exists() and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == offered:
            self.remarks.append(f"lm-eval {offered} is the one of make clients")
            return str(clients / "lm_eval")
        Environment(self._folder / "lm-eval").install(text)
        self.remarks.append(f"lm-eval {offered}")
        return str(self._folder / "lm-eval" / "bin" / "lm_eval")

    def versions(self) -> dict[str, str]:
        """Of setup.py's requirements."""
        found = self.environment.installed()
        return {name: found[name] for name in self._wanted}


def check(step: Step, environment: Environment, lm_eval: str) -> str | None:
    """What it printed, if it failed."""
    ran = environment.run(step.arguments, step.input, LM_EVAL=lm_eval)
    return None if ran.returncode == 0 and ran.stdout.strip() else (ran.stdout + ran.stderr).strip() or "it printed nothing"


def find_culprit(step: Step, environment: Environment, before: dict[str, str], lm_eval: str) -> str:
    """Which dependency of those in `before`, {name: version}, it is; said in a line. What another release of it needs comes
    with it: transformers is to blame, and not the hub's client that its newer release asks for."""
    pinned = pinned_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    back: list[str] = []
    for name, release in before.items():
        if pinned.get(name, release) == release:
            continue
        known = environment.installed()
        try:
            environment.install(f"{name}=={pinned[name]}")
        except CannotInstall:
            continue
        if check(step, environment, lm_eval) is None:
            changed = environment.installed().items() - known.items()
            along = ", ".join(f"{other} {found}" for other, found in sorted(changed) if other != name)
            brought = f", which brings {along}" if along else ""
            others = f" (put back before it, to no avail: {', '.join(back)})" if back else ""
            return f"{name} {release} breaks it: it passes with {name} {pinned[name]}{brought}{others}"
        back.append(f"{name} {pinned[name]}")
    return f"it is no dependency's version alone: it fails with {', '.join(back) or 'the versions of constraints.txt'} too"


def run(end: str) -> str | None:
    """Build a set and run the steps; a line about the first that failed."""
    start_s, start_cpu_s = time.monotonic(), cpu_s()
    with tempfile.TemporaryDirectory(prefix="compat-") as folder:
        try:
            chosen = Set(end, Path(folder))
            lm_eval = chosen.build()
        except CannotInstall as error:
            return f"the {end} cannot be installed: {error}"
        versions = chosen.versions()
        print(f"{end}: {', '.join(f'{name} {release}' for name, release in versions.items())}", *chosen.remarks, sep="\n  ")
        print(f"  installed in {time.monotonic() - start_s:.0f} s", flush=True)
        for step in STEPS:
            step_s = time.monotonic()
            problem = check(step, chosen.environment, lm_eval)
            print(f"  {step.name}: {'FAILED' if problem else 'ok'}, {time.monotonic() - step_s:.0f} s", flush=True)
            if problem is not None:
                print(problem, flush=True)
                return f"{step.name} fails with the {end}: {find_culprit(step, chosen.environment, versions, lm_eval)}"
    print(f"  {time.monotonic() - start_s:.0f} s, {cpu_s() - start_cpu_s:.0f} s of processor time", flush=True)
    return None


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    ends = sys.argv[1:] or ["oldest", "newest"]
    failures = [failure for end in ends if (failure := run(end)) is not None]
    print("\n".join(f"compat: {failure}" for failure in failures) or f"compat: passes with the {' and the '.join(ends)}")
    sys.exit(1 if failures else 0)
