"""Pictures beside each other, labelled, as one plain picture."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, SIZE = 8, 20, 15  # pixels: between pictures, per line of a label, of its letters


def side_by_side(
    pictures: Mapping[str, Image.Image],
    *,
    crop: tuple[int, int, int, int] | None = None,
    zoom: int = 1,
    columns: int = 4,
) -> Image.Image:
    """The pictures in rows of `columns`, each above its label (a key of `pictures`, wrapped to the width of a place).

    `crop` (left, top, right, bottom) shows that part of each, `zoom` times enlarged without smoothing, so that single
    pixels can be compared.
    """
    shown = {
        label: (picture.crop(crop) if crop else picture).convert("RGB") for label, picture in pictures.items()
    }
    if zoom > 1:
        shown = {
            k: v.resize((v.width * zoom, v.height * zoom), Image.Resampling.NEAREST) for k, v in shown.items()
        }
    font = ImageFont.load_default(SIZE)
    width = max(picture.width for picture in shown.values())
    height = max(picture.height for picture in shown.values())
    labels = [_wrapped(label, width - 4, font) for label in shown]
    foot = LINE * max(label.count("\n") + 1 for label in labels) + GAP
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + foot + GAP) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, picture) in enumerate(zip(labels, shown.values())):
        left, top = i % columns * (width + GAP), i // columns * (height + foot + GAP)
        sheet.paste(picture, (left, top))
        draw.multiline_text((left + 2, top + height + 4), label, fill="black", font=font, spacing=LINE - SIZE)
    return sheet


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The label, broken between words wherever a line of it would reach into the next picture's place."""
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
