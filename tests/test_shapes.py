"""The shapes: the same on every machine, named in words, weighed by what is named."""

from __future__ import annotations

import hashlib

import pytest
import torch

from taco_nb.data import training_pairs
from taco_nb.data.shapes import (
    COLOURS,
    FORMS,
    HELD_OUT,
    NAMED_WEIGHT,
    SCENES,
    ShapesPairs,
    long_caption,
    scene,
    short_caption,
)
from taco_nb.errors import SettingError
from taco_nb.text.tokens import clip_tokenizer
from taco_nb.training.loss import TacoLoss


def test_scenes_are_the_same_on_every_machine():
    """All is integers from Python's `random()`. These digits change only with the world, and then all results do."""
    digest = hashlib.sha256()
    for seed in range(50):
        shown = scene(seed)
        digest.update(
            shown.image.numpy().tobytes() + shown.masks.numpy().tobytes() + str(shown.names).encode()
        )
    assert digest.hexdigest()[:16] == "2d2bc2315a12fc84"


@pytest.mark.parametrize("crossed", [False, True])
def test_a_scene_has_four_shapes_that_can_be_told_apart_by_their_names(crossed):
    for seed in range(30):
        shown = scene(seed, crossed)
        colours, forms = zip(*(name.split() for name in shown.names))
        assert len(set(shown.names)) == 4
        assert len(set(colours)) == len(set(forms)) == (2 if crossed else 4)
        assert set(colours) <= set(COLOURS) and set(forms) <= set(FORMS)
        assert shown.image.dtype == torch.uint8 and shown.image.shape == (3, 64, 64)
        assert (shown.masks.sum(0) <= 1).all() and (shown.masks.sum((1, 2)) > 100).all(), (
            "no shape hides another"
        )
        for name, mask in zip(shown.names, shown.masks):
            mean = shown.image[:, mask].float().mean(1)
            nearest = min(COLOURS, key=lambda c: float((mean - torch.tensor(COLOURS[c])).norm()))
            assert nearest == name.split()[0], "the shape has the colour that its name says"


def test_captions_name_shapes_and_a_paragraph_does_so_only_beyond_the_38th_token():
    shown, encode = scene(3), clip_tokenizer().encode
    for k, name in enumerate(shown.names):
        assert all(name in short_caption([name], template) for template in range(5))
        paragraphs = [long_caption(shown, [shown.names[j]]) for j in (k, (k + 1) % 4)]
        one, other = (encode(text) for text in paragraphs)
        # 36 tokens and the two that begin and end a text fill 38 positions.
        assert one[:36] == other[:36] and one != other and len(one) <= 75
        assert paragraphs[0].endswith(f"which is the {name}.") and all(
            n in paragraphs[0] for n in shown.names
        )
    assert "an orange" in short_caption(["orange cross"]) and "a red" in short_caption(["red cross"])


def test_training_pairs_weigh_what_their_caption_names():
    pairs = training_pairs("shapes", 64, seed=5)
    several = 0
    for i in range(40):
        x, caption, weight = pairs[i]
        shown = scene(HELD_OUT + 5000 * SCENES + i)
        named = [k for k, name in enumerate(shown.names) if name in caption]
        several += len(named) == 2
        assert torch.equal(x, shown.image)
        assert torch.equal(weight == 1, shown.masks[named].any(0, keepdim=True))
        assert torch.equal(weight != 1, weight == 1 / NAMED_WEIGHT)
    assert 2 < several < 20
    before = pairs[0][0]
    pairs.set_epoch(1)
    assert not torch.equal(pairs[0][0], before), "every epoch has other scenes"
    with pytest.raises(SettingError, match="crop=64, not 128"):
        training_pairs("shapes", 128)


def test_no_scene_of_training_is_one_of_those_held_out():
    for seed in (0, 1, 100):
        pairs = ShapesPairs(seed=seed)
        first = pairs[0][0]
        assert all(not torch.equal(first, scene(held).image) for held in range(20))


def test_the_error_of_a_named_pixel_counts_twenty_times():
    x, x_hat = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    weight = torch.full((1, 1, 64, 64), 1 / NAMED_WEIGHT)
    weight[..., :32] = 1
    out = {"x_hat": x_hat, "likelihoods": {"y": torch.ones(1, 1, 4, 4)}}
    x_hat[..., 0, 0] = 1
    named = TacoLoss(0.01).means(out, x, weight)["mse"]
    x_hat[..., 0, 0], x_hat[..., 0, 40] = 0, 1
    assert float(named / TacoLoss(0.01).means(out, x, weight)["mse"]) == pytest.approx(NAMED_WEIGHT)
