"""Plain pictures are made here: several beside each other with their labels, and numbers as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LINE, SIZE = 8, 20, 15  # pixels: between pictures, per line of a label, of its letters
COLD, HOT = np.array((20, 24, 60)), np.array((255, 214, 90))
"""The colours of 0 and 1 in a heat map. They differ in lightness, so that eyes that see no hue can tell them apart."""


def heat(field: Tensor) -> Image.Image:
    """Return a field (h, w) of numbers in [0, 1] as a picture of w x h pixels, dark where little is."""
    return Image.fromarray((COLD + field.numpy()[..., None] * (HOT - COLD)).round().astype(np.uint8))


def stretched(field: Tensor) -> tuple[Tensor, float, float]:
    """Return a field scaled to [0, 1], and the values that became 0 and 1."""
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-12), low, high


def side_by_side(
    pictures: Mapping[str, Image.Image] | Sequence[tuple[str, Image.Image]],
    *,
    crop: tuple[int, int, int, int] | None = None,
    zoom: int = 1,
    columns: int = 4,
) -> Image.Image:
    """Return the pictures in rows of `columns`, with its label, wrapped to the picture's width, below each.

    `pictures` maps labels to pictures, or is pairs of both where several have the same label.

    `crop` (left, top, right, bottom) shows that part of each, enlarged `zoom` times without smoothing, so that single
    pixels can be compared.
    """
    pairs = list(pictures.items() if isinstance(pictures, Mapping) else pictures)
    shown = []
    for _, picture in pairs:
        part = (picture.crop(crop) if crop else picture).convert("RGB")
        shown.append(part.resize((part.width * zoom, part.height * zoom), Image.Resampling.NEAREST))
    font = ImageFont.load_default(SIZE)
    width, height = max(part.width for part in shown), max(part.height for part in shown)
    labels = [_wrapped(label, width - 4, font) for label, _ in pairs]
    foot = LINE * max(label.count("\n") + 1 for label in labels) + GAP
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + foot + GAP) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, part) in enumerate(zip(labels, shown)):
        left, top = i % columns * (width + GAP), i // columns * (height + foot + GAP)
        sheet.paste(part, (left, top))
        draw.multiline_text((left + 2, top + height + 4), label, fill="black", font=font, spacing=LINE - SIZE)
    return sheet


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Break a label between words wherever a line of it would reach into the next picture's place."""
    lines = []
    for line in label.split("\n"):
        first, *words = line.split(" ")
        lines.append(first)
        for word in words:
            longer = f"{lines[-1]} {word}"
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(lines)
