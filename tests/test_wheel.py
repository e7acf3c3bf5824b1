"""An installation that is no checkout: a wheel is built, unpacked and used where the repository cannot be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from taco_nb.files import BUNDLED, REPOSITORY

DATA = ("sample", "kodak", "reference", "checkpoints", "joint_space", "results", "shapes")
BUILD = "import setuptools.build_meta as hooks; print(hooks.build_wheel('out'))"  # as pip calls it
USE = """
import sys
from pathlib import Path
import taco_nb
from taco_nb import datasets, load
from taco_nb.files import bundled, data_root
from taco_nb.tools.cli import main

sample = datasets("sample", limit=1)[0][0]
codec = load("demo")
blob = codec.encode(sample.image, sample.captions[0])
assert load("demo").decode(blob).size == sample.image.size
assert load("demo-low").encode(sample.image, "a cat") and bundled("reference/report.json").is_file()
assert len(datasets("sample", captions="context")[0]) == 3
assert [len(of) for of in datasets("kodak", "kodak-256", captions="context")] == [24, 24]
print(taco_nb.__file__, data_root(), codec.fingerprint, sep="\\n")
main(["status", "clic"], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which a wheel of this repository was unpacked."""
    pytest.importorskip("setuptools", reason="a wheel is built with setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "taco_nb", source / "taco_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in DATA:
        shutil.copytree(REPOSITORY / "data" / name, source / "data" / name)
    (source / "data" / "coco").mkdir()
    (source / "data" / "coco" / "large.jpg").write_bytes(b"a download, which is nobody else's")
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(source / "out" / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(home)
    return home


def test_a_wheel_holds_the_small_data_and_no_download(installed):
    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    packed = files(installed / "taco_nb" / "_data")
    assert packed == {
        f"{name}{os.sep}{path}": content for name in DATA for path, content in files(BUNDLED / name).items()
    }
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"taco_nb"}


def test_what_is_installed_from_a_wheel_encodes_and_decodes(installed, tmp_path):
    """Without `site`, so that an editable installation of the repository is not found instead."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {name: value for name, value in os.environ.items() if name != "TACO_NB_DATA"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(installed), *packages]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    module, root, fingerprint, status, *_ = done.stdout.splitlines()
    assert Path(module).is_relative_to(installed) and len(fingerprint) > 8
    if sys.platform == "linux":
        assert Path(root) == tmp_path / "cache" / "taco-nb" and not Path(root).exists()
    assert status.startswith("clic") and "missing" in status and str(REPOSITORY) not in done.stdout


def test_an_editable_installation_reads_the_repositorys_own_data(tmp_path):
    """Its build copies nothing, so that what is changed in `data/` counts at once."""
    pytest.importorskip("setuptools", reason="a wheel is built with setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "taco_nb").mkdir()
    (tmp_path / "taco_nb" / "__init__.py").touch()
    build = BUILD.replace("build_wheel", "build_editable")
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "out" / done.stdout.splitlines()[-1]) as wheel:
        assert not [name for name in wheel.namelist() if "_data" in name]
    assert BUNDLED == REPOSITORY / "data"
