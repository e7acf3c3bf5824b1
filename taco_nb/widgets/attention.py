"""Attention is drawn over the picture, token by token, and so is its spectrum."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from IPython.display import HTML
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

from taco_nb.codec import MULTIPLE
from taco_nb.data.images import to_rgb
from taco_nb.inspection import Attention, energy
from taco_nb.text import KeywordWeights, TextTower
from taco_nb.text.keywords import Word
from taco_nb.widgets.html_parts import picture_tag, self_contained
from taco_nb.widgets.pictures import COLD, HOT, heat, side_by_side, stretched


def attention_maps(
    image: Image.Image, attention: Attention, tokens: Mapping[str, int], width: int = 240, columns: int = 4
) -> Image.Image:
    """Return the picture once per token, bright where its positions and the token attend to each other.

    `tokens` maps labels to positions in the caption. Each map is scaled from its own least to its own greatest value, and
    the label names the two: a map whose two are nearly equal looks lively and means nothing.
    """
    image = to_rgb(image)
    height = max(1, round(width * image.height / image.width))
    grey = np.asarray(image.convert("L").resize((width, height)), dtype=np.float32)[..., None] / 255
    # The map covers the padded picture: enlarge it to that size, and cut the padding off.
    padded = tuple(-(-side // MULTIPLE) * MULTIPLE for side in image.size)
    pictures = {}
    for label, token in tokens.items():
        field, low, high = stretched(_field(attention, token))
        small = Image.fromarray((field.numpy() * 255).astype(np.uint8))
        large = small.resize(padded, Image.Resampling.BICUBIC).crop((0, 0, *image.size))
        seen = np.asarray(large.resize((width, height)), dtype=np.float32) / 255
        # The picture shines through in grey, but is nowhere black, so that dark places show their colour too.
        colour = np.asarray(heat(torch.from_numpy(seen)))
        overlaid = Image.fromarray((colour * (0.35 + 0.65 * grey)).round().astype(np.uint8))
        pictures[f"{label}\n{low:.4f} to {high:.4f}"] = overlaid
    return side_by_side(pictures, columns=columns)


def _field(attention: Attention, token: int) -> Tensor:
    """Return a token's map. Where the text was pooled to one vector, every token has that vector's map."""
    texts = attention.weights.shape[1 if attention.name.startswith("Extractor") else 2]
    return attention.over_image(0 if texts == 1 else token)


class Look:
    """The result of `where_the_text_looks`: HTML in which tokens are picked without a kernel, and a plain sheet."""

    def __init__(
        self,
        image: Image.Image,
        looks: Mapping[str, Sequence[Attention]],
        tokens: list[str],
        weights: list[float] | None,
    ):
        self._image, self._looks, self._tokens, self._weights = image, looks, tokens, weights
        # Long tokens are likely to be words that one can see. The first position is no word.
        long = [i for i, token in enumerate(tokens) if i and len(token) > 3] or [0]
        self._words = {tokens[i]: i for i in long[:4]}

    def picture(self) -> Image.Image:
        """Return the last attention of each codec over the picture, for up to four words."""
        sheets = {
            label: attention_maps(self._image, records[-1], self._words)
            for label, records in self._looks.items()
        }
        return side_by_side(sheets, columns=1)

    def _repr_html_(self) -> str:
        start, colours = next(iter(self._words.values())), {"cold": COLD.tolist(), "hot": HOT.tolist()}
        settings = {"tokens": self._tokens, "weights": self._weights, "start": start, **colours}
        maps = [self._map(label, record) for label, records in self._looks.items() for record in records]
        sheet = picture_tag(self.picture(), f"Attention over the picture for {', '.join(self._words)}")
        return self_contained(
            "attention",
            f"<div {_json('tokens', settings)}></div><div data-picture>{picture_tag(self._image, '')}</div>"
            + "".join(maps)
            + sheet.replace("<img", '<img class="ta-sheet"'),
        )

    def _map(self, label: str, record: Attention) -> str:
        """Return the maps of all tokens in one picture, one below the other, each from black at its least value to white."""
        width, height = self._image.size
        step = -(-width // MULTIPLE) * MULTIPLE // record.grid[1]  # pixels to a position
        rows, columns = -(-height // step), -(-width // step)  # the rest of the grid is padding
        fields = [stretched(_field(record, i)[:rows, :columns]) for i in range(len(self._tokens))]
        greys = np.concatenate([field for field, _, _ in fields])
        sprite = Image.fromarray((greys * 255).round().astype(np.uint8)).convert("RGB")
        about = {
            "codec": label,
            "layer": record.name,
            "ranges": [(low, high) for _, low, high in fields],
            "rows": rows,
            "columns": columns,
            "width": 100 * columns * step / width,  # per cent of the picture that the map covers
            "height": 100 * rows * step / height,
        }
        return f"<div {_json('map', about)}>{picture_tag(sprite, '')}</div>"


def where_the_text_looks(
    image: Image.Image,
    looks: Mapping[str, Sequence[Attention]],
    tower: TextTower,
    caption: str,
    weights: KeywordWeights | None = None,
) -> Look:
    """Show a caption's tokens to pick from, and over the picture where the picked token attends, for one or several codecs.

    `looks` maps a label to what `taco_nb.inspection.look_at_attention` gives for a codec, this image and caption. Each map is
    scaled from its own least to its own greatest value, which stand below it. With `weights`, tokens are shaded by theirs.
    """
    spans = [span for span in tower.spans(caption) if span is not None]
    tokens = ["start", *(caption[slice(*span)] for span in spans[1:-1]), "end"]
    shades = None if weights is None else weights.token_weights([caption], tower)[0, : len(tokens)].tolist()
    return Look(to_rgb(image), looks, tokens, shades)


def _json(name: str, content: dict[str, Any]) -> str:
    """Return an HTML attribute that holds JSON."""
    return f'data-{name}="{html.escape(json.dumps(content))}"'


def spectrum(groups: Mapping[str, Sequence[Attention]]) -> Figure:
    """Draw how much of each attention matrix its first singular values hold, for several codecs side by side.

    `groups` maps a codec's label to its three attentions (see `taco_nb.inspection.look_at_attention`).
    """
    figure = Figure()
    for label, records in groups.items():
        for record in records:
            held = energy(record.weights).tolist()
            figure.add_scatter(x=list(range(1, len(held) + 1)), y=held, name=f"{label}, {record.name}")
    figure.update_layout(
        template="plotly_white",
        height=420,
        title={"text": "How much of an attention's matrix its first singular values hold", "x": 0.5},
        xaxis={"title": "number of singular values", "range": [0.5, 40.5]},
        yaxis={"title": "share of the energy"},
    )
    return figure


def shaded_caption(words: Sequence[Word], caption: str) -> HTML:
    """Return the caption with the words that matter shaded, and the reason in small letters behind each."""
    parts, at = [], 0
    for word in words:
        text = html.escape(word.text)
        if word.why:
            style = "background:#ffd65a;color:#000;padding:0 2px"
            text = f'<mark style="{style}" title="weight {word.weight:g}">{text}</mark>'
            text += f"<sub>{html.escape(word.why)}</sub>"
        parts += [html.escape(caption[at : word.start]), text]
        at = word.end
    parts.append(html.escape(caption[at:]))
    return HTML(f'<p style="line-height:2">{"".join(parts)}</p>')
