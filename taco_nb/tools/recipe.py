"""A recipe, a file of TOML, says how codecs are made from nothing: from which pictures, and by which runs.

    taco-nb bundle --recipe data/checkpoints/recipe.toml --out out/recipe

Each run is `fit` with the settings that the file gives, in the file's order; a run's `init` may name an earlier one. A run
that is finished is not repeated, one that was stopped goes on, so the same command goes on after a stop.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from taco_nb.data import CONTEXT
from taco_nb.data.captioned import image_files
from taco_nb.errors import DataError, SettingError, StoppedError, check_known
from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write, data_root, read_toml
from taco_nb.training import fit

CAPTIONS = "captions.json"


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """Return a recipe: "about" in words, "pictures" {folder: parts}, "runs" {name: settings}, and which are "bundled".

    A run has the recipe's common settings, then those of the run that it is `like`, then its own. One with several `seeds`
    is a run per seed, and the first of them has the plain name. Raises `SettingError` for a file that is no recipe.
    """
    try:
        recipe = read_toml(path)
        common, stated, _ = recipe["settings"], recipe["runs"], recipe["about"]
        runs: dict[str, dict[str, Any]] = {}
        for name, own in stated.items():
            settings = common | _inherited(stated, own)
            first, *others = settings.pop("seeds", [settings.get("seed", Experiment.seed)])
            settings.pop("like", None)
            runs[name] = settings | {"seed": first}
            for seed in others:
                runs[f"{name}-seed{seed}"] = settings | {"seed": seed, "bundled": False}
        recipe["bundled"] = [name for name, settings in runs.items() if settings.pop("bundled", True)]
        return recipe | {"runs": runs}
    except (
        OSError,
        ValueError,  # malformed TOML, or a list of seeds without one
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,  # runs that are like each other
    ) as error:
        raise SettingError(f"{path} is no recipe ({type(error).__name__}: {error}).") from None


def _inherited(stated: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings together with those of the run that it is like, of the one that this is like, and so on."""
    return (_inherited(stated, stated[own["like"]]) if "like" in own else {}) | own


def follow(
    path: str | os.PathLike,
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    only: Sequence[str] = (),
) -> dict[str, Path]:
    """Train what the recipe says below the folder `out`, and return the folders of the runs.

    `only` names the runs to train, if not all. Raises `SettingError` for a recipe that cannot be followed, and `DataError`
    for pictures that are missing; `StoppedError` when a signal asked a run to stop; `fit` raises the rest.
    """
    out, recipe = Path(out).absolute(), read_recipe(path)
    check_known(only, [*recipe["runs"]], f"{path} has no run")
    wanted = {name: settings for name, settings in recipe["runs"].items() if not only or name in only}
    for name, settings in wanted.items():
        if settings.get("init") in recipe["runs"]:
            settings["init"] = str(out / settings["init"])
        if parts := recipe.get("pictures", {}).get(settings["train_data"]):
            folder = out / "pictures" / settings["train_data"]
            if not folder.is_dir():
                gather(parts, folder, data_root(data_dir))
            settings["train_data"] = str(folder)
        if not fit(Experiment().replace(**settings), out / name, data_dir=data_dir).finished:
            raise StoppedError(f"{name} was asked to stop. The same command goes on with it.")
    return {name: out / name for name in wanted}


def gather(parts: Sequence[Mapping[str, Any]], folder: Path, root: Path) -> None:
    """Copy the pictures of some parts into a folder for `training_pairs`, with the captions of each.

    A part has "folder" and, all of them optional: "captions", a file in either form that data sets are read from; "context",
    a file of paragraphs, or "joined" for the captions in a row; "without", a list of names that stay out; "skip_every" n,
    which leaves out every n-th picture from the first on; "limit". The folder gets its name only when it is whole.
    """
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    captions: dict[str, list[str]] = {}
    context: dict[str, list[str]] = {}
    for part in parts:
        images = dict(sorted(image_files(root / part["folder"]).items()))
        said = _captions(root / part["captions"]) if "captions" in part else {name: [""] for name in images}
        left_out = set((root / part["without"]).read_text().split()) if "without" in part else set()
        left_out |= set([*images][:: part["skip_every"]] if "skip_every" in part else ())
        chosen = [name for name in images if name in said and name not in left_out][: part.get("limit")]
        if doubles := captions.keys() & set(chosen):
            raise DataError(f"Two parts have a picture that is called {doubles.pop()}.")
        for name in tqdm(chosen, part["folder"], unit="picture", delay=2):
            shutil.copyfile(images[name], scratch / name)
            captions[name] = said[name]
        if part.get("context") == "joined":
            context |= {name: [" ".join(said[name])] for name in chosen}
        elif "context" in part:
            paragraphs = _captions(root / part["context"])
            context |= {name: paragraphs[name] for name in chosen}
    for file, content in ((CAPTIONS, captions), (CONTEXT, context)):
        if content:
            with atomic_write(scratch / file, "w") as stream:
                json.dump(content, stream)
    scratch.replace(folder)


def _captions(path: Path) -> dict[str, list[str]]:
    """Return the captions by picture of a file in MS-COCO's form, or in that of `CaptionedFolder`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "annotations" not in content:
        return {name: [said] if isinstance(said, str) else said for name, said in content.items()}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        captions[names[annotation["image_id"]]].append(annotation["caption"])
    return captions
