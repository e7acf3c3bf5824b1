"""Curves, drawn with plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from taco_nb.evaluation import means
from taco_nb.metrics.rate import few_points

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

METRICS = {
    "psnr": "PSNR in dB",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS ([-1, 1] inputs, lower is better)",
    "lpips_01": "LPIPS as TACO measures it ([0, 1] inputs, lower is better)",
    "clip_score": "CLIP score (100 cos, picture and caption)",
    "fid": "FID (lower is better)",
    "cmmd": "CMMD (lower is better)",
}
IMAGES = 100
"""So many images of a data set have points of their own; thirty thousand would be a cloud and a page of 50 MB."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "height": 460,
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
}


def rate_distortion(
    *results: pd.DataFrame,
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    title: str = "",
) -> Figure:
    """Quality over bits per pixel, a curve per codec through its means and a small point per image; menus choose.

    `results` come from `taco_nb.evaluation`; one menu chooses the metric, another, where there are several, the data set.
    An image's point says its name (of large sets, the first `IMAGES` have one). `published` gives curves from the
    literature on Kodak as {name: {"bpp": [...], "psnr": [...]}}, drawn thin and dashed. A curve through fewer than four
    points says so in the legend.
    """
    import pandas as pd
    import plotly.graph_objects as go

    rows = pd.concat(results, ignore_index=True)
    table = means(rows)
    metrics = [metric for metric in METRICS if metric in table and table[metric].notna().any()]
    sets = list(dict.fromkeys(table["dataset"]))
    figure = go.Figure()
    owners: list[str] = []  # each trace's data set
    heights: list[dict[str, list]] = []  # each trace's y by metric, empty where nobody measured it
    legend: list[bool] = []

    def add(dataset: str, y: dict[str, list], named: bool, **trace: Any) -> None:
        present = bool(y.get(metrics[0]))
        figure.add_scatter(
            y=y.get(metrics[0], []), visible=dataset == sets[0], showlegend=named and present, **trace
        )
        owners.append(dataset)
        heights.append(y)
        legend.append(named)

    for i, ((codec, dataset), curve) in enumerate(table.groupby(["codec", "dataset"], sort=False)):
        curve = curve.sort_values("bpp")
        single = len(curve) == 1
        group, colour = f"{codec}, {dataset}", _COLOURS[i % len(_COLOURS)]
        add(
            dataset,
            _heights(curve, metrics),
            True,
            x=curve["bpp"],
            name=curve_name(group, len(curve)),
            legendgroup=group,
            mode="markers" if single else "lines+markers",
            marker={"size": 13 if single else 6, "symbol": "star" if single else "circle"},
            line={"color": colour},
            text=_points(curve),
            hovertemplate="%{text}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>",
        )
        images = rows[(rows["codec"] == codec) & (rows["dataset"] == dataset)]
        images = images[images["name"].isin(images["name"].unique()[:IMAGES])]
        quality = images["quality"] if "quality" in images else pd.Series(math.nan, images.index)
        # above the curves, so that of a mean over one image it is the image that answers
        add(
            dataset,
            _heights(images, metrics),
            False,
            x=images["bpp"],
            name=group,
            legendgroup=group,
            mode="markers",
            marker={"size": 6 if single else 4, "color": colour, "opacity": 0.6 if single else 0.25},
            customdata=[
                [codec, dataset, name, None if math.isnan(q) else q]
                for name, q in zip(images["name"], quality)
            ],
            hovertemplate="%{customdata[2]}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>",
        )
    for name, curve in (published or {}).items():
        add(
            sets[0] if len(sets) == 1 else "kodak",
            {metric: list(curve[metric]) for metric in metrics if curve.get(metric)},
            True,
            x=list(curve["bpp"]),
            name=curve_name(f"{name} (published)", len(curve["bpp"])),
            mode="lines",
            line={"width": 1, "dash": "dot"},
        )
    by_metric = [
        _button(
            METRICS[metric],
            {
                "y": [y.get(metric, []) for y in heights],
                "showlegend": [named and bool(y.get(metric)) for named, y in zip(legend, heights)],
            },
            {"yaxis.title.text": METRICS[metric]},
        )
        for metric in metrics
    ]
    by_set = [_button(name, {"visible": [owner == name for owner in owners]}, {}) for name in sets]
    menus = [by_metric, by_set] if len(sets) > 1 else [by_metric]
    figure.update_layout(
        **_LAYOUT,
        title={"text": title, "x": 0.5},
        xaxis={"title": "bits per pixel, from file sizes", "type": "log", "dtick": "D2"},
        yaxis_title=METRICS[metrics[0]],
        updatemenus=[
            {"buttons": buttons, "x": x, "xanchor": anchor, "y": 1.02, "yanchor": "bottom"}
            for buttons, x, anchor in zip(menus, (0, 1), ("left", "right"))
        ],
    )
    return figure


def curve_name(name: str, points: int) -> str:
    """Return the name of a curve as the legend shows it: with the number of its points if they are few."""
    few = few_points(points)
    return (
        f"{name}, {few}" if few and points > 1 else name
    )  # a single point is no curve, and is not drawn as one


def _heights(rows: pd.DataFrame, metrics: Sequence[str]) -> dict[str, list]:
    """The rows' values of each metric that any of them has; None for NaN, which JSON does not know."""
    known = [metric for metric in metrics if rows[metric].notna().any()]
    return {metric: [None if math.isnan(value) else value for value in rows[metric]] for metric in known}


def _button(label: str, traces: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """An entry of a menu that changes the traces and the layout."""
    return {"label": label, "method": "update", "args": [traces, layout]}


def training_curves(log: pd.DataFrame, title: str = "") -> Figure:
    """The terms of the loss over steps, each in its own panel, from a run's `log`; of a long one, 1000 rows or fewer."""
    from plotly.subplots import make_subplots

    log = log.iloc[:: max(1, -(-len(log) // 1000))]

    terms = [name for name in ("loss", "bpp", "mse", "lpips", "joint", "lr") if name in log]
    figure = make_subplots(rows=1, cols=len(terms), subplot_titles=terms)
    for column, name in enumerate(terms, start=1):
        figure.add_scatter(
            x=log["step"], y=log[name], name=name, mode="lines+markers", showlegend=False, row=1, col=column,
            line={"color": _COLOURS[0]},
        )  # fmt: skip
    figure.update_xaxes(title_text="step")
    figure.update_layout(**{**_LAYOUT, "height": 320, "margin": _LAYOUT["margin"] | {"t": 80}}, title=title)
    return figure


def _points(curve: pd.DataFrame) -> list[str]:
    """Say what each point of a curve is: how many images are behind its means, and its quality, where it has one."""
    said = []
    for point in curve.to_dict("records"):
        text = f"mean of {point['images']} image{'s' * (point['images'] != 1)}"
        for metric in METRICS:
            if 0 < point.get(f"{metric}_images", 0) < point["images"]:
                text += f" ({metric} of {point[f'{metric}_images']:.0f})"
        quality = point.get("quality", math.nan)
        said.append(text if math.isnan(quality) else f"{text}, quality {quality:.0f}")
    return said
