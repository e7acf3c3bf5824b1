"""Pictures are distorted from hardly visibly to grossly: a distance that orders them as people would passes a first test."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from taco_nb.data.images import to_tensor
from taco_nb.metrics.distortion import ms_ssim, psnr
from taco_nb.metrics.perception import MiniDistance

if TYPE_CHECKING:
    import pandas as pd


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _noise(image: Image.Image, deviation: int) -> Image.Image:
    values = np.asarray(image) + np.random.default_rng(0).normal(0, deviation, np.asarray(image).shape)
    return Image.fromarray(values.round().clip(0, 255).astype("uint8"))


def _shuffle(image: Image.Image, share: float, side: int = 16) -> Image.Image:
    """Let that share of all squares change places."""
    values, squares = np.asarray(image).copy(), []
    for top in range(0, values.shape[0], side):
        squares += [values[top : top + side, left : left + side] for left in range(0, values.shape[1], side)]
    order = np.random.default_rng(0).permutation(len(squares))[: round(share * len(squares))]
    moved = [squares[i].copy() for i in np.roll(order, 1)]
    for i, square in zip(order, moved):
        squares[i][:] = square
    return Image.fromarray(values)


GRADED: dict[str, tuple[Callable[[Image.Image, float], Image.Image], Sequence[float]]] = {
    "JPEG, quality": (_jpeg, (90, 70, 50, 30, 15, 5)),
    "blur, radius in pixels": (_blur, (0.5, 1, 2, 4, 8)),
    "noise, standard deviation in levels": (_noise, (2, 5, 10, 20, 40)),
    "shuffled blocks, share": (_shuffle, (0.05, 0.2, 0.5, 1)),
}
"""{kind and unit: (how a picture is distorted by a grade, the grades from hardly visible to gross)}."""


def graded(image: Image.Image, distance: MiniDistance) -> pd.DataFrame:
    """Return what `mini_distance`, PSNR and MS-SSIM say of an RGB picture's distortions: a row per kind and grade."""
    import pandas as pd

    x, rows = to_tensor(image), []
    for kind, (distort, grades) in GRADED.items():
        for grade in grades:
            x_hat = to_tensor(distort(image, grade))
            figures = {**distance(x, x_hat), "psnr": psnr(x, x_hat), "ms_ssim": ms_ssim(x, x_hat)}
            rows.append({"kind": kind, "grade": grade, **figures})
    return pd.DataFrame(rows)
