"""Compare: what it shows is what was measured on the very files, in HTML that needs no kernel and no network."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import make_codec, make_lpips
from PIL import Image

from taco_nb import datasets, load
from taco_nb.codec import read_header
from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.errors import SettingError
from taco_nb.evaluation.peers import encode_peer
from taco_nb.inspection import bit_map
from taco_nb.metrics.distortion import ms_ssim, psnr
from taco_nb.widgets import compare
from taco_nb.widgets.compare import SHOWN
from taco_nb.widgets.html_parts import picture_url


class Page(HTMLParser):
    """Figures of a page: attributes of each figure and its picture, and the text below."""

    def __init__(self, page: str):
        super().__init__()
        self.figures: list[dict] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "figure":
            self.figures.append({"text": "", **dict(attributes)})
        elif tag == "img":
            self.figures[-1] |= dict(attributes)

    def handle_data(self, text):
        if self.figures and not text.lstrip().startswith(("//", ".taco")):
            self.figures[-1]["text"] += text


def pixels(figure: dict) -> Image.Image:
    kind, _, data = figure["src"].partition(";base64,")
    assert kind in ("data:image/webp", "data:image/png")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


@pytest.fixture(scope="module")
def sample():
    return datasets("sample")[0][0]


@pytest.fixture(scope="module")
def jpeg(sample):
    return encode_peer(sample.image, "JPEG", 20)


def test_every_pixel_and_every_number_is_that_of_the_file(sample, jpeg):
    page = Page(
        compare(sample.image, {"JPEG": (jpeg.image, jpeg.data)}, caption='a "tabby" cat')._repr_html_()
    )
    original, coded = page.figures
    assert pixels(original).tobytes() == sample.image.tobytes()
    assert pixels(coded).tobytes() == jpeg.image.tobytes()
    x, x_hat = to_tensor(sample.image), to_tensor(jpeg.image)
    area = sample.image.width * sample.image.height
    for said in (
        f"{len(jpeg.data):,} bytes",
        f"{8 * len(jpeg.data) / area:.3f} bpp",
        f"PSNR {psnr(x, x_hat):.2f} dB",
        f"MS-SSIM {ms_ssim(x, x_hat):.4f}",
    ):
        assert said in coded["text"] and said in coded["alt"]
    assert original["alt"] == 'The original: a "tabby" cat' and coded["data-label"] == "JPEG"


def test_lpips_is_shown_where_it_is_given_and_ms_ssim_where_it_is_defined(jpeg, sample):
    lpips = make_lpips()
    lpips.distance = lambda x_hat, x, convention: torch.tensor([0.125 if convention == "pm1" else 0.5])
    page = compare(sample.image, {"JPEG": (jpeg.image, jpeg.data)}, distance=lpips).figures()
    assert "LPIPS 0.1250" in page
    small = encode_peer(sample.image.crop((0, 0, 64, 64)), "JPEG", 20)
    page = compare(
        sample.image.crop((0, 0, 64, 64)), {"JPEG": (small.image, small.data)}, distance=lpips
    ).figures()
    assert "PSNR" in page and "MS-SSIM" not in page


def test_a_reconstruction_of_another_size_is_refused(sample, jpeg):
    with pytest.raises(SettingError, match="'JPEG' is .*, but the original"):
        compare(sample.image.crop((0, 0, 64, 64)), {"JPEG": (jpeg.image, jpeg.data)})


def test_markup_in_labels_and_captions_is_text(sample):
    nasty = '"><script>alert(1)</script>'
    page = Page(compare(sample.image, {nasty: (sample.image, b"x")}, caption=nasty).figures())
    assert [figure["data-label"] for figure in page.figures] == ["original", nasty]
    assert page.figures[0]["alt"].endswith(nasty) and nasty in page.figures[1]["text"]
    assert compare(sample.image, {nasty: (sample.image, b"x")}).figures().count("<script") == 0


def test_nothing_is_loaded_from_elsewhere(sample, jpeg):
    page = compare(sample.image, {"JPEG": (jpeg.image, jpeg.data)})._repr_html_()
    assert not re.search(r"(https?:)?//[\w-]+\.\w", re.sub(r'src="data:[^"]*"', "", page))


def test_it_is_also_a_plain_picture(sample, jpeg):
    sheet = compare(sample.image, {"JPEG": (jpeg.image, jpeg.data)}).picture()
    assert sheet.width > 2 * sample.image.width and sheet.height > sample.image.height
    assert np.array_equal(
        np.asarray(sheet)[: sample.image.height, : sample.image.width], np.asarray(sample.image)
    )


def test_the_original_is_what_the_codec_saw():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 4), dtype=np.uint8))
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6  # lies on its side
    noise.convert("RGB").save(file, "PNG", exif=turned)
    for original in (noise, Image.open(file)):
        seen = to_rgb(original)
        shown, coded = Page(compare(original, {"same": (seen, b"x")}).figures()).figures
        assert pixels(shown).tobytes() == seen.tobytes() and "PSNR 60.00 dB" in coded["text"]


def test_a_very_large_picture_is_measured_whole_and_shown_smaller():
    original = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, SHOWN + 452, 3), dtype=np.uint8)
    )
    coded = encode_peer(original, "JPEG", 50)
    shown = compare(original, {"JPEG": (coded.image, coded.data)}, bits=torch.rand(4, 160))
    page = Page(shown.figures())
    for figure in page.figures[:2]:
        assert "shown at 2048 x 33" in figure["text"]
        assert pixels(figure).size == (2048, 33) == (int(figure["width"]), int(figure["height"]))
    assert "2500 x 40 pixels" in page.figures[0]["text"]
    said = page.figures[1]["text"]
    assert f"PSNR {psnr(to_tensor(original), to_tensor(coded.image)):.2f} dB" in said
    assert f"{8 * len(coded.data) / (2500 * 40):.3f} bpp" in said
    assert (page.figures[2]["width"], page.figures[2]["height"]) == ("157", "3"), (
        "the blocks of the whole picture"
    )
    assert "shown at" not in compare(coded.image.crop((0, 0, SHOWN, 40)), {}).figures()


@pytest.mark.parametrize("size, kind", [((1, 16383), "webp"), ((1, 16384), "png"), ((40000, 2), "png")])
def test_a_side_may_be_longer_than_webp_has(size, kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    src = picture_url(picture)
    assert src.startswith(f"data:image/{kind};")
    assert pixels({"src": src}).tobytes() == picture.tobytes()


# --- Where the bits went ----------------------------------------------------------------------------------------------


def payload(file: bytes) -> int:
    return 8 * sum(map(len, read_header(file)[1:]))


@pytest.mark.parametrize("size", [(451, 300), (128, 64)])
def test_the_map_adds_up_to_the_file(sample, size):
    codec, image = load("demo"), sample.image.resize(size)
    bits = bit_map(codec, image, sample.captions[0])
    assert bits.shape == (-(-size[1] // 64) * 4, -(-size[0] // 64) * 4)
    there = payload(codec.encode(image, sample.captions[0]))
    assert abs(float(bits.sum()) - there) < 0.02 * there + 128, "beside what two streams need to end"
    assert float(bits.min()) > 0


def test_the_map_follows_the_picture():
    codec = make_codec(3)
    noise = torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0))
    noise[..., 64:] = 0.5  # the right half is flat
    bits = bit_map(load("demo"), noise, "")
    assert float(bits[:, :3].mean()) > 4 * float(bits[:, 5:].mean())
    assert not torch.equal(bit_map(codec, noise, "a cat"), bit_map(codec, noise, "two dogs in the rain"))


def test_the_map_lies_over_its_blocks(sample, jpeg):
    bits = torch.zeros(20, 32)
    bits[2, 5], bits[19, 31] = 70, 1000  # the last is padding, and not shown
    page = Page(compare(sample.image, {"JPEG": (jpeg.image, jpeg.data)}, bits=bits).figures())
    figure = page.figures[-1]
    assert "data-bits" in figure and "0 to 70 bits per 16 x 16 pixels" in figure["text"]
    assert (figure["width"], figure["height"]) == ("29", "19")
    assert float(figure["data-width"]) == pytest.approx(100 * 29 * 16 / 451, abs=0.01)
    assert float(figure["data-height"]) == pytest.approx(100 * 19 * 16 / 300, abs=0.01)
    bright = np.asarray(pixels(figure)).sum(-1)
    assert np.unravel_index(bright.argmax(), bright.shape) == (2, 5)
