"""Rate and distortion of every image: point at one and read its name, click and see what the codecs made of it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets

from taco_nb.codec import Codec
from taco_nb.data import CaptionedImages
from taco_nb.errors import TacoError
from taco_nb.peers import encode_peer
from taco_nb.widgets.compare import Compare, CompareView, compare
from taco_nb.widgets.figures import rate_distortion

if TYPE_CHECKING:
    import pandas as pd

_HINT = "Small points are single images. Click on one to see what the codecs made of it."


class Explorer(ipywidgets.VBox):
    """What `explorer` gives; without a kernel the figure, which has its menus and names there too."""

    def __init__(
        self, results: pd.DataFrame, figure: Any, sets: Sequence[CaptionedImages], codecs: Mapping[str, Codec]
    ):
        import plotly.graph_objects as go

        self._results, self._static, self._codecs = results, figure, codecs
        self._sets = {dataset.name: dataset for dataset in sets}
        self.figure = go.FigureWidget(figure)
        self.said, self.view = ipywidgets.HTML(_HINT), CompareView()
        for trace in self.figure.data:
            if trace.customdata is not None:
                trace.on_click(self._clicked)
        super().__init__([self.figure, self.said, self.view])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**self._static._repr_mimebundle_(), **super()._repr_mimebundle_(**kwargs)}

    def _clicked(self, trace: Any, points: Any, _: Any) -> None:
        if not points.point_inds:
            return  # the click was on another trace
        codec, dataset, name, quality = trace.customdata[points.point_inds[0]]
        self.said.value = f"Encoding {html.escape(name)} …"
        try:
            self.view.figures = self.open(codec, dataset, name, quality).figures()
            self.said.value = f"{html.escape(name)} of {html.escape(dataset)}. {_HINT}"
        except TacoError as error:
            self.said.value = html.escape(str(error))

    def open(self, codec: str, dataset: str, name: str, quality: float | None = None) -> Compare:
        """The image of a point under the handle, as the codec of the point and the codecs that were given make it.

        They encode it once more, which gives the files that were measured; `quality` is that of a peer.
        """
        images = self._sets[dataset]
        sample = images[images.names.index(name)]
        rows = self._results[(self._results["dataset"] == dataset) & (self._results["name"] == name)].set_index("codec")
        shown = {}
        if codec not in self._codecs:
            peer = encode_peer(sample.image, codec, int(quality))
            shown[f"{codec}, quality {peer.quality}"] = (peer.image, peer.data)
        for label in sorted(
            self._codecs.keys() & set(rows.index), key=lambda label: label != codec
        ):  # the point's own first
            file = self._codecs[label].encode(sample.image, rows.loc[label, "caption"])
            shown[label] = (self._codecs[label].decode(file), file)
        return compare(sample.image, shown, caption=sample.captions[0])


def explorer(
    *results: pd.DataFrame,
    sets: Sequence[CaptionedImages],
    codecs: Mapping[str, Codec],
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    title: str = "",
) -> Explorer:
    """`rate_distortion`, in which a click on an image's point opens it in a `compare` below.

    `sets` are the data sets that `results` were measured on, `codecs` the codecs by the names that they have there; JPEG
    and its like need not be given.
    """
    import pandas as pd

    figure = rate_distortion(*results, published=published, title=title)
    return Explorer(pd.concat(results, ignore_index=True), figure, sets, codecs)
