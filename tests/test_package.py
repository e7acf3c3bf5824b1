"""The package and its repository: quick to import, complete in its dependencies, and free of anybody's paths."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import time
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
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- import taco_nb ---------------------------------------------------------------------------------------------------


def test_importing_the_package_is_quick():
    def seconds(program: str) -> float:
        started = time.monotonic()
        python(program)
        return time.monotonic() - started

    assert median(seconds("import taco_nb") for _ in range(3)) < 2


def test_importing_the_package_loads_nothing_heavy():
    loaded = python("import sys, taco_nb, taco_nb.errors, taco_nb.files; print(*sys.modules)").split()
    assert "taco_nb" in loaded
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


def test_every_public_name_is_there_and_evaluate_is_a_function():
    program = """
import taco_nb
for name in taco_nb.__all__:
    assert getattr(taco_nb, name).__name__ == name and name in dir(taco_nb), name
import taco_nb.evaluation, taco_nb.training, taco_nb.data
for name in ("evaluate", "fit", "load", "datasets", "baseline"):
    assert callable(getattr(taco_nb, name)), name
from taco_nb import *
print(evaluate.__module__, fit.__name__)
"""
    assert python(program) == "taco_nb.evaluation.run fit"


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
