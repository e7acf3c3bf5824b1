"""The bundled codec is the one that its card describes, and as good."""

import json

import pytest

from taco_nb import datasets, evaluate, load
from taco_nb.evaluation import evaluate_matched
from taco_nb.files import REPOSITORY, sha256

SHELF = REPOSITORY / "data" / "checkpoints"
CARD = json.loads((SHELF / "demo.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    return evaluate(load("demo"), datasets("sample"))


def test_the_card_is_of_this_file():
    path = SHELF / "demo.safetensors"
    assert sha256(path) == CARD["sha256"] and path.stat().st_size < 8e6
    about = load("demo").about
    assert about["steps"] == CARD["steps"]
    assert about["experiment"]["lmbda"] == CARD["lmbda"]
    assert "demo.safetensors" in (SHELF / "README.md").read_text(encoding="utf-8")


def test_it_is_as_good_as_its_card_says(results):
    said = CARD["results"]["sample"]
    assert len(results) == said["images"]
    assert results["bpp"].mean() == pytest.approx(said["bpp"], rel=0.01)
    assert results["psnr"].mean() == pytest.approx(said["psnr"], abs=0.05)
    assert results["ms_ssim"].mean() == pytest.approx(said["ms_ssim"], abs=0.003)


def test_it_stands_beside_jpeg_as_its_card_says(results):
    matched = evaluate_matched(results, datasets("sample"))
    jpeg = matched[matched["codec"] == "JPEG"]
    said = CARD["results"]["sample"]["jpeg_psnr_at_no_more_bytes"]
    assert jpeg["psnr"].mean() == pytest.approx(said, abs=0.1)
