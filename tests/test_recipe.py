"""A recipe makes codecs from nothing: it gathers the pictures, trains run after run, and goes on after a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from PIL import Image

from taco_nb.checkpoint import WEIGHTS
from taco_nb.data import training_pairs
from taco_nb.errors import CheckpointError, DataError, SettingError, StoppedError
from taco_nb.files import REPOSITORY
from taco_nb.tools.recipe import follow, gather, read_recipe
from taco_nb.training import loop

RECIPE = """
about = "four grey squares"

[[pictures.grey]]
folder = "grey"
captions = "grey.json"
context = "joined"

[settings]
profile = "sample"
text_encoder = "untrained-16"
train_data = "grey"
crop = 64
epochs = 1
batch_size = 4
k_P = 0.0
k_J = 0.0
sizes = {N = 16, M = 24, groups = [8, 16], text_dim = 16, heads = 2, context_widths = [16, 16]}

[runs.trunk]
schedule = "constant"
bundled = false

[runs.demo-a]
init = "trunk"
schedule = "cosine"
seeds = [11, 12]

[runs.demo-b]
like = "demo-a"
captions = "context"
seeds = [11]
"""


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "grey").mkdir()
    said = {}
    for level in (10, 90, 160, 220):
        Image.new("RGB", (80, 72), (level, level, level)).save(tmp_path / "grey" / f"{level}.png")
        said[f"{level}.png"] = [f"Grey level {level}.", "A grey square."]
    (tmp_path / "grey.json").write_text(json.dumps(said))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_runs_inherit_settings_and_have_a_name_per_seed(root):
    recipe = read_recipe(root / "recipe.toml")
    assert [*recipe["runs"]] == ["trunk", "demo-a", "demo-a-seed12", "demo-b"]
    assert recipe["bundled"] == ["demo-a", "demo-b"]
    seeds = [settings["seed"] for settings in recipe["runs"].values()]
    assert seeds == [100, 11, 12, 11]
    a, b = recipe["runs"]["demo-a"], recipe["runs"]["demo-b"]
    assert a["schedule"] == b["schedule"] == "cosine" and (a | {"captions": "context"}) == b


def test_a_run_is_also_like_what_its_model_is_like(root):
    (root / "recipe.toml").write_text(RECIPE + '\n[runs.demo-c]\nlike = "demo-b"\nlmbda = 0.5\n')
    runs = read_recipe(root / "recipe.toml")["runs"]
    assert runs["demo-c"] == runs["demo-b"] | {"lmbda": 0.5} and runs["demo-c"]["init"] == "trunk"


def test_pictures_are_gathered_with_their_captions_and_without_those_that_stay_out(root):
    (root / "others.txt").write_text("160.png\n")
    part = {
        "folder": "grey",
        "captions": "grey.json",
        "context": "joined",
        "skip_every": 4,
        "without": "others.txt",
    }
    gather([part], root / "out", root)
    pairs = training_pairs(root / "out", 64)
    assert sorted(pairs.dataset.names) == ["220.png", "90.png"]
    assert pairs.dataset.captions(0) == ("Grey level 220.", "A grey square.")
    paragraphs = training_pairs(root / "out", 64, captions="context").dataset
    assert paragraphs.captions(0) == ("Grey level 220. A grey square.",)
    with pytest.raises(DataError, match="Two parts have a picture that is called"):
        gather([part, part], root / "again", root)
    assert not (root / "again").exists()


def test_a_recipe_is_followed_and_goes_on_where_it_was(root, tmp_path):
    out = root / "runs"
    follow(root / "recipe.toml", out, root, only=["trunk"])
    weights = out / "trunk" / WEIGHTS
    before = weights.stat().st_mtime_ns
    folders = follow(root / "recipe.toml", out, root)
    assert folders == {name: out / name for name in ("trunk", "demo-a", "demo-a-seed12", "demo-b")}
    assert read_recipe(root / "recipe.toml")["bundled"] == ["demo-a", "demo-b"]
    assert weights.stat().st_mtime_ns == before, "a finished run is not repeated"


def test_a_stop_ends_the_whole_recipe_and_not_one_run(root, tmp_path, monkeypatch):
    step = loop.Trainer.train_step

    def asked_to_stop(trainer, *batch):
        step(trainer, *batch)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "train_step", asked_to_stop)
        with pytest.raises(StoppedError, match="trunk was asked to stop. The same command goes on"):
            follow(root / "recipe.toml", root / "runs", root)
    assert [path.name for path in (root / "runs").iterdir() if path.name != "pictures"] == ["trunk"]
    assert follow(root / "recipe.toml", root / "runs", root, only=["trunk"])


def test_what_cannot_be_followed_is_said(root, tmp_path):
    with pytest.raises(SettingError, match="has no run 'trunc'. Did you mean 'trunk'"):
        follow(root / "recipe.toml", root / "runs", root, only=["trunc"])
    with pytest.raises(CheckpointError):
        follow(root / "recipe.toml", root / "runs", root, only=["demo-a"])
    circle = RECIPE.replace("[runs.demo-a]", '[runs.demo-a]\nlike = "demo-b"')
    for text in (circle, "about = 1", "no toml", RECIPE.replace("[settings]", "[setings]")):
        (root / "wrong.toml").write_text(text)
        with pytest.raises(SettingError, match="is no recipe"):
            read_recipe(root / "wrong.toml")


@pytest.mark.parametrize("shelf", ["checkpoints", "shapes"])
def test_the_bundled_recipes_can_be_read_and_their_experiments_made(shelf):
    from taco_nb.experiment import Experiment

    recipe = read_recipe(REPOSITORY / "data" / shelf / "recipe.toml")
    for settings in recipe["runs"].values():
        assert settings["train_data"] in recipe.get("pictures", ["shapes"])
        Experiment().replace(**settings)
