"""Widgets that need a kernel, driven from Python: what they show is what the codec made, and errors are sentences."""

from __future__ import annotations

import base64
import html
import io
import re
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PLAIN, make_codec, make_lpips
from PIL import Image
from test_compare import Page, pixels

from taco_nb import baseline, datasets, fit, load
from taco_nb.data.images import to_tensor
from taco_nb.data.shapes import PLACES, scene, short_caption
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.evaluation import evaluate, evaluate_peers
from taco_nb.evaluation.peers import encode_peer
from taco_nb.inspection import look_at_attention
from taco_nb.metrics.distortion import psnr
from taco_nb.metrics.networks import perceptual_distance
from taco_nb.training import Run
from taco_nb.widgets import (
    caption_lab,
    caption_presets,
    explorer,
    pick_the_word,
    training_monitor,
    upload_box,
)

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def codec():
    return make_codec(5)


@pytest.fixture(scope="module")
def sample():
    return datasets("sample")[0]


@pytest.fixture(scope="module")
def image(sample):
    return sample[0].image.crop((100, 60, 292, 252))


# --- The shapes -------------------------------------------------------------------------------------------------------


def test_the_word_that_is_picked_is_what_the_codec_reads():
    picker = pick_the_word(load("shapes-softmax"), seed=3)
    seen = [picker.picture.value]
    assert picker.text.value == short_caption([scene(3, False).names[0]])
    picker.shape.value = PLACES[2]
    assert picker.text.value == short_caption([scene(3, False).names[2]])
    picker.crossed.value = True
    assert picker.text.value == short_caption([scene(3, True).names[2]])
    picker.seed.value = 4
    picker.text.value = "look at everything"
    for shown in (picker.picture.value, picker._repr_mimebundle_()["text/html"]):
        assert shown.startswith("<img")
        seen.append(shown)
    assert len(set(seen)) == 3


# --- Caption lab ------------------------------------------------------------------------------------------------------


def test_presets_are_those_that_there_are(sample):
    presets = caption_presets(sample, 0)
    published = sample.captions(0)
    assert list(presets) == ["human", "another human", "context", "empty", "of another image", "nonsense"]
    assert (presets["human"], presets["another human"]) == published[:2] and presets["empty"] == ""
    assert presets["of another image"] == sample.captions(1)[0] not in published
    assert presets["context"] == datasets("sample", captions="context")[0].captions(0)[0]
    assert list(caption_presets(sample.head(1), 0)) == [
        "human",
        "another human",
        "context",
        "empty",
        "nonsense",
    ]


def test_kodak_has_the_captions_that_taco_published(shared, tmp_path):
    (tmp_path / "kodak").symlink_to(shared / "kodak")
    (kodak,) = datasets("kodak", data_dir=tmp_path)
    presets = caption_presets(kodak, 3, tmp_path)
    assert presets["OFA"] == kodak.captions(3)[0] and "human" not in presets


def row(table: str, name: str) -> list[str]:
    """The cells of a row of the caption lab's table."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr.*?</tr>", table)]
    return next(cells for cells in rows if cells and cells[0] == name)


def test_an_edited_caption_is_encoded_and_compared_with_the_first(codec, image):
    lab = caption_lab(codec, image, {"human": "a cat", "empty": ""})
    files = {caption: codec.encode(image, caption) for caption in ("a cat", "", "two dogs")}
    assert files["a cat"] != files["two dogs"], "this codec listens"
    lab.text.value = "two dogs"
    cells = row(lab.table.value, "your own, 1")
    difference = len(files["two dogs"]) - len(files["a cat"])
    assert cells[1:3] == ["two dogs", f"{len(files['two dogs']):,}"] and cells[5] == f"{difference:+d}"
    x = to_tensor(image)
    decoded = {caption: codec.decode(file) for caption, file in files.items()}
    assert cells[4] == f"{psnr(x, to_tensor(decoded['two dogs'])):.3f}"
    original, first, now = Page(lab.view.figures).figures
    for figure, picture in ((original, image), (first, decoded["a cat"]), (now, decoded["two dogs"])):
        assert pixels(figure).tobytes() == picture.tobytes()
    assert lab.view.start == {"left": 1, "right": 2} and lab.said.value == ""
    lab.buttons[1].click()
    assert (
        lab.text.value == "" and pixels(Page(lab.view.figures).figures[2]).tobytes() == decoded[""].tobytes()
    )
    assert lab.table.value.count("<tr") == 4, "what has been tried stays, and is not tried twice"


def test_nothing_is_measured_or_loaded_twice(codec, image, monkeypatch, tmp_path):
    import sys

    from taco_nb.metrics import networks

    compare = sys.modules["taco_nb.widgets.compare"]  # the module, whose name the function has taken
    measured, loaded, lpips = [], [], make_lpips()
    measure = compare.distortion
    monkeypatch.setattr(compare, "distortion", lambda x, x_hat: measured.append(x_hat) or measure(x, x_hat))
    there = networks.METRICS["lpips"]._replace(  # as if AlexNet were there
        pretrained=SimpleNamespace(path=tmp_path), load=lambda device: loaded.append(1) or lpips
    )
    monkeypatch.setitem(networks.METRICS, "lpips", there)
    perceptual_distance.cache_clear()
    lab = caption_lab(codec, image, {"human": "a cat", "empty": ""})
    for caption, count in (("two dogs", 3), ("", 3), ("two dogs", 3), ("three", 4)):
        lab.text.value = caption
        assert len(measured) == count and "LPIPS" in lab.view.figures
    assert len(loaded) == 1
    perceptual_distance.cache_clear()


def test_without_a_kernel_the_presets_are_pictures(codec, image):
    lab = caption_lab(codec, image, {"human": "a <b>cat</b>", "nonsense": "qwzx"})
    bundle = lab._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == lab.model_id
    assert [figure["data-label"] for figure in Page(bundle["text/html"]).figures] == [
        "original",
        "human",
        "nonsense",
    ]
    assert row(bundle["text/html"], "human")[1] == "a &lt;b&gt;cat&lt;/b&gt;"
    with pytest.raises(SettingError, match="at least one caption"):
        caption_lab(codec, image, {})


# --- Upload -----------------------------------------------------------------------------------------------------------


def uploaded(name: str, content: bytes) -> tuple:
    return ({"name": name, "type": "image/png", "size": len(content), "content": memoryview(content),
             "last_modified": pd.Timestamp(0).to_pydatetime()},)  # fmt: skip


def test_a_picture_of_ones_own_becomes_a_file_to_keep(codec, image):
    box, file = upload_box(codec), io.BytesIO()
    image.save(file, "PNG")
    box.upload.value = uploaded('my "cat".png', file.getvalue())
    box.caption.value = "a cat"
    box.button.click()
    name, data = re.search(
        r'download="([^"]+)" href="data:application/octet-stream;base64,([^"]+)"', box.link.value
    ).groups()
    assert name == "my &quot;cat&quot;.taco"
    kept = base64.b64decode(data)
    assert kept == codec.encode(image, "a cat")
    shown = Page(box.view.figures).figures
    assert pixels(shown[0]).tobytes() == image.tobytes()
    assert pixels(shown[1]).tobytes() == codec.decode(kept).tobytes()
    said = html.unescape(box.said.value)
    assert said.startswith('my "cat".png: ') and f"{len(kept):,}" in said and "192 x 192" in said


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("notes.txt", b"no picture", r"^notes\.txt cannot be read as an image"),
        ("half.png", b"\x89PNG\r\n\x1a\n", r"^half\.png cannot be read"),
        ("../../x<y>.png", b"", r"^x&lt;y&gt;\.png cannot be read"),
        (f"{'long' * 99}.png", b"", r"^(long){99}\.png cannot be read"),
    ],
)
def test_what_is_no_picture_is_said_in_words(codec, name, content, said):
    box = upload_box(codec)
    box.upload.value = uploaded(name, content)
    box.button.click()
    assert re.search(said, box.said.value) and box.link.value == box.view.figures == ""


def test_a_failure_that_nobody_foresaw_does_not_look_like_work(image, monkeypatch, caplog):
    broken, file = make_codec(5), io.BytesIO()
    image.save(file, "PNG")
    monkeypatch.setattr(broken, "conditioning", lambda captions: 1 / 0)
    box = upload_box(broken)
    box.upload.value = uploaded("cat.png", file.getvalue())
    box.button.click()
    assert "Jupyter's log" in box.said.value and box.link.value == box.view.figures == ""
    assert "ZeroDivisionError" in caplog.text


def test_nothing_chosen_and_no_kernel(codec):
    box = upload_box(codec)
    box.button.click()
    assert box.said.value == "Choose a picture first."
    assert "JupyterLab" in box._repr_mimebundle_()["text/html"]


# --- Explorer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explored(codec, sample):
    sets = [sample.centre_crop(128).head(2)]
    curves = evaluate_peers(sets, qualities=(20, 60), peers=["JPEG"])
    return explorer(curves, evaluate(codec, sets), sets=sets, codecs={codec.name: codec}), sets[0]


def click(widget, customdata: list) -> None:
    """What the browser reports when a point is clicked."""
    assert customdata in [list(data) for trace in widget.figure.data for data in trace.customdata or ()]
    widget.clicks.point = [*customdata, time.time()]


def test_a_click_opens_the_image_as_it_was_measured(explored, codec):
    widget, dataset = explored
    name, image = dataset.names[1], dataset[1].image
    click(widget, ["JPEG", "sample", name, 60])
    original, jpeg, ours = Page(widget.view.figures).figures
    assert pixels(original).tobytes() == image.tobytes()
    assert pixels(jpeg).tobytes() == encode_peer(image, "JPEG", 60).image.tobytes()
    assert jpeg["data-label"] == "JPEG, quality 60" and ours["data-label"] == codec.name
    file = codec.encode(image, dataset[1].captions[0])
    assert pixels(ours).tobytes() == codec.decode(file).tobytes() and f"{len(file):,} bytes" in ours["text"]
    assert widget.said.value.startswith(name)
    click(widget, [codec.name, "sample", dataset.names[0], None])
    assert [figure["data-label"] for figure in Page(widget.view.figures).figures] == ["original", codec.name]


def test_a_codec_that_was_evaluated_twice_is_shown_once(codec, sample):
    images = sample.centre_crop(128).head(1)
    results = evaluate(codec, [images])
    widget = explorer(results, results, sets=[images], codecs={codec.name: codec})
    shown = Page(widget.compare_at(codec.name, "sample", images.names[0]).figures()).figures
    file = codec.encode(images[0].image, images[0].captions[0])
    assert [figure["data-label"] for figure in shown] == ["original", codec.name]
    assert pixels(shown[1]).tobytes() == codec.decode(file).tobytes()


def test_the_figure_is_an_output_of_its_own(explored, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    explored[0]._ipython_display_()
    figure, below = shown
    assert len(figure.data) == 4 and figure.layout.meta["key"] == explored[0].clicks.key
    assert explored[0].view in below.children and explored[0].clicks in below.children


# --- Where the text looks ---------------------------------------------------------------------------------------------


def test_every_token_has_its_map_over_the_picture(codec, image):
    import json

    from taco_nb.widgets import where_the_text_looks
    from taco_nb.widgets.html_parts import picture_url

    records = look_at_attention(codec, image, "a cat")
    page = where_the_text_looks(image, {"softmax": records}, codec.tower, "a cat")._repr_html_()

    def content(name: str) -> list[dict]:
        return [json.loads(html.unescape(found)) for found in re.findall(rf'data-{name}="([^"]*)"', page)]

    (settings,) = content("tokens")
    assert settings["tokens"] == ["start", "a", "cat", "end"] and settings["weights"] is None
    maps = content("map")
    assert [m["layer"] for m in maps] == [record.name for record in records]
    for about, record in zip(maps, records):
        assert (about["rows"], about["columns"]) == record.grid  # 192 pixels need no padding
        assert about["width"] == about["height"] == 100
        field = record.over_image(2)
        assert about["ranges"][2] == pytest.approx([float(field.min()), float(field.max())])
    sprite = re.findall(r'src="([^"]+)"', page)[1]
    grey = np.asarray(pixels({"src": sprite}))[..., 0].reshape(4, *records[0].grid)
    field = records[0].over_image(2)
    assert np.abs(grey[2] / 255 - ((field - field.min()) / (field.max() - field.min())).numpy()).max() < 0.003
    assert picture_url(image) in page


def test_tokens_are_shaded_by_their_weights_and_a_pooled_text_has_one_map(codec, image):
    from taco_nb.text import KeywordWeights
    from taco_nb.text.keywords import pool
    from taco_nb.widgets import where_the_text_looks

    weights = KeywordWeights.fit(["a cat sleeps", "a dog"], "tfidf")
    look = where_the_text_looks(
        image, {"x": look_at_attention(codec, image, "a cat")}, codec.tower, "a cat", weights
    )
    assert look._weights == pytest.approx(weights.token_weights(["a cat"], codec.tower)[0, :4].tolist())
    pooled = make_codec(5)
    pooled.conditioning = lambda captions: (
        pool(codec.tower(captions), weights.token_weights(captions, codec.tower), "keywords"),
        None,
    )
    records = look_at_attention(pooled, image, "a cat")
    assert records[0].weights.shape[2] == 1
    page = where_the_text_looks(image, {"pooled": records}, codec.tower, "a cat")._repr_html_()
    assert page.count("[1.0, 1.0]") == 8, "four tokens in two Injectors"
    assert isinstance(look.picture(), Image.Image)


def test_the_map_over_the_picture_has_the_colours_of_the_scale(codec):
    from taco_nb.widgets import attention_maps
    from taco_nb.widgets.pictures import COLD, HOT, heat

    white = Image.new("RGB", (128, 64), "white")
    record = look_at_attention(codec, white, "a cat")[0]
    weights = torch.linspace(0, 1, 16 * 32).reshape(1, -1, 1).expand(1, -1, record.weights.shape[2])
    sheet = attention_maps(white, record._replace(weights=weights), {"cat": 1}, width=128)
    seen = np.asarray(sheet)[:64, :128].reshape(-1, 3)
    scale = {tuple(colour) for colour in np.asarray(heat(torch.arange(256)[None] / 255))[0]}
    assert {tuple(colour) for colour in seen} <= scale
    assert tuple(seen[0]) == tuple(COLD) and tuple(seen[-1]) == tuple(HOT)


# --- Training monitor -------------------------------------------------------------------------------------------------

SIZES = {"N": 16, "M": 24, "groups": (4, 4, 4, 4, 8), "text_dim": 64, "heads": 8, "context_widths": (16, 16)}


@pytest.fixture
def outputs(monkeypatch) -> list[list[dict]]:
    """What `IPython.display.display` was given: for each output of the cell, its successive states."""
    import IPython.display

    shown: list[list[dict]] = []

    def display(bundle, raw, display_id):
        states = [bundle]
        shown.append(states)
        return SimpleNamespace(update=lambda bundle, raw: states.append(bundle))

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_a_monitored_run_is_the_run_and_ends_with_its_own_picture(sample, tmp_path, outputs):
    exp = baseline("sample", init="", sizes=SIZES, crop=64, epochs=1, batch_size=6, **PLAIN)
    image, caption = sample[0].image, "a cat"
    monitor = training_monitor(image, caption)
    watched = fit(exp, tmp_path / "watched", device="cpu", on_log=monitor)
    alone = fit(exp, tmp_path / "alone", device="cpu")
    assert all(
        torch.equal(w, v) for w, v in zip(*(run.codec.net.state_dict().values() for run in (watched, alone)))
    )
    curves, pictures = outputs
    last = curves[-1]["application/vnd.plotly.v1+json"]
    steps = np.frombuffer(base64.b64decode(last["data"][0]["x"]["bdata"]), last["data"][0]["x"]["dtype"])
    assert list(steps) == list(watched.log["step"])
    assert last["layout"]["title"]["text"] == f"watched, step {watched.steps} of {watched.total_steps}"
    file = watched.codec.encode(monitor.image, caption)
    assert monitor.image.size == (256, 256)
    assert f"after {watched.steps} steps\n{len(file)} bytes" in pictures[-1]["text/plain"]
    sheet = np.asarray(Image.open(io.BytesIO(pictures[-1]["image/png"])))
    decoded = np.asarray(watched.codec.decode(file))
    assert any(np.array_equal(sheet[:256, x : x + 256], decoded) for x in range(sheet.shape[1] - 255))
    fit(exp, tmp_path / "watched", device="cpu", on_log=training_monitor(image, caption))
    assert len(outputs) == 4, "a finished run shows its end"
    assert outputs[3][-1]["text/plain"] == pictures[-1]["text/plain"]


def test_weights_that_cannot_code_do_not_end_a_run(sample, tmp_path, outputs):
    broken = make_codec(5)
    torch.nn.init.constant_(broken.net.g_a.analysis_transform[0].weight, torch.nan)
    run = Run(tmp_path, baseline("sample"), 1, 2)
    training_monitor(sample[0].image, "a cat")(run, [{"step": 1, "loss": 2.0}], lambda: broken)
    curves, pictures = outputs
    with pytest.raises(CheckpointError) as error:
        broken.encode(sample[0].image, "a cat")
    assert pictures[0] == {"text/plain": f"No picture after step 1: {error.value}"}
    assert "application/vnd.plotly.v1+json" in curves[0]


def test_what_is_slow_to_draw_is_drawn_less_often(outputs):
    from taco_nb.widgets.monitor import SHARE, _Display

    display, drawn = _Display(), []

    def draw():
        started = time.monotonic()
        time.sleep(0.01)
        drawn.append((started, time.monotonic()))
        return {"text/plain": str(len(drawn))}

    while len(drawn) < 4:
        display.show(draw, always=False)
        time.sleep(0.001)
    for (began, ended), (following, _) in zip(drawn, drawn[1:]):
        assert following - ended >= (ended - began) / SHARE
    display.show(draw, always=True)
    assert outputs[0][-1] == {"text/plain": "5"}
