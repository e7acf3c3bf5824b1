"""`taco-nb results` measures the tables and figures of the READMEs, keeps them as CSV, and fills them in between markers.

    taco-nb results              # measure what is out of date, and fill in everything
    taco-nb results kodak        # measure this one; others that are out of date are filled in with a line that says so
    taco-nb results --check      # measure only what takes seconds; fail where a page does not show what is kept

In a page, what is filled in stands between two comments, of which the first has its name:

    <!-- results: kodak -->
    ...
    <!-- end of results -->

`data/results/kodak.csv` holds what was measured. `data/results/kodak.json` holds the command, the commit, the machine, and
checksums of the weights, the data and the code that it depends on. When one of these is another, the result is out of date.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pandas as pd
import torch
from PIL import Image

from taco_nb import checkpoint
from taco_nb.codec import load
from taco_nb.control import against, control, effects, heard, listening, siblings
from taco_nb.data import datasets
from taco_nb.data.images import to_tensor
from taco_nb.data.shapes import scene, short_caption
from taco_nb.errors import DataError, check_known
from taco_nb.evaluation import evaluate, evaluate_matched, means
from taco_nb.evaluation.peers import match_bpp
from taco_nb.experiment import Experiment
from taco_nb.files import BUNDLED, REPOSITORY, atomic_write, human_size, sha256
from taco_nb.metrics.distortion import psnr
from taco_nb.metrics.rate import BD_POINTS, bd_rate
from taco_nb.model import TACO, ModelConfig
from taco_nb.provenance import code_digest, provenance
from taco_nb.tools.bench import REFERENCE, speed
from taco_nb.tools.bundle import SCENES, standing
from taco_nb.tools.recipe import read_recipe
from taco_nb.widgets.pictures import side_by_side
from taco_nb.widgets.shapes import under_captions

FOLDER = BUNDLED / "results"
PICTURES = REPOSITORY / "notebooks/pictures"
_CODEC = (
    "model", "text", "codec.py", "data/images.py", "data/colour.py", "data/captioned.py", "metrics/distortion.py",
    "evaluation/measure.py", "evaluation/peers.py",
)  # fmt: skip
"""The code on which the files of codecs, ours and others', and their distortion depend."""
_IN_WORDS = {
    "attention=linformer": "Linformer attention",
    "captions=context": "context captions, {text_tokens} tokens",
    "captions=constant": "one constant caption",
    "text_pooling=keywords": "keyword-weighted captions",
    "text_pooling=keywords-tokens": "keyword-weighted tokens",
}
_START = ("init", "lmbda", "k_P")
"""Runs of the recipe with `demo`'s settings here, and with its weight of J, differ from it by what an ablation changes."""
_LOSSES = {"rate and squared error alone": "mse", "the whole loss": "demo"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Tables = dict[str, pd.DataFrame]


class Result(NamedTuple):
    """A result says how it is measured, on what it depends, and how pages show each of its tables."""

    measure: Callable[[], Tables]
    """Return tables by name. It may also make a figure in the repository."""
    blocks: dict[str, tuple[str, Callable[[pd.DataFrame], str]]]
    """{name of a table, and of its marker: (page, what to write there of the table)}."""
    data: tuple[str, ...]
    """Files below `data/` that it depends on, as patterns."""
    code: tuple[str, ...]
    """Modules of the package that it depends on, and folders of them."""
    quick: bool = False
    """True if measuring takes seconds, so that a check measures it anew."""


# Measuring ------------------------------------------------------------------------------------------------------------


def _measure_kodak() -> Tables:
    known = _codecs()
    table, gaps = standing([load(name) for name in known], datasets("kodak"))
    described = pd.DataFrame(
        {"codec": name, "what": _in_words(exp), "lambda": exp.lmbda} for name, exp in known.items()
    )
    ours = evaluate(load("demo"), datasets("kodak"))
    alike = means(pd.concat([ours, evaluate_matched(ours, datasets("kodak"))]))
    return {
        "kodak": described.merge(table.drop(columns="dataset")),
        "kodak-bd": gaps.drop(columns="dataset"),
        "kodak-alike": alike[["codec", "bpp", "psnr", "ms_ssim", "mini_distance"]],
    }


def _measure_codecs() -> Tables:
    rows = []
    for name, exp in _codecs().items():
        path = BUNDLED / "checkpoints" / f"{name}.safetensors"
        card, about = checkpoint.card_of(path), checkpoint.read_weights(path)[1]
        with torch.device("meta"):  # shapes alone
            parameters = sum(weight.numel() for weight in TACO(ModelConfig(**about["config"])).parameters())
        row = {"file": path.name, "what": _in_words(exp), "lambda": exp.lmbda, "steps": card["steps"]}
        rows.append(row | {"hours": card["hours"], "parameters": parameters, "bytes": path.stat().st_size})
    return {"codecs": pd.DataFrame(rows)}


def _measure_control() -> Tables:
    tables = [
        effects(control(load(name), datasets("kodak-256", captions=exp.dataset_captions)))
        for name, exp in _codecs().items()
    ]
    return {"control": pd.concat(tables)}


def _measure_siblings() -> Tables:
    """Compare the runs of the bundled codecs' recipe from what is kept of them; nothing is encoded."""
    table, recipe = siblings(), read_recipe(BUNDLED / "checkpoints/recipe.toml")
    runs = {name: Experiment().replace(**recipe["runs"][name]) for name in table["codec"].unique()}
    demo = runs["demo"]
    alike = {
        name: exp for name, exp in runs.items() if all(getattr(exp, of) == getattr(demo, of) for of in _START)
    }
    names = [
        name for name, exp in alike.items() if exp.k_J == demo.k_J and name not in ("demo", "demo-constant")
    ]
    found = against(table, [*((name, "demo") for name in names), ("demo", "demo-constant")])
    found["seeds"] = found["seeds"].map(lambda seeds: " ".join(f"{seed:.4g}" for seed in seeds))

    weights = {name: exp.k_J for name, exp in alike.items() if not exp.ablations}
    joint = effects(table[table["codec"].isin(weights) & (table["seed"] == 1)].assign(dataset="kodak-256"))
    joint["k_J"] = joint["codec"].map(weights)

    # Every baseline, and its sibling that was trained without the other terms of the loss.
    own = table[(table["condition"] == "own") & (table["seed"] == 1)]
    figures = own.groupby("codec")[["bytes", "psnr", "ms_ssim", "mini_distance"]].mean()
    rows = [
        {"loss": loss, "codec": name, "lambda": runs[name].lmbda, **figures.loc[name]}
        for loss, middle in _LOSSES.items()
        for name in (f"{middle}-lowest", f"{middle}-low", middle, f"{middle}-high")
    ]
    losses = pd.DataFrame(rows)
    losses.insert(3, "bpp", 8 * losses.pop("bytes") / 256**2)
    return {"siblings": found, "joint": joint.sort_values("k_J", kind="stable"), "losses": losses}


def _measure_shapes() -> Tables:
    """Make notebooks/pictures/shapes.png: a scene under two captions, as the codec that listens has decoded it."""
    codec, shown = load("shapes-softmax"), scene(3, crossed=False)
    captions = [short_caption([shown.names[k]]) for k in (0, 3)]
    _write_picture("shapes.png", under_captions(codec, shown, captions))
    return {"shapes": heard(listening(codec, SCENES))}


def _measure_speed() -> Tables:
    table = speed("cuda" if torch.cuda.is_available() else "cpu", repeats=9, training_repeats=3)
    return {"speed": table[["task", "codec", "median_ms", "speedup"]]}


def _measure_reconstruction() -> Tables:
    """Make notebooks/pictures/reconstruction.png: the cat's face by a bundled codec, JPEG and WebP, at no more bytes."""
    pictures, codec = datasets("sample")[0], load("demo")
    cat = pictures[pictures.names.index("chelsea.png")]
    data = codec.encode(cat.image, cat.captions[0])
    files = {codec.name: (codec.decode(data), data)}
    for match in (match_bpp(cat.image, peer, len(data)) for peer in ("JPEG", "WebP")):
        files[f"{match.format}, quality {match.quality}"] = match.image, match.data
    shown, rows = {f'original\n"{cat.captions[0]}"': cat.image}, []
    for name, (picture, data) in files.items():
        decibels = psnr(to_tensor(cat.image), to_tensor(picture))
        shown[f"{name}\n{len(data)} bytes, {decibels:.1f} dB"] = picture
        rows.append({"codec": name, "bytes": len(data), "psnr": decibels})
    _write_picture("reconstruction.png", side_by_side(shown, columns=2))
    return {"reconstruction": pd.DataFrame(rows)}


def _write_picture(name: str, picture: Image.Image) -> None:
    with atomic_write(PICTURES / name) as file:
        picture.save(file, "PNG", optimize=True)


def _codecs() -> dict[str, Experiment]:
    """Return the bundled codecs in the order of the tables: the baselines first, each kind by lambda, then by name."""
    known = checkpoint.bundled_codecs().items()
    return dict(sorted(known, key=lambda item: (len(item[1].ablations), item[1].lmbda, item[0])))


def _in_words(exp: Experiment) -> str:
    """Return what a bundled codec's training changed, as a reader of a table wants to know it."""
    if exp.schedule == "constant":
        return "the trunk that most others start from"
    changes = [f"{name}={value}" for name, value in exp.ablations.items()]
    if len(changes) == 3:
        return "all three changes"
    known = [_IN_WORDS.get(change, change).format(text_tokens=exp.text_tokens) for change in changes]
    return " and ".join(known) or "baseline"


# Writing --------------------------------------------------------------------------------------------------------------


def _markdown(columns: Mapping[str, Iterable[str]]) -> str:
    """Return a table in Markdown, given by its columns."""
    rows = [columns, ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join(f"| {' | '.join(row).lstrip()} |" for row in rows)


def _kodak_table(table: pd.DataFrame) -> str:
    peers = [column for column in table if column.endswith(", %")]
    return _markdown(
        {
            "codec": table["codec"].map("`{}`".format),
            "what": table["what"],
            "lambda": table["lambda"].map("{:g}".format),
            "bits per pixel": table["bpp"].map("{:.3f}".format),
            "PSNR in dB": table["psnr"].map("{:.2f}".format),
            "MS-SSIM": table["ms_ssim"].map("{:.4f}".format),
            **{f"than {peer.removesuffix(', %')}": table[peer].map(_than) for peer in peers},
        }
    )


def _than(percent: float) -> str:
    if math.isnan(percent):
        return "–"
    return f"{abs(percent):.0f} % {'less' if percent < 0 else 'more'}"


def _bd_sentence(table: pd.DataFrame) -> str:
    gaps = table.to_dict("records")
    points = gaps[0]["points"]
    count = _NUMBERS[points] if points < len(_NUMBERS) else points
    if math.isnan(gaps[0]["BD-rate (PSNR), %"]):
        return f"There is no BD-rate: it takes a curve, and there {'is' if points == 1 else 'are'} {count} of its points."
    said = [
        f"{abs(gap['BD-rate (PSNR), %']):.1f} % {'below' if gap['BD-rate (PSNR), %'] < 0 else 'above'} {gap['peer']}"
        for gap in gaps
    ]
    few = (
        f" It rests on {count} points, fewer than the {_NUMBERS[BD_POINTS]} that Bjøntegaard's measure wants."
    )
    listed = f"{', '.join(said[:-1])} and {said[-1]}" if len(said) > 1 else said[0]
    return f"The BD-rate (PSNR) of the {count} baselines is {listed}.{few if points < BD_POINTS else ''}"


def _alike_sentence(table: pd.DataFrame) -> str:
    ours, *others = table.to_dict("records")
    listed = ", ".join(f"{row['mini_distance']:.2f} of {row['codec']}" for row in others)
    return (
        f"At equal bytes, picture by picture, the `mini_distance` of `{ours['codec']}` is {ours['mini_distance']:.2f}, "
        f"beside {listed} (lower is better; the distance was in its loss)."
    )


def _effects_columns(table: pd.DataFrame, metrics: Sequence[str], form: str) -> dict[str, list[str]]:
    """Return a column for each metric, under its unit: the effects on it, their intervals and the range of the seeds."""
    columns: dict[str, list[str]] = {}
    for metric in metrics:
        for row in table[table["metric"] == metric].to_dict("records"):
            seeds = [float(seed) for seed in str(row.get("seeds", "")).split()]
            spread = f"; seeds {min(seeds):{form}} to {max(seeds):{form}}" if len(seeds) > 1 else ""
            cell = f"{row['effect']:{form}} ({row['low']:{form}} to {row['high']:{form}}{spread})"
            columns.setdefault(row["unit"], []).append(cell)
    return columns


def _control_table(table: pd.DataFrame) -> str:
    columns = {"codec": table["codec"].drop_duplicates().map("`{}`".format)}
    for condition in ("another's", "NA", "empty"):
        under_it = _effects_columns(table[table["condition"] == condition], ["bytes", "psnr"], "+.3f")
        columns |= {f"{condition}: {unit}": cells for unit, cells in under_it.items()}
    return _markdown(columns)


def _siblings_table(table: pd.DataFrame) -> str:
    pairs = table.drop_duplicates(["codec", "sibling"])
    columns = {
        "codec": pairs["codec"].map("`{}`".format),
        "minus its sibling": pairs["sibling"].map("`{}`".format),
        "seeds": [str(len(str(seeds).split())) for seeds in pairs["seeds"]],
    }
    metrics = ["bytes", "psnr", "mini_distance", "mini_score"]
    return _markdown(columns | _effects_columns(table, metrics, "+.3f"))


def _joint_table(table: pd.DataFrame) -> str:
    table = table[table["condition"] == "another's"]
    columns = {"k_J": table["k_J"].drop_duplicates().map("{:g}".format)}
    metrics = ["bytes", "psnr", "ms_ssim", "mini_score"]
    return _markdown(columns | _effects_columns(table, metrics, "+.3g"))


def _losses_table(table: pd.DataFrame) -> str:
    plain, whole = (table[table["loss"] == loss] for loss in _LOSSES)
    gap = bd_rate(plain["bpp"], plain["psnr"], whole["bpp"], whole["psnr"])
    columns = {
        "trained for": table["loss"],
        "run": table["codec"].map("`{}`".format),
        "lambda": table["lambda"].map("{:g}".format),
        "bits per pixel": table["bpp"].map("{:.3f}".format),
        "PSNR in dB": table["psnr"].map("{:.2f}".format),
        "MS-SSIM": table["ms_ssim"].map("{:.4f}".format),
        "mini_distance": table["mini_distance"].map("{:.3f}".format),
    }
    more = f"{abs(gap):.1f} % {'more' if gap > 0 else 'fewer'} bits"
    return f"{_markdown(columns)}\n\nAt the same PSNR the whole loss takes {more} (BD-rate)."


def _codecs_table(table: pd.DataFrame) -> str:
    return _markdown(
        {
            "file": table["file"].map("`{}`".format),
            "what": table["what"],
            "lambda": table["lambda"].map("{:g}".format),
            "steps": table["steps"].map("{:,}".format),
            "hours": table["hours"].map("{:.1f}".format),
            "parameters": (table["parameters"] / 1e6).map("{:.2f} M".format),
            "size": table["bytes"].map(human_size),
        }
    )


def _speed_table(table: pd.DataFrame) -> str:
    codecs = table["codec"].drop_duplicates()
    columns = {"": ["`{}`".format(codec if codec == REFERENCE else f'mode="{codec}"') for codec in codecs]}
    for task, rows in table.groupby("task", sort=False):
        title = task.replace("step", "step, one 256x256 crop")  # on a GPU `speed` takes eight crops
        columns[title] = [
            f"{row.median_ms / 1e3:.2f} s"
            + ("" if row.codec == REFERENCE else f", {row.speedup:.1f} times as fast")
            for row in rows.itertuples()
        ]
    return _markdown(columns)


def _shapes_figure(table: pd.DataFrame) -> str:
    free, crossed = (
        f"{of['listening']:.1f} dB ({of['low']:.1f} to {of['high']:.1f})" for of in table.to_dict("records")
    )
    return (
        "![One scene of four shapes, decoded from two files: each keeps the texture of the shape that its caption names]"
        "(notebooks/pictures/shapes.png)\n\n"
        "*One scene under two captions. The picture and the codec are the same, and the caption is never sent: the encoder "
        "spends its bits on what the words name. Over scenes that the codec has not seen, the named shape gains "
        f"{free} against the same shape when another one is named, and {crossed} where only colour and form together say "
        "which is meant.*"
    )


def _reconstruction_figure(table: pd.DataFrame) -> str:
    size = table["bytes"].max()
    return (
        "![A cat's face four times: the photograph, and what the demo codec, JPEG and WebP make of it in "
        f"{size / 1e3:.1f} kB](../../notebooks/pictures/reconstruction.png)"
    )


RESULTS = {
    "kodak": Result(
        _measure_kodak,
        {
            "kodak": ("README.md", _kodak_table),
            "kodak-bd": ("README.md", _bd_sentence),
            "kodak-alike": ("README.md", _alike_sentence),
        },
        ("checkpoints/*.safetensors", "kodak/*"),
        (*_CODEC, "metrics/rate.py", "tools/bundle.py"),
    ),
    "shapes": Result(
        _measure_shapes,
        {"shapes": ("README.md", _shapes_figure)},
        ("shapes/shapes-softmax.safetensors",),
        (*_CODEC, "control.py", "data/shapes.py", "widgets/shapes.py", "widgets/pictures.py"),
    ),
    "control": Result(
        _measure_control,
        {"control": ("data/checkpoints/README.md", _control_table)},
        ("checkpoints/*.safetensors", "kodak/*"),
        (*_CODEC, "control.py", "metrics/interval.py"),
    ),
    "siblings": Result(
        _measure_siblings,
        {
            "losses": ("data/checkpoints/README.md", _losses_table),
            "siblings": ("data/checkpoints/README.md", _siblings_table),
            "joint": ("data/checkpoints/README.md", _joint_table),
        },
        ("checkpoints/results.csv", "checkpoints/recipe.toml"),
        ("control.py", "metrics/interval.py", "metrics/rate.py"),
        quick=True,
    ),
    "reconstruction": Result(
        _measure_reconstruction,
        {"reconstruction": ("data/checkpoints/README.md", _reconstruction_figure)},
        ("checkpoints/*.safetensors", "sample/images/chelsea.png"),
        (*_CODEC, "widgets/pictures.py"),
    ),
    "speed": Result(
        _measure_speed,
        {"speed": ("README.md", _speed_table)},
        ("sample/images/coffee.png",),
        ("model", "text", "codec.py", "timing.py", "tools/bench.py"),
    ),
    "codecs": Result(
        _measure_codecs,
        {"codecs": ("data/checkpoints/README.md", _codecs_table)},
        ("checkpoints/*.safetensors", "checkpoints/*.json"),
        ("model", "checkpoint.py", "experiment.py"),
        quick=True,
    ),
}


# What is kept, and whether it is out of date --------------------------------------------------------------------------


def inputs_of(result: Result) -> dict[str, str]:
    """Return a checksum of the files below data/ that a result depends on, and one of the code."""
    files = sorted(path for pattern in result.data for path in BUNDLED.glob(pattern))
    listed = [[path.relative_to(BUNDLED).as_posix(), sha256(path)] for path in files]
    data = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {"weights and data": data, "code": code_digest(*result.code)}


def stale(name: str) -> str:
    """Return why a kept result is out of date, such as "the code changed since"; "" if it is not."""
    kept, now = _kept(name)["inputs"], inputs_of(RESULTS[name])
    if not kept:
        return "it is not recorded which weights, data and code it rests on"
    changed = [f"the {what}" for what, digest in now.items() if kept.get(what) != digest]
    return f"{' and '.join(changed)} changed since" if changed else ""


def _kept(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise DataError(f"{path} is missing. Measure it: taco-nb results {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def _tables(name: str) -> Tables:
    how = {"keep_default_na": False, "na_values": [""]}  # "NA" is a caption
    return {table: pd.read_csv(FOLDER / f"{table}.csv", **how) for table in _kept(name)["tables"]}


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _keep(name: str) -> None:
    """Measure a result, and write its tables and where they came from."""
    inputs, about = inputs_of(RESULTS[name]), provenance()  # of before, in case something changes meanwhile
    tables = RESULTS[name].measure()
    for table, frame in tables.items():
        with atomic_write(FOLDER / f"{table}.csv", "w") as file:
            file.write(_csv(frame))
    kept = {"command": f"taco-nb results {name}", "tables": list(tables), "inputs": inputs, **about}
    with atomic_write(FOLDER / f"{name}.json", "w") as file:
        file.write(json.dumps(kept, indent=1) + "\n")


def _whence(name: str) -> str:
    """Return the line below a table: command, commit and machine, and whether it is out of date."""
    kept = _kept(name)
    hardware, commit = kept["hardware"], kept["commit"] or "unknown"
    commit = commit[:7] + ("+changes" if commit.endswith("+changes") else "")
    gpus = "".join(f", {gpu}" for gpu in hardware["gpus"])
    line = f"`{kept['command']}`, commit {commit}, {hardware['cpu']}, {hardware['cores']} cores{gpus}."
    changed = stale(name)
    return f"*{line}" + (f" Out of date: {changed}.*" if changed else "*")


def _pages() -> dict[Path, str]:
    """Return the pages with everything filled in, as they should be. Raises `DataError` for a page without a marker."""
    texts: dict[Path, str] = {}
    for name, result in RESULTS.items():
        tables, whence = _tables(name), _whence(name)
        for number, (marker, (page, write)) in enumerate(result.blocks.items(), 1):
            path = REPOSITORY / page
            if path not in texts:
                if not path.is_file():
                    raise DataError(
                        f"{path} is missing. Results are filled in in a checkout of the repository."
                    )
                texts[path] = path.read_text(encoding="utf-8")
            block = re.compile(rf"(<!-- results: {marker} -->\n).*?(<!-- end of results -->)", re.DOTALL)
            if len(block.findall(texts[path])) != 1:
                raise DataError(
                    f"{path} must have the marker '<!-- results: {marker} -->' once, and '<!-- end of results -->' after it."
                )
            last = number == len(result.blocks)  # what belongs together says once where it came from
            content = write(tables[marker]) + (f"\n\n{whence}\n" if last else "\n")
            texts[path] = block.sub(lambda found, text=content: found[1] + text + found[2], texts[path])
    return texts


def fill(names: Sequence[str] = ()) -> None:
    """Measure the results of these names, or all that are out of date, and fill everything in.

    Raises `SettingError` for a name that is not known, and `DataError` for one that cannot be measured here; without names
    that is said, and the others are measured.
    """
    check_known(names, list(RESULTS), "There is no result")
    for name in names or [name for name in RESULTS if not (FOLDER / f"{name}.json").is_file() or stale(name)]:
        click.echo(f"Measuring {name}.")
        try:
            _keep(name)
        except DataError as error:
            if name in names:
                raise
            click.echo(f"Not measured: {error}")
    for path, text in _pages().items():
        if path.read_text(encoding="utf-8") != text:
            with atomic_write(path, "w") as file:
                file.write(text)
            click.echo(f"Filled in: {path.relative_to(REPOSITORY)}")
    for name in RESULTS:
        if changed := stale(name):
            click.echo(f"{name} is out of date ({changed}), and its page says so.")


def check() -> list[str]:
    """Return what is wrong, a sentence each: a quick result that comes out otherwise, and a page that shows something else.

    A result that is out of date is right if its page says so.
    """
    wrong = []
    for name, result in RESULTS.items():
        if result.quick and _differs(result.measure(), _tables(name)):
            wrong.append(f"{name} comes out otherwise than what is kept. Run: taco-nb results {name}")
    for path, text in _pages().items():
        if path.read_text(encoding="utf-8") != text:
            wrong.append(
                f"{path.relative_to(REPOSITORY)} does not show what is kept, or not that it is out of date. Run: taco-nb "
                "results, which measures anew; or taco-nb results codecs, which takes seconds and marks the others."
            )
    return wrong


def _differs(measured: Mapping[str, pd.DataFrame], kept: Mapping[str, pd.DataFrame]) -> bool:
    return {name: _csv(table) for name, table in measured.items()} != {
        name: _csv(table) for name, table in kept.items()
    }
