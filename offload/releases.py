"""The releases of torch, transformers and tokenizers that were tested: what setup.py said when this package was installed.
Run from a clone that was not installed, nothing is known, and nothing is said."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from types import TracebackType

from .errors import OffloadError

DISTRIBUTION = "treestream"
WATCHED = ("torch", "transformers", "tokenizers")  # their releases have broken what builds on them
BLAMED = {"transformers", "tokenizers"}
OURS = {"offload", "tree", "run_70b"}
INSTALL = "pip install -c constraints.txt -e ."


def untested() -> tuple[str, ...]:
    """What is installed and not of a tested release, like "torch 3.0 (tested: >=2.6,<2.14)"."""
    found = {name: installed(name) for name in WATCHED}
    return tuple(_told(name) for name, release in found.items() if release is not None and not _is_tested(name, release))


def warning() -> str | None:
    """One line about what `untested` names."""
    names = untested()
    return f"{', '.join(names)}: not tested, may fail; {INSTALL} installs what was" if names else None


def blamed_for(error: BaseException) -> str | None:
    """The dependency in which `error` was raised, with its release and the tested ones; None when it is one of ours or of
    those that do as they are told."""
    if isinstance(error, ImportError) and _package(error.name or "") in BLAMED:  # a name that we import is gone
        return _told(_package(error.name or ""))
    for package in reversed(list(_packages(error.__traceback__))):
        if package in OURS:
            return None
        if package in BLAMED:
            return _told(package)
    return None


def translated(error: BaseException, where: str) -> OffloadError | None:
    """`error` as ours, if a dependency is to blame."""
    blamed = blamed_for(error)
    if blamed is None:
        return None
    what = " ".join(str(error).split())[:300]
    return OffloadError(
        f"{blamed} failed: {type(error).__name__}: {what}",
        where=where,
        cure=f"install what was tested, {INSTALL}; if that is what runs, report what --verbose prints",
    )


@contextmanager
def errors_translated() -> Iterator[None]:
    """OffloadError in place of what a dependency is to blame for."""
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:
        if (ours := translated(error, "offload.load")) is None:
            raise
        raise ours from error


def bounds_of(name: str) -> str | None:
    """Like ">=2.6,<2.14"; None for what is not among our requirements, or if they are not known."""
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        if match := re.fullmatch(rf"{name} *\(?([<>=!~][^;)]*)\)? *(;.*)?", requirement):
            return ",".join(sorted((bound.strip() for bound in match[1].split(",")), reverse=True))  # ">" before "<"
    return None


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_tested(name: str, release: str) -> bool:
    tested = bounds_of(name)
    if tested is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(tested).contains(release, prereleases=True)


def _told(name: str) -> str:
    tested = bounds_of(name)
    return f"{name} {installed(name) or 'of an unknown release'}" + (f" (tested: {tested})" if tested else "")


def _packages(trace: TracebackType | None) -> Iterator[str]:
    """The package of each frame, the innermost last."""
    while trace is not None:
        yield _package(trace.tb_frame.f_globals.get("__name__") or "")
        trace = trace.tb_next


def _package(module: str) -> str:
    return module.partition(".")[0]
