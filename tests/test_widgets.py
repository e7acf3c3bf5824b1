"""Widgets: what they show is what they were given, and none of them needs a kernel or a network."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from browser import CHROMIUM
from conftest import make_net
from PIL import Image

from taco_nb.errors import SettingError
from taco_nb.evaluation import means
from taco_nb.widgets import encoder_diagram, rate_distortion, side_by_side, sortable, training_curves
from taco_nb.widgets.figures import IMAGES

# --- Pictures beside each other ---------------------------------------------------------------------------------------


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise, darker than white everywhere, so that it is found in one place only."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 250, (height, width, 3), dtype=np.uint8))


def place(sheet: Image.Image, picture: Image.Image) -> tuple[int, int]:
    """The one place (left, top) where all pixels of `picture` stand in `sheet`."""
    whole, part = np.asarray(sheet), np.asarray(picture)
    height, width = part.shape[:2]
    starts = np.argwhere((whole[: -height + 1 or None, : -width + 1 or None] == part[0, 0]).all(axis=-1))
    places = [(x, y) for y, x in starts if (whole[y : y + height, x : x + width] == part).all()]
    assert len(places) == 1
    return int(places[0][0]), int(places[0][1])


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of the box are not white."""
    return int((np.asarray(sheet.crop(box)) < 250).any(axis=-1).sum())


def test_every_pixel_is_at_its_place():
    pictures = {f"picture {i}": noise(60, 40, i) for i in range(5)}
    sheet = side_by_side(pictures, columns=3)
    places = [place(sheet, picture) for picture in pictures.values()]
    lefts, tops = sorted({x for x, _ in places}), sorted({y for _, y in places})
    assert places == [(x, y) for y in tops for x in lefts][:5]
    assert len(lefts) == 3 and len(tops) == 2
    assert np.all(np.diff(lefts) >= 60) and np.all(np.diff(tops) >= 40)


def test_fewer_pictures_than_columns_leave_no_empty_ones():
    one, three = (side_by_side({str(i): noise(60, 40, i) for i in range(n)}, columns=4) for n in (1, 3))
    assert one.width == 60
    assert 3 * 60 <= three.width < 4 * 60


def test_pictures_of_several_sizes_and_modes():
    wide, grey = noise(90, 30, 1), noise(20, 50, 2).convert("L")
    sheet = side_by_side({"wide": wide, "grey": grey})
    assert place(sheet, wide)[1] == place(sheet, grey.convert("RGB"))[1]


def test_crop_and_zoom_enlarge_single_pixels():
    pictures = {str(i): noise(60, 40, i) for i in range(2)}
    sheet = side_by_side(pictures, crop=(10, 5, 22, 14), zoom=3)
    for picture in pictures.values():
        pixels = np.asarray(picture)[5:14, 10:22]
        place(sheet, Image.fromarray(np.kron(pixels, np.ones((3, 3, 1), np.uint8))))
    assert all(picture.size == (60, 40) for picture in pictures.values())


def test_every_label_is_drawn_below_its_own_picture():
    pictures = {
        "first label\nof two lines": noise(120, 40, 0),
        "": noise(120, 40, 1),
        "third": noise(120, 40, 2),
    }
    sheet = side_by_side(pictures)
    lefts = [place(sheet, picture)[0] for picture in pictures.values()]
    first, none, third = (ink(sheet, (left, 40, left + 120, sheet.height)) for left in lefts)
    assert first > third > none == 0
    assert sheet.height > side_by_side({"one line": noise(120, 40)}).height


def test_a_long_label_stays_below_its_own_picture():
    caption = "original\nA close up of a tabby cat with big green eyes that looks up at somebody."
    sheet = side_by_side(
        {caption: noise(120, 40, 0), "": noise(120, 40, 1), "x": noise(120, 40, 2)}, columns=2
    )
    second = place(sheet, noise(120, 40, 1))[0]
    below = place(sheet, noise(120, 40, 2))[1]
    assert ink(sheet, (0, 40, 120, below)) > 500
    assert ink(sheet, (120, 0, second, below)) == ink(sheet, (second, 40, sheet.width, below)) == 0


# --- The table --------------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The texts of a table's cells, by row, and the names of all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.rows[-1][-1] += text


TABLE = pd.DataFrame(
    {
        "name": ["b", "a", "d", "c", "e"],
        "psnr": [9.5, 30.25, math.nan, math.inf, -2.0],
        "bytes": [1000, 200, 30, 4000, 5],
        "caption": ["Zoo", "apple", "", "<b>ban&na</b>", '"quoted"'],
    }
)


def test_every_cell_shows_its_value():
    cells = Cells(sortable(TABLE, digits=2).data)
    assert cells.rows[0] == list(TABLE)
    assert cells.rows[1] == ["b", "9.50", "1000", "Zoo"]
    assert [row[1] for row in cells.rows[1:]] == ["9.50", "30.25", "–", "inf", "-2.00"]
    assert [row[3] for row in cells.rows[1:]] == list(TABLE["caption"])


def test_markup_in_cells_and_headings_is_text():
    nasty = '<script>alert("1")</script><img src=x onerror=alert(2)>\' &amp;'
    page = sortable(pd.DataFrame({nasty: [nasty]})).data
    cells = Cells(page)
    assert cells.rows == [[nasty], [nasty]]
    assert "img" not in cells.tags and cells.tags.count("script") == 1


def test_missing_values_are_dashes():
    frame = pd.DataFrame({"x": [None, math.nan, 0.0, False]}, dtype=object)
    assert [row[0] for row in Cells(sortable(frame).data).rows[1:]] == ["–", "–", "0.000", "False"]


def test_two_tables_on_a_page_do_not_share_a_name():
    ids = re.findall(r'<table id="([^"]+)"', sortable(TABLE).data + sortable(TABLE).data)
    assert len(set(ids)) == 2


@pytest.fixture(scope="module")
def sorted_orders(tmp_path_factory):
    """The first column after clicks on headings, as a browser shows it: {(heading, clicks): names}."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH to run the table's script in")
    home = tmp_path_factory.mktemp("browser")
    wanted = [(column, clicks) for column in range(len(TABLE.columns)) for clicks in (1, 2)]
    tables = "".join(sortable(TABLE).data for _ in wanted)
    clicking = """
const tables = [...document.querySelectorAll("table")];
WANTED.forEach(([column, clicks], i) => {
  for (let click = 0; click < clicks; click++) tables[i].querySelectorAll("th")[column].click();
});
document.title = JSON.stringify(tables.map(table => [...table.tBodies[0].rows].map(row => row.cells[0].textContent)));
""".replace("WANTED", json.dumps(wanted))
    page = home / "tables.html"
    page.write_text(f"<meta charset=utf-8>{tables}<script>{clicking}</script>", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=600
    )
    title = re.search(r"<title>(.*)</title>", done.stdout)
    assert title, done.stderr
    orders = map("".join, json.loads(html.unescape(title[1])))
    return {(TABLE.columns[column], clicks): order for (column, clicks), order in zip(wanted, orders)}


def test_a_table_can_be_folded_behind_words():
    table = pd.DataFrame({"a": [1.0]})
    folded = sortable(table, fold="All <figures>").data
    assert (
        folded.startswith("<details><summary>All &lt;figures&gt;</summary><table")
        and "</table></details>" in folded
    )
    assert sortable(table).data.startswith("<table")


def test_clicks_sort_and_missing_values_stay_last(sorted_orders):
    assert sorted_orders["name", 1] == "abcde"
    assert sorted_orders["name", 2] == "edcba"
    assert sorted_orders["psnr", 1] == "ebacd", "-2, 9.5, 30.25, infinity, none: as numbers, not as text"
    assert sorted_orders["psnr", 2] == "cabed"
    assert sorted_orders["bytes", 1] == "edabc"
    assert sorted_orders["bytes", 2] == "cbade"
    assert sorted_orders["caption", 1] == "ecbad", '"quoted", <b>, Zoo, apple, none'


# --- The diagram ------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "sizes, side, tokens", [({}, 64, 8), ({"N": 12, "M": 20, "groups": (8, 12), "text_dim": 24}, 128, 38)]
)
def test_the_diagram_is_that_of_the_network(sizes, side, tokens):
    net = make_net(**sizes)
    N, M, text_dim = net.config.N, net.config.M, net.config.text_dim
    root = ElementTree.fromstring(encoder_diagram(net, side=side, tokens=tokens).data)
    boxes = [rect for rect in root.iter(f"{SVG}rect") if rect.get("rx")]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    at = {2**i: f"{side // 2**i} x {side // 2**i}" for i in range(5)}
    expected = [
        ("image", f"3 x {at[1]}"),
        ("conv", f"{N} x {at[2]}"),
        ("3 x residual", f"{N} x {at[2]}"),
        ("conv", f"{N} x {at[4]}"),
        ("3 x residual", f"{N} x {at[4]}"),
        ("Injector", f"{N} x {at[4]}"),
        ("attention", f"{N} x {at[4]}"),
        ("conv", f"{N} x {at[8]}"),
        ("3 x residual", f"{N} x {at[8]}"),
        ("Extractor", f"{tokens} x {text_dim}"),
        ("Injector", f"{N} x {at[8]}"),
        ("conv", f"{M} x {at[16]}"),
        ("attention", f"{M} x {at[16]}"),
    ]
    assert len(boxes) == len(expected)
    names = {name for name, _ in expected}
    assert [(text, texts[i + 1]) for i, text in enumerate(texts) if text in names] == expected

    counts = [int(text.split()[0].replace(",", "")) for text in texts if text.endswith(" parameters")]
    assert sum(counts) == sum(p.numel() for p in net.g_a.parameters())
    assert counts[0] == sum(p.numel() for p in net.g_a.analysis_transform[0].parameters())
    quarter, eighth = (side // 4) ** 2, (side // 8) ** 2
    sizes = [text.removesuffix(" attention") for text in texts if text.endswith(" attention")]
    assert sizes == [f"{quarter} x {tokens}", f"{tokens} x {eighth}", f"{eighth} x {tokens}"]
    assert [text for text in texts if text.endswith("text")] == ["text", "new text", "new text"]


def test_every_box_is_on_the_page_and_none_hides_another():
    root = ElementTree.fromstring(encoder_diagram(make_net(), side=64, tokens=8).data)
    _, _, width, height = map(float, root.get("viewBox").split())
    boxes = []
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("rx"):
            left, top, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            assert left >= 0 and top >= 0 and left + w <= width and top + h <= height
            assert all(left >= r or left + w <= x or top >= b or top + h <= y for x, y, r, b in boxes)
            boxes.append((left, top, left + w, top + h))
    assert not re.search(r"(href|src)=", ElementTree.tostring(root, encoding="unicode"))


def test_drawing_leaves_the_network_as_it_was():
    net = make_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    encoder_diagram(net, side=64, tokens=8)
    failing = make_net()
    failing.g_a.analysis_transform[-1].double()
    with pytest.raises(RuntimeError):
        encoder_diagram(failing, side=64, tokens=8)
    assert not any(layer._forward_hooks for n in (net, failing) for layer in n.g_a.analysis_transform)
    assert not net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("side, tokens", [(0, 8), (-64, 8), (64, 0)])
def test_a_diagram_of_nothing_is_refused(side, tokens):
    with pytest.raises(SettingError, match=f"at least 1, but are {side} and {tokens}"):
        encoder_diagram(make_net(), side=side, tokens=tokens)


# --- The curves -------------------------------------------------------------------------------------------------------


def results_of(codec: str, dataset: str = "photos", shift: float = 0.0, **more) -> pd.DataFrame:
    names = ["a.png", "b.png"]
    columns = {
        "codec": codec,
        "dataset": dataset,
        "name": names,
        "width": 10,
        "height": 10,
        "bytes": [10, 20],
    }
    measured = {
        "bpp": [0.8 + shift, 1.6 + shift],
        "psnr": [30 + shift, 34 + shift],
        "ms_ssim": [0.9, math.nan],
    }
    return pd.DataFrame({**columns, **measured, **more})


TACO = results_of("taco", lpips=[0.1, 0.2], lpips_01=[0.01, 0.02])
JPEG = pd.concat(
    [results_of("JPEG", shift=shift, quality=quality) for quality, shift in ((80, 0.5), (20, 0.1))]
)
JPEG_NAME, VTM_NAME = "JPEG, photos, only 2 points", "VTM (published), only 3 points"
PUBLISHED = {"VTM": {"bpp": [0.1, 0.2, 0.4], "psnr": [30, 32, 34]}, "no curve": {"bpp": [0.1], "psnr": []}}


def curves(figure) -> list:
    """The curves that are seen, without the points of single images."""
    return [trace for trace in figure.data if trace.visible and trace.customdata is None]


def choices(figure) -> dict[str, dict[str, list]]:
    """What each entry of the menu of metrics makes of the curves: {label: {name of a curve in the legend: its y}}."""
    return {
        button.label: {
            trace.name: list(y)
            for trace, y, named in zip(figure.data, button.args[0]["y"], button.args[0]["showlegend"])
            if named
        }
        for button in figure.layout.updatemenus[0].buttons
    }


def test_a_curve_per_codec_through_the_means():
    figure = rate_distortion(JPEG, TACO, published=PUBLISHED, title="photos")
    shown = [trace for trace in curves(figure) if trace.showlegend]
    assert [trace.name for trace in shown] == [JPEG_NAME, "taco, photos", VTM_NAME]
    jpeg, taco, vtm = shown
    expected = means(JPEG).sort_values("bpp")
    assert list(jpeg.x) == list(expected["bpp"]) and list(jpeg.y) == list(expected["psnr"])
    assert list(taco.x) == [pytest.approx(1.2)] and list(taco.y) == [32] and taco.mode == "markers"
    assert (list(vtm.x), list(vtm.y)) == (PUBLISHED["VTM"]["bpp"], PUBLISHED["VTM"]["psnr"])
    assert ["quality 20" in jpeg.text[0], "quality 80" in jpeg.text[1], "quality" in taco.text[0]] == [
        True,
        True,
        False,
    ]
    assert all("mean of 2 images" in text for text in (*jpeg.text, *taco.text))
    assert figure.layout.title.text == "photos"
    assert figure.layout.yaxis.title.text == "PSNR in dB"


def test_every_image_has_a_point_that_says_which_it_is():
    points = {trace.name: trace for trace in rate_distortion(JPEG, TACO).data if trace.customdata is not None}
    taco, jpeg = points["taco, photos"], points["JPEG, photos"]
    assert [tuple(data) for data in taco.customdata] == [
        ("taco", "photos", name, None) for name in ("a.png", "b.png")
    ]
    assert [tuple(data)[2:] for data in jpeg.customdata] == [
        (n, q) for q in (80, 20) for n in ("a.png", "b.png")
    ]
    assert list(taco.x) == list(TACO["bpp"]) and list(taco.y) == list(TACO["psnr"])
    assert "%{customdata[2]}" in taco.hovertemplate and not taco.showlegend


def test_a_curve_through_four_points_needs_no_warning():
    four = [results_of("JPEG", quality=quality, shift=quality / 100) for quality in (20, 40, 60, 80)]
    named = [trace.name for trace in rate_distortion(*four).data if trace.showlegend]
    assert named == ["JPEG, photos"]


def test_of_a_large_set_the_first_images_have_points():
    many = pd.concat([TACO.assign(name=[f"{i}a.png", f"{i}b.png"]) for i in range(IMAGES)], ignore_index=True)
    curve, points = rate_distortion(many).data
    assert [data[2] for data in points.customdata] == list(many["name"][:IMAGES])
    assert f"mean of {2 * IMAGES} images" in curve.text[0]


def test_the_menu_shows_one_metric_at_a_time():
    figure = rate_distortion(JPEG, TACO, published=PUBLISHED)
    menu = choices(figure)
    names = {label: list(shown) for label, shown in menu.items()}
    (psnr, ms_ssim, lpips, lpips_01) = menu
    assert psnr == "PSNR in dB" and ms_ssim == "MS-SSIM" and "[-1, 1]" in lpips and "[0, 1]" in lpips_01
    assert names[psnr] == [JPEG_NAME, "taco, photos", VTM_NAME]
    assert names[ms_ssim] == [JPEG_NAME, "taco, photos"]
    assert names[lpips] == names[lpips_01] == ["taco, photos"], (
        "JPEG has no LPIPS here, so no curve and no legend"
    )
    assert menu[lpips]["taco, photos"] == [pytest.approx(0.15)]
    assert menu[lpips_01]["taco, photos"] == [pytest.approx(0.015)]
    for button in figure.layout.updatemenus[0].buttons:
        assert button.args[1] == {"yaxis.title.text": button.label}
        assert len(button.args[0]["y"]) == len(button.args[0]["showlegend"]) == len(figure.data)
    first = figure.layout.updatemenus[0].buttons[0].args[0]
    assert [list(y) for y in first["y"]] == [list(trace.y) for trace in figure.data]
    assert list(first["showlegend"]) == [trace.showlegend for trace in figure.data]


def test_a_metric_missing_for_one_image_is_a_gap():
    y = rate_distortion(TACO).layout.updatemenus[0].buttons[1].args[0]["y"]
    assert list(y[1]) == [0.9, None], "JSON has no NaN"


def test_metrics_that_nobody_measured_are_not_offered():
    figure = rate_distortion(JPEG.drop(columns="ms_ssim").assign(lpips=math.nan))
    assert list(choices(figure)) == ["PSNR in dB"]


def test_a_second_menu_chooses_the_data_set():
    figure = rate_distortion(TACO, results_of("taco", "kodak", shift=1), published=PUBLISHED)
    assert [trace.name for trace in curves(figure)] == ["taco, photos"]
    _, menu = figure.layout.updatemenus
    visible = {
        button.label: {trace.name for trace, shown in zip(figure.data, button.args[0]["visible"]) if shown}
        for button in menu.buttons
    }
    published = {VTM_NAME, "no curve (published)"}
    assert visible == {"photos": {"taco, photos"}, "kodak": {"taco, kodak", *published}}
    assert len(rate_distortion(TACO).layout.updatemenus) == 1


def test_training_curves_show_every_term_of_the_log():
    log = pd.DataFrame(
        {"step": [1, 2, 3], "epoch": 1.0, "loss": [3.0, 2, 1], "bpp": [0.5, 0.4, 0.3], "lr": [0.1, 0.1, 0]}
    )
    figure = training_curves(log)
    assert [trace.name for trace in figure.data] == ["loss", "bpp", "lr"]
    for trace in figure.data:
        assert list(trace.x) == [1, 2, 3] and list(trace.y) == list(log[trace.name])
    assert len({trace.xaxis for trace in figure.data}) == 3
    long = pd.DataFrame({"step": range(2345), "loss": 1.0})
    assert list(training_curves(long).data[0].x) == list(range(0, 2345, 3))
    training_curves(log.head(0))


def test_figures_and_tables_load_nothing():
    figures = (
        rate_distortion(JPEG, TACO, published=PUBLISHED),
        training_curves(pd.DataFrame({"step": [1], "loss": [2.0]})),
    )
    pages = [figure.to_html(include_plotlyjs=False) for figure in figures] + [sortable(TABLE).data]
    for page in pages:
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
