"""Files from the web: resumed where they stopped, checked before they are trusted, under their name only when whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from taco_nb.errors import DownloadError

PROGRAM = "taco-nb"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PATIENCE = 60  # seconds without a byte
BLOCK = 1 << 16  # bytes written at a time, and lost at most when a connection breaks


@dataclass(frozen=True)
class Remote:
    """A file on the web: its address, its size in bytes, and the checksums that it must have, "md5:… sha256:…".

    `vouched` says where size and checksums were published. Without any, a file of the right size is taken as it comes.
    """

    url: str
    size: int
    checksums: str = ""
    vouched: str = ""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def download(remote: Remote, path: Path) -> str:
    """Fetch a file to `path`, and give its SHA-256; a file that is there already and has the checksums is left.

    The bytes gather beside it in `.<name>.part`, and the next call, after a kill too, goes on from there with a Range
    request, or from the start where the server knows none. A connection that breaks is taken up again as long as that
    brings further bytes. Of several processes one fetches and the others wait. Raises `DownloadError` where the file
    cannot be had, or is another one.
    """
    from huggingface_hub.utils import WeakFileLock

    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if _size(path) == remote.size:
                return _verify(remote, path)
            while (had := _size(part)) < remote.size:
                try:
                    _transfer(remote, part)
                except OSError as error:  # those of requests are too
                    if error.errno in FULL or _size(part) <= had:
                        raise
            checksum = _verify(remote, part)
            os.replace(part, path)
            return checksum
    except OSError as error:
        kept = (
            f" What has come so far, {shown(_size(part))}, is kept: the same command goes on."
            if _size(part)
            else ""
        )
        if part.exists() and not kept:
            part.unlink()
        reason = f"the disk or quota of {path.parent} is full" if error.errno in FULL else _reason(error)
        raise DownloadError(
            f"{remote.url} ({shown(remote.size)}) could not be fetched: {reason}.{kept}"
        ) from error


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise `DownloadError` unless the disks have room for all bytes that are needed, given per folder."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        disks[disk] = (folder, disks.get(disk, (folder, 0))[1] + size)
    for folder, size in disks.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise DownloadError(
                f"The disk of {folder} has {shown(free)} free, but {shown(size)} are needed, unpacking included: nothing "
                "was fetched. Make room, or name a folder on a larger disk: TACO_NB_DATA, HF_HOME, TORCH_HOME."
            )


def shown(size: int) -> str:
    """A number of bytes as people say it: "13.5 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:.0f} {name}"
    return f"{size} bytes"


def _transfer(remote: Remote, part: Path) -> None:
    """One request, for what `part` lacks."""
    from pooch import HTTPDownloader
    from tqdm.auto import tqdm

    had = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={had}-"} if had else {})
    bar = tqdm(total=remote.size, initial=had, desc=remote.name, unit="B", unit_scale=True, delay=1)
    with open(part, "ab") as file, bar:

        def begin(response, **_) -> None:
            if not response.ok or response.is_redirect:
                return
            start = had if response.status_code == 206 else 0
            if start < had:  # a server without Range begins again, and so must we
                file.truncate(0)
                bar.initial = 0
                bar.reset()
            length = int(response.headers.get("Content-Length", remote.size - start))
            if start + length != remote.size:
                raise DownloadError(
                    f"{remote.url} has {start + length:,} bytes, not {remote.size:,}: the file has changed at its source, "
                    "or a proxy answers in its place."
                )

        def write(chunk: bytes) -> None:
            if file.tell() + len(chunk) > remote.size:
                raise DownloadError(f"{remote.url} sends more than its {remote.size:,} bytes.")
            file.write(chunk)
            bar.update(len(chunk))

        fetch = HTTPDownloader(chunk_size=BLOCK, headers=headers, hooks={"response": begin}, timeout=PATIENCE)
        fetch(remote.url, SimpleNamespace(write=write, flush=file.flush), None)


def _verify(remote: Remote, path: Path) -> str:
    """The SHA-256 of a file, as "sha256:…"; of another size or checksum it is deleted, and a `DownloadError`."""
    from tqdm.auto import tqdm

    wanted = remote.checksums.split()
    digests = {name: hashlib.new(name) for name in {"sha256", *(word.partition(":")[0] for word in wanted)}}
    bar = tqdm(
        total=_size(path), desc=f"checking {remote.name}", unit="B", unit_scale=True, leave=False, delay=2
    )
    with open(path, "r+b") as file, bar:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
            bar.update(len(block))
    found = {name: f"{name}:{digest.hexdigest()}" for name, digest in digests.items()}
    if (wrong := set(wanted) - set(found.values())) or _size(path) != remote.size:
        found["size"] = f"{_size(path):,} bytes"
        path.unlink()
        raise DownloadError(
            f"What came from {remote.url} is not the file that was expected: it has {', '.join(found.values())}, "
            f"not {', '.join(sorted(wrong)) or f'{remote.size:,} bytes'}. It was deleted. Try again; if that does not "
            "help, the file has changed at its source, or a proxy answers in its place."
        )
    return found["sha256"]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error, without the layers of libraries around it."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error).rstrip(".") or type(error).__name__
