"""The original is shown with what codecs made of it: under one handle, side by side, as a difference, and with the bits."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets
from PIL import Image
from torch import Tensor

from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.errors import SettingError
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.networks import METRICS, perceptual_distance
from taco_nb.metrics.perception import Lpips, MiniDistance
from taco_nb.metrics.rate import bpp
from taco_nb.widgets.html_parts import FOLDER, picture_tag, self_contained
from taco_nb.widgets.pictures import heat, side_by_side, stretched

BLOCK = 16  # pixels to a position of y, across and down
SHOWN = 2048
"""A picture with a longer side than so many pixels is shown smaller; with a camera's, a page would have tens of megabytes."""


class Compare:
    """Several pictures of one size. In a notebook it is HTML that swipes without a kernel; `picture` draws a plain sheet.

    `reconstructions` maps a label to the picture and its badges, short texts that say what was measured of it. `caption`
    and `bits` are those of `compare`.
    """

    def __init__(
        self,
        original: Image.Image,
        reconstructions: Mapping[str, tuple[Image.Image, tuple[str, ...]]],
        caption: str = "",
        bits: Tensor | None = None,
    ):
        self._size, self._bits, self._caption = original.size, bits, caption
        size = (f"{original.width} x {original.height} pixels",)
        self._layers = [("original", *_small_enough(original, size))]
        for label, (picture, badges) in reconstructions.items():
            self._layers.append((label, *_small_enough(picture.convert("RGB"), badges)))

    def _repr_html_(self) -> str:
        return self_contained("compare", self.figures())

    def picture(self) -> Image.Image:
        """Return the pictures beside each other, with their badges below them."""
        sheet = {"\n".join([label, *badges]): picture for label, picture, badges in self._layers}
        return side_by_side(sheet, columns=3)

    def figures(self) -> str:
        """Return the pictures as HTML figures, the map of the bits last. This is what a page without scripts shows."""
        about = f": {self._caption}" if self._caption else ""
        parts = []
        for i, (label, picture, badges) in enumerate(self._layers):
            alt = ", ".join([label, *badges]) if i else "The original"
            shown = " ".join(f'<span class="tc-badge">{html.escape(badge)}</span>' for badge in badges)
            parts.append(
                f'<figure data-label="{html.escape(label)}">{picture_tag(picture, alt + about)}'
                f"<figcaption><b>{html.escape(label)}</b> {shown}</figcaption></figure>"
            )
        return "".join(parts) + ("" if self._bits is None else self._map(self._bits))

    def _map(self, bits: Tensor) -> str:
        """Return the map's figure, with the shares of the picture's width and height that its blocks cover, in per cent.

        The shares are above 100 where the last blocks reach beyond the picture; blocks of padding alone are left out.
        """
        width, height = self._size
        rows, columns = -(-height // BLOCK), -(-width // BLOCK)
        field, low, high = stretched(bits[:rows, :columns])
        label, spread = "where the bits went", f"{low:.0f} to {high:.0f} bits per {BLOCK} x {BLOCK} pixels"
        covers = f'data-width="{100 * columns * BLOCK / width:.4f}" data-height="{100 * rows * BLOCK / height:.4f}"'
        return (
            f'<figure data-bits {covers} data-label="{label}" data-range="{spread}">'
            f"{picture_tag(heat(field), f'{label}: {spread}')}<figcaption>{label}: {spread}</figcaption></figure>"
        )


def _small_enough(picture: Image.Image, badges: tuple[str, ...]) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a picture that a page can hold, and its badges with one more if it is smaller now."""
    if max(picture.size) <= SHOWN:
        return picture, badges
    small = picture.copy()
    small.thumbnail((SHOWN, SHOWN))
    return small, (*badges, f"shown at {small.width} x {small.height}")


def compare(
    original: Any,
    reconstructions: Mapping[str, tuple[Image.Image, bytes]],
    *,
    caption: str = "",
    bits: Tensor | None = None,
    distance: Lpips | MiniDistance | None = None,
) -> Compare:
    """Show the original and any number of reconstructions, to be swiped over by mouse, touch and keys.

    Each is measured here, whole, also where it is shown smaller (`SHOWN`): the badges give bits per pixel, PSNR, MS-SSIM
    (of pictures large enough), and LPIPS, or mini_distance where the weights of LPIPS are not on the machine.

    Args:
        original: whatever `Codec.encode` takes.
        reconstructions: labels, each with the decoded picture and the file it was decoded from, whose length is the rate.
        caption: goes into the alternative texts.
        bits: a map from `taco_nb.inspection.bit_map`.
        distance: the perceptual distance to measure, in place of the one on this machine.

    Raises `SettingError` for a reconstruction of another size than the original's.
    """
    original = to_rgb(original)
    measured = {}
    for label, (picture, file) in reconstructions.items():
        if picture.size != original.size:
            raise SettingError(f"{label!r} is {picture.size} large, but the original is {original.size}.")
        measured[label] = (picture, badges_of(original, picture, file, distance))
    return Compare(original, measured, caption, bits)


def badges_of(
    original: Image.Image, picture: Image.Image, file: bytes, distance: Lpips | MiniDistance | None = None
) -> tuple[str, ...]:
    """Return the badges of a reconstruction: its file's size, and how far it is from the original."""
    x, x_hat = to_tensor(original), to_tensor(picture.convert("RGB"))
    measured = distortion(x, x_hat)
    rate = bpp(len(file), *picture.size)
    badges = [f"{len(file):,} bytes", f"{rate:.3f} bpp", f"PSNR {measured['psnr']:.2f} dB"]
    if not math.isnan(measured["ms_ssim"]):
        badges.append(f"MS-SSIM {measured['ms_ssim']:.4f}")
    distance = distance or perceptual_distance()
    if not math.isnan(value := distance(x, x_hat)[distance.name]):
        badges.append(f"{METRICS[distance.name].title} {value:.4f}")
    return tuple(badges)


class CompareView(anywidget.AnyWidget):
    """A `Compare` inside other widgets. Its pictures may change, while handle, zoom and choices stay where they were."""

    _esm = FOLDER / "compare.js"
    _css = FOLDER / "compare.css"
    figures = traitlets.Unicode().tag(sync=True)
    """The HTML that `Compare.figures` returns, or ""."""
    start = traitlets.Dict().tag(sync=True)
    """The first choices, such as {"left": 1, "right": 2}: the pictures to the left and right of the handle."""
