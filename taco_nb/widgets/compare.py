"""The original and what codecs made of it: under one handle, side by side, as a difference, with the bits laid over it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import anywidget
import traitlets
from PIL import Image
from torch import Tensor

from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.errors import SettingError
from taco_nb.metrics.distortion import distortion
from taco_nb.metrics.networks import find_lpips
from taco_nb.metrics.rate import bpp
from taco_nb.widgets.heat import heat
from taco_nb.widgets.page import img, self_contained, source
from taco_nb.widgets.pictures import side_by_side

if TYPE_CHECKING:
    from taco_nb.metrics.perception import Lpips

BLOCK = 16  # pixels to a position of y, across and down
SHOWN = 2048
"""Pixels on the longer side up to which a picture is shown as it is: of a camera's, a page would be tens of megabytes."""


class _Layer(NamedTuple):
    label: str
    picture: Image.Image
    badges: tuple[str, ...]
    alt: str


class Compare:
    """What `compare` gives: HTML that swipes without a kernel, and a plain sheet of pictures."""

    def __init__(self, layers: list[_Layer], bits: Tensor | None):
        self._size = layers[0].picture.size
        self._layers, self._bits = [_fitted(layer) for layer in layers], bits

    def _repr_html_(self) -> str:
        return self_contained("compare", self.figures())

    def picture(self) -> Image.Image:
        """The pictures beside each other, with their figures below them."""
        return side_by_side(
            {"\n".join([layer.label, *layer.badges]): layer.picture for layer in self._layers}, columns=3
        )

    def figures(self) -> str:
        """The pictures as HTML figures, the map of the bits last: what is seen where no script runs."""
        parts = []
        for label, picture, badges, alt in self._layers:
            shown = " ".join(f'<span class="tc-badge">{html.escape(badge)}</span>' for badge in badges)
            parts.append(
                f'<figure data-label="{html.escape(label, quote=True)}">{img(picture, alt)}'
                f"<figcaption><b>{html.escape(label)}</b> {shown}</figcaption></figure>"
            )
        if self._bits is not None:
            parts.append(self._map(self._bits))
        return "".join(parts)

    def _map(self, bits: Tensor) -> str:
        """The map, stretched over the picture: the shares of its width and height that the blocks cover, in per cent."""
        width, height = self._size
        rows, columns = -(-height // BLOCK), -(-width // BLOCK)
        seen = bits[:rows, :columns]  # the rest is padding
        low, high = float(seen.min()), float(seen.max())
        label, spread = "where the bits went", f"{low:.0f} to {high:.0f} bits per {BLOCK} x {BLOCK} pixels"
        blocks = img(heat((seen - low) / max(high - low, 1e-12)), f"{label}: {spread}")
        covers = f'data-width="{100 * columns * BLOCK / width:.4f}" data-height="{100 * rows * BLOCK / height:.4f}"'
        says = f'data-label="{label}" data-range="{spread}"'
        return (
            f"<figure data-bits {covers} {says}>{blocks}<figcaption>{label}: {spread}</figcaption></figure>"
        )


def compare(
    original: Any,
    reconstructions: Mapping[str, tuple[Image.Image, bytes]],
    *,
    caption: str = "",
    bits: Tensor | None = None,
    lpips: Lpips | None = None,
) -> Compare:
    """The original and any number of reconstructions, each measured here, to be swiped over by mouse, touch and keys.

    `reconstructions` maps a label to the decoded picture and the file it was decoded from, whose length is the rate. The
    badges give bits per pixel, PSNR, MS-SSIM (of pictures large enough) and LPIPS (where its weights are on the machine).
    They are those of the whole picture; one with a side of more than `SHOWN` pixels is shown smaller, and a badge says so.
    `original` is whatever `Codec.encode` takes. `caption` goes into the alternative texts. `bits` is a map from
    `taco_nb.inspection.bit_map`. Raises `SettingError` for a reconstruction of another size than the original's.
    """
    original = to_rgb(original)
    measured = {}
    for label, (picture, file) in reconstructions.items():
        if picture.size != original.size:
            raise SettingError(f"{label!r} is {picture.size} large, but the original is {original.size}.")
        measured[label] = (picture, badges_of(original, picture, file, lpips))
    return compare_measured(original, measured, caption, bits)


def badges_of(
    original: Image.Image, picture: Image.Image, file: bytes, lpips: Lpips | None = None
) -> tuple[str, ...]:
    """The badges of a reconstruction: its file's size, and how far it is from the original."""
    x, x_hat = to_tensor(original), to_tensor(picture.convert("RGB"))
    measured = distortion(x, x_hat)
    badges = [
        f"{len(file):,} bytes",
        f"{bpp(len(file), *picture.size):.3f} bpp",
        f"PSNR {measured['psnr']:.2f} dB",
    ]
    if not math.isnan(measured["ms_ssim"]):
        badges.append(f"MS-SSIM {measured['ms_ssim']:.4f}")
    lpips = lpips or find_lpips()
    if lpips and not math.isnan(value := lpips(x, x_hat)["lpips"]):
        badges.append(f"LPIPS {value:.4f}")
    return tuple(badges)


def compare_measured(
    original: Image.Image,
    measured: Mapping[str, tuple[Image.Image, tuple[str, ...]]],
    caption: str = "",
    bits: Tensor | None = None,
) -> Compare:
    """As `compare`, of an RGB original and reconstructions whose badges are known already."""
    about = f": {caption}" if caption else ""
    layers = [
        _Layer(
            "original", original, (f"{original.width} x {original.height} pixels",), f"The original{about}"
        )
    ]
    for label, (picture, badges) in measured.items():
        layers.append(_Layer(label, picture.convert("RGB"), badges, f"{label}, {', '.join(badges)}{about}"))
    return Compare(layers, bits)


def _fitted(layer: _Layer) -> _Layer:
    """The layer with a picture that a page can hold."""
    if max(layer.picture.size) <= SHOWN:
        return layer
    small = layer.picture.copy()
    small.thumbnail((SHOWN, SHOWN))
    return layer._replace(picture=small, badges=(*layer.badges, f"shown at {small.width} x {small.height}"))


class CompareView(anywidget.AnyWidget):
    """A `Compare` inside other widgets, whose pictures change while handle, zoom and choices stay where they were."""

    _esm = source("compare.js")
    _css = source("compare.css")
    figures = traitlets.Unicode().tag(sync=True)
    """What `Compare.figures` gives."""
    start = traitlets.Dict().tag(sync=True)
    """What is chosen at first, such as {"left": 1, "right": 2}: the figures to the left and right of the handle."""
