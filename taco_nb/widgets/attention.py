"""Attention drawn over the picture, token by token, and its spectrum."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taco_nb.codec import MULTIPLE
from taco_nb.data.images import to_rgb
from taco_nb.inspection import Attention, energy
from taco_nb.widgets.heat import COLD, HOT, heat
from taco_nb.widgets.page import img, self_contained
from taco_nb.widgets.pictures import side_by_side

if TYPE_CHECKING:
    from IPython.display import HTML
    from plotly.graph_objects import Figure

    from taco_nb.text import KeywordWeights, TextTower
    from taco_nb.text.keywords import Word


def attention_maps(
    image: Image.Image, attention: Attention, tokens: Mapping[str, int], width: int = 240, columns: int = 4
) -> Image.Image:
    """The picture once per token, bright where its positions and the token attend to each other.

    `tokens` maps labels to positions in the caption. Each map is scaled from its own least to its own greatest value,
    which the label says: a map whose two are nearly equal looks lively and means nothing.
    """
    image = to_rgb(image)
    height = max(1, round(width * image.height / image.width))
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32)[..., None] / 255
    pictures = {}
    for label, token in tokens.items():
        field = _field(attention, token)
        low, high = float(field.min()), float(field.max())
        pictures[f"{label}\n{low:.4f} to {high:.4f}"] = _overlay(
            grey, (field - low) / max(high - low, 1e-12), image.size
        )
    return side_by_side(pictures, columns=columns)


def _field(attention: Attention, token: int) -> Tensor:
    """A token's map; of a text that was pooled to one vector, every token has that one's."""
    texts = attention.weights.shape[1 if attention.name.startswith("Extractor") else 2]
    return attention.over_image(0 if texts == 1 else token)


def _overlay(grey: np.ndarray, field: Tensor, size: tuple[int, int]) -> Image.Image:
    """A field (h, w) in [0, 1] over the padded picture, laid in colour over the grey picture without padding."""
    padded = tuple(-(-side // MULTIPLE) * MULTIPLE for side in size)
    scaled = Image.fromarray((field.numpy() * 255).astype(np.uint8)).resize(padded, Image.Resampling.BICUBIC)
    seen = np.asarray(scaled.crop((0, 0, *size)).resize(grey.shape[1::-1]), dtype=np.float32) / 255
    colour = np.asarray(heat(torch.from_numpy(seen)))
    return Image.fromarray((colour * (0.35 + 0.65 * grey)).round().astype(np.uint8))


class Look:
    """What `where_the_text_looks` gives: HTML in which a token is picked without a kernel, and a plain sheet of pictures."""

    def __init__(
        self, image: Image.Image, looks: Mapping[str, Sequence[Attention]], tokens: list[str], weights: Any
    ):
        self._image, self._looks, self._tokens, self._weights = image, looks, tokens, weights
        self._words = [i for i, token in enumerate(tokens) if len(token) > 3 and i] or [0]

    def picture(self) -> Image.Image:
        """The last attention of each codec over the picture, for the first four words."""
        words = {self._tokens[i]: i for i in self._words[:4]}
        return side_by_side(
            {
                label: attention_maps(self._image, records[-1], words)
                for label, records in self._looks.items()
            },
            columns=1,
        )

    def _repr_html_(self) -> str:
        settings = {"tokens": self._tokens, "weights": self._weights, "start": self._words[0]}
        settings |= {"cold": COLD.tolist(), "hot": HOT.tolist()}
        maps = "".join(
            self._map(label, record) for label, records in self._looks.items() for record in records
        )
        words = ", ".join(self._tokens[i] for i in self._words[:4])
        sheet = img(self.picture(), f"Attention over the picture for {words}").replace(
            "<img", '<img class="ta-sheet"'
        )
        return self_contained(
            "attention",
            f"<div {_json('tokens', settings)}></div><div data-picture>{img(self._image, '')}</div>{maps}{sheet}",
        )

    def _map(self, label: str, record: Attention) -> str:
        """The maps of all tokens, each from black at its least to white at its greatest, one below the other."""
        width, height = self._image.size
        step = -(-width // MULTIPLE) * MULTIPLE // record.grid[1]  # pixels to a position
        rows, columns = -(-height // step), -(-width // step)  # the rest is padding
        fields = [_field(record, i)[:rows, :columns] for i in range(len(self._tokens))]
        ranges = [(float(field.min()), float(field.max())) for field in fields]
        greys = [(field - low) / max(high - low, 1e-12) for field, (low, high) in zip(fields, ranges)]
        sprite = Image.fromarray((np.concatenate(greys) * 255).round().astype(np.uint8)).convert("RGB")
        about = {"codec": label, "layer": record.name, "ranges": ranges, "rows": rows, "columns": columns}
        about |= {"width": 100 * columns * step / width, "height": 100 * rows * step / height}
        return f"<div {_json('map', about)}>{img(sprite, '')}</div>"


def where_the_text_looks(
    image: Image.Image,
    looks: Mapping[str, Sequence[Attention]],
    tower: TextTower,
    caption: str,
    weights: KeywordWeights | None = None,
) -> Look:
    """The caption's tokens to pick from, and over the picture where each attends, for one or several codecs.

    `looks` maps a label to what `taco_nb.inspection.look_at_attention` gives for a codec, this image and caption. Each map is
    scaled from its own least to its own greatest value, which stand below it. With `weights`, tokens are shaded by theirs.
    """
    spans = [span for span in tower.spans(caption) if span is not None]
    tokens = ["start", *(caption[slice(*span)] for span in spans[1:-1]), "end"]
    shades = None if weights is None else weights.token_weights([caption], tower)[0, : len(tokens)].tolist()
    return Look(to_rgb(image), looks, tokens, shades)


def _json(name: str, content: dict[str, Any]) -> str:
    return f'data-{name}="{html.escape(json.dumps(content), quote=True)}"'


def spectrum(groups: Mapping[str, Sequence[Attention]]) -> Figure:
    """How much of each attention matrix its first singular values hold, for several codecs side by side.

    `groups` maps a codec's label to its three attentions (see `taco_nb.inspection.look_at_attention`).
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, records in groups.items():
        for record in records:
            shares = energy(record.weights)
            figure.add_scatter(
                x=list(range(1, len(shares) + 1)), y=shares.tolist(), name=f"{label}, {record.name}"
            )
    figure.update_layout(
        template="plotly_white",
        height=420,
        xaxis={"title": "number of singular values", "range": [0.5, 40.5]},
        yaxis={"title": "share of the energy"},
    )
    return figure


def shaded_caption(words: Sequence[Word], caption: str) -> HTML:
    """The caption with the words that matter shaded; the reason is in brackets behind them, and on hovering."""
    from IPython.display import HTML

    parts, at = [], 0
    for word in words:
        parts.append(html.escape(caption[at : word.start]))
        at = word.end
        text = html.escape(word.text)
        if word.why:
            text = (
                f'<mark style="background:#ffd65a;color:#000;padding:0 2px" title="weight {word.weight:g}">{text}</mark>'
                f"<sub>{html.escape(word.why)}</sub>"
            )
        parts.append(text)
    parts.append(html.escape(caption[at:]))
    return HTML(f'<p style="line-height:2">{"".join(parts)}</p>')
