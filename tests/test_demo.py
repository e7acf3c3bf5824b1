"""The bundled codecs are the ones that their cards describe, and as good; a run becomes one with a card of its own."""

import io
import json
from contextlib import redirect_stdout
from statistics import mean

import pytest
import torch
from conftest import PLAIN, TINY, command

from taco_nb import datasets, evaluate, fit, load
from taco_nb.data.images import to_tensor
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.evaluation.peers import match_bpp
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY, sha256
from taco_nb.metrics.distortion import psnr
from taco_nb.tools.bundle import bundle, standing

SHELF = REPOSITORY / "data" / "checkpoints"
NAMES = sorted(path.stem for path in SHELF.glob("*.safetensors"))


def card_of(name, shelf=SHELF):
    return json.loads((shelf / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    """A bundled codec's name, and its evaluation on the sample's validation pictures."""
    return request.param, evaluate(load(request.param), datasets("sample"))


def test_all_of_them_are_small_enough_to_travel():
    sizes = [path.stat().st_size for path in SHELF.glob("*.safetensors")]
    assert "demo" in NAMES and max(sizes) < 8e6 and sum(sizes) < 60e6
    assert sorted(path.stem for path in SHELF.glob("*.json")) == NAMES
    shelf = (SHELF / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.safetensors`" in shelf for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_of_its_file(name):
    card, about = card_of(name), load(name).about
    assert sha256(SHELF / f"{name}.safetensors") == card["sha256"]
    assert about["steps"] == card["steps"] and about["experiment"]["lmbda"] == card["lmbda"]
    assert (
        about["experiment"] == card["experiment"]
        and sum(link["steps"] for link in card["history"]) == card["steps"]
    )
    assert card["not_to_be_used_to_claim"] and card["data"] and card["hardware"]
    assert "/" not in about["experiment"]["train_data"]  # nobody's folders


def test_it_is_as_good_as_its_card_says(named):
    name, results = named
    said = card_of(name)["results"]["sample"]
    assert len(results) == said["images"]
    assert results["bpp"].mean() == pytest.approx(said["bpp"], rel=0.01)
    assert results["psnr"].mean() == pytest.approx(said["psnr"], abs=0.05)
    assert results["ms_ssim"].mean() == pytest.approx(said["ms_ssim"], abs=0.003)


def test_it_beats_jpeg_with_no_more_bytes(named):
    name, results = named
    images = [sample.image for sample in datasets("sample")[0]]
    jpegs = [
        match_bpp(image, "JPEG", size).image for image, size in zip(images, results["bytes"], strict=True)
    ]
    assert results["psnr"].mean() > mean(psnr(*map(to_tensor, pair)) for pair in zip(images, jpegs))
    assert card_of(name)["results"]["sample"]["JPEG, %"] < 0


# --- From a run to a bundled codec ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps, from random weights."""
    exp = baseline(
        "sample", **PLAIN | {"text_encoder": "untrained-16"}, sizes=TINY, init="", epochs=1, crop=64
    )
    return fit(exp, tmp_path_factory.mktemp("runs") / "tiny", device="cpu")


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """That run, bundled by the command: the shelf it lies on, and the card that the command prints."""
    shelf = tmp_path_factory.mktemp("data") / "checkpoints"
    shelf.mkdir()
    kodak = (
        shelf.parent / "kodak"
    )  # a small one, in place of the bundled 24 whole pictures, which take minutes
    kodak.mkdir()
    datasets("kodak-256")[0][0].image.save(kodak / "a.png")
    (kodak / "captions_ofa.json").write_text('{"a.png": "doors"}')
    words = ["bundle", f"first={run.dir}", "--data", "the bundled pictures", "--data-dir", shelf.parent]
    with redirect_stdout(io.StringIO()) as said:
        assert command(*words) == 0
    return shelf, json.loads(said.getvalue())["first"]


def test_a_run_becomes_a_bundled_codec_with_a_measured_card(run, first):
    shelf, card = first
    assert card == card_of("first", shelf)
    assert sorted(path.name for path in shelf.iterdir()) == ["first.json", "first.safetensors"]
    assert card["sha256"] == sha256(shelf / "first.safetensors")
    assert (card["steps"], card["data"]) == (run.total_steps, "the bundled pictures")
    assert [link["run"] for link in card["history"]] == ["tiny"]
    assert card["history"][0]["settings"]["sizes"] == card["experiment"]["sizes"]
    codec = load("first", data_dir=shelf.parent)
    assert codec.name == "first"
    results = evaluate(codec, datasets("sample"))
    assert card["results"]["sample"]["psnr"] == pytest.approx(results["psnr"].mean(), abs=1e-4)
    assert card["results"]["sample"]["bpp"] == pytest.approx(results["bpp"].mean(), abs=1e-4)
    assert set(card["results"]) == {"sample", "kodak"}
    assert (
        card["results"]["sample"]["JPEG, %"] is None
    )  # a few steps reconstruct nothing that JPEG's curve reaches
    kernels = codec.net.g_a.analysis_transform[0].weight
    assert torch.equal(kernels, kernels.half().float())


def test_what_it_started_from_is_counted_in_and_told(run, first, tmp_path):
    """A run that went on from a bundled codec, and one that went on from that run."""
    shelf, card = first
    exp = run.experiment.replace(init=str(shelf / "first.safetensors"), attention="linformer", seed=1)
    second = fit(exp, tmp_path / "second", device="cpu")
    third = fit(exp.replace(init=str(second.dir), lmbda=0.02), tmp_path / "third", device="cpu")
    made = bundle({"next": second.dir, "last": third.dir}, "pictures", tmp_path, data_dir=shelf.parent)
    assert [made[name]["steps"] / card["steps"] for name in ("next", "last")] == [2, 3]
    assert [link["run"] for link in made["last"]["history"]] == ["tiny", "second", "third"]
    assert [link["settings"]["lmbda"] for link in made["last"]["history"]] == [exp.lmbda, exp.lmbda, 0.02]
    assert made["next"]["history"] == made["last"]["history"][:2]
    assert "attention=linformer" in made["next"]["what"] and "baseline" in card["what"]
    assert str(tmp_path) not in json.dumps([made, load(tmp_path / "last.safetensors").about])


def test_an_unfinished_run_is_refused_and_nothing_written(run, tmp_path):
    stopped = fit(run.experiment, tmp_path / "stopped", device="cpu", max_hours=0)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with pytest.raises(SettingError, match="not a finished run: 1 steps"):
        bundle({"fine": run.dir, "mine": stopped.dir}, "pictures", shelf)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        bundle({"mine": tmp_path / "nowhere"}, "pictures", shelf)
    assert not list(shelf.iterdir())


def test_the_command_says_what_is_no_run(tmp_path, capsys):
    assert command("bundle", "mine", "--data", "pictures", "--data-dir", tmp_path) == 1
    assert "Error: 'mine' is not NAME=RUN" in capsys.readouterr().err
    assert command("bundle", f"mine={tmp_path}") == 2
    assert "Say by --data what the runs were trained on" in capsys.readouterr().err


# --- What a run starts from -------------------------------------------------------------------------------------------


def test_the_samples_training_leaves_unseen_pictures_better_off(tmp_path):
    """It starts before the learning rate has fallen, so the few steps in which it falls show on pictures of others."""
    run = fit(baseline("sample"), tmp_path / "run", device="cpu")
    before, after = (evaluate(codec, datasets("kodak-256")) for codec in (load("demo-trunk"), load(run.dir)))
    assert after["psnr"].mean() > before["psnr"].mean() and after["bpp"].mean() < before["bpp"].mean()
    assert after["mini_distance"].mean() < 1.05 * before["mini_distance"].mean()


def test_where_a_codec_stands_is_read_off_the_curves_of_the_others():
    sets = [dataset.head(1) for dataset in datasets("sample")]
    table, gaps = standing([load("demo")], sets)
    (row,) = table.to_dict("records")
    assert row["codec"] == "demo" and row["images"] == 1 and -100 < row["JPEG, %"] < 100
    assert gaps["BD-rate (PSNR), %"].isna().all()  # one point is no curve
    assert (gaps["note"] == "only 1 point").all() and (gaps["points of the peer"] > 4).all()


def test_a_bd_rate_through_few_points_says_so():
    sets = [dataset.head(1) for dataset in datasets("sample")]
    _, gaps = standing([load(name) for name in ("demo-low", "demo", "demo-high", "demo-linformer")], sets)
    assert gaps["BD-rate (PSNR), %"].notna().any() and set(gaps["note"]) == {"only 3 points"}
    assert set(gaps["points"]) == {3}, "an ablation is no point of the baselines' curve"


def test_with_a_damaged_kodak_the_command_says_so_in_a_sentence(tmp_path, capsys):
    (tmp_path / "kodak").mkdir()
    assert command("bundle", "--data-dir", tmp_path) == 1
    assert "Error: The data set kodak cannot be read" in capsys.readouterr().err
