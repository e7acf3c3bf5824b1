"""The package and its repository: quick to import, complete in its dependencies, and free of anybody's paths."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median

import pytest

import taco_nb
from taco_nb.files import REPOSITORY

HEAVY = ("torch", "compressai", "open_clip", "pandas", "plotly")
SOURCES = {folder: sorted((REPOSITORY / folder).rglob("*.py")) for folder in ("taco_nb", "tests")}


def python(program: str) -> str:
    """What a program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- import taco_nb ---------------------------------------------------------------------------------------------------


def test_importing_the_package_is_quick():
    """The time is the processor's, of the whole interpreter, so that a busy machine is no fault."""
    spent = [float(python("import taco_nb, time; print(time.process_time())")) for _ in range(3)]
    assert median(spent) < 1


def test_importing_the_package_loads_nothing_heavy():
    loaded = python("import sys, taco_nb, taco_nb.errors, taco_nb.files; print(*sys.modules)").split()
    assert "taco_nb" in loaded
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


def test_every_public_name_is_there_and_none_needs_the_tools():
    program = """
import sys, taco_nb
for name in taco_nb.__all__:
    assert getattr(taco_nb, name).__name__ == name and name in dir(taco_nb), name
import taco_nb.evaluation, taco_nb.training, taco_nb.data
for name in ("evaluate", "fit", "load", "datasets", "baseline"):
    assert callable(getattr(taco_nb, name)), name
from taco_nb import *
print(evaluate.__module__, fit.__name__, *sys.modules)
"""
    *functions, loaded = python(program).split(maxsplit=2)
    assert functions == ["taco_nb.evaluation.run", "fit"], "not the modules that are called so"
    loaded = loaded.split()
    assert "taco_nb.training" in loaded and "taco_nb.codec" in loaded
    of_tools = {name for name in loaded if name.startswith("taco_nb.tools")}
    of_tools |= {"openai", "pooch", "nbformat", "papermill", "bs4"}.intersection(loaded)
    assert sorted(of_tools) == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evalaute'"):
        taco_nb.evalaute  # noqa: B018
    assert not hasattr(taco_nb, "torch")


# --- pyproject.toml ---------------------------------------------------------------------------------------------------


def imports(paths) -> dict[str, str]:
    """The top-level modules that the files import, each with the name of a file that does."""
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0]: path.name for name in names}
    return found


def normal(requirement: str) -> str:
    """The name of a distribution in a requirement, as PyPI compares names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.mark.parametrize("folder", SOURCES)
def test_every_import_is_a_dependency(folder):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has nothing to read TOML with")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = set(map(normal, project["dependencies"]))
    if folder == "tests":
        required |= set(map(normal, project["optional-dependencies"]["dev"]))
    own = {"taco_nb"} | {path.stem for path in SOURCES["tests"]}
    distributions = packages_distributions()
    missing = {
        f"{module} ({path})"
        for module, path in imports(SOURCES[folder]).items()
        if module not in own | sys.stdlib_module_names
        and not required & set(map(normal, distributions.get(module, [module])))
    }
    assert not missing, f"pyproject.toml does not require {sorted(missing)}"


# --- How the modules depend on each other -----------------------------------------------------------------------------

ORDER = (
    "lazy", "errors", "settings", "files", "command", "processes", "provenance", "pretrained", "model", "data", "text",
    "metrics", "experiment", "checkpoint", "codec", "inspection", "training", "evaluation", "control", "timing",
    "report", "verdicts", "audit", "notebook", "ablation", "widgets", "tools", "taco_nb",
)  # fmt: skip
"""The modules and subpackages of `taco_nb`. Each may import from those before it, and none from those behind it."""
ONLY = {"model": {"errors", "settings"}}
"""What a subpackage may import at most: the model reads no files, and is nobody's client."""
NEVER = {"metrics": {"model", "checkpoint", "codec"}}
"""What a subpackage must not import, although it comes before: metrics measure pictures, whatever made them."""
READS_FILES = {"io", "os", "pathlib", "pickle", "safetensors", "shutil", "tempfile", "zipfile"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES["taco_nb"]}


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a module, those in functions too, without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_run_time(node)


def imported_by(module: str) -> set[str]:
    """The names of all modules that a module imports, at its top or in a function."""
    found = set()
    for node in at_run_time(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found - {module}


IMPORTS = {module: imported_by(module) for module in MODULES}


def part(module: str) -> str:
    """The module or subpackage directly below `taco_nb` that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def arrows() -> set[tuple[str, str]]:
    """(module, imported module) for all imports from one part of the package into another."""
    pairs = {(module, other) for module, others in IMPORTS.items() for other in others & MODULES.keys()}
    return {(module, other) for module, other in pairs if part(module) != part(other)}


def test_every_part_has_its_place_in_the_order():
    assert {part(module) for module in MODULES} - {"taco_nb"} <= set(ORDER)


def test_no_module_imports_upwards():
    upwards = {
        f"{module} -> {other}"
        for module, other in arrows()
        if other == "taco_nb" or ORDER.index(part(other)) > ORDER.index(part(module))
    }
    assert sorted(upwards) == []


def test_the_model_reads_no_files_and_metrics_know_no_models():
    wrong = {f"{a} -> {b}" for a, b in arrows() if part(b) not in ONLY.get(part(a), ORDER)}
    wrong |= {f"{a} -> {b}" for a, b in arrows() if part(b) in NEVER.get(part(a), ())}
    wrong |= {
        f"{module} -> {name}"
        for module, names in IMPORTS.items()
        for name in names
        if part(module) == "model" and name.partition(".")[0] in READS_FILES
    }
    assert sorted(wrong) == []


def test_no_two_modules_import_each_other():
    """A circle is a module that can be reached from itself."""
    circles = set()
    for start in MODULES:
        reached, todo = set(), [start]
        while todo:
            further = IMPORTS[todo.pop()] & MODULES.keys() - reached
            reached |= further
            todo += further
        if start in reached:
            circles.add(start)
    assert sorted(circles) == []


def test_no_two_functions_or_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                homes.setdefault(node.name, []).append(module)
    assert sorted({n for n, h in homes.items() if len(h) > 1 and not n.startswith("_")}) == []


def test_no_private_name_is_imported_elsewhere():
    private = {
        f"{module}: {node.module}.{alias.name}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert sorted(private) == []


def test_nothing_but_tools_is_of_one_operating_system():
    """A library may import such a module where it exists; ours may not."""
    of_one_system = {"fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "winreg"}
    assert sorted({f"{m} -> {o}" for m, others in IMPORTS.items() for o in others & of_one_system}) == []


# --- The tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES["tests"], ids=lambda path: path.stem)
def test_every_skip_has_a_reason(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(
            r"pytest\.(mark\.)?(skip|skipif|xfail)", ast.unparse(node)
        ):
            call = calls.get(id(node))
            given = (
                []
                if call is None
                else [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
            )
            if call is not None and node.attr != "skipif":
                given += call.args
            reasons = [ast.unparse(reason) for reason in given]
            assert any(len(reason) > 5 for reason in reasons), f"{path.name}, line {node.lineno}"


# --- The repository ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files in git, and those that would be added to it."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout, or no git")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_no_file_names_a_home_or_work_folder(tracked):
    somewhere = re.compile(rb"(?<![\w.~])/(home|Users|root|work|workspace)/[\w.-]+|[A-Z]:\\+Users\\")
    assert somewhere.search(b"/".join([b"cd ", b"home", b"me"]))
    found = {}
    for path in tracked:
        content = path.read_bytes()
        if b"\0" not in content and (match := somewhere.search(content)):
            found[str(path.relative_to(REPOSITORY))] = match[0]
    assert not found


def test_no_file_is_large(tracked):
    large = {path.name: path.stat().st_size for path in tracked if path.stat().st_size > 9000 * 1000}
    assert not large
