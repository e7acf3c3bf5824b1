"""CMMD and CLIP score: the published formulas, computed another way, on pictures prepared another way."""

import math

import numpy as np
import open_clip
import pytest
import torch
from conftest import make_clip
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from taco_nb.metrics.joint_space import BLOCK, ClipScore, CmmdEmbedding, cmmd


def vectors(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 5, generator=generator) + seed, dim=-1)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that is smooth, but not symmetric."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def seen(image: Image.Image) -> torch.Tensor:
    """CLIP's input of a picture that has its size already."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    return ((tensor(image) / 255) - mean) / std


# --- CMMD -------------------------------------------------------------------------------------------------------------


def test_cmmd_is_that_of_the_sums_over_all_pairs():
    def mean_kernel(a, b):
        pairs = [
            math.exp(-sum((s - t) ** 2 for s, t in zip(p, q)) / 200) for p in a.tolist() for q in b.tolist()
        ]
        return math.fsum(pairs) / len(pairs)

    x, y = vectors(9, 0), vectors(6, 1)
    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert expected > 1
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)


def test_cmmd_is_0_for_the_same_pictures_in_any_order_and_symmetric():
    x, y = vectors(50, 0), vectors(50, 1)
    assert cmmd(x, x[torch.randperm(50)]) == pytest.approx(0, abs=1e-9)
    assert cmmd(x, y) == pytest.approx(cmmd(y, x)) == pytest.approx(cmmd(x[torch.randperm(50)], y))
    assert cmmd(x, y) > 0


def test_doubling_both_sets_changes_nothing():
    """This holds for the biased estimator only, whose means include the pair of every vector with itself."""
    x, y = vectors(20, 0), vectors(20, 1)
    assert cmmd(torch.cat([x, x]), torch.cat([y, y])) == pytest.approx(cmmd(x, y))


def test_blocks_change_nothing(monkeypatch):
    x, y = vectors(21, 0), vectors(34, 1)
    whole = cmmd(x, y)
    monkeypatch.setattr("taco_nb.metrics.joint_space.BLOCK", 8)
    assert BLOCK > 34 and cmmd(x, y) == pytest.approx(whole, rel=1e-12)


def test_close_sets_are_told_apart_though_their_kernels_are_nearly_1():
    """A good codec's sets are so close that the means agree in more digits than float32 has."""
    x = vectors(400, 0)
    y = torch.nn.functional.normalize(x + 1e-3, dim=-1)
    difference = (x.double().mean(0) - y.double().mean(0)).square().sum().item()
    assert cmmd(x, y) == pytest.approx(1000 * difference / 100, rel=0.05)  # the kernel's first order
    assert cmmd(x, y) < 1e-4


def test_no_pictures_have_no_cmmd():
    assert math.isnan(cmmd(vectors(0, 0), vectors(0, 0)))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_kernel_of_all_pairs_is_ever_in_memory(monkeypatch):
    monkeypatch.setattr("taco_nb.metrics.joint_space.BLOCK", 64)
    with Largest() as largest:
        cmmd(vectors(300, 0), vectors(200, 1))
    assert largest.elements == 64 * 64 > 300 * 5


@pytest.mark.parametrize("size", [(90, 61), (61, 91), (40, 40), (17, 23)])
def test_pictures_are_prepared_as_in_the_official_program(size):
    """Central square by Pillow, then Pillow's bicubic filter; its fixed-point sums may differ by one step of 255."""
    embedding, image = CmmdEmbedding(make_clip(40)), photograph(*size)
    width, height = size
    short = min(size)
    left, top = (width - short) // 2, (height - short) // 2
    small = image.crop((left, top, left + short, top + short)).resize((40, 40), Image.Resampling.BICUBIC)
    with torch.no_grad():
        expected = embedding.model.encode_image(seen(small), normalize=True)
    measured = embedding(tensor(image))
    assert measured.norm().item() == pytest.approx(1)
    assert (measured @ expected.T).item() > 1 - 1e-5
    assert (measured @ embedding(tensor(photograph(*size, seed=1))).T).item() < 1 - 1e-3


# --- CLIP score -------------------------------------------------------------------------------------------------------


def test_clip_score_is_the_cosine_in_percent():
    clip, tokenizer = make_clip(), open_clip.SimpleTokenizer()
    images, captions = (
        [photograph(48, 64, seed) for seed in range(3)],
        ["a red barn", "", "two dogs on a beach"],
    )
    scores = ClipScore(clip, tokenizer)(tensor(*images), captions)
    for image, caption, score in zip(images, captions, scores):
        small = image.resize((32, 42), Image.Resampling.BICUBIC).crop((0, 5, 32, 37))
        with torch.no_grad():
            picture, text = clip.encode_image(seen(small))[0], clip.encode_text(tokenizer([caption]))[0]
        cosine = (picture @ text / picture.norm() / text.norm()).item()
        assert score == pytest.approx(max(100 * cosine, 0), abs=0.3)  # the filters differ by a step of 255


def test_clip_score_is_never_negative_and_of_the_pair():
    clip = make_clip()
    clip.text_projection.data *= -1
    turned, score = (
        ClipScore(clip, open_clip.SimpleTokenizer()),
        ClipScore(make_clip(), open_clip.SimpleTokenizer()),
    )
    images, captions = (
        tensor(*[photograph(40, 40, seed) for seed in range(4)]),
        ["a", "red dog", "sea", "a man on a bike"],
    )
    for one, other in zip(score(images, captions), turned(images, captions)):
        assert min(one, other) == 0 < max(one, other) < 100
    assert score(images, captions) != pytest.approx(score(images, captions[::-1]), abs=1e-3)


def test_a_paragraph_is_cut_at_77_tokens():
    score, image = ClipScore(make_clip(), open_clip.SimpleTokenizer()), tensor(photograph(40, 40))
    words = "word " * 75
    assert score(image, [words + "sea"]) == pytest.approx(score(image, [words + "mountain"]))
