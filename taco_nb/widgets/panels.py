"""The report's figures: for one data set, several qualities over the rate, a panel each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from taco_nb.widgets.figures import _COLOURS, _LAYOUT, curve_name

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

PANELS = {"lpips_01": "LPIPS (as TACO feeds it)", "psnr": "PSNR in dB", "fid": "FID", "cmmd": "CMMD"}
DIFFERENCES = {
    "bpp": "bits per pixel",
    "psnr": "PSNR in dB",
    "ms_ssim": "MS-SSIM",
    "lpips_01": "LPIPS",
    "clip_score": "CLIP score",
}


def rate_panels(
    points: pd.DataFrame,
    *,
    published: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    stated: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Figure:
    """LPIPS, PSNR, FID and CMMD over bits per pixel, a curve per label of `points` (from `taco_nb.report.points`).

    Points that may be held against published figures are filled, others hollow. `published` are curves from the literature,
    {name: {"bpp": [...], "psnr": [...]}}, drawn dotted; `stated` are single values of known quality and unknown rate,
    {name: {metric: value}}, drawn as level lines. The title names the metrics of which there is nothing to show, and the
    legend says so of a curve through fewer than four points.
    """
    from plotly.subplots import make_subplots

    published, stated = published or {}, stated or {}
    held = {
        metric: points[metric].notna().any()
        or any(curve.get(metric) for curve in published.values())
        or any(_plain(metric) in values for values in stated.values())
        for metric in PANELS
    }
    shown = [metric for metric in PANELS if held[metric]] or ["psnr"]
    rows = -(-len(shown) // 2)
    titles = [PANELS[metric] for metric in shown]
    figure = make_subplots(rows, min(2, len(shown)), subplot_titles=titles, vertical_spacing=0.2)
    # A curve has one entry in the legend for all panels, so the panel with the fewest of its points decides.
    legend = {
        label: curve_name(label, min((n for n in curve[shown].count() if n), default=0))
        for label, curve in points.groupby("label", sort=False)
    }
    rates = [*points["bpp"], *(rate for curve in published.values() for rate in curve["bpp"])]
    for i, metric in enumerate(shown):
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        _measured(figure, points.dropna(subset=[metric]).sort_values("bpp"), metric, place, legend)
        for name, curve in published.items():
            if curve.get(metric):
                line = {"width": 1, "dash": "dot"}
                published_name = curve_name(f"{name}, published", len(curve["bpp"]))
                _line(figure, curve["bpp"], curve[metric], published_name, line, place)
        for name, values in stated.items():
            if _plain(metric) in values:
                level = [values[_plain(metric)]] * 2
                line = {"width": 1.5, "dash": "dash", "color": "#333" if name == "baseline" else "#999"}
                _line(figure, [0, max(rates, default=1)], level, f"the report, {name}", line, place)
    missing = ", ".join(
        metric for metric in map(_plain, PANELS) if metric not in map(_plain, shown) or not any(held.values())
    )
    note = f"<br><sub>nothing to show of {missing}</sub>" if missing else ""
    figure.update_xaxes(title_text="bits per pixel, from file sizes", rangemode="tozero")
    layout: dict[str, Any] = {**_LAYOUT, "height": 150 + 330 * rows, "margin": _LAYOUT["margin"] | {"t": 105}}
    layout["title"] = {"text": title + note, "x": 0.5, "yref": "container", "y": 0.97, "yanchor": "top"}
    figure.update_layout(**layout, legend={"orientation": "h", "y": -0.3 / rows, "yanchor": "top"})
    _legend_once(figure)
    return figure


def _plain(metric: str) -> str:
    return metric.removesuffix("_01")


def _measured(
    figure: Figure, points: pd.DataFrame, metric: str, place: dict[str, int], names: Mapping[str, str]
) -> None:
    for label, curve in points.groupby("label", sort=False):
        symbols = ["circle" if reason == "" else "circle-open" for reason in curve["unjudged"]]
        # a mean may be over fewer than all images, such as MS-SSIM, which small ones do not have
        counts = curve[f"{metric}_images"] if f"{metric}_images" in curve else curve["images"]
        said = [
            f"{run}<br>lambda {lmbda:g}, mean of {count:.0f} images"
            + (f"<br>not judged: {reason}" if reason else "")
            for run, lmbda, count, reason in zip(curve["run"], curve["lmbda"], counts, curve["unjudged"])
        ]
        figure.add_scatter(
            x=curve["bpp"], y=curve[metric], name=names[label], mode="lines+markers", marker={"size": 9, "symbol": symbols},
            text=said, hovertemplate="%{text}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>", **place,
        )  # fmt: skip


def _line(
    figure: Figure, x: Sequence[float], y: Sequence[float], name: str, line: dict, place: dict[str, int]
) -> None:
    figure.add_scatter(x=list(x), y=list(y), name=name, mode="lines", line=line, **place)


def _legend_once(figure: Figure) -> None:
    """One entry in the legend, and one colour, for what is in several panels."""
    names = list(dict.fromkeys(trace.name for trace in figure.data))
    seen = set()
    for trace in figure.data:
        colour = trace.line.color or _COLOURS[names.index(trace.name) % len(_COLOURS)]
        trace.update(line_color=colour, legendgroup=trace.name, showlegend=trace.name not in seen)
        seen.add(trace.name)


def difference_plot(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Mean differences to the baseline with their 95 % intervals (from `taco_nb.verdicts.paired`), a panel per metric."""
    from plotly.subplots import make_subplots

    shown = pairs[pairs["metric"].isin(DIFFERENCES) & pairs["low"].notna()]
    metrics = [metric for metric in DIFFERENCES if (shown["metric"] == metric).any()]
    figure = make_subplots(
        1, max(1, len(metrics)), shared_yaxes=True, subplot_titles=[DIFFERENCES[m] for m in metrics]
    )
    for column, metric in enumerate(metrics, start=1):
        rows = shown[shown["metric"] == metric]
        figure.add_scatter(
            x=rows["difference"], y=rows["ablation"] + "<br>" + rows["dataset"] + rows["lmbda"].map(", lambda {:g}".format),
            error_x={"array": rows["high"] - rows["difference"], "arrayminus": rows["difference"] - rows["low"]},
            mode="markers", marker={"color": _COLOURS[0], "size": 9}, showlegend=False, row=1, col=column,
        )  # fmt: skip
        figure.add_vline(0, line={"width": 1, "color": "#777"}, row=1, col=column)
    lines = len(shown[["ablation", "dataset", "lmbda"]].drop_duplicates())
    figure.update_layout(**{**_LAYOUT, "height": 170 + 45 * lines, "title": {"text": title, "x": 0.5}})
    figure.update_layout(margin={"l": 130, "t": 80})
    figure.update_xaxes(nticks=4, tickangle=0)
    return figure
