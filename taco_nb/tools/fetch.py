"""Data sets fetched and laid out as they are read, with a manifest of what is there and where it came from."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from taco_nb.data import STAGING, datasets, training_pairs
from taco_nb.data.captioned import few, read_json
from taco_nb.errors import DownloadError, TacoError, check_known
from taco_nb.files import atomic_write, data_root
from taco_nb.pretrained import PRETRAINED, Pretrained
from taco_nb.tools.download import FULL, PROGRAM, check_room, download, shown
from taco_nb.tools.sources import SOURCES, Part

MANIFEST = "manifest.json"


def fetch_set(folder: Path, parts: Sequence[Part]) -> None:
    """Fetch what `folder` lacks of a data set, one part after the other, going on where an earlier call was stopped.

    Every part is checked and unpacked in the hidden folder `.fetch`, is entered in `manifest.json`, and only then takes
    its place, so that nothing half-finished ever stands there. What is in its place already, of the right size or
    number, is left, and entered as found if it was not fetched. Raises `DownloadError` where a part cannot be had, is
    not what was expected, or has no room.
    """
    from huggingface_hub.utils import WeakFileLock

    staging = folder / STAGING
    if not missing_parts(folder, parts) and not staging.exists():
        return  # without a write: the folder may be somebody else's
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(staging / "lock", timeout=1):
            for part in parts:
                _fetch_part(folder, part, parts)
        shutil.rmtree(staging, ignore_errors=True)
    except TimeoutError as error:
        raise DownloadError(f"Another process is fetching into {folder}: wait for it, or end it.") from error
    except OSError as error:
        raise DownloadError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}."
        ) from error


def is_there(folder: Path, part: Part, parts: Sequence[Part]) -> bool:
    """Whether a part is in its place, whole: a file by its size, a folder by the number of its files.

    Parts that share a folder, as the two halves of CLIC do, count together: those in the manifest if this one is, too.
    """
    if not part.members:
        path = folder / part.place
        return path.is_file() and path.stat().st_size == part.remote.size
    known = manifest(folder)
    sharing = [other for other in parts if (other.place, other.members) == (part.place, part.members)]
    if part.name in known:
        sharing = [other for other in sharing if other.name in known]
    home, pattern = folder / part.place, PurePosixPath(part.members).name
    found = sum(_wanted(name, pattern) for name in os.listdir(home)) if home.is_dir() else 0
    return found >= sum(other.count for other in sharing)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of each part in `folder`, by the name of its download; empty where nothing was fetched yet.

    An entry holds source, size, checksum and who vouched for it, the number of files and their bytes, and the date; of
    what was found and not fetched, the place and the date alone.
    """
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else {}


def room_needed(folder: Path, parts: Sequence[Part]) -> int:
    """Bytes of disk that `fetch_set` takes at most at any time, beyond what lies there already."""
    kept = peak = 0
    for part in missing_parts(folder, parts):
        had = fetched_bytes(folder, part)
        peak = max(peak, kept + part.remote.size - had + part.unpacked)
        kept += (part.unpacked or part.remote.size) - had
    return peak


def missing_parts(folder: Path, parts: Sequence[Part]) -> list[Part]:
    """The parts that are not in their place."""
    return [part for part in parts if not is_there(folder, part, parts)]


def fetched_bytes(folder: Path, part: Part) -> int:
    """How much of a part that is not yet in its place has been downloaded."""
    whole = folder / STAGING / part.name
    return max(
        path.stat().st_size if path.exists() else 0 for path in (whole, whole.with_name(f".{part.name}.part"))
    )


def compare_splits(folder: Path) -> str:
    """A sentence on whether TACO's list of MS-COCO images is Karpathy's restval, which is evaluated on here."""
    listed = set(read_json(folder / "mscoco_30k_list.json"))
    images = read_json(folder / "dataset_coco.json")["images"]
    restval = {image["filename"] for image in images if image["split"] == "restval"}
    if listed == restval:
        return f"TACO's list of {len(listed):,} images is Karpathy's restval."
    return (
        f"TACO's list has {len(listed):,} images and Karpathy's restval, which is evaluated on here, {len(restval):,}; "
        f"{len(listed ^ restval):,} are in one of them only: {few(listed ^ restval)}."
    )


def _fetch_part(folder: Path, part: Part, parts: Sequence[Part]) -> None:
    known = manifest(folder)
    if is_there(folder, part, parts):
        if part.name not in known:
            _enter(folder, part, {"found": part.place or "."})
        return
    remote = part.remote
    if not remote.checksums and "checksum" in known.get(part.name, {}):
        remote = replace(remote, checksums=known[part.name]["checksum"])  # of the first time
    path = folder / STAGING / part.name
    checksum = download(remote, path)
    files = unpack(path, part) if part.members else [path]
    _enter(folder, part, {
        "source": remote.url,
        "size": remote.size,
        "checksum": checksum,
        "vouched": part.remote.vouched or "nobody: this is the checksum of the first download",
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    })  # fmt: skip
    if part.members:
        _move(files, folder / part.place)
        path.unlink()
    else:
        os.replace(path, folder / part.place)


def unpack(archive: Path, part: Part) -> list[Path]:
    """Unpack the wanted files of an archive into a new folder beside it, and give their paths.

    Refuses the archive, with a `DownloadError`, if any name in it leads out of the folder or is a link, and if the files
    are not as many, or are larger, than `part` says. Nothing unpacked is left then, nor when the disk is full.
    """
    from tqdm.auto import tqdm

    folder = archive.with_name(f"{archive.name}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = _checked(opened, archive, part)
            folder.mkdir()
            for info in tqdm(wanted, desc=f"unpacking {archive.name}", unit="file", delay=1):
                with (
                    opened.open(info) as packed,
                    open(folder / PurePosixPath(info.filename).name, "xb") as file,
                ):
                    shutil.copyfileobj(packed, file, 1 << 20)
        return sorted(folder.iterdir())
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in FULL
        raise DownloadError(
            f"{archive} could not be unpacked: {f'the disk or quota of {archive.parent} is full' if full else error}. "
            "What was unpacked is removed, the archive is kept: the same command goes on."
        ) from error


def _checked(opened: zipfile.ZipFile, archive: Path, part: Part) -> list[zipfile.ZipInfo]:
    """The members to unpack, once no member of the archive does harm."""
    for info in opened.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in info.filename:
            raise DownloadError(
                f"{archive} holds {info.filename!r}, which leads out of the folder: nothing is unpacked."
            )
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{archive} holds {info.filename!r}, a link or device: nothing is unpacked.")
    wanted = [
        info for info in opened.infolist() if not info.is_dir() and _wanted(info.filename, part.members)
    ]
    names = {PurePosixPath(info.filename).name for info in wanted}
    if not len(wanted) == len(names) == part.count:
        raise DownloadError(f"{archive} holds {len(names):,} files {part.members}, not {part.count:,}.")
    if (size := sum(info.file_size for info in wanted)) > part.unpacked:
        raise DownloadError(
            f"{archive} unpacks to {shown(size)}, but at most {shown(part.unpacked)} were expected."
        )
    return wanted


def _wanted(name: str, pattern: str) -> bool:
    hidden = any(step.startswith((".", "__MACOSX")) for step in PurePosixPath(name).parts)
    return not hidden and fnmatchcase(name, pattern)


def _enter(folder: Path, part: Part, entry: dict[str, Any]) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entries = manifest(folder) | {part.name: {**entry, "date": now}}
    with atomic_write(folder / MANIFEST, "w") as file:
        json.dump(entries, file, indent=1)


def _move(files: list[Path], folder: Path) -> None:
    """Unpacked files to their folder: at one stroke, unless there is one already."""
    unpacked = files[0].parent
    if not folder.is_dir():
        os.rename(unpacked, folder)
        return
    for file in files:
        os.replace(file, folder / file.name)
    unpacked.rmdir()


# --- All that a profile needs -----------------------------------------------------------------------------------------


def fetch_all(names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None = None) -> int:
    """Fetch data sets and networks by name, or all that a profile needs, and print what is there then.

    Returns the exit status: 0 if all is there, 1 if something is not, 130 if stopped.
    """
    return _settle(names, profile, data_dir, fetching=True)


def show_status(names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None = None) -> int:
    """Print what is there and what is missing, without a request; 0 if all is there, else 1."""
    return _settle(names, profile, data_dir, fetching=False)


def _settle(
    names: Sequence[str], profile: str | None, data_dir: str | os.PathLike | None, fetching: bool
) -> int:
    if profile == "sample" and not names:
        print('Profile "sample" needs nothing that is not bundled.')
        return 0
    known = [*SOURCES, *PRETRAINED]
    check_known(names, known, "There is no data set or pretrained network")
    root = data_root(data_dir)
    names = known if profile == "paper" or not names else names
    sets = {root / name: parts for name, parts in SOURCES.items() if name in names}
    weights = [network for name, network in PRETRAINED.items() if name in names]
    try:
        well = not fetching or _fetch(sets, weights)
        missing = _show(sets, weights)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it was.", file=sys.stderr)
        return 130
    if missing:
        where = f" --data-dir {data_dir}" if data_dir else ""
        print(f"With a network, this fetches what is missing: {PROGRAM} fetch {' '.join(missing)}{where}")
    return 0 if well and not missing else 1


def _fetch(sets: dict[Path, tuple[Part, ...]], weights: list[Pretrained]) -> bool:
    """Get all that is missing; what fails is said, and keeps nothing else from being fetched."""
    weights = [network for network in weights if network.path is None]
    rooms = [(folder, room_needed(folder, parts)) for folder, parts in sets.items()]
    check_room(rooms + [(network.home, network.size) for network in weights])
    steps = [network.fetch for network in weights]
    steps += [partial(_prepare, folder, parts) for folder, parts in sets.items()]
    well = True
    for step in steps:
        try:
            step()
        except TacoError as error:
            print(error, file=sys.stderr)
            well = False
    return well


def _prepare(folder: Path, parts: tuple[Part, ...]) -> None:
    """Fetch a data set, and read it once as a run would, so that nothing is left to be found out there."""
    fetch_set(folder, parts)
    (dataset,) = datasets(folder.name, data_dir=folder.parent)
    print(f"{folder.name}: {len(dataset):,} images to evaluate on.")
    if folder.name == "coco":
        print(f"coco: {len(training_pairs('coco', 256, data_dir=folder.parent)):,} pairs to train on.")
        print(f"coco: {compare_splits(folder)}")


def _show(sets: dict[Path, tuple[Part, ...]], weights: list[Pretrained]) -> list[str]:
    """Print a line for each, and give the names of those that are missing."""
    rows, missing = [], []
    for folder, parts in sets.items():
        lacking, entries = missing_parts(folder, parts), manifest(folder)
        if lacking:
            missing.append(folder.name)
            had = sum(fetched_bytes(folder, part) for part in lacking)
            rest = sum(part.remote.size for part in lacking) - had
            note = f"{folder} lacks {few(part.name for part in lacking)}"
            rows.append((folder.name, "unfinished" if had or entries else "missing", rest, note))
        else:
            found = sum("found" in entries.get(part.name, {"found": ""}) for part in parts)
            note = f"; {found} of {len(parts)} parts were not fetched, and so not checked" if found else ""
            size = sum(entries.get(part.name, {}).get("bytes", part.remote.size) for part in parts)
            rows.append((folder.name, "there", size, f"{folder}{note}"))
    for network in weights:
        if network.path is None:
            missing.append(network.name)
        state = "there" if network.path else "missing"
        rows.append((network.name, state, network.size, f"{network.path or network.home}, for {network.use}"))
    width = max(len(name) for name, *_ in rows)
    for name, state, size, note in rows:
        print(f"{name:{width}}  {state:10}  {shown(size):>8}  {note}")
    return missing
