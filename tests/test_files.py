"""Files: nobody ever sees half of one, and the data folder is where it was said to be."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taco_nb.errors import DataError
from taco_nb.files import REPOSITORY, atomic_write, data_root, sha256

HALF_A_FILE = """
import sys, time
from taco_nb.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half of the new content")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_bytes_and_text_arrive_whole(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "bytes") as file:
        file.write(bytes(range(256)))
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == bytes(range(256))
    with atomic_write(str(tmp_path / "text"), "w") as file:
        file.write("café 猫\n")
    assert (tmp_path / "text").read_bytes() == "café 猫\n".encode()


def test_the_name_is_taken_only_at_the_end(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    with atomic_write(path) as file:
        file.write(b"newer")
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions and signals of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "atomic") as file:
            file.write(b"")
        (tmp_path / "plain").write_bytes(b"")
        assert os.umask(umask) == umask  # which the writing has left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="permissions and signals of POSIX")
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", HALF_A_FILE, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:  # what the dead one left beside it is in nobody's way
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_data_root_argument_wins_then_environment_then_repository(tmp_path, monkeypatch):
    given, environment = tmp_path / "given", tmp_path / "environment"
    given.mkdir()
    environment.mkdir()
    monkeypatch.setenv("TACO_NB_DATA", str(environment))
    assert data_root(given) == data_root(str(given)) == given.resolve()
    assert data_root() == environment.resolve()
    monkeypatch.delenv("TACO_NB_DATA")
    assert data_root() == Path(__file__).resolve().parents[1] / "data"
    assert (data_root() / "sample").is_dir()


def test_data_root_is_absolute_and_knows_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data_root("data") == tmp_path.resolve() / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert data_root("~/data") == tmp_path.resolve() / "data"


def test_a_missing_data_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(DataError, match=name):
            data_root(tmp_path / name)
    monkeypatch.setenv("TACO_NB_DATA", str(tmp_path / "from-environment"))
    with pytest.raises(DataError, match="from-environment.*TACO_NB_DATA"):
        data_root()


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_sha256_of_files_larger_than_a_block(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
