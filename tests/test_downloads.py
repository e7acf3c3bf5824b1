"""Downloads over real HTTP: they resume, they are checked, and what is not whole never stands where it would be trusted."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import command
from disks import small_disk
from file_server import FileServer

from taco_nb.data import datasets, training_pairs
from taco_nb.errors import DataError, DownloadError, StorageError
from taco_nb.files import BUNDLED, REPOSITORY, sha256
from taco_nb.pretrained import Checkpoint
from taco_nb.tools import fetch
from taco_nb.tools.download import BLOCK, Remote, check_room, download
from taco_nb.tools.fetch import (
    SOURCES,
    STAGING,
    Part,
    fetch_set,
    manifest,
    missing_parts,
    room_needed,
    unpack,
)

CONTENT = random.Random(0).randbytes(1_500_000)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with FileServer() as server:
        server.files["a.bin"] = CONTENT
        yield server


def remote(server: FileServer, name: str = "a.bin", **changes) -> Remote:
    content = server.files[name]
    checksums = f"sha256:{hashlib.sha256(content).hexdigest()} md5:{hashlib.md5(content).hexdigest()}"
    return Remote(**{"url": server.url(name), "size": len(content), "checksums": checksums, **changes})


def part_of(there: Remote, *where) -> Part:
    """What is there on the server, as a part of a data set."""
    return Part(there.url, there.size, there.checksums, there.vouched, *where)


def files(folder: Path) -> dict[str, int]:
    """What lies in a folder, by name, with sizes; empty files, such as locks, aside."""
    found = {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    return {name: size for name, size in found.items() if size}


def python(program: str, *arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=ENVIRONMENT, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def wait_until(condition, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("waited a minute in vain")


# --- One file ---------------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_a_second_call_asks_for_nothing(server, tmp_path):
    path = tmp_path / "folder" / "a.bin"
    for _ in range(2):
        assert download(remote(server), path) == f"sha256:{sha256(path)}"
        assert path.read_bytes() == CONTENT and files(tmp_path) == {"folder/a.bin": len(CONTENT)}
    assert server.asked == [("a.bin", 0)]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path, ranges):
    server.ranges, server.cuts = (
        ranges,
        [4 * BLOCK + 1, 5 * BLOCK + 1],
    )  # from the start each time, or from there on
    download(remote(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [start // BLOCK for _, start in server.asked] == ([0, 4, 9] if ranges else [0, 4, 5])


def test_a_file_that_has_moved_is_followed_and_resumed_there(server, tmp_path):
    server.moved, server.cuts = {"old/b.bin": "a.bin"}, [4 * BLOCK]
    download(remote(server, url=server.url("old/b.bin")), tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == CONTENT
    assert server.asked == [("old/b.bin", 0), ("a.bin", 0), ("old/b.bin", 4 * BLOCK), ("a.bin", 4 * BLOCK)]


@pytest.mark.parametrize("seed", range(5))
def test_wherever_it_breaks_the_bytes_are_the_same(server, tmp_path, seed):
    chance = random.Random(seed)
    server.cuts = [chance.randrange(BLOCK, 400_000) for _ in range(chance.randrange(1, 8))]
    download(remote(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_gives_up_is_a_sentence_and_the_next_call_goes_on(server, tmp_path, ranges):
    server.ranges, server.cuts = ranges, [10 * BLOCK, 0]
    with pytest.raises(DownloadError, match=r"a.bin \(1.5 MB\) could not be fetched: .* more expected"):
        download(remote(server), tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    asked = len(server.asked)
    download(remote(server), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked[asked:] == [("a.bin", 10 * BLOCK if ranges else 0)]


FETCH = """
import sys
from pathlib import Path
from taco_nb.tools.download import Remote, download
download(Remote(sys.argv[1], int(sys.argv[2]), sys.argv[3]), Path(sys.argv[4]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_download_that_is_killed_goes_on_where_it_was(server, tmp_path):
    server.pause = 0.1
    path, part, wanted = tmp_path / "a.bin", tmp_path / ".a.bin.part", remote(server)
    with python(FETCH, wanted.url, wanted.size, wanted.checksums, path) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 200_000, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not path.exists()
    there, server.pause = part.stat().st_size, 0
    download(wanted, path)
    assert path.read_bytes() == CONTENT and not part.exists()
    assert server.asked == [("a.bin", 0), ("a.bin", there)]


def test_of_two_that_fetch_the_same_file_one_waits(server, tmp_path):
    server.pause = 0.02
    threads = [threading.Thread(target=download, args=(remote(server), tmp_path / "a.bin")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.asked == [("a.bin", 0)]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_file_than_expected_leaves_nothing(server, tmp_path, algorithm):
    good = remote(server)
    words = [word[:-1] + "x" if word.startswith(algorithm) else word for word in good.checksums.split()]
    path = tmp_path / "a.bin"
    with pytest.raises(
        DownloadError, match=rf"not the file that was expected.*{words[algorithm == 'md5']}.*deleted"
    ):
        download(remote(server, checksums=" ".join(words)), path)
    assert not files(tmp_path)
    download(good, path)
    assert path.read_bytes() == CONTENT


def test_half_a_file_that_goes_on_as_another_is_found_out(server, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="not the file that was expected"):
        download(remote(server), tmp_path / "a.bin")
    assert not files(tmp_path)


def test_without_a_published_checksum_the_size_still_counts(server, tmp_path):
    bare = remote(server, checksums="")
    assert download(bare, tmp_path / "a.bin") == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    (tmp_path / ".c.bin.part").write_bytes(CONTENT + b"x")  # of another edition
    with pytest.raises(DownloadError, match="1,500,001 bytes, not 1,500,000 bytes. It was deleted"):
        download(bare, tmp_path / "c.bin")
    with pytest.raises(DownloadError, match="1,500,000 bytes, not 1,499,999"):
        download(remote(server, checksums="", size=1_499_999), tmp_path / "b.bin")


def test_a_file_that_does_not_say_its_length_may_not_be_longer(server, tmp_path):
    server.announce = False
    download(remote(server), tmp_path / "a.bin")
    with pytest.raises(DownloadError, match="sends more than its 1,000 bytes"):
        download(remote(server, size=1000), tmp_path / "b.bin")
    assert not (tmp_path / "b.bin").exists()


def test_what_is_not_on_the_server_is_a_sentence(server, tmp_path):
    with pytest.raises(DownloadError) as raised:
        download(Remote(server.url("absent.zip"), 5), tmp_path / "absent.zip")
    assert str(raised.value) == (
        f"{server.url('absent.zip')} (5 bytes) could not be fetched: the server answers 404 Not Found."
    )
    assert not files(tmp_path)


def test_no_network_is_a_sentence(tmp_path):
    with pytest.raises(DownloadError, match="could not be fetched: .*refused.$"):
        download(Remote("http://127.0.0.1:9/a.bin", 5), tmp_path / "a.bin")
    with pytest.raises(DownloadError, match="could not be fetched: .*[Nn]ame.*"):
        download(Remote("http://nowhere.invalid/a.bin", 5), tmp_path / "a.bin")
    assert not files(tmp_path)


def test_a_place_that_cannot_be_written_is_a_sentence(server, sources, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="could not be fetched: .*(exists|directory)"):
        download(remote(server), tmp_path / "file" / "a.bin")
    with pytest.raises(StorageError, match="clic cannot be written: .*Give another folder"):
        fetch_set(tmp_path / "file" / "clic", sources["clic"])


# --- A full disk ------------------------------------------------------------------------------------------------------

FETCH_IN_VAIN = (
    FETCH.replace("download(Remote", "try: download(Remote")
    + """
except Exception as error: print(type(error).__name__, error)
"""
)
UNPACK_IN_VAIN = """
import shutil
from taco_nb.tools.fetch import Part, unpack
Path(sys.argv[4]).with_name(".a.bin.part").unlink()
try: unpack(Path(shutil.copy(sys.argv[5], Path(sys.argv[4]).parent)), Part("", 1, members="*.png", count=20, unpacked=10**8))
except Exception as error: print(type(error).__name__, error)
print([path.name for path in Path(sys.argv[4]).parent.iterdir() if path.stat().st_size])
"""


def test_a_disk_that_fills_up_is_a_sentence(server, tmp_path):
    """While downloading, when what came is kept, and while unpacking, when the archive is."""
    disk, wanted = tmp_path / "disk", remote(server)
    disk.mkdir()
    members = {f"{i}.png": bytes(200_000) for i in range(20)}
    packed = archive(tmp_path, zipped(members, compression=zipfile.ZIP_DEFLATED))
    arguments = [wanted.url, wanted.size, wanted.checksums, disk / "a.bin", packed]
    done = subprocess.run(
        [*small_disk(disk), sys.executable, "-c", FETCH_IN_VAIN + UNPACK_IN_VAIN, *map(str, arguments)],
        env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=600,
    )  # fmt: skip
    fetched, unpacked, left = done.stdout.splitlines()
    assert fetched == (
        f"DownloadError {wanted.url} (1.5 MB) could not be fetched: the disk or quota of {disk} is full. "
        "What has come so far, 1.0 MB, is kept: the same command goes on."
    )
    assert unpacked == (
        f"DownloadError {disk / 'a.zip'} could not be unpacked: the disk or quota of {disk} is full. "
        "What was unpacked is removed, the archive is kept: the same command goes on."
    )
    assert left == "['a.zip']" and len(server.asked) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_file_larger_than_the_system_allows_is_a_sentence(server, tmp_path):
    wanted = remote(server)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))" + FETCH_IN_VAIN
    process = python(limited, wanted.url, wanted.size, wanted.checksums, tmp_path / "a.bin")
    printed = process.communicate(timeout=600)[0]
    assert "is full. What has come so far, 500 kB, is kept" in printed and files(tmp_path) == {
        ".a.bin.part": 500_000
    }
    download(wanted, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.asked[-1] == ("a.bin", 500_000)


def test_room_is_counted_per_disk_and_before_anything_is_there(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    check_room([(tmp_path / "not" / "yet", free // 3), (tmp_path, free // 3)])
    check_room([])
    with pytest.raises(
        DownloadError, match=r"has .* free, but .* are needed, unpacking included: nothing was fetched"
    ):
        check_room([(tmp_path / "not" / "yet", free // 3), (tmp_path, free)])


# --- Archives ---------------------------------------------------------------------------------------------------------


def zipped(
    members: dict[str, bytes], *infos: zipfile.ZipInfo, compression: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for info in infos:
            archive.writestr(info, b"../../target")
    return buffer.getvalue()


def special(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


def part(
    members: str = "*.png", count: int = 2, unpacked: int = 10**6, place: str = "images", **about
) -> Part:
    about |= {"place": place, "members": members, "count": count, "unpacked": unpacked}
    return Part("http://127.0.0.1:9/a.zip", 5, **about)


def archive(folder: Path, content: bytes) -> Path:
    (folder / "a.zip").write_bytes(content)
    return folder / "a.zip"


def test_the_wanted_files_come_out_without_their_folders_and_the_rest_stays_in(tmp_path):
    members = {
        "x/1.png": b"one",
        "y/deep/2.png": b"two",
        "readme.txt": b"",
        "__MACOSX/x/._1.png": b"",
        "x/.3.png": b"",
    }
    found = unpack(archive(tmp_path, zipped(members)), part())
    assert {path.name: path.read_bytes() for path in found} == {"1.png": b"one", "2.png": b"two"}
    assert files(tmp_path).keys() == {"a.zip", "a.zip.unpacked/1.png", "a.zip.unpacked/2.png"}


OUTSIDE = ["../evil.png", "x/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:\\evil.png", "c:evil.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_archive_that_would_write_outside_is_refused_whole(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    content = zipped({"1.png": b"one", "2.png": b"two", name: b"evil"})
    with pytest.raises(DownloadError, match="leads out of the folder: nothing is unpacked"):
        unpack(archive(home, content), part())
    assert files(tmp_path).keys() == {"home/a.zip"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_an_archive_with_a_link_or_device_is_refused_whole(tmp_path, kind):
    content = zipped({"1.png": b"one", "2.png": b"two"}, special("3.png", kind))
    with pytest.raises(DownloadError, match="'3.png', a link or device: nothing is unpacked"):
        unpack(archive(tmp_path, content), part(count=3))
    assert files(tmp_path).keys() == {"a.zip"}


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"1.png": b""}, "holds 1 files .*png, not 2"),
        ({"1.png": b"", "2.png": b"", "3.png": b""}, "holds 3 files"),
        ({"x/1.png": b"one", "y/1.png": b"another"}, "holds 1 files"),
        ({"1.png": bytes(10**6), "2.png": b"x"}, "unpacks to 1.0 MB, but at most 1.0 MB"),
        ({"1.png": bytes(50 * 10**6), "2.png": b"x"}, "unpacks to 50.0 MB"),
    ],
)
def test_an_archive_with_other_files_than_expected_is_refused_whole(tmp_path, members, complaint):
    content = zipped(members, compression=zipfile.ZIP_DEFLATED)
    assert len(content) < 10**6
    with pytest.raises(DownloadError, match=complaint):
        unpack(archive(tmp_path, content), part())
    assert files(tmp_path).keys() == {"a.zip"}


def test_a_damaged_archive_leaves_nothing_unpacked(tmp_path):
    content = bytearray(zipped({"1.png": b"one", "2.png": b"twotwotwo"}))
    content[content.index(b"twotwotwo")] ^= 1
    for damaged in (bytes(content), bytes(content[:100]), b"no archive"):
        with pytest.raises(DownloadError, match="a.zip could not be unpacked"):
            unpack(archive(tmp_path, damaged), part())
        assert files(tmp_path).keys() == {"a.zip"}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_unpacking_that_is_killed_starts_over(server, tmp_path):
    members = {f"{i:05}.png": bytes([i % 256]) * 100 for i in range(4000)}
    content = zipped(members)
    server.files["a.zip"] = content
    parts = (part_of(remote(server, "a.zip"), "images", "*.png", len(members), 10**8),)
    program = """
import sys
from pathlib import Path
from taco_nb.tools.fetch import Part, fetch_set
fetch_set(Path(sys.argv[4]), (Part(sys.argv[1], int(sys.argv[2]), sys.argv[3], "", "images", "*.png", 4000, 10**8),))
"""
    folder = tmp_path / "set"
    unpacked = folder / STAGING / "a.zip.unpacked"
    wanted = parts[0]
    with python(program, wanted.url, wanted.size, wanted.checksums, folder) as process:
        wait_until(lambda: unpacked.is_dir() and len(os.listdir(unpacked)) > 100, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (folder / "images").exists() and not manifest(folder)
    (unpacked / "stray.png").touch()
    fetch_set(folder, parts)
    assert sorted(os.listdir(folder)) == ["images", "manifest.json"]
    assert {path.name: path.read_bytes() for path in (folder / "images").iterdir()} == members
    assert server.asked == [("a.zip", 0)]  # the archive was there


# --- Data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared) -> dict[str, bytes]:
    """Small editions of what is published of MS-COCO and CLIC, by file name."""
    coco, kodak = shared / "minicoco", shared / "kodak"

    def folder(name: str, pattern: str) -> dict[str, bytes]:
        return {f"{name}/{path.name}": path.read_bytes() for path in sorted((coco / name).glob(pattern))}

    karpathy = (coco / "dataset_coco.json").read_bytes()
    listed = [image["filename"] for image in json.loads(karpathy)["images"] if image["split"] == "restval"]
    pictures = [(kodak / f"kodim{n:02}.png").read_bytes() for n in (1, 2, 3)]
    return {
        "train2014.zip": zipped(folder("train2014", "*.jpg")),
        "val2014.zip": zipped(folder("val2014", "*.jpg")),
        "annotations_trainval2014.zip": zipped(
            folder("annotations", "*.json") | {"annotations/instances.json": b"{}"}
        ),
        "caption_datasets.zip": zipped({"dataset_coco.json": karpathy, "dataset_flickr8k.json": b"{}"}),
        "mscoco_30k_list.json": json.dumps(listed[::-1]).encode(),
        "CLIC2020Mobile_test.zip": zipped({"mobile/m.png": pictures[0], "__MACOSX/mobile/._m.png": b"junk"}),
        "CLIC2020Professional_test.zip": zipped(
            {"professional/p.png": pictures[1], "professional/q.png": pictures[2]}
        ),
        "clic_ofa.json": json.dumps({"m.png": "m", "p.png": "p", "q.png": "q"}).encode(),
    }


@pytest.fixture
def sources(server, published) -> dict[str, tuple[Part, ...]]:
    """The real table of sources, for the small editions on loopback."""
    server.files |= published
    small = {}
    for name, parts in SOURCES.items():
        small[name] = ()
        for real in parts:
            if real.name in published:
                content = published[real.name]
                bare = {} if real.checksums else {"checksums": ""}
                there = remote(server, real.name, vouched=real.vouched, **bare)
                count = unpacked = 0
                if real.members:
                    with zipfile.ZipFile(io.BytesIO(content)) as opened:
                        inside = [
                            info
                            for info in opened.infolist()
                            if fetch._is_wanted(info.filename, real.members)
                        ]
                    count, unpacked = len(inside), sum(info.file_size for info in inside)
                small[name] += (part_of(there, real.place, real.members, count or 1, unpacked),)
    return small


def test_mscoco_is_laid_out_as_it_is_read(server, sources, tmp_path, shared, capsys):
    folder, parts = tmp_path / "coco", sources["coco"]
    needed = room_needed(folder, parts)
    fetch_set(folder, parts)
    assert sorted(os.listdir(folder)) == [
        "annotations", "dataset_coco.json", "manifest.json", "mscoco_30k_list.json", "train2014", "val2014",
    ]  # fmt: skip
    assert sorted(os.listdir(folder / "annotations")) == ["captions_train2014.json", "captions_val2014.json"]
    (mine,), (theirs,) = (datasets("coco", data_dir=root) for root in (tmp_path, _beside(shared, tmp_path)))
    assert mine.checksum() == theirs.checksum() and len(mine) > 30
    assert len(training_pairs("coco", 64, data_dir=tmp_path)) == 5 * 128
    assert fetch.compare_splits(folder) == "TACO's list of 48 images is Karpathy's restval."
    entry = manifest(folder)["train2014.zip"]
    assert entry | {"date": ""} == {
        "source": server.url("train2014.zip"),
        "size": len(server.files["train2014.zip"]),
        "checksum": f"sha256:{hashlib.sha256(server.files['train2014.zip']).hexdigest()}",
        "vouched": "TensorFlow Datasets, url_checksums",
        "files": 128,
        "bytes": sum(path.stat().st_size for path in (folder / "train2014").iterdir()),
        "date": "",
    }
    assert "nobody" in manifest(folder)["mscoco_30k_list.json"]["vouched"]
    assert needed >= sum(files(folder).values()) - (folder / "manifest.json").stat().st_size > 0
    asked = len(server.asked)
    fetch_set(folder, parts)
    assert len(server.asked) == asked and room_needed(folder, parts) == 0


def _beside(shared: Path, tmp_path: Path) -> Path:
    """A data folder whose coco is `../shared/minicoco`."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "coco").symlink_to(shared / "minicoco")
    return tmp_path / "beside"


def test_the_halves_of_clic_share_a_folder(server, sources, tmp_path):
    fetch_set(tmp_path / "clic", sources["clic"])
    (clic,) = datasets("clic", data_dir=tmp_path)
    assert clic.names == ("m.png", "p.png", "q.png") and clic[0].image.size == (768, 512)
    assert files(tmp_path / "clic").keys() == {
        "m.png",
        "p.png",
        "q.png",
        "captions_ofa.json",
        "manifest.json",
    }
    (tmp_path / "clic" / "q.png").unlink()
    assert [part.name for part in missing_parts(tmp_path / "clic", sources["clic"])] == [
        "CLIC2020Mobile_test.zip", "CLIC2020Professional_test.zip",
    ]  # fmt: skip
    fetch_set(tmp_path / "clic", sources["clic"])
    assert datasets("clic", data_dir=tmp_path)[0].names == clic.names


@pytest.mark.parametrize("absent", ["train2014.zip", "caption_datasets.zip", "annotations_trainval2014.zip"])
def test_a_set_that_is_not_finished_is_not_there_and_goes_on(server, sources, tmp_path, absent):
    content = server.files.pop(absent)
    with pytest.raises(DownloadError, match=f"{absent}.* 404 Not Found"):
        fetch_set(tmp_path / "coco", sources["coco"])
    with pytest.raises(DataError, match="Its download is unfinished; to go on, run: taco-nb fetch coco"):
        datasets("coco", data_dir=tmp_path)
        training_pairs("coco", 64, data_dir=tmp_path)
    server.files[absent] = content
    there = [part.name for part in sources["coco"] if part.name in manifest(tmp_path / "coco")]
    asked = len(server.asked)
    fetch_set(tmp_path / "coco", sources["coco"])
    assert [name for name, _ in server.asked[asked:]] == [
        p.name for p in sources["coco"] if p.name not in there
    ]
    assert len(datasets("coco", data_dir=tmp_path)[0]) > 30


def test_the_half_of_clic_that_is_there_is_not_fetched_again(server, sources, tmp_path):
    content = server.files.pop("CLIC2020Professional_test.zip")
    with pytest.raises(DownloadError, match="Professional"):
        fetch_set(tmp_path / "clic", sources["clic"])
    server.files["CLIC2020Professional_test.zip"] = content
    server.asked.clear()
    fetch_set(tmp_path / "clic", sources["clic"])
    assert [name for name, _ in server.asked] == ["CLIC2020Professional_test.zip", "clic_ofa.json"]


@pytest.mark.parametrize("name", ["coco", "clic"])
def test_a_set_that_is_absent_names_the_command(tmp_path, name, monkeypatch):
    with pytest.raises(DataError, match=f"To fetch it, run: taco-nb fetch {name} --data-dir {tmp_path}$"):
        datasets(name, data_dir=tmp_path)
    monkeypatch.setenv("TACO_NB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"To fetch it, run: taco-nb fetch {name}$"):
        datasets(name)


def test_what_somebody_else_put_there_is_left_and_said_to_be_so(server, sources, tmp_path, shared):
    """A laboratory's own copy, or a link to it, where it has as many files; half a copy is fetched."""
    folder = tmp_path / "coco"
    folder.mkdir()
    (folder / "train2014").symlink_to(shared / "minicoco" / "train2014")
    shutil.copytree(shared / "minicoco" / "val2014", folder / "val2014")
    next((folder / "val2014").iterdir()).unlink()
    fetch_set(folder, sources["coco"])
    asked = {name for name, _ in server.asked}
    assert "train2014.zip" not in asked and "val2014.zip" in asked and (folder / "train2014").is_symlink()
    assert "checksum" not in manifest(folder)["train2014.zip"] and "source" in manifest(folder)["val2014.zip"]
    assert datasets("coco", data_dir=tmp_path) and len(training_pairs("coco", 64, data_dir=tmp_path)) == 640


def test_what_is_whole_is_not_written_to(server, sources, tmp_path, shared):
    """A data set may be a link to somebody else's folder."""
    fetch_set(tmp_path / "clic", sources["clic"])
    (tmp_path / "clic" / "manifest.json").unlink()
    before = (tmp_path / "clic").stat().st_mtime_ns
    fetch_set(tmp_path / "clic", sources["clic"])
    assert (tmp_path / "clic").stat().st_mtime_ns == before and not manifest(tmp_path / "clic")


def test_a_first_checksum_holds_for_the_next_time(server, sources, tmp_path):
    """Nobody published one for TACO's list, so that what came first is what must come again."""
    fetch_set(tmp_path, sources["coco"])
    (tmp_path / "mscoco_30k_list.json").unlink()
    server.files["mscoco_30k_list.json"] = server.files["mscoco_30k_list.json"][:-1] + b" "
    with pytest.raises(DownloadError, match="mscoco_30k_list.json is not the file that was expected"):
        fetch_set(tmp_path, sources["coco"])


def test_splits_that_differ_are_said_to(sources, tmp_path):
    fetch_set(tmp_path, sources["coco"])
    listed = json.loads((tmp_path / "mscoco_30k_list.json").read_text())
    (tmp_path / "mscoco_30k_list.json").write_text(json.dumps(["other.jpg", *listed[1:]]))
    assert f"2 are in one of them only: {listed[0]}, other.jpg" in fetch.compare_splits(tmp_path)


def test_only_one_at_a_time_fetches_a_set(server, sources, tmp_path):
    from filelock import FileLock

    (tmp_path / STAGING).mkdir()
    with (
        FileLock(tmp_path / STAGING / "lock"),
        pytest.raises(DownloadError, match="Another process is fetching"),
    ):
        fetch_set(tmp_path, sources["clic"])
    fetch_set(tmp_path, sources["clic"])
    assert not server.asked[3:] and files(tmp_path).keys() >= {"m.png", "captions_ofa.json"}


def test_sources_are_those_of_the_reference_files(shared):
    clic = SOURCES["clic"][-1]
    assert clic.checksums == f"sha256:{sha256(shared / 'reference' / 'clic_ofa.json')}"
    named = json.loads((shared / "reference" / "clic_ofa.json").read_text(encoding="utf-8"))
    assert sum(part.count for part in SOURCES["clic"][:2]) == len(named) == 428


def test_every_source_is_whole():
    for name, parts in SOURCES.items():
        assert len({part.name for part in parts}) == len(parts), name
        for item in parts:
            assert item.size > 0 and item.url.startswith("http") and bool(item.members) == bool(item.unpacked)
            assert bool(item.checksums) == bool(item.vouched)
            for word in item.checksums.split():
                algorithm, _, digits = word.partition(":")
                assert len(digits) == 2 * hashlib.new(algorithm).digest_size and int(digits, 16)
    assert "md5:0da8c0bd3d6becc4dcb32757491aca88" in SOURCES["coco"][0].checksums
    assert "md5:a3d79f5ed8d289b7a7554ce06a5782b3" in SOURCES["coco"][1].checksums


# --- The commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(server, tmp_path, monkeypatch):
    """`weights("net")` is a network that the server has, of a thousand bytes; and `to_be_had=False` one that it has not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def network(name: str, to_be_had: bool = True) -> Checkpoint:
        content = name.encode() * 1000
        if to_be_had:
            server.files[name] = content[:1000]
        return Checkpoint(name, "a test", 1000, server.url(name), hashlib.sha256(content[:1000]).hexdigest())

    return network


def run(tmp_path, sources, *arguments, networks=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "SOURCES", sources)
        patch.setattr(fetch, "PRETRAINED", {network.name: network for network in networks})
        return command(*arguments, "--data-dir", tmp_path)


def test_fetch_gets_all_that_the_profile_needs_and_status_agrees(server, sources, weights, tmp_path, capsys):
    networks = [weights("net")]
    assert run(tmp_path, sources, "status", networks=networks) == 1
    before = capsys.readouterr().out
    assert before.count("missing") == 4 and f"fetch coco clic net --data-dir {tmp_path}" in before
    assert not server.asked and not files(tmp_path)
    assert run(tmp_path, sources, "fetch", "--profile", "paper", networks=networks) == 0
    printed = capsys.readouterr().out
    assert (
        "clic: 3 images to evaluate on" in printed
        and "pairs to train on" in printed
        and "is Karpathy's restval" in printed
    )
    server.asked.clear()
    for verb in ("status", "fetch"):
        assert run(tmp_path, sources, verb, "--profile", "paper", networks=networks) == 0
        after = capsys.readouterr().out
        assert "missing" not in after and str(tmp_path / "coco") in after and not server.asked


def test_fetch_gets_what_is_named_and_nothing_else(server, sources, tmp_path, capsys):
    assert run(tmp_path, sources, "fetch", "clic") == 0
    assert {name for name, _ in server.asked} == {part.name for part in sources["clic"]}
    assert run(tmp_path, sources, "status", "clic") == 0 and run(tmp_path, sources, "status") == 1


def test_kodak_is_bundled_and_is_read_where_somebody_has_it(shared, tmp_path, capsys):
    for verb in ("status", "fetch"):
        assert command(verb, "kodak", "--data-dir", tmp_path) == 0
        said = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"kodak  bundled +11\.2 MB  {BUNDLED / 'kodak'}", said[-1])
    assert said[0] == "kodak: 24 images to evaluate on." and not files(tmp_path)
    (tmp_path / "kodak").symlink_to(shared / "kodak")
    assert command("status", "kodak", "--data-dir", tmp_path) == 0
    assert re.fullmatch(rf"kodak  there +15\.4 MB  {tmp_path / 'kodak'}\n", capsys.readouterr().out)


def test_what_fails_keeps_nothing_else_from_being_fetched(server, sources, weights, tmp_path, capsys):
    networks = [weights("never", to_be_had=False), weights("net")]
    server.files.pop("clic_ofa.json")
    assert run(tmp_path, sources, "fetch", "--profile", "paper", networks=networks) == 1
    printed = capsys.readouterr()
    assert (
        "never could not be fetched." in printed.err
        and "clic_ofa.json" in printed.err
        and "Traceback" not in printed.err
    )
    assert f"fetch clic never --data-dir {tmp_path}" in printed.out and "unfinished" in printed.out
    assert networks[1].path and datasets("kodak", "coco", data_dir=tmp_path)


def test_a_disk_that_is_too_small_is_known_before_anything_is_fetched(
    server, sources, weights, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    needed = sum(room_needed(tmp_path / name, parts) for name, parts in sources.items()) + 1000
    networks = [weights("net")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    assert run(tmp_path, sources, "fetch", "--profile", "paper", networks=networks) == 1
    assert "nothing was fetched. Make room" in capsys.readouterr().err
    assert not server.asked and not files(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert run(tmp_path, sources, "fetch", "--profile", "paper", networks=networks) == 0


def test_the_room_for_what_has_come_is_not_asked_for_again(server, sources, tmp_path):
    server.cuts = [3 * BLOCK, 0]
    before = room_needed(tmp_path / "coco", sources["coco"])
    with pytest.raises(DownloadError, match="train2014.zip"):
        fetch_set(tmp_path / "coco", sources["coco"])
    assert room_needed(tmp_path / "coco", sources["coco"]) == before - 3 * BLOCK


def test_stopping_by_hand_is_a_sentence(sources, weights, tmp_path, capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "fetch_network", stop)
    assert run(tmp_path, sources, "fetch", "slow", networks=[weights("slow")]) == 130
    assert capsys.readouterr().err == "Stopped. The same command goes on where it was.\n"


def test_any_model_of_open_clip_can_be_asked_for(tmp_path, capsys, monkeypatch):
    """The captioner's is none of the profile's, and `fetch` still knows where it is to be had, and whether it is here."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "coca_ViT-B-32/laion2b_s13b_b90k"
    for verb in ("status", "fetch"):
        assert command(verb, name, "--data-dir", tmp_path) == 1
        printed = capsys.readouterr()
        assert (
            f"{name}  missing" in printed.out
            and "1.0 GB" in printed.out
            and f"taco-nb fetch {name}" in printed.out
        )
    assert f"{name} could not be fetched. open_clip_model.safetensors of laion/" in printed.err
    snapshot = tmp_path / "models--laion--CoCa-ViT-B-32-laion2B-s13B-b90k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "open_clip_pytorch_model.bin").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for verb in ("status", "fetch"):
        assert command(verb, name, "--data-dir", tmp_path) == 0


def test_a_damaged_manifest_is_named(sources, tmp_path, capsys):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "manifest.json").write_text("{")
    for verb in ("status", "fetch"):
        assert run(tmp_path, sources, verb, "coco") == 1
        assert "manifest.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fetch", "kodac"], "no data set or pretrained network 'kodac'. Did you mean 'kodak'"),
        (["fetch"], "Give --profile paper, or names"),
        (["fetch", "ViT-B-32/openapi"], "no pretrained model 'ViT-B-32/openapi': ViT-B-32 has openai"),
        (["fetsch"], "No such command 'fetsch'"),
        (["status", "--data-dir", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_command_says_what_is_right(arguments, complaint, capsys):
    assert command(*arguments)
    assert complaint in capsys.readouterr().err


def test_the_profile_sample_needs_nothing(server, capsys):
    assert command("fetch", "--profile", "sample") == command("status", "--profile", "sample") == 0
    assert "nothing that is not bundled" in capsys.readouterr().out


def test_the_command_runs_as_it_is_written(tmp_path):
    words = [
        sys.executable,
        "-m",
        "taco_nb.tools.cli",
        "status",
        "kodak",
        "clic",
        "inception",
        "--data-dir",
        str(tmp_path),
    ]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    printed = done.stdout
    assert done.returncode == 1 and not done.stderr
    assert "11.2 MB" in printed and "1.6 GB" in printed and "95.6 MB" in printed and "hub" in printed
