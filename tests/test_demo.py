"""The bundled codecs are the ones that their cards describe, and as good; a run becomes one with a card of its own."""

import json

import pytest
import torch
from conftest import TINY

from taco_nb import datasets, evaluate, fit, load
from taco_nb.demo import bundle, main, standing
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.evaluation import evaluate_matched
from taco_nb.experiment import baseline
from taco_nb.files import REPOSITORY, sha256

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
    assert "demo" in NAMES and max(sizes) < 8e6 and sum(sizes) < 45e6
    assert sorted(path.stem for path in SHELF.glob("*.json")) == NAMES
    shelf = (SHELF / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.safetensors`" in shelf for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_of_its_file(name):
    card, about = card_of(name), load(name).about
    assert sha256(SHELF / f"{name}.safetensors") == card["sha256"]
    assert about["steps"] == card["steps"] and about["experiment"]["lmbda"] == card["lmbda"]
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
    matched = evaluate_matched(results, datasets("sample"))
    jpeg = matched[matched["codec"] == "JPEG"]
    assert results["psnr"].mean() > jpeg["psnr"].mean()
    assert card_of(name)["results"]["sample"]["JPEG, %"] < 0


# --- From a run to a bundled codec ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps, from random weights."""
    exp = baseline("sample", sizes=TINY, text_encoder="untrained-16", init="", epochs=1, crop=64)
    return fit(exp, tmp_path_factory.mktemp("runs") / "tiny", device="cpu")


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """That run, bundled: the shelf it lies on, and its card."""
    shelf = tmp_path_factory.mktemp("shelf")
    return shelf, bundle(run.dir, "first", "the bundled pictures", shelf)


def test_a_run_becomes_a_bundled_codec_with_a_measured_card(run, first):
    shelf, card = first
    assert card == card_of("first", shelf)
    assert sorted(path.name for path in shelf.iterdir()) == ["first.json", "first.safetensors"]
    assert card["sha256"] == sha256(shelf / "first.safetensors")
    assert (card["steps"], card["data"], card["started_from"]) == (run.total_steps, "the bundled pictures", None)
    codec = load(shelf / "first.safetensors")
    results = evaluate(codec, datasets("sample"))
    assert card["results"]["sample"]["psnr"] == pytest.approx(results["psnr"].mean(), abs=1e-4)
    assert card["results"]["sample"]["bpp"] == pytest.approx(results["bpp"].mean(), abs=1e-4)
    assert card["results"]["sample"]["JPEG, %"] is None  # a few steps reconstruct nothing that JPEG's curve reaches
    kernels = codec.net.g_a.analysis_transform[0].weight
    assert torch.equal(kernels, kernels.half().float())


def test_steps_and_hours_of_what_it_started_from_are_counted_in(run, first, tmp_path):
    shelf, card = first
    exp = run.experiment.replace(init=str(shelf / "first.safetensors"), attention="linformer", seed=1)
    after = bundle(fit(exp, tmp_path / "second", device="cpu").dir, "next", "pictures", tmp_path)
    assert after["steps"] == 2 * card["steps"] and after["started_from"]["sha256"] == card["sha256"]
    assert "attention=linformer" in after["what"] and "baseline" in card["what"]


def test_an_unfinished_run_is_refused_and_nothing_written(run, tmp_path):
    stopped = fit(run.experiment, tmp_path / "stopped", device="cpu", max_hours=0)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with pytest.raises(SettingError, match="not a finished run: 1 steps"):
        bundle(stopped.dir, "mine", "pictures", shelf)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        bundle(tmp_path / "nowhere", "mine", "pictures", shelf)
    assert not list(shelf.iterdir())


def test_where_a_codec_stands_is_read_off_the_curves_of_the_others():
    sets = [dataset.head(1) for dataset in datasets("sample")]
    table, gaps = standing([load("demo")], sets)
    (row,) = table.to_dict("records")
    assert row["codec"] == "demo" and row["images"] == 1 and -100 < row["JPEG, %"] < 100
    assert gaps["BD-rate (PSNR), %"].isna().all()  # one point is no curve


def test_without_kodak_the_command_says_so_in_a_sentence(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path)]) == 1
    assert "DataError: The data set kodak cannot be read" in capsys.readouterr().err
