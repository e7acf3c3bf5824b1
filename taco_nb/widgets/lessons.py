"""Pictures that explain one idea each, in the notebooks' order: a latent, a paragraph, a matrix, a softmax, a saving."""

from __future__ import annotations

import html
import uuid
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from IPython.display import HTML
from PIL import Image
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots
from torch.special import ndtr

from taco_nb.inspection import Attention, DecodingStep, energy
from taco_nb.text.long import words_with_ends
from taco_nb.widgets.attention import attention_maps
from taco_nb.widgets.figures import COLOURS, LAYOUT
from taco_nb.widgets.pictures import side_by_side

_FADE = """
(() => {
  const box = document.getElementById("ID"), slider = box.querySelector("input"), said = box.querySelector("output");
  const words = [...box.querySelectorAll("span[data-end]")];
  const show = () => {
    const kept = words.filter(word => Number(word.dataset.end) <= Number(slider.value) - 2);
    words.forEach(word => word.style.opacity = kept.includes(word) ? 1 : 0.25);
    said.textContent = `${slider.value} positions: ${kept.length} of ${words.length} words`;
  };
  slider.addEventListener("input", show);
  show();
})();
"""


# 1. How a file is decoded ---------------------------------------------------------------------------------------------


def decoding_sheet(steps: Sequence[DecodingStep], zoom: int = 1) -> Image.Image:
    """Return what a decoder sees as it reads a file: after z, after the first anchors, and after each group of channels.

    `steps` comes from `taco_nb.inspection.decoding_steps`. Below each picture stands what has been read so far, in bytes.
    """
    shown, total = [], 0.0
    for i, step in enumerate(steps):
        total += float(step.bits.sum()) / 8
        # Of the later groups only the second half is shown, which completes them.
        if i < 2 or not step.anchors:
            what = step.name if i < 2 else step.name.removesuffix(", others")
            shown.append((f"{'+ ' if i else ''}{what}: {total:.0f} bytes", step.picture))
    return side_by_side(shown, zoom=zoom)


def latent_figure(step: DecodingStep) -> Figure:
    """Draw a channel of a half group, an integer per position, and beside it the Gaussian of its most expensive one.

    The channel is the one that takes most bits. The mouse over a position gives its integer, the Gaussian that the decoder
    expects it under, and its bits.
    """
    channel = int(step.bits.sum((1, 2)).argmax())
    symbols, means, scales, bits = (t[channel] for t in (step.symbols, step.means, step.scales, step.bits))
    row, column = divmod(int(bits.argmax()), bits.shape[1])
    mean, scale, found = float(means[row, column]), float(scales[row, column]), int(symbols[row, column])
    said = [
        [f"integer {s:.0f}<br>mean {m:.2f}, scale {d:.2f}<br>{b:.2f} bits" for s, m, d, b in zip(*rows)]
        for rows in zip(*(t.tolist() for t in (symbols, means, scales, bits)))
    ]
    dearest = f"the dearest of them, in orange: {bits[row, column]:.1f} bits"
    titles = [f"integers of one channel ({step.name})", dearest]
    figure = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.45, 0.55])
    figure.add_heatmap(
        z=symbols, text=said, hovertemplate="%{text}<extra></extra>", colorscale="Cividis", showscale=False, row=1, col=1,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showticklabels=False, row=1, col=1)
    figure.update_xaxes(showticklabels=False, row=1, col=1)
    reach = max(3, abs(found) + 1)
    integers = torch.arange(-reach, reach + 1)
    # An integer's probability is the Gaussian's mass within half a step of it.
    chances = ndtr((integers + 0.5) / scale) - ndtr((integers - 0.5) / scale)
    figure.add_bar(
        x=integers, y=chances, marker_color=[COLOURS[1] if n == found else COLOURS[0] for n in integers.tolist()],
        hovertemplate="integer %{x}: probability %{y:.3g}<extra></extra>", row=1, col=2,
    )  # fmt: skip
    figure.update_xaxes(title_text=f"integer, around the mean {mean:.2f}; scale {scale:.2f}", row=1, col=2)
    figure.update_yaxes(title_text="probability", row=1, col=2)
    figure.update_layout(LAYOUT, height=360, showlegend=False)
    return figure


def graded_figure(table: pd.DataFrame) -> Figure:
    """Draw what three distances say of distortions that grow from left to right, from `taco_nb.metrics.graded.graded`."""
    drawn = {"mini_distance": "mini_distance", "psnr": "PSNR in dB", "ms_ssim": "MS-SSIM"}
    figure = make_subplots(1, len(drawn), subplot_titles=[*drawn.values()])
    for column, metric in enumerate(drawn, 1):
        for (kind, of), colour in zip(table.groupby("kind", sort=False), COLOURS):
            share = [n / (len(of) - 1) for n in range(len(of))]
            figure.add_scatter(
                x=share, y=of[metric], text=of["grade"], name=kind, mode="lines+markers", line_color=colour,
                hovertemplate="%{text}: %{y:.3f}", legendgroup=kind, showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(showticklabels=False, title_text="from hardly visible<br>to gross")
    figure.update_layout(LAYOUT, height=340)
    return figure


# 2. What a cut leaves of a paragraph ----------------------------------------------------------------------------------


def fading_text(text: str, length: int = 38) -> HTML:
    """Show which words of a text fit into so many positions of CLIP; a slider moves the cut from 2 to 77 and beyond.

    The start and the end of the text take two positions.
    """
    words = words_with_ends(text)
    spans = " ".join(
        f'<span data-end="{end}"{"" if end <= length - 2 else " style=opacity:.25"}>{html.escape(word)}</span>'
        for word, end in words
    )
    name = f"fade-{uuid.uuid4().hex[:8]}"
    most = max(77, words[-1][1] + 2)
    return HTML(
        f'<div id="{name}" style="max-width:760px;line-height:1.7"><label>cut at '
        f'<input type="range" min="2" max="{most}" value="{length}" style="width:320px;vertical-align:middle"></label> '
        f"<output></output><p>{spans}</p></div><script>{_FADE.replace('ID', name)}</script>"
    )


# 3. How large an attention's matrix is, and how much of it matters ----------------------------------------------------


def matrices_to_scale(sizes: Mapping[str, tuple[int, int]], side: int = 300) -> HTML:
    """Draw matrices of (queries, keys) as rectangles to one scale, beside each other; the largest has `side` pixels."""
    scale = side / max(max(size) for size in sizes.values())
    boxes = "".join(
        f'<figure style="display:inline-block;margin:0 24px 0 0;vertical-align:top;width:{max(170, keys * scale):.0f}px">'
        f'<div style="width:{max(1, keys * scale):.1f}px;height:{max(1, queries * scale):.1f}px;background:{COLOURS[0]}">'
        f'</div><figcaption style="white-space:normal">{html.escape(name)}:<br>'
        f"{queries} x {keys} = {queries * keys:,}</figcaption></figure>"
        for name, (queries, keys) in sizes.items()
    )
    return HTML(f'<div style="white-space:nowrap;overflow-x:auto">{boxes}</div>')


def low_rank_sheet(
    image: Image.Image, attention: Attention, label: str, token: int, ranks: Sequence[int] = (1, 2, 4)
) -> Image.Image:
    """Return where a token looks, and what is left of it if the matrix keeps its first singular values alone."""
    u, s, v = torch.linalg.svd(attention.weights, full_matrices=False)
    held = energy(attention.weights)
    sheets = [(f"all of {len(held)}", attention_maps(image, attention, {label: token}))]
    for rank in ranks:
        kept = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        part = attention_maps(image, attention._replace(weights=kept), {label: token})
        sheets.append((f"the first {rank}: {held[rank - 1]:.1%} of the energy", part))
    return side_by_side(sheets)


def key_shares(looks: Mapping[str, Attention], words: int) -> Figure:
    """Draw how much of an Injector's attention each key gets, as a mean over positions and heads, with the padding marked.

    `looks` maps a title to an Injector's attention; a caption has `words` keys, its start and end included, and all others
    are padding. The titles say what share the padding takes.
    """
    shares = {name: attention.weights.mean((0, 1)) for name, attention in looks.items()}
    titles = [f"{name}: padding takes {share[words:].sum():.0%}" for name, share in shares.items()]
    figure = make_subplots(1, len(shares), subplot_titles=titles)
    for column, share in enumerate(shares.values(), 1):
        for kind, keys in (("the caption", range(words)), ("padding", range(words, len(share)))):
            figure.add_bar(
                x=[*keys], y=share[list(keys)], name=kind, showlegend=column == 1, row=1, col=column,
                marker_color=COLOURS[0 if kind == "the caption" else 4],
            )  # fmt: skip
    figure.update_xaxes(title_text="key")
    figure.update_yaxes(title_text="share of the attention", col=1)
    figure.update_layout(LAYOUT, height=340, barmode="overlay")
    return figure


# 4. A softmax over fewer and fewer keys -------------------------------------------------------------------------------


def fewer_keys(attention: Attention, counts: Sequence[int] = (38, 8, 4, 2, 1)) -> Figure:
    """Draw the softmax of one head at one position over its first keys, fewer and fewer: over a single one it is 1.

    The position is the one whose attention is the most uneven, where there is most to choose from.
    """
    rows = attention.weights.flatten(0, 1)
    row = rows[int(rows.max(-1).values.argmax())]
    figure = make_subplots(
        1, len(counts), shared_yaxes=True, subplot_titles=[f"{n} key{'s' * (n > 1)}" for n in counts]
    )
    for column, count in enumerate(counts, 1):
        kept = row[:count] / row[:count].sum()
        figure.add_bar(
            x=[*range(len(kept))], y=kept, marker_color=COLOURS[0], showlegend=False, row=1, col=column
        )
        if count <= 8:  # so that a single bar has one mark, and not three
            figure.update_xaxes(tickvals=[*range(count)], row=1, col=column)
    figure.update_yaxes(range=[0, 1.02])
    figure.update_yaxes(title_text="weight", col=1)
    figure.update_layout(LAYOUT, height=340, margin_t=80, title={"text": "One position's softmax", "x": 0.5})
    return figure


# 5. What a faster part can save ---------------------------------------------------------------------------------------


def amdahl_bar(share: float, of: str = "time") -> Figure:
    """Draw an encoder's time, or operations, as a bar: attention's share beside the rest, with a slider for that share.

    The title says how many times as fast the encoder is if attention costs nothing at all: 1 / (1 - share). `of` says what
    the share is of.
    """
    shares = sorted({round(share, 3), *(n / 20 for n in range(19))})

    def title(s: float) -> str:
        return f"If attention takes {s:.0%} of the {of}, free attention makes the encoder {1 / (1 - s):.2f} times as fast"

    figure = Figure()
    bars = {"y": ["as it is", "attention for free"], "orientation": "h"}
    figure.add_bar(x=(1 - share, 1 - share), name="the rest", marker_color=COLOURS[0], **bars)
    figure.add_bar(x=(share, 0), name="attention", marker_color=COLOURS[1], **bars)
    steps = [
        {"label": f"{s:.0%}", "method": "update",
         "args": [{"x": [[1 - s, 1 - s], [s, 0]]}, {"title.text": title(s)}]}
        for s in shares
    ]  # fmt: skip
    slider = {"active": shares.index(round(share, 3)), "steps": steps, "pad": {"t": 45}}
    figure.update_layout(
        LAYOUT, height=330, barmode="stack", title={"text": title(share), "x": 0.5},
        sliders=[{**slider, "currentvalue": {"prefix": "attention's share: "}}],
        xaxis={"range": [0, 1], "title": f"the encoder's {of}", "tickformat": ".0%"}, yaxis={"autorange": "reversed"},
    )  # fmt: skip
    return figure


# 6. What was published ------------------------------------------------------------------------------------------------


def forest_of_changes(changes: pd.DataFrame) -> Figure:
    """Draw changes to a baseline in per cent, a line each: what was published, and what was measured, if it was.

    `changes` comes from `taco_nb.verdicts.published_changes`: label, published, measured (NaN where nothing was), low, high.
    """
    figure = Figure()
    measured = changes[changes["measured"].notna()]
    figure.add_scatter(
        x=changes["published"], y=changes["label"], mode="markers", name="published",
        marker={"size": 12, "symbol": "diamond", "color": COLOURS[1]},
    )  # fmt: skip
    figure.add_scatter(
        x=measured["measured"], y=measured["label"], mode="markers", name="measured here",
        marker={"size": 10, "color": COLOURS[0]},
        error_x={"array": measured["high"] - measured["measured"], "arrayminus": measured["measured"] - measured["low"]},
    )  # fmt: skip
    missing = changes[changes["measured"].isna()]
    figure.add_scatter(
        x=[0] * len(missing), y=missing["label"], mode="text", text="not measured yet", name="", showlegend=False,
        textposition="middle right", textfont={"color": "#777"},
    )  # fmt: skip
    figure.add_vline(0, line={"width": 1, "color": "#777"})
    figure.update_layout(
        LAYOUT, height=160 + 45 * len(changes), margin={"l": 190, "t": 60},
        title={"text": "Change against the baseline, in per cent; lower is better", "x": 0.5},
        xaxis_title="per cent", yaxis={"autorange": "reversed"},
    )  # fmt: skip
    return figure
