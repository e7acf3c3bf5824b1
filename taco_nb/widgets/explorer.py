"""Every image is a point of rate and distortion: point at it to read its name, click to see what the codecs made of it."""

from __future__ import annotations

import html
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import traitlets
from plotly.graph_objects import Figure

from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages
from taco_nb.errors import TacoError
from taco_nb.evaluation.peers import encode_peer
from taco_nb.widgets.compare import Compare, CompareView, compare
from taco_nb.widgets.figures import rate_distortion
from taco_nb.widgets.html_parts import FOLDER

_HINT = "Small points are single images. Click on one to see what the codecs made of it."


class _Clicks(anywidget.AnyWidget):
    """An invisible widget that hears the clicks on the figure whose layout has its key."""

    _esm = FOLDER / "clicks.js"
    key = traitlets.Unicode().tag(sync=True)
    point = traitlets.List().tag(sync=True)
    """The customdata of the clicked point, and the time of the click."""


class Explorer:
    """The result of `explorer`: a figure, and below it, where there is a kernel, the image that was clicked."""

    def __init__(
        self,
        results: pd.DataFrame,
        figure: Figure,
        sets: Sequence[CaptionedImages],
        codecs: Mapping[str, Codec],
    ):
        self._results, self._codecs = results, codecs
        self._sets = {dataset.name: dataset for dataset in sets}
        key = uuid.uuid4().hex
        self.figure = figure.update_layout(meta={"key": key})
        self.clicks = _Clicks(key=key)
        self.said, self.view = ipywidgets.HTML(_HINT), CompareView()
        self.clicks.observe(self._clicked, "point")

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.figure)
        display(ipywidgets.VBox([self.said, self.view, self.clicks]))

    def _clicked(self, change: dict[str, Any]) -> None:
        codec, dataset, name, quality, _ = change["new"]
        self.said.value = f"Encoding {html.escape(name)} …"
        try:
            self.view.figures = self.compare_at(codec, dataset, name, quality).figures()
            self.said.value = f"{html.escape(name)} of {html.escape(dataset)}. {_HINT}"
        except TacoError as error:
            self.said.value = html.escape(str(error))

    def compare_at(self, codec: str, dataset: str, name: str, quality: float | None = None) -> Compare:
        """Return the image of a point as the point's codec and all codecs that `explorer` was given make it.

        They encode it once more. The files are those that were measured, except that rounding may differ where crops were
        evaluated in batches. `quality` is the setting of a conventional codec such as JPEG.
        """
        images = self._sets[dataset]
        sample = images[images.names.index(name)]
        rows = self._results[(self._results["dataset"] == dataset) & (self._results["name"] == name)]
        captions = rows.drop_duplicates("codec").set_index("codec")["caption"]
        shown = {}
        if codec not in self._codecs:
            peer = encode_peer(sample.image, codec, int(quality))
            shown[f"{codec}, quality {peer.quality}"] = (peer.image, peer.data)
        measured = self._codecs.keys() & set(captions.index)
        for label in sorted(measured, key=lambda label: label != codec):  # the point's own codec comes first
            file = self._codecs[label].encode(sample.image, captions[label])
            shown[label] = (self._codecs[label].decode(file), file)
        return compare(sample.image, shown, caption=sample.captions[0])


def explorer(
    *results: pd.DataFrame,
    sets: Sequence[CaptionedImages],
    codecs: Mapping[str, Codec],
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    title: str = "",
) -> Explorer:
    """Show the figure of `rate_distortion`, in which a click on an image's point opens it in a `compare` below.

    `sets` are the data sets that `results` were measured on, and `codecs` maps the codecs' names in `results` to the
    codecs; JPEG and its like need not be given.
    """
    figure = rate_distortion(*results, published=published, title=title)
    return Explorer(pd.concat(results, ignore_index=True), figure, sets, codecs)
