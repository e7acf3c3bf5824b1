"""`python -m taco_nb.data fetch` on a machine with a network, `python -m taco_nb.data status` anywhere.

fetch gets data sets and pretrained networks, by name or all that a profile needs, and goes on where it was stopped.
status says what is there, what is missing, how large it is, and where it was looked for; its exit status is 1 if anything
is missing, so that a job can ask before it starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from taco_nb.data import datasets, training_pairs
from taco_nb.data.captioned import few
from taco_nb.data.download import PROGRAM, check_room, shown
from taco_nb.data.fetch import compare_splits, fetch_set, fetched_bytes, manifest, missing_parts, room_needed
from taco_nb.data.sources import SOURCES, Part
from taco_nb.errors import TacoError
from taco_nb.experiment import check_names
from taco_nb.files import data_root
from taco_nb.pretrained import PRETRAINED, Pretrained


def main(
    arguments: Sequence[str] | None = None,
    sources: Mapping[str, tuple[Part, ...]] = SOURCES,
    networks: Mapping[str, Pretrained] = PRETRAINED,
) -> int:
    """Run a command line, and give the exit status: 0 if all is there, 1 if something is not, 2 for a wrong command."""
    known = [*sources, *networks]
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.partition("\n\n")[2])
    parser.add_argument("command", choices=("fetch", "status"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; for status all, if none is given")
    parser.add_argument("--profile", choices=("paper", "sample"), help="all that this profile needs")
    parser.add_argument("--data-dir", help="the data folder (default: TACO_NB_DATA, or data/ of the repository)")
    asked = parser.parse_args(arguments)
    if asked.profile == "sample" and not asked.names:
        print('Profile "sample" needs nothing that is not bundled.')
        return 0
    if asked.command == "fetch" and not asked.names and not asked.profile:
        parser.error(f"say what to fetch: --profile paper, or names of {', '.join(known)}")
    try:
        check_names(asked.names, known, "There is no data set or pretrained network")
        root = data_root(asked.data_dir)
    except TacoError as error:
        parser.error(str(error))
    names = known if asked.profile == "paper" or not asked.names else asked.names
    sets = {root / name: parts for name, parts in sources.items() if name in names}
    weights = [network for name, network in networks.items() if name in names]
    try:
        well = asked.command == "status" or _fetch(sets, weights)
        missing = _show(sets, weights)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on where it was.", file=sys.stderr)
        return 130
    except (TacoError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if missing:
        where = f" --data-dir {asked.data_dir}" if asked.data_dir else ""
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


if __name__ == "__main__":
    sys.exit(main())
