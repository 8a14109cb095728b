"""The shape of the project, read from its source without importing it: who may import whom, how long things may be,
which names may occur where. A failure prints the offending lines. A table changes only with its reason beside it."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# A room is a package or a module directly under offload/. It may import itself and what stands beside it here; a name
# with a dot admits one module of a room. Who may import `tree`, the other package, is in TREE_IMPORTERS.
FLOOR = {"errors", "config", "version"}
MACHINE = {*FLOOR, "coding", "device", "weights", "streaming"}
MODEL = {*MACHINE, "model", "planner", "text"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "releases": {"errors"},  # what is installed, and what was tested
    "config": {"errors"},
    "device": FLOOR,
    "coding": FLOOR,  # arithmetic on tensors
    "weights": {*FLOOR, "coding", "device"},
    "streaming": {*FLOOR, "device", "weights"},
    "datastore": {"errors"},  # tokens and bytes: whoever opens one brings what it has to know of a model
    "text": {*FLOOR, "model.transformers_api", "weights.gguf_header", "weights.gguf_cursor"},  # which hold tokenizers, too
    "model": {*MACHINE, "releases"},  # whether a family or a release is to blame for a pass that fails
    # shapes come from where models are found, without building any; buckets say what recordings of the draft will take, and
    # the workspace what decoding will; of packed files it reads the same headers, without torch
    "planner": {
        *FLOOR,
        "coding.base_kinds",
        "coding.config_fields",
        "coding.gguf_types",
        "coding.workspace",
        "device",
        "weights",
        "model.gguf_config",
        "model.locate",
        "model.rope",
        "model.buckets",
    },
    "report": {*FLOOR, "device.base", "planner", "text"},  # records and words: it reads no weights and moves none
    "demo": FLOOR,  # data, and the script that made it
    # makes tensors instead of reading them; computes what the demo target computes
    "scale": {*MACHINE, "model", "planner.shapes", "demo"},
    "typed_model": MODEL,  # what of a model has a size, without its files
    "stored": {*MODEL, "scale"},  # which of its tensors travel as what
    "source": {*MODEL, "stored", "typed_model"},  # a model looked at, not yet loaded: what calibrate measures and engine loads
    "calibrate": {*MODEL, "source", "typed_model"},
    "engine": {*MODEL, "report", "source", "typed_model"},
    "assemble": {*MODEL, "calibrate", "datastore", "engine", "report", "source", "typed_model"},
    # looks at files, devices and sizes as a run would, times copies and a decoder, and runs nothing
    "doctor": {*MODEL, "calibrate", "releases", "scale.preset", "source", "typed_model"},
    # HTTP around one engine; whoever starts a server says how its engine is opened
    "serve": {*FLOOR, "engine", "planner", "releases", "report", "text"},
    "bench": {*MODEL, "assemble", "calibrate", "demo", "engine", "releases", "report", "scale", "source"},
    "cli": {
        *MODEL,
        "assemble",
        "bench",
        "calibrate",
        "datastore",
        "demo",
        "doctor",
        "engine",
        "releases",
        "report",
        "scale",
        "serve",
        "source",
        "typed_model",
    },
    "__init__": {*MODEL, "assemble", "engine", "releases", "report"},  # the package's face: `offload.load`
}

# Where offload may say `from tree.x import y`.
TREE_IMPORTERS = (
    "offload/calibrate/",  # times what is done with trees
    "offload/datastore/",  # a source of tokens of a tree
    "offload/engine/",
    "offload/planner/",
    "offload/bench/",
    "offload/assemble.py",  # drafts without a model: whoever wires everything brings the sources
    "offload/cli/",
    "offload/serve/",  # asks for scores and writes them out
    "offload/model/masks.py",  # a tree's mask
    "offload/model/apart.py",  # the same of a draft on another device: a drafter, whose arguments are tree's types
    "offload/model/drafter.py",  # fits our model to tree's TreeModel protocol, whose arguments are tree's types
    "offload/__init__.py",  # the guard that the tree it finds is ours and not dm-tree's
)
TREE_MAY_IMPORT = {"tree", "torch", "numpy", *sys.stdlib_module_names}

# Where offload may say `transformers`: what moves between its releases is known in one place.
TRANSFORMERS_FILES = (
    "offload/model/transformers_api.py",
    "offload/demo/train.py",  # made the bundled pair, once, and is not run again
)

# Of coding, those that take the time of importing numba.
NUMBA_MODULES = {
    "loops",
    "base_loops",
    "number_loops",
    "residual_loops",
    "base_encode",
    "residual_cpu",
    "residual_encode",
}

MODULE_LINES, FUNCTION_LINES = 300, 60
CUDA_FILE = "offload/device/cuda.py"


class Import(NamedTuple):
    module: str  # absolute dotted name; "offload.device.base" for `from .base import Device` inside offload/device
    line: int
    relative: bool
    deferred: bool  # inside a function or under TYPE_CHECKING: cannot close a cycle


def python_files(*places: str) -> list[Path]:
    found = [path for place in places for path in (ROOT / place).rglob("*.py")]
    return sorted(found + [ROOT / place for place in places if (ROOT / place).is_file()])


def product_files() -> list[Path]:
    return python_files("offload", "tree", "run_70b.py")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def deferred_nodes(tree: ast.Module) -> set[ast.AST]:
    def is_deferring(node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return "TYPE_CHECKING" in ast.dump(node.test)
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)

    return {child for node in ast.walk(tree) if is_deferring(node) for child in ast.walk(node)}


@cache
def product_modules() -> frozenset[str]:
    return frozenset(module_of(path) for path in product_files())


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    package = path.relative_to(ROOT).parent.parts
    deferred = deferred_nodes(parse(path))
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, node in deferred)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                module = inner if inner in product_modules() else base
                yield Import(module, node.lineno, node.level > 0, node in deferred)


def room_of(path: Path) -> str:
    """The part below offload: "device" for device/cpu.py, "source" for source.py, "__init__" for __init__.py."""
    return Path(path.relative_to(ROOT).parts[1]).stem


def is_admitted(module: str, room: str) -> bool:
    """`module` without its leading "offload."; the bare package is `__init__`, which nobody below may import."""
    return any(f"{module}.".startswith(f"{name}.") for name in {room, *ALLOWED.get(room, set())})


def assert_none(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(dict.fromkeys(offenders))


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(path) for path in python_files("offload")}
    assert rooms <= set(ALLOWED), f"give these rooms a row in ALLOWED: {sorted(rooms - set(ALLOWED))}"


def test_arrows_in_offload_point_down() -> None:
    offenders = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in python_files("offload")
        for found in imports_of(path)
        if found.module.split(".")[0] == "offload"
        and not is_admitted(found.module.removeprefix("offload").lstrip(".") or "__init__", room_of(path))
    ]
    assert_none(offenders)


def test_what_renders_an_untrusted_template_imports_nothing_of_ours() -> None:
    path = ROOT / "offload/text/template_process.py"
    assert path.exists() and not [found for found in imports_of(path) if found.module.split(".")[0] in {"offload", "tree"}]


def test_tree_imports_only_torch_numpy_and_the_standard_library() -> None:
    offenders = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in python_files("tree")
        for found in imports_of(path)
        if found.module.split(".")[0] not in TREE_MAY_IMPORT
    ]
    assert_none(offenders)


def test_tree_is_imported_in_few_places_and_by_module() -> None:
    offenders = []
    for path in python_files("offload"):
        if not name_of(path).startswith(TREE_IMPORTERS):
            used = [found for found in imports_of(path) if found.module.split(".")[0] == "tree"]
            offenders += [f"{name_of(path)}:{found.line} may not import tree" for found in used]
        for node in ast.walk(parse(path)):
            plain = isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "tree" for alias in node.names)
            bare = isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "tree"
            if (plain or bare) and room_of(path) != "__init__":
                offenders.append(f"{name_of(path)}:{node.lineno}: write `from tree.x import y`")
    assert_none(offenders)


def test_transformers_is_imported_in_one_file() -> None:
    offenders = [
        f"{name_of(path)}:{found.line}: {found.module}"
        for path in product_files()
        if name_of(path) not in TRANSFORMERS_FILES
        for found in imports_of(path)
        if found.module.split(".")[0] == "transformers"
    ]
    assert_none(offenders)


def test_numba_is_imported_when_something_is_coded() -> None:
    """What imports it, by whatever way, while it is imported itself: loops, and what encodes and decodes by them."""
    found, before = {"numba"}, set[str]()
    while found != before:
        before = set(found)
        found |= {
            module_of(path)
            for path in product_files()
            if any(not one.deferred and (one.module in found or one.module.startswith("numba.")) for one in imports_of(path))
        }
    assert found - {"numba"} == {f"offload.coding.{name}" for name in NUMBA_MODULES}


def test_a_package_imports_itself_relatively() -> None:
    offenders = [
        f"{name_of(path)}:{found.line} imports {found.module}"
        for path in python_files("offload", "tree")
        for found in imports_of(path)
        if not found.relative and found.module.split(".")[0] == path.relative_to(ROOT).parts[0]
    ]
    assert_none(offenders)


def test_the_entry_point_hands_over_and_nothing_imports_it() -> None:
    entry = [found for path in python_files("run_70b.py") for found in imports_of(path)]
    standard = set(sys.stdlib_module_names)
    assert [found for found in entry if found.module.split(".")[0] not in {"offload", *standard}] == []
    below = [(name_of(path), found) for path in python_files("offload", "tree") for found in imports_of(path)]
    assert [place for place, found in below if found.module == "run_70b"] == []


def test_no_import_cycles() -> None:
    graph = {module_of(path): set[str]() for path in product_files()}
    for path in product_files():
        ours = {found.module for found in imports_of(path) if not found.deferred} & set(graph)
        graph[module_of(path)] = ours - {module_of(path)}
    while free := [module for module, targets in graph.items() if not targets]:
        for module in free:
            del graph[module]
        for targets in graph.values():
            targets.difference_update(free)
    assert graph == {}, "these import each other, or something that does"


def test_modules_and_functions_stay_small() -> None:
    offenders = []
    for path in product_files():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MODULE_LINES:
            offenders.append(f"{name_of(path)}: {num_lines} lines, {MODULE_LINES} at most")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > FUNCTION_LINES:
                    offenders.append(f"{name_of(path)}:{node.lineno} {node.name}: {num_lines} lines, {FUNCTION_LINES}")
    assert_none(offenders)


def test_setup_lists_every_package_by_name() -> None:
    setup = parse(ROOT / "setup.py")
    names = {getattr(node, field, None) for node in ast.walk(setup) for field in ("id", "attr", "name")}
    assert not names & {"find_packages", "find_namespace_packages"}
    keywords = [node for node in ast.walk(setup) if isinstance(node, ast.keyword)]
    listed = next(ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == "packages")
    assert listed == sorted({module_of(path.parent / "__init__.py") for path in python_files("offload", "tree")})


def test_nothing_can_stand_in_for_our_tree() -> None:
    """A folder `tests/tree` would be what `import tree` finds; so would an installed dm-tree without `pythonpath`."""
    assert not [place for place in ("tests/tree", "tests/offload", "tests/__init__.py") if (ROOT / place).exists()]
    assert re.search(r'^pythonpath = \["\."\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    tricks = re.compile(r"\bsys\.path\b|\bsys\.modules\b")
    others = [path for path in python_files("tests") if path != Path(__file__).resolve()]
    assert [name_of(path) for path in others if tricks.search(path.read_text(encoding="utf-8"))] == []


def names_torch_cuda(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return node.level == 0 and (node.module == "torch.cuda" or (node.module == "torch" and "cuda" in names))
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr == "cuda"  # tensor.cuda()


def test_torch_cuda_is_named_in_one_file() -> None:
    offenders = []
    for path in [*product_files(), ROOT / "setup.py"]:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        where = [number for number, line in lines if "torch.cuda" in line]
        where += [
            node.lineno for node in ast.walk(parse(path)) if isinstance(node, ast.stmt | ast.expr) and names_torch_cuda(node)
        ]
        if name_of(path) != CUDA_FILE:
            offenders += [f"{name_of(path)}:{number}" for number in sorted(set(where))]
    assert_none(offenders)


def runs_foreign_code(node: ast.AST) -> bool:
    """What could execute a file's contents: pickle in any form, evaluated text, a model's own Python."""
    if isinstance(node, ast.Attribute):
        return node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    if isinstance(node, ast.keyword):
        refused = isinstance(node.value, ast.Constant) and node.value.value is False
        return node.arg in {"trust_remote_code", "allow_pickle"} and not refused
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}


def test_no_file_can_run_code() -> None:
    picklers = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    offenders = []
    for path in product_files():
        where = [found.line for found in imports_of(path) if found.module.split(".")[0] in picklers]
        where += [getattr(node, "lineno", 0) for node in ast.walk(parse(path)) if runs_foreign_code(node)]
        offenders += [f"{name_of(path)}:{number}" for number in where]
    assert_none(offenders)


def test_source_is_ascii() -> None:
    files = python_files("offload", "tree", "tests", "docs", "setup.py", "run_70b.py")
    assert [name_of(path) for path in files if not path.read_bytes().isascii()] == []


def test_changelog_opens_with_this_version() -> None:
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "offload/version.py").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version and newest and newest[1] == version[1]


def test_readme_has_two_commands_and_ci_runs_the_second() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Install and run\n")[2].partition("\n## ")[0]
    commands = [block.strip() for block in re.findall(r"^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    assert len(commands) == 2 and not any("\n" in command for command in commands)
    assert all(" -c constraints.txt -e " in command for command in commands)  # they do in a year what they do today
    assert commands[1] in [line.strip() for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()]
