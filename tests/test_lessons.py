"""The pictures that explain: they show what was computed, and what they say is so."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from taco_nb import datasets, load
from taco_nb.data.images import to_tensor
from taco_nb.inspection import Attention, decoding_steps, look_at_attention, without_text
from taco_nb.metrics.distortion import psnr
from taco_nb.text.long import surviving, words_with_ends
from taco_nb.widgets import (
    amdahl_bar,
    decoding_sheet,
    fading_text,
    fewer_keys,
    forest_of_changes,
    key_shares,
    latent_figure,
    low_rank_sheet,
    matrices_to_scale,
)


@pytest.fixture(scope="module")
def codec():
    return load("demo")


@pytest.fixture(scope="module")
def sample():
    return datasets("kodak-256")[0][0]


@pytest.fixture(scope="module")
def steps(codec, sample):
    return decoding_steps(codec, sample.image, sample.captions[0])


def test_the_steps_are_the_file(codec, sample, steps):
    """Their bits add up to its size, the last picture is the decoder's, and each group makes the picture better."""
    data = codec.encode(sample.image, sample.captions[0])
    assert len(steps) == 1 + 2 * len(codec.net.config.groups)
    assert sum(float(step.bits.sum()) for step in steps) / 8 == pytest.approx(len(data), rel=0.05)
    decoded = codec.decode(data)
    assert (to_tensor(steps[-1].picture) - to_tensor(decoded)).abs().max() <= 1 / 255 + 1e-6
    quality = [psnr(to_tensor(sample.image), to_tensor(step.picture)) for step in steps]
    assert quality[-1] == max(quality) and quality[0] == min(quality)
    assert [step.anchors for step in steps[1:3]] == [True, False]
    assert decoding_sheet(steps).width > 4 * sample.image.width


def test_a_latent_is_drawn_under_its_gaussian(steps):
    step = steps[1]
    heatmap, bars = latent_figure(step).data
    channel = int(step.bits.sum((1, 2)).argmax())
    assert (torch.as_tensor(heatmap.z) == step.symbols[channel]).all()
    found = [x for x, colour in zip(bars.x, bars.marker.color) if colour != bars.marker.color[0]]
    dearest = step.symbols[channel].flatten()[int(step.bits[channel].argmax())]
    assert found == [dearest] or int(dearest) == bars.x[0]
    chance = dict(zip((int(x) for x in bars.x), bars.y))[int(dearest)]
    assert -torch.log2(torch.tensor(chance)) == pytest.approx(
        float(step.bits[channel].max()), rel=0.02, abs=0.05
    )


def test_without_text_every_caption_gives_the_same_file(codec, sample):
    before = codec.encode(sample.image, "a red door")
    silent = without_text(codec)
    assert len({silent.encode(sample.image, words) for words in ("a red door", "", "two dogs")}) == 1
    assert codec.encode(sample.image, "a red door") == before, "the codec itself is left alone"


def test_a_text_fades_where_it_is_cut():
    text = "A red barn. " * 30
    ends = words_with_ends(text)
    for length in (10, 38, 77):
        kept = sum(end <= length - 2 for _, end in ends)
        assert kept / len(ends) == pytest.approx(surviving(text, length)["words_kept"][0])
    page = fading_text(text).data
    assert page.count("data-end=") == len(ends) and page.count("opacity:.25") == sum(
        end > 36 for _, end in ends
    )
    assert "&lt;b&gt;" in fading_text("a <b> c").data


def test_matrices_are_to_scale():
    page = matrices_to_scale({"long": (4096, 38), "square": (4096, 4096)}).data
    assert "width:2.8px;height:300.0px" in page and "width:300.0px;height:300.0px" in page
    assert "155,648" in page


def test_what_attention_is_shown_is_what_ran(codec, sample):
    first, _, second = look_at_attention(codec, sample.image, sample.captions[0])
    figure = key_shares({"one": first, "two": second}, words=12)
    for record, (words, padding) in zip((first, second), (figure.data[:2], figure.data[2:])):
        assert sum(words.y) + sum(padding.y) == pytest.approx(1, abs=1e-4)
        assert sum(padding.y) == pytest.approx(float(record.weights[..., 12:].sum(-1).mean()), abs=1e-4)
    bars = fewer_keys(first, (38, 4, 1)).data
    assert [len(of.y) for of in bars] == [38, 4, 1] and bars[-1].y[0] == 1
    assert all(sum(of.y) == pytest.approx(1, abs=1e-4) for of in bars)


def test_a_matrix_of_rank_one_is_kept_by_one_singular_value(sample):
    weights = torch.rand(2, 64 * 64, 1) @ torch.rand(2, 1, 5)
    record = Attention("Injector 8", weights, (64, 64))
    whole, first = (low_rank_sheet(sample.image, record, "x", 0, ranks) for ranks in ((), (1,)))
    assert first.width > whole.width  # the sheet has one more, which looks alike
    size = (240, 240)
    left, right = (first.crop((x, 0, x + size[0], size[1])) for x in (0, size[0] + 8))
    assert (to_tensor(left) - to_tensor(right)).abs().max() < 0.02


def test_amdahl():
    figure = amdahl_bar(0.123)
    assert "1.14 times as fast" in figure.layout.title.text
    (slider,) = figure.layout.sliders
    half = next(step for step in slider.steps if step.label == "50%")
    assert "2.00 times" in half.args[1]["title.text"]
    assert slider.steps[slider.active].label == "12%"


def test_what_was_not_measured_has_an_empty_place():
    nan = float("nan")
    changes = pd.DataFrame(
        {
            "label": ["a", "b"],
            "published": [27.0, -1.0],
            "measured": [3.0, nan],
            "low": [1.0, nan],
            "high": [5.0, nan],
        }
    )
    published, measured, missing = forest_of_changes(changes).data
    assert list(published.x) == [27.0, -1.0] and list(measured.y) == ["a"] and list(missing.y) == ["b"]
    assert list(measured.error_x.array) == [2.0]
