"""The bundled sample keeps every promise that its README makes."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
IMAGES = sorted((SAMPLE / "images").iterdir())
NAMES = {path.name for path in IMAGES}


def read(name):
    return json.loads((SAMPLE / name).read_text(encoding="utf-8"))


SPLITS = {split: read(f"annotations/captions_{split}.json") for split in ("train", "val")}
CONTEXT = read("captions_context.json")


def png_chunks(path):
    """Chunk types of a PNG file, in order: 8 bytes of signature, then length, type, data and CRC of each chunk."""
    data, position, kinds = path.read_bytes(), 8, []
    while position < len(data):
        kinds.append(data[position + 4 : position + 8].decode("ascii"))
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return kinds


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_image_is_a_plain_rgb_png_of_the_promised_size(path):
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert all(256 <= side <= 512 for side in image.size)
        assert any(low != high for low, high in image.getextrema())
        red, green, blue = image.resize((8, 8)).split()
        assert red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes(), "a grey picture"
    assert set(png_chunks(path)) == {"IHDR", "IDAT", "IEND"}, "metadata"


def test_every_image_is_in_exactly_one_split():
    train, val = ([entry["file_name"] for entry in SPLITS[split]["images"]] for split in ("train", "val"))
    assert sorted(train + val) == sorted(NAMES)
    assert len(NAMES) >= 8 and len(val) >= 3
    assert 0.6 <= len(train) / len(NAMES) <= 0.75


def test_ids_are_unique_over_both_splits():
    for kind in ("images", "annotations"):
        ids = [entry["id"] for split in SPLITS.values() for entry in split[kind]]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_have_coco_form_and_fit_the_images(split):
    data = SPLITS[split]
    assert set(data) == {"images", "annotations"}
    for entry in data["images"]:
        assert set(entry) == {"id", "file_name", "width", "height"}
        with Image.open(SAMPLE / "images" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])
    assert all(set(entry) == {"id", "image_id", "caption"} for entry in data["annotations"])
    assert Counter(entry["image_id"] for entry in data["annotations"]) == {e["id"]: 5 for e in data["images"]}


def test_captions_are_short_and_all_different():
    captions = [entry["caption"] for split in SPLITS.values() for entry in split["annotations"]]
    assert len({caption.lower() for caption in captions}) == len(captions)
    for caption in captions:
        assert 8 <= len(caption.split()) <= 16, caption
        assert caption == caption.strip() and caption[0].isupper() and caption.endswith("."), caption


def test_every_image_has_one_paragraph_of_the_promised_length():
    assert set(CONTEXT) == NAMES
    for name, paragraph in CONTEXT.items():
        assert 90 <= len(paragraph.split()) <= 140, name
        assert "\n" not in paragraph, name


def test_readme_has_a_row_with_split_and_terms_for_every_image():
    text = (SAMPLE / "README.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells for line in text.splitlines() if len(cells := line.split("|")) == 10}
    for split, data in SPLITS.items():
        for entry in data["images"]:
            cells = rows[entry["file_name"]]
            assert cells[2].strip() == split
            assert all(cell.strip() for cell in cells[1:-1])
            assert re.search(r"CC0|CC BY 2\.0|public domain|permission", cells[6])
            assert f"{entry['width']}x{entry['height']}" in cells[8]
