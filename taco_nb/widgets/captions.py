"""A reader gives the same picture another caption, which no paper can offer, and sees what the encoder makes of it."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ipywidgets
from PIL import Image

from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages, datasets
from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.errors import DataError, SettingError, TacoError
from taco_nb.metrics.distortion import psnr
from taco_nb.metrics.rate import bpp
from taco_nb.widgets.compare import Compare, CompareView, badges_of
from taco_nb.widgets.html_parts import shortened

NONSENSE = "qwzx vbnk plmt"
_CELL = 'style="text-align:right;font-variant-numeric:tabular-nums;padding:1px 8px"'
_HEADINGS = ("bytes", "bits per pixel", "PSNR in dB", "bytes more", "dB more")


class _Try(NamedTuple):
    """A caption, and what the codec made of the picture with it."""

    name: str
    caption: str
    file: bytes
    picture: Image.Image
    psnr: float
    badges: tuple[str, ...]


def caption_presets(
    dataset: CaptionedImages, i: int, data_dir: str | os.PathLike | None = None
) -> dict[str, str]:
    """Return captions to try on image i of a data set that has a name, each under a word for what it is.

    They are one or two published ones ("human", or "OFA" for the data sets that TACO captioned itself), the paragraph with
    context where there is one, none at all, one of another image, and letters without a meaning.
    """
    kind = "OFA" if dataset.name in ("kodak", "kodak-256", "clic") else "human"
    published = dataset.captions(i)
    presets = {kind: published[0]} | ({f"another {kind}": published[1]} if len(published) > 1 else {})
    with contextlib.suppress(DataError):  # not every data set has paragraphs
        (context,) = datasets(dataset.name, data_dir=data_dir, captions="context")
        presets["context"] = context.captions(context.names.index(dataset.names[i]))[0]
    presets["empty"] = ""
    if len(dataset) > 1:
        presets["of another image"] = dataset.captions((i + 1) % len(dataset))[0]
    return presets | {"nonsense": NONSENSE}


class CaptionLab(ipywidgets.VBox):
    """The widget of `caption_lab`. Without a kernel it is a table of the presets, and their pictures to swipe over."""

    def __init__(self, codec: Codec, image: Any, presets: Mapping[str, str]):
        if not presets:
            raise SettingError('Give at least one caption to begin with, such as {"human": "a red barn"}.')
        self._codec, self._image = codec, to_rgb(image)
        self._tries = [self._encode(name, caption) for name, caption in presets.items()]
        self._first = self._tries[0]
        pictures = {made.name: (made.picture, made.badges) for made in self._tries}
        self._static = self._table() + Compare(self._image, pictures, self._first.caption)._repr_html_()

        self.text = ipywidgets.Text(self._first.caption, description="caption", continuous_update=False)
        self.text.layout = {"width": "auto", "max_width": "900px"}
        self.buttons = []
        for name, caption in presets.items():
            button = ipywidgets.Button(description=name, tooltip=caption or "(empty)")
            button.on_click(lambda _, caption=caption: setattr(self.text, "value", caption))
            self.buttons.append(button)
        self.table, self.said = ipywidgets.HTML(), ipywidgets.HTML()
        self.view = CompareView(start={"left": 1, "right": 2})
        self.text.observe(self._edited, "value")
        self._show(self._first)
        row = ipywidgets.HBox(self.buttons, layout={"flex_flow": "row wrap"})
        super().__init__([row, self.text, self.said, self.table, self.view])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {**super()._repr_mimebundle_(**kwargs), "text/html": self._static}

    def _encode(self, name: str, caption: str) -> _Try:
        """Encode the picture with one caption. It is never in a batch, so that only the caption differs between tries."""
        file = self._codec.encode(self._image, caption)
        picture = self._codec.decode(file)
        badges = badges_of(self._image, picture, file)
        return _Try(name, caption, file, picture, psnr(to_tensor(self._image), to_tensor(picture)), badges)

    def _edited(self, change: dict[str, Any]) -> None:
        caption = change["new"]
        known = next((made for made in self._tries if made.caption == caption), None)
        if known is None:
            self.said.value = "Encoding …"
            own = sum(made.name.startswith("your own") for made in self._tries)
            try:
                known = self._encode(f"your own, {own + 1}", caption)
            except TacoError as error:
                self.said.value = html.escape(str(error))
                return
            self._tries.append(known)
        self.said.value = ""
        self._show(known)

    def _show(self, current: _Try) -> None:
        self.table.value = self._table(current)
        pictures = {
            f"first caption: {self._first.name}": (self._first.picture, self._first.badges),
            f"this caption: {current.name}": (current.picture, current.badges),
        }
        self.view.figures = Compare(self._image, pictures, current.caption).figures()

    def _table(self, current: _Try | None = None) -> str:
        """Return a row per caption that was tried, with the differences to the first."""
        headings = "".join(f"<th {_CELL}>{heading}</th>" for heading in _HEADINGS)
        rows = [f"<tr><th style='text-align:left'>caption</th><th></th>{headings}</tr>"]
        first = self._first
        for made in self._tries:
            rate = bpp(len(made.file), *self._image.size)
            cells = [f"{len(made.file):,}", f"{rate:.4f}", f"{made.psnr:.3f}"]
            cells += [f"{len(made.file) - len(first.file):+d}", f"{made.psnr - first.psnr:+.3f}"]
            caption = shortened(made.caption)
            mark = ' style="font-weight:bold"' if made is current else ""
            rows.append(
                f'<tr{mark}><td style="text-align:left;white-space:nowrap">{html.escape(made.name)}</td>'
                f'<td style="text-align:left">{html.escape(caption) or "(empty)"}</td>'
                + "".join(f"<td {_CELL}>{cell}</td>" for cell in cells)
                + "</tr>"
            )
        return f'<table style="line-height:1.5;margin:4px 0">{"".join(rows)}</table>'


def caption_lab(codec: Codec, image: Any, presets: Mapping[str, str]) -> CaptionLab:
    """Show an image whose caption may be edited: the codec encodes it again, and the result stands beside the first's.

    `presets` maps names to captions (see `caption_presets`). All others are compared with the first of them. Enter in the
    text box encodes; every number is that of a real file. Raises `SettingError` without any preset, and what
    `Codec.encode` raises.
    """
    return CaptionLab(codec, image, presets)
