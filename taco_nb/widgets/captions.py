"""The experiment that a paper cannot offer: another caption for the same picture, and what the encoder makes of it."""

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
from taco_nb.widgets.compare import CompareView, badges_of, compare_measured

NONSENSE = "qwzx vbnk plmt"
_CELL = 'style="text-align:right;font-variant-numeric:tabular-nums;padding:1px 8px"'


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
    """Captions to try on image i of a data set that has a name, by what they are: those that there are for it, in order.

    Two published ones ("human", or "OFA" for the data sets that TACO captioned itself), the paragraph with context, none,
    one of another image, and letters without a meaning.
    """
    kind = "OFA" if dataset.name in ("kodak", "clic") else "human"
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
    """What `caption_lab` gives; without a kernel the presets, measured, and their pictures."""

    def __init__(self, codec: Codec, image: Any, presets: Mapping[str, str]):
        if not presets:
            raise SettingError(
                'A caption lab begins with at least one caption, such as {"human": "a red barn"}.'
            )
        self._codec, self._image = codec, to_rgb(image)
        self._tries = self._encode(presets)
        self._first = self._tries[0]
        shown = {t.name: (t.picture, t.badges) for t in self._tries}
        self._static = self._table() + compare_measured(self._image, shown, self._first.caption)._repr_html_()

        self.text = ipywidgets.Text(self._first.caption, description="caption", continuous_update=False)
        self.text.layout = {"width": "auto", "max_width": "900px"}
        self.buttons = [
            ipywidgets.Button(description=name, tooltip=text or "(empty)") for name, text in presets.items()
        ]
        for button, caption in zip(self.buttons, presets.values()):
            button.on_click(lambda _, caption=caption: setattr(self.text, "value", caption))
        self.table, self.said, self.view = (
            ipywidgets.HTML(),
            ipywidgets.HTML(),
            CompareView(start={"left": 1, "right": 2}),
        )
        self.text.observe(self._edited, "value")
        self._show(self._first)
        row = ipywidgets.HBox(self.buttons, layout={"flex_flow": "row wrap"})
        super().__init__([row, self.text, self.said, self.table, self.view])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {**super()._repr_mimebundle_(**kwargs), "text/html": self._static}

    def _encode(self, captions: Mapping[str, str]) -> list[_Try]:
        x = to_tensor(self._image)
        made = []
        for (
            name,
            caption,
        ) in captions.items():  # one by one, so that nothing but the caption differs between them
            file = self._codec.encode(self._image, caption)
            picture = self._codec.decode(file)
            badges = badges_of(self._image, picture, file)
            made.append(_Try(name, caption, file, picture, psnr(x, to_tensor(picture)), badges))
        return made

    def _edited(self, change: dict[str, Any]) -> None:
        caption = change["new"]
        known = next((t for t in self._tries if t.caption == caption), None)
        self.said.value = "" if known else "Encoding …"
        try:
            if known is None:
                (known,) = self._encode(
                    {f"your own, {sum(t.name.startswith('your own') for t in self._tries) + 1}": caption}
                )
                self._tries.append(known)
        except TacoError as error:
            self.said.value = html.escape(str(error))
            return
        self.said.value = ""
        self._show(known)

    def _show(self, current: _Try) -> None:
        self.table.value = self._table(current)
        pictures = {
            f"first caption: {self._first.name}": (self._first.picture, self._first.badges),
            f"this caption: {current.name}": (current.picture, current.badges),
        }
        self.view.figures = compare_measured(self._image, pictures, current.caption).figures()

    def _table(self, current: _Try | None = None) -> str:
        heads = ("bytes", "bits per pixel", "PSNR in dB", "bytes more", "dB more")
        rows = [
            "<tr><th style='text-align:left'>caption</th><th></th>"
            + "".join(f"<th {_CELL}>{h}</th>" for h in heads)
            + "</tr>"
        ]
        for t in self._tries:
            rate = bpp(len(t.file), *self._image.size)
            cells = [f"{len(t.file):,}", f"{rate:.4f}", f"{t.psnr:.3f}"]
            cells += [f"{len(t.file) - len(self._first.file):+d}", f"{t.psnr - self._first.psnr:+.3f}"]
            mark = ' style="font-weight:bold"' if t is current else ""
            caption = t.caption if len(t.caption) <= 90 else f"{t.caption[:90]} …"
            rows.append(
                f'<tr{mark}><td style="text-align:left;white-space:nowrap">{html.escape(t.name)}</td>'
                f'<td style="text-align:left">{html.escape(caption) or "(empty)"}</td>'
                + "".join(f"<td {_CELL}>{cell}</td>" for cell in cells)
                + "</tr>"
            )
        return f'<table style="line-height:1.5;margin:4px 0">{"".join(rows)}</table>'


def caption_lab(codec: Codec, image: Any, presets: Mapping[str, str]) -> CaptionLab:
    """An image whose caption may be edited: the codec encodes again, and all is set beside the first caption.

    `presets` maps names to captions, the first of which is what all others are compared with (see `caption_presets`).
    Enter in the text box encodes; every number is that of a real file. Raises `SettingError` without any preset, and what
    `Codec.encode` raises.
    """
    return CaptionLab(codec, image, presets)
