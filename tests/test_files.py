"""Files: nobody ever sees half of one, and the data folder is where it was said to be."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disks import bound_by_permissions, small_disk

from taco_nb.errors import DataError, StorageError
from taco_nb.files import (
    LONGEST_NAME,
    REPOSITORY,
    atomic_write,
    check_writable,
    data_root,
    fitting_name,
    human_size,
    sha256,
    short_path,
)

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


# --- Where nothing can be written -------------------------------------------------------------------------------------

WRITE_IN_VAIN = """
import sys
from pathlib import Path
import torch
from taco_nb.errors import StorageError
from taco_nb.files import atomic_write, check_writable

home = Path(sys.argv[1])

def plain():
    with atomic_write(home / "file", "w") as file:
        file.write("x" * 2_000_000)

def weights():
    with atomic_write(home / "file") as file:
        torch.save({"weights": torch.zeros(500_000)}, file)

for write in (plain, weights, lambda: check_writable(home / "new")):
    try:
        write()
        print("written")
    except StorageError as error:
        print(error)
print(sorted(path.name for path in home.iterdir()), sum(map(len, [(home / "file").read_bytes()])))
"""


def in_vain(*before: str, home: Path) -> list[str]:
    """What a program says that tries to write in vain; the beginning of its command sets its limits."""
    done = subprocess.run(
        [*before, sys.executable, "-c", WRITE_IN_VAIN, str(home)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_a_sentence_and_the_old_file_stays(tmp_path):
    """Of `torch.save` too, which reports a full disk as an "unexpected pos"."""
    full = "sh", "-c", f'echo old > {tmp_path}/file && exec "$@"', "sh"
    plain, weights, _, left = in_vain(*small_disk(tmp_path), *full, home=tmp_path)
    assert (
        plain
        == weights
        == (
            f"{tmp_path / 'file'} cannot be written: the disk is full. Make room there, or give a folder on another disk."
        )
    )
    assert left == "['file', 'new'] 4"


def test_a_disk_that_is_full_to_the_brim_is_found_out_before_the_work(tmp_path):
    fill = (
        "sh",
        "-c",
        f'mkdir {tmp_path}/new; dd if=/dev/zero of={tmp_path}/file bs=4k 2>/dev/null; exec "$@"',
        "sh",
    )
    *_, checked, _ = in_vain(*small_disk(tmp_path), *fill, home=tmp_path)
    assert checked.startswith(f"{tmp_path / 'new'} cannot be written: the disk is full.")


def test_a_disk_that_can_only_be_read_is_a_sentence(tmp_path):
    lock = "sh", "-c", f'echo old > {tmp_path}/file && mount -o remount,ro {tmp_path} && exec "$@"', "sh"
    *said, left = in_vain(*small_disk(tmp_path), *lock, home=tmp_path)
    assert len(said) == 3 and left == "['file'] 4"
    assert all(line.endswith("the disk can only be read. Give a folder on another disk.") for line in said)


def test_a_folder_of_somebody_elses_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("old\n")
    tmp_path.chmod(0o555)
    try:
        *said, left = in_vain(*bound_by_permissions(), home=tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert len(said) == 3 and left == "['file'] 4"
    assert all(line.endswith("permission is denied. Give a folder that you may write to.") for line in said)


def test_a_folder_whose_name_a_file_has_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="file/new cannot be written: .*Give another folder"),
        atomic_write(tmp_path / "file" / "new"),
    ):
        pass
    with pytest.raises(StorageError, match="cannot be written"):
        check_writable(tmp_path / "file")
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_errors_that_have_nothing_to_do_with_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file") as file:
        file.write(Path(tmp_path / "absent").read_bytes())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_can_be_made_again_does_not_wait_for_the_disk(tmp_path, monkeypatch, durable):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    with atomic_write(tmp_path / "file", durable=durable) as file:
        file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x" and len(waited) == durable


# --- Names and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.png", "x" * 250, "\u56f3" * 80 + ".jpg", "e\u0301" * 70 + ".JPEG", "." * 255]
)
def test_long_names_get_a_short_one_that_can_be_written(tmp_path, name):
    short = fitting_name(f"{name}.taco")
    with atomic_write(tmp_path / short) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [short] and len(short.encode()) <= LONGEST_NAME
    if len(name) < 100:
        assert short == fitting_name(short) and short.endswith(".taco")
    assert (short == f"{name}.taco") == (len(f"{name}.taco".encode()) <= LONGEST_NAME)


def test_long_names_that_begin_alike_stay_apart():
    names = {fitting_name("x" * 300 + f"{i}.png") for i in range(50)}
    assert len(names) == 50 and all(name.endswith(".png") for name in names)


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path):
    with atomic_write(tmp_path / ("\u56f3" * 85)) as file:
        file.write(b"x")
    assert len(os.listdir(tmp_path)[0].encode()) == 255


def test_paths_are_short_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "a" / "b") == os.path.join("a", "b") and short_path(tmp_path.parent) == str(
        tmp_path.parent
    )


@pytest.mark.parametrize(
    ("size", "text"), [(5, "5 bytes"), (1553, "1.6 kB"), (244_408_911, "244 MB"), (13_510_573_713, "13.5 GB")]
)
def test_sizes_are_said_as_people_do(size, text):
    assert human_size(size) == text


# --- Provenance -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core"
)
def test_cores_are_those_that_the_process_may_use():
    """As of a batch system, which gives a job some of a machine's cores."""
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    program += "from taco_nb.provenance import provenance; print(provenance()['hardware']['cores'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
