"""Attention drawn over the picture, token by token, and its spectrum."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from taco_nb.inspection import Attention, energy
from taco_nb.widgets.heat import COLD, HOT
from taco_nb.widgets.pictures import side_by_side

if TYPE_CHECKING:
    from IPython.display import HTML
    from plotly.graph_objects import Figure

    from taco_nb.text.keywords import Word


def attention_maps(
    image: Image.Image, attention: Attention, tokens: Mapping[str, int], width: int = 240, columns: int = 4
) -> Image.Image:
    """The picture once per token, bright where its positions and the token attend to each other.

    `tokens` maps labels to positions in the caption. Each map is scaled from its own least to its own greatest value,
    which the label says: a map whose two are nearly equal looks lively and means nothing.
    """
    height = round(width * image.height / image.width)
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32)[..., None] / 255
    pictures = {}
    for label, token in tokens.items():
        field = attention.over_image(token)
        low, high = float(field.min()), float(field.max())
        pictures[f"{label}\n{low:.4f} to {high:.4f}"] = _overlay(
            grey, (field - low) / max(high - low, 1e-12), image.size
        )
    return side_by_side(pictures, columns=columns)


def _overlay(grey: np.ndarray, field: Tensor, size: tuple[int, int]) -> Image.Image:
    """A field (h, w) in [0, 1] over the padded picture, laid in colour over the grey picture without padding."""
    padded = tuple(-(-side // 64) * 64 for side in size)
    scaled = Image.fromarray((field.numpy() * 255).astype(np.uint8)).resize(padded, Image.Resampling.BICUBIC)
    heat = np.asarray(scaled.crop((0, 0, *size)).resize(grey.shape[1::-1]), dtype=np.float32)[..., None] / 255
    colour = COLD + heat * (HOT - COLD)
    return Image.fromarray((colour * (0.35 + 0.65 * grey)).astype(np.uint8))


def spectrum(groups: Mapping[str, Sequence[Attention]]) -> Figure:
    """How much of each attention matrix its first singular values hold, for several codecs side by side.

    `groups` maps a codec's label to its three attentions (see `taco_nb.inspection.attentions`).
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, records in groups.items():
        for record in records:
            shares = energy(record.weights)
            figure.add_scatter(x=list(range(1, len(shares) + 1)), y=shares.tolist(), name=f"{label}, {record.name}")
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
