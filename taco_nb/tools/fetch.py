"""`taco-nb fetch` puts data sets and pretrained networks where the package reads them; `taco-nb status` says what is there.

A data set's folder has a manifest of what is there and where it came from. Networks go where their libraries look.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from taco_nb.data import STAGING, datasets, training_pairs
from taco_nb.data.captioned import few, read_json
from taco_nb.errors import DownloadError, TacoError, check_known
from taco_nb.files import BUNDLED, atomic_write, bundled, data_root, human_size, storage_errors
from taco_nb.pretrained import PRETRAINED, Checkpoint, OpenClip, Pretrained, find_pretrained
from taco_nb.tools.download import FULL, Remote, check_room, download

MANIFEST = "manifest.json"


# A data set -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Remote):
    """A part of a data set is a download, and says what becomes of it in the data set's folder.

    A plain file becomes `place`. A zip archive has `members`, a pattern as in a shell: the `count` files in it whose
    names match, hidden ones aside, go into the folder `place`, without the folders that they have in the archive. All of
    them together may have at most `unpacked` bytes. The archive itself is not kept.
    """

    place: str = ""
    members: str = ""
    count: int = 1
    unpacked: int = 0


SOURCES: dict[str, tuple[Part, ...]] = {
    name: tuple(Part(**part) for part in parts)
    for name, parts in read_json(BUNDLED / "reference" / "downloads.json").items()
}
"""The parts of each data set, in the order in which they are fetched. A set without parts is bundled.

What makes a set readable comes last: the profile "auto" takes MS-COCO's annotations as the sign that it is there.
"""


def fetch_set(folder: Path, parts: Sequence[Part]) -> None:
    """Fetch what `folder` lacks of a data set, one part after the other, going on where an earlier call was stopped.

    Every part is checked and unpacked in the hidden folder `.fetch`, is entered in `manifest.json`, and only then takes
    its place, so that nothing half-finished ever stands there. What is in its place already, of the right size or
    number, is left, and entered as found if it was not fetched.

    Raises `DownloadError` if a part cannot be had, is not what was expected, or has no room, and `StorageError` if the
    folder cannot be written.
    """
    staging = folder / STAGING
    if not missing_parts(folder, parts) and not staging.exists():
        return  # without writing anything: the folder may be somebody else's
    with storage_errors(folder):
        staging.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(staging / "lock", timeout=1):
                for part in parts:
                    _fetch_part(folder, part, parts)
        except Timeout as error:
            raise DownloadError(
                f"Another process is fetching into {folder}: wait for it, or end it."
            ) from error
    shutil.rmtree(staging, ignore_errors=True)


def _fetch_part(folder: Path, part: Part, parts: Sequence[Part]) -> None:
    known = manifest(folder)
    if is_there(folder, part, parts):
        if part.name not in known:
            _enter(folder, part, {"found": part.place or "."})
        return
    if not part.checksums:  # nobody has published one: what came the first time is what must come again
        part = replace(part, checksums=known.get(part.name, {}).get("checksum", ""))
    path, place = folder / STAGING / part.name, folder / part.place
    checksum = download(part, path)
    files = unpack(path, part) if part.members else [path]
    _enter(folder, part, {
        "source": part.url,
        "size": part.size,
        "checksum": checksum,
        "vouched": part.vouched or "nobody: this is the checksum of the first download",
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    })  # fmt: skip
    if not part.members:
        os.replace(path, place)
        return
    if place.is_dir():
        for file in files:
            os.replace(file, place / file.name)
    else:
        os.rename(files[0].parent, place)  # all files at one stroke
    shutil.rmtree(files[0].parent, ignore_errors=True)
    path.unlink()


def is_there(folder: Path, part: Part, parts: Sequence[Part]) -> bool:
    """Return whether a part is in its place and whole: a file by its size, a folder by the number of its files.

    Parts that share a folder, as the two halves of CLIC do, count together. If this one is in the manifest, only those
    count that are there as well.
    """
    if not part.members:
        path = folder / part.place
        return path.is_file() and path.stat().st_size == part.size
    known = manifest(folder)
    sharing = [other for other in parts if (other.place, other.members) == (part.place, part.members)]
    if part.name in known:
        sharing = [other for other in sharing if other.name in known]
    home, pattern = folder / part.place, PurePosixPath(part.members).name
    found = sum(_is_wanted(name, pattern) for name in os.listdir(home)) if home.is_dir() else 0
    return found >= sum(other.count for other in sharing)


def missing_parts(folder: Path, parts: Sequence[Part]) -> list[Part]:
    """Return the parts that are not in their place."""
    return [part for part in parts if not is_there(folder, part, parts)]


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each part in `folder`, by the name of its download; empty if nothing was fetched yet.

    An entry holds source, size, checksum and who vouched for it, the number of files and their bytes, and the date. Of
    what was found and not fetched it has the place and the date alone.
    """
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else {}


def _enter(folder: Path, part: Part, entry: dict[str, Any]) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entries = manifest(folder) | {part.name: {**entry, "date": now}}
    with atomic_write(folder / MANIFEST, "w") as file:
        json.dump(entries, file, indent=1)


def room_needed(folder: Path, parts: Sequence[Part]) -> int:
    """Return the bytes of disk that `fetch_set` takes at most at any time, beyond what lies there already."""
    kept = peak = 0
    for part in missing_parts(folder, parts):
        had = fetched_bytes(folder, part)
        # While an archive is unpacked, it and what comes out of it are both there.
        peak = max(peak, kept + part.size - had + part.unpacked)
        kept += (part.unpacked or part.size) - had
    return peak


def fetched_bytes(folder: Path, part: Part) -> int:
    """Return how many bytes of a part that is not yet in its place have been downloaded."""
    whole = folder / STAGING / part.name
    half = whole.with_name(f".{part.name}.part")
    return max(path.stat().st_size if path.exists() else 0 for path in (whole, half))


def compare_splits(folder: Path) -> str:
    """Return a sentence on whether TACO's list of MS-COCO images is Karpathy's restval, which is evaluated on here."""
    listed = set(read_json(folder / "mscoco_30k_list.json"))
    images = read_json(folder / "dataset_coco.json")["images"]
    restval = {image["filename"] for image in images if image["split"] == "restval"}
    if listed == restval:
        return f"TACO's list of {len(listed):,} images is Karpathy's restval."
    return (
        f"TACO's list has {len(listed):,} images and Karpathy's restval, which is evaluated on here, {len(restval):,}; "
        f"{len(listed ^ restval):,} are in one of them only: {few(listed ^ restval)}."
    )


# An archive -----------------------------------------------------------------------------------------------------------


def unpack(archive: Path, part: Part) -> list[Path]:
    """Unpack the wanted files of a zip archive into a new folder beside it, and return their paths.

    Refuses the archive, with a `DownloadError`, if any name in it leads out of the folder or is a link, and if the files
    are not as many, or are larger, than `part` says. Nothing unpacked is left then, nor when the disk is full.

    `pooch.Unzip` would take the half-unpacked folder of a call that was killed for a whole one, and goes through the
    list of all members once for each of them, of which MS-COCO has 82,783.
    """
    folder = archive.with_name(f"{archive.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = _checked_members(opened, archive, part)
            folder.mkdir()
            for info in tqdm(wanted, desc=f"unpacking {archive.name}", unit="file", delay=1):
                target = folder / PurePosixPath(info.filename).name
                with opened.open(info) as packed, open(target, "xb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
        return sorted(folder.iterdir())
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in FULL
        raise DownloadError(
            f"{archive} could not be unpacked: {f'the disk or quota of {archive.parent} is full' if full else error}. "
            "What was unpacked is removed, the archive is kept: the same command goes on."
        ) from error


def _checked_members(opened: zipfile.ZipFile, archive: Path, part: Part) -> list[zipfile.ZipInfo]:
    """Return the members to unpack, after looking at all for one that would do harm."""
    for info in opened.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in info.filename:
            raise DownloadError(
                f"{archive} holds {info.filename!r}, which leads out of the folder: nothing is unpacked."
            )
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{archive} holds {info.filename!r}, a link or device: nothing is unpacked.")
    wanted = [
        info for info in opened.infolist() if not info.is_dir() and _is_wanted(info.filename, part.members)
    ]
    names = {PurePosixPath(info.filename).name for info in wanted}
    if not len(wanted) == len(names) == part.count:
        raise DownloadError(f"{archive} holds {len(names):,} files {part.members}, not {part.count:,}.")
    if (size := sum(info.file_size for info in wanted)) > part.unpacked:
        raise DownloadError(
            f"{archive} unpacks to {human_size(size)}, but at most {human_size(part.unpacked)} were expected."
        )
    return wanted


def _is_wanted(name: str, pattern: str) -> bool:
    hidden = any(step.startswith((".", "__MACOSX")) for step in PurePosixPath(name).parts)
    return not hidden and fnmatchcase(name, pattern)


# A pretrained network -------------------------------------------------------------------------------------------------


def fetch_network(network: Pretrained) -> None:
    """Fetch a pretrained network to where its library looks for it, unless it is there. Raises `DownloadError`."""
    if network.path is not None:
        return
    try:
        if isinstance(network, Checkpoint):
            download(Remote(network.url, network.size, f"sha256:{network.sha256}"), network.file)
        elif isinstance(network, OpenClip):
            _fetch_from_hub(network)
        else:
            _install_spacy_model(network.name)
    except DownloadError as error:
        raise DownloadError(
            f"{network.name} could not be fetched. {error} With a network, run: {network.command} (or copy it from a machine "
            f"that has it to {network.home})."
        ) from error


def _fetch_from_hub(network: OpenClip) -> None:
    import open_clip

    try:
        # This fails at once where there is no network, and the download only after a minute of trying.
        huggingface_hub.file_exists(network.repository, network.files[0])
        open_clip.download_pretrained(network.tag)
    except Exception as error:  # of the hub's, of its web client's, and of open_clip's many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DownloadError(f"{network.files[0]} of {network.repository}: {reason}.") from error


def _install_spacy_model(name: str) -> None:
    command = [sys.executable, "-m", "spacy", "download", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip() or f"it ended with {done.returncode}").splitlines()[-1].rstrip(".")
        if "ConnectionError" in last:  # requests prints its exceptions, one inside the other
            host = re.search(r"host='([^']+)'", last)
            last = f"no connection to {host[1] if host else 'the network'}"
        raise DownloadError(f"`python -m spacy download {name}` says: {last}.")


# All that is asked for ------------------------------------------------------------------------------------------------


def fetch_all(names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None = None) -> int:
    """Fetch data sets and networks by name, or all that a profile needs, and print what is there then.

    What fails is said, and keeps nothing else from being fetched. Returns the exit status: 0 if all is there, 1 if
    something is not, 130 if stopped. Raises `DownloadError`, before anything is fetched, where the disks have no room.
    """
    if data_dir:
        with storage_errors(data_dir):
            Path(data_dir).expanduser().mkdir(parents=True, exist_ok=True)
    sets, networks = _wanted(names, profile, data_dir)
    networks = [network for network in networks if network.path is None]
    failed = False
    try:
        rooms = [(folder, room_needed(folder, parts)) for folder, parts in sets.items()]
        check_room(rooms + [(network.home, network.size) for network in networks])
        steps: list[Callable[[], None]] = [partial(fetch_network, network) for network in networks]
        steps += [partial(_prepare, folder, parts) for folder, parts in sets.items()]
        for step in steps:
            try:
                step()
            except TacoError as error:
                print(error, file=sys.stderr)
                failed = True
        return show_status(names, profile, data_dir) or int(failed)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it was.", file=sys.stderr)
        return 130


def _wanted(
    names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None
) -> tuple[dict[Path, tuple[Part, ...]], list[Pretrained]]:
    """Return what has these names and what the profile needs; everything there is, if neither is given.

    Data sets are given by their folders and parts.
    """
    known = [*SOURCES, *PRETRAINED]
    if profile == "paper" or not (names or profile):
        names = list(dict.fromkeys([*names, *known]))
    networks = {name: PRETRAINED.get(name) or find_pretrained(name) for name in names if name not in SOURCES}
    unknown = [name for name, network in networks.items() if network is None]
    check_known(unknown, known, "There is no data set or pretrained network")
    root = data_root(data_dir)
    sets = {name: parts for name, parts in SOURCES.items() if name in names}
    folders = {root / name if parts else bundled(name, data_dir): parts for name, parts in sets.items()}
    return folders, list(networks.values())


def _prepare(folder: Path, parts: tuple[Part, ...]) -> None:
    """Fetch a data set, and open it once as a run would, so that nothing is left to be found out there."""
    fetch_set(folder, parts)
    (dataset,) = datasets(folder.name, data_dir=folder.parent)
    print(f"{folder.name}: {len(dataset):,} images to evaluate on.")
    if folder.name == "coco":
        print(f"coco: {len(training_pairs('coco', 256, data_dir=folder.parent)):,} pairs to train on.")
        print(f"coco: {compare_splits(folder)}")


def show_status(names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None = None) -> int:
    """Print a line for each data set and network, and the command that fetches what is missing, without a request.

    Returns 0 if all is there, else 1.
    """
    sets, networks = _wanted(names, profile, data_dir)
    rows = []
    for folder, parts in sets.items():
        lacking, entries = missing_parts(folder, parts), manifest(folder)
        if lacking:
            had = sum(fetched_bytes(folder, part) for part in lacking)
            state = "unfinished" if had or entries else "missing"
            size = sum(part.size for part in lacking) - had
            note = f"{folder} lacks {few(part.name for part in lacking)}"
        elif not parts:
            state = "bundled" if folder == BUNDLED / folder.name else "there"
            size, note = sum(file.stat().st_size for file in folder.iterdir()), folder
        else:
            state = "there"
            size = sum(entries.get(part.name, {}).get("bytes", part.size) for part in parts)
            found = sum("checksum" not in entries.get(part.name, {}) for part in parts)
            note = f"{folder}; {found} of {len(parts)} parts were not fetched, and so not checked"
            note = note if found else folder
        rows.append((folder.name, state, size, note))
    for network in networks:
        state = "there" if network.path else "missing"
        note = f"{network.path or network.home}, for {network.use}"
        rows.append((network.name, state, network.size, note))
    if not rows:
        print('Profile "sample" needs nothing that is not bundled.')
        return 0
    width = max(len(name) for name, *_ in rows)
    for name, state, size, note in rows:
        print(f"{name:{width}}  {state:10}  {human_size(size):>8}  {note}")
    missing = [name for name, state, *_ in rows if state in ("missing", "unfinished")]
    if missing:
        where = f" --data-dir {data_dir}" if data_dir else ""
        print(f"With a network, this fetches what is missing: taco-nb fetch {' '.join(missing)}{where}")
    return int(bool(missing))
