"""Curves, drawn with plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from taco_nb.evaluation import means

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
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 460, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}


def rate_distortion(
    *results: pd.DataFrame, published: Mapping[str, Mapping[str, Sequence[float]]] | None = None, title: str = ""
) -> Figure:
    """Quality over bits per pixel, a curve per codec through its means; a menu chooses the metric.

    `results` come from `taco_nb.evaluation`, and are averaged over the images of each data set; `published` gives curves
    from the literature as {name: {"bpp": [...], "psnr": [...]}}, drawn thin and dashed.
    """
    import pandas as pd
    import plotly.graph_objects as go

    table = means(pd.concat(results, ignore_index=True))
    metrics = [metric for metric in METRICS if metric in table and table[metric].notna().any()]
    figure = go.Figure()
    owners: list[str] = []
    for metric in metrics:
        for i, ((codec, dataset), curve) in enumerate(table.groupby(["codec", "dataset"], sort=False)):
            if curve[metric].isna().all():
                continue
            curve = curve.sort_values("bpp")
            single = len(curve) == 1
            figure.add_scatter(
                x=curve["bpp"],
                y=curve[metric],
                name=f"{codec}, {dataset}",
                mode="markers" if single else "lines+markers",
                marker={"size": 13 if single else 6, "symbol": "star" if single else "circle"},
                line={"color": _COLOURS[i % len(_COLOURS)]},
                text=_points(curve),
                hovertemplate="%{text}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>",
                visible=metric == metrics[0],
            )
            owners.append(metric)
        for name, curve in (published or {}).items():
            if curve.get(metric):
                figure.add_scatter(
                    x=list(curve["bpp"]),
                    y=list(curve[metric]),
                    name=f"{name} (published)",
                    mode="lines",
                    line={"width": 1, "dash": "dot"},
                    visible=metric == metrics[0],
                )
                owners.append(metric)
    buttons = [
        {
            "label": METRICS[metric],
            "method": "update",
            "args": [{"visible": [owner == metric for owner in owners]}, {"yaxis.title.text": METRICS[metric]}],
        }
        for metric in metrics
    ]
    figure.update_layout(
        **_LAYOUT,
        title={"text": title, "x": 0.5},
        xaxis={"title": "bits per pixel, from file sizes", "type": "log", "dtick": "D2"},
        yaxis_title=METRICS[metrics[0]],
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}],
    )
    return figure


def training_curves(log: pd.DataFrame) -> Figure:
    """The terms of the loss over steps, each in its own panel, from a run's `log`."""
    from plotly.subplots import make_subplots

    terms = [name for name in ("loss", "bpp", "mse", "lpips", "joint", "lr") if name in log]
    figure = make_subplots(rows=1, cols=len(terms), subplot_titles=terms)
    for column, name in enumerate(terms, start=1):
        figure.add_scatter(
            x=log["step"], y=log[name], name=name, mode="lines+markers", showlegend=False, row=1, col=column,
            line={"color": _COLOURS[0]},
        )  # fmt: skip
    figure.update_xaxes(title_text="step")
    figure.update_layout(**{**_LAYOUT, "height": 300})
    return figure


def _points(curve: pd.DataFrame) -> list[str]:
    """What each point of a curve is: its quality setting, where it has one, and the images behind the mean."""
    qualities = curve["quality"] if "quality" in curve else [None] * len(curve)
    return [
        f"mean of {count} images" + (f", quality {quality:.0f}" if quality == quality and quality is not None else "")
        for quality, count in zip(qualities, curve["images"])
    ]
