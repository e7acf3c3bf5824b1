"""Curves are drawn with plotly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from taco_nb.evaluation import means
from taco_nb.metrics.rate import few_points

METRICS = {
    "psnr": "PSNR in dB",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS ([-1, 1] inputs, lower is better)",
    "lpips_01": "LPIPS as TACO measures it ([0, 1] inputs, lower is better)",
    "clip_score": "CLIP score (100 cos, picture and caption)",
    "fid": "FID (lower is better)",
    "cmmd": "CMMD (lower is better)",
    "mini_distance": "mini_distance (lower is better)",
    "mini_score": "mini_score (100 cos, picture and caption)",
    "mini_mmd": "mini_mmd (lower is better)",
}
PANELS = {"lpips_01": "LPIPS (as TACO feeds it)", "psnr": "PSNR in dB", "fid": "FID", "cmmd": "CMMD"}
DIFFERENCES = {
    "bpp": "bits per pixel",
    "psnr": "PSNR in dB",
    "ms_ssim": "MS-SSIM",
    "lpips_01": "LPIPS",
    "clip_score": "CLIP score",
    "mini_distance": "mini_distance",
    "mini_score": "mini_score",
}
IMAGES = 100
"""So many images of a data set have points of their own; thirty thousand would be a cloud, and a page of 50 MB."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_OF_PEERS = {"JPEG": COLOURS[4], "WebP": COLOURS[2], "AVIF": COLOURS[3]}
"""Other codecs have the same colours in every figure; ours take the rest in order."""
_OF_OURS = [colour for colour in COLOURS if colour not in _OF_PEERS.values()]
# Plotly's own marks would write 0.2 as a small 2.
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
LAYOUT = {"template": "plotly_white", "height": 460, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""Curves from the literature, {name: {"bpp": [...], "psnr": [...]}}."""


# All codecs on all data sets, with a menu -----------------------------------------------------------------------------


def rate_distortion(*results: pd.DataFrame, published: Curves | None = None, title: str = "") -> Figure:
    """Draw quality over bits per pixel: a curve per codec through its means, and a small point per image.

    `results` come from `taco_nb.evaluation`. A menu chooses the metric, and another the data set where there are several.
    An image's point says its name (only the first `IMAGES` of a set have one). `published` curves, measured on Kodak, are
    thin and dotted. A curve through fewer than four points says so in the legend.
    """
    rows = pd.concat(results, ignore_index=True)
    table = means(rows)
    metrics = [metric for metric in METRICS if metric in table and table[metric].notna().any()]
    sets = list(dict.fromkeys(table["dataset"]))
    figure = Figure()
    # A menu's entry gives every trace its new y, visibility and place in the legend, so each trace is noted here: its data
    # set, its y by metric (without those that nobody measured), and whether it may stand in the legend.
    traces: list[tuple[str, dict[str, list], bool]] = []

    def add(dataset: str, y: dict[str, list], named: bool, **trace: Any) -> None:
        first = y.get(metrics[0], [])
        figure.add_scatter(y=first, visible=dataset == sets[0], showlegend=named and bool(first), **trace)
        traces.append((dataset, y, named))

    ours = [name for name in table["codec"].unique() if name not in _OF_PEERS]
    colours = _OF_PEERS | {name: _OF_OURS[i % len(_OF_OURS)] for i, name in enumerate(ours)}
    for (codec, dataset), curve in table.groupby(["codec", "dataset"], sort=False):
        curve = curve.sort_values("bpp")
        single = len(curve) == 1  # a codec of one quality is a star
        group, colour = f"{codec}, {dataset}", colours[codec]
        add(
            dataset,
            _by_metric(curve, metrics),
            True,
            x=curve["bpp"],
            name=curve_name(group, len(curve)),
            legendgroup=group,
            mode="markers" if single else "lines+markers",
            marker={"size": 13 if single else 6, "symbol": "star" if single else "circle"},
            line={"color": colour},
            text=_said_of_means(curve),
            hovertemplate="%{text}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>",
        )
        images = rows[(rows["codec"] == codec) & (rows["dataset"] == dataset)]
        images = images[images["name"].isin(images["name"].unique()[:IMAGES])]
        quality = images["quality"] if "quality" in images else pd.Series(math.nan, images.index)
        # The images come after the means, and so above them: where a mean is of one image, a click is to find the image.
        add(
            dataset,
            _by_metric(images, metrics),
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
    # An entry is a label, what it changes in the traces, and what in the layout.
    by_metric = []
    for metric in metrics:
        shown = {
            "y": [y.get(metric, []) for _, y, _ in traces],
            "showlegend": [named and bool(y.get(metric)) for _, y, named in traces],
        }
        by_metric.append((METRICS[metric], shown, {"yaxis.title.text": METRICS[metric]}))
    by_set = [(name, {"visible": [of == name for of, _, _ in traces]}, {}) for name in sets]
    menus = [by_metric, by_set] if len(sets) > 1 else [by_metric]
    figure.update_layout(
        LAYOUT,
        # the title stands above the menus, which on a narrow page would cover it
        title={"text": title, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top"},
        margin_t=90 if title else 60,
        xaxis={"title": "bits per pixel, from file sizes", "type": "log", "tickvals": _TICKS},
        yaxis_title=METRICS[metrics[0]],
        updatemenus=[
            {
                "buttons": [{"label": label, "method": "update", "args": args} for label, *args in entries],
                "x": x,
                "xanchor": anchor,
                "y": 1.02,
                "yanchor": "bottom",
            }
            for entries, x, anchor in zip(menus, (0, 1), ("left", "right"))
        ],
    )
    return figure


def curve_name(name: str, points: int) -> str:
    """Return the name of a curve as the legend shows it: with the number of its points if they are few."""
    few = few_points(points)
    # a single point is no curve, and is not drawn as one
    return f"{name}, {few}" if few and points > 1 else name


def _by_metric(rows: pd.DataFrame, metrics: Sequence[str]) -> dict[str, list]:
    """Return the rows' values of each metric that any of them has, with None for NaN, which JSON does not know."""
    known = [metric for metric in metrics if rows[metric].notna().any()]
    return {metric: [None if math.isnan(value) else value for value in rows[metric]] for metric in known}


def _said_of_means(curve: pd.DataFrame) -> list[str]:
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


# Training -------------------------------------------------------------------------------------------------------------


def training_curves(log: pd.DataFrame, title: str = "") -> Figure:
    """Draw the terms of the loss over steps, each in its own panel, from at most 1000 rows of a run's `log`."""
    # A long run's log has more rows than a panel has pixels.
    log = log.iloc[:: max(1, -(-len(log) // 1000))]
    terms = [name for name in ("loss", "bpp", "mse", "lpips", "mini_distance", "joint", "lr") if name in log]
    # More than three panels beside each other have no room for their scales on a narrow page.
    lines = math.ceil(len(terms) / 3)
    figure = make_subplots(lines, 3, subplot_titles=terms, vertical_spacing=0.22)
    for i, name in enumerate(terms):
        row, column = divmod(i, 3)
        figure.add_scatter(
            x=log["step"], y=log[name], name=name, mode="lines+markers", showlegend=False, row=row + 1, col=column + 1,
            line={"color": COLOURS[0]},
        )  # fmt: skip
    figure.update_xaxes(title_text="step", row=lines)
    figure.update_layout(LAYOUT, height=130 + 170 * lines, margin_t=80, title=title)
    return figure


# The report's figures: one data set, several metrics, a panel each ----------------------------------------------------


def rate_panels(
    points: pd.DataFrame,
    *,
    published: Curves | None = None,
    stated: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> Figure:
    """Draw LPIPS, PSNR, FID and CMMD over bits per pixel, a curve per label of `points` (from `taco_nb.report.points`).

    Points that may be held against published figures are filled, others hollow. `published` curves are dotted. `stated` are
    single values of known quality and unknown rate, {name: {metric: value}}, drawn as level lines. The title names the
    metrics of which there is nothing to show, and the legend says so of a curve through fewer than four points.
    """
    published, stated = published or {}, stated or {}
    plain = {metric: metric.removesuffix("_01") for metric in PANELS}  # the names in `stated`
    held = [
        metric
        for metric in PANELS
        if points[metric].notna().any()
        or any(curve.get(metric) for curve in published.values())
        or any(plain[metric] in values for values in stated.values())
    ]
    panels = held or ["psnr"]  # empty axes are clearer than no figure
    rows = -(-len(panels) // 2)
    figure = make_subplots(
        rows, min(2, len(panels)), subplot_titles=[PANELS[metric] for metric in panels], vertical_spacing=0.2
    )
    # A curve has one entry in the legend for all panels, so the panel with the fewest of its points decides.
    legend = {
        label: curve_name(label, min((n for n in curve[panels].count() if n), default=0))
        for label, curve in points.groupby("label", sort=False)
    }
    rates = [*points["bpp"], *(rate for curve in published.values() for rate in curve["bpp"])]
    for i, metric in enumerate(panels):
        place = {"row": i // 2 + 1, "col": i % 2 + 1}
        measured = points.dropna(subset=[metric]).sort_values("bpp")
        for label, curve in measured.groupby("label", sort=False):
            figure.add_scatter(
                x=curve["bpp"], y=curve[metric], name=legend[label], mode="lines+markers", text=_said_of_runs(curve, metric),
                marker={"size": 9, "symbol": ["circle-open" if reason else "circle" for reason in curve["unjudged"]]},
                hovertemplate="%{text}<br>%{x:.3f} bpp, %{y:.4g}<extra>%{fullData.name}</extra>", **place,
            )  # fmt: skip
        for name, curve in published.items():
            if curve.get(metric):
                figure.add_scatter(
                    x=list(curve["bpp"]), y=list(curve[metric]), mode="lines",
                    name=curve_name(f"{name}, published", len(curve["bpp"])), line={"width": 1, "dash": "dot"}, **place,
                )  # fmt: skip
        for name, values in stated.items():
            if plain[metric] in values:
                figure.add_scatter(
                    x=[0, max(rates, default=1)], y=[values[plain[metric]]] * 2, name=f"the report, {name}", mode="lines",
                    line={"width": 1.5, "dash": "dash", "color": "#333" if name == "baseline" else "#999"}, **place,
                )  # fmt: skip
    missing = ", ".join(plain[metric] for metric in PANELS if metric not in held)
    note = f"<br><sub>nothing to show of {missing}</sub>" if missing else ""
    figure.update_xaxes(title_text="bits per pixel, from file sizes", rangemode="tozero")
    figure.update_layout(
        LAYOUT,
        height=150 + 330 * rows,
        margin_t=105,
        title={"text": title + note, "x": 0.5, "yref": "container", "y": 0.97, "yanchor": "top"},
        legend={"orientation": "h", "y": -0.3 / rows, "yanchor": "top"},
    )
    # What is in several panels has one entry in the legend, and one colour.
    names = list(dict.fromkeys(trace.name for trace in figure.data))
    for i, trace in enumerate(figure.data):
        colour = trace.line.color or COLOURS[names.index(trace.name) % len(COLOURS)]
        seen = trace.name in {earlier.name for earlier in figure.data[:i]}
        trace.update(line_color=colour, legendgroup=trace.name, showlegend=not seen)
    return figure


def _said_of_runs(curve: pd.DataFrame, metric: str) -> list[str]:
    """Say of each point which run it is, and why it is not judged, if it is not."""
    # A mean may be over fewer than all images, such as that of MS-SSIM, which small ones do not have.
    counts = curve[f"{metric}_images"] if f"{metric}_images" in curve else curve["images"]
    return [
        f"{run}<br>lambda {lmbda:g}, mean of {count:.0f} images"
        + (f"<br>not judged: {reason}" if reason else "")
        for run, lmbda, count, reason in zip(curve["run"], curve["lmbda"], counts, curve["unjudged"])
    ]


def difference_plot(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Draw mean differences to the baseline with their 95 % intervals, a panel per metric.

    `pairs` comes from `taco_nb.verdicts.paired`.
    """
    known = pairs[pairs["metric"].isin(DIFFERENCES) & pairs["low"].notna()]
    labels = known["ablation"] + "<br>" + known["dataset"] + known["lmbda"].map(", lambda {:g}".format)
    return _interval_panels(known.assign(label=labels), DIFFERENCES, title)


def effect_plot(found: pd.DataFrame, title: str = "") -> Figure:
    """Draw what other captions change against the own one, with 95 % intervals, a panel per metric.

    `found` comes from `taco_nb.control.effects`. A line says what differs: condition, codec or data set. Effects of too few
    pictures for an interval have none.
    """
    differ = [name for name in ("codec", "condition", "dataset") if found[name].nunique() > 1]
    labels = found[differ or ["condition"]].agg("<br>".join, axis=1)
    known = found.assign(label=labels, difference=found["effect"])
    return _interval_panels(known, dict(zip(found["metric"], found["unit"])), title)


def sibling_plot(found: pd.DataFrame, title: str = "") -> Figure:
    """Draw how siblings differ, from `taco_nb.control.against`: the 95 % interval over pictures, and each seed by itself.

    A panel per metric; a line per pair of siblings. Seeds are small open circles.
    """
    named = found[["codec", "sibling"]].apply(
        lambda names: names.str.removeprefix("demo-").replace("demo", "baseline")
    )
    labels = named["codec"] + "<br>minus " + named["sibling"]
    known = found.assign(label=labels, difference=found["effect"])
    return _interval_panels(known, dict(zip(found["metric"], found["unit"])), title)


def _interval_panels(rows: pd.DataFrame, titles: Mapping[str, str], title: str) -> Figure:
    """Draw a panel per metric, with a line per label: the difference as a point, from low to high as a bar.

    Where rows have "seeds", the differences of each seed are drawn too.
    """
    metrics = [metric for metric in titles if (rows["metric"] == metric).any()]
    figure = make_subplots(
        1, max(1, len(metrics)), shared_yaxes=True, subplot_titles=[titles[metric] for metric in metrics]
    )
    for column, metric in enumerate(metrics, start=1):
        of = rows[rows["metric"] == metric].iloc[::-1]  # the first line on top
        figure.add_scatter(
            x=of["difference"], y=of["label"],
            error_x={"array": of["high"] - of["difference"], "arrayminus": of["difference"] - of["low"]},
            mode="markers", marker={"color": COLOURS[0], "size": 9}, showlegend=False, row=1, col=column,
        )  # fmt: skip
        if "seeds" in of:
            each = of[["label", "seeds"]].explode("seeds")
            figure.add_scatter(
                x=each["seeds"], y=each["label"], mode="markers", showlegend=False, row=1, col=column,
                marker={"color": COLOURS[1], "size": 7, "symbol": "circle-open"},
                hovertemplate="one seed: %{x:.4g}<extra></extra>",
            )  # fmt: skip
        figure.add_vline(0, line={"width": 1, "color": "#777"}, row=1, col=column)
    figure.update_layout(
        LAYOUT,
        height=170 + 45 * rows["label"].nunique(),
        margin={"l": 130, "t": 80},
        title={"text": title, "x": 0.5},
    )
    figure.update_xaxes(nticks=3, tickfont_size=11, tickangle=0, exponentformat="none")
    return figure


def listening_bars(found: pd.DataFrame, title: str = "Listening") -> Figure:
    """Draw the listening of each codec, in dB, from low to high: a bar for each kind of scene.

    `found` comes from `taco_nb.control.heard`, with intervals over the scenes, or from `over_seeds`, with the range of the
    seeds.
    """
    figure = Figure()
    for (kind, of), colour in zip(found.groupby("kind", sort=False), COLOURS):
        figure.add_bar(
            x=of["codec"].str.removeprefix("shapes-"), y=of["listening"], name=f"{kind} scenes", marker_color=colour,
            error_y={"array": of["high"] - of["listening"], "arrayminus": of["listening"] - of["low"]},
        )  # fmt: skip
    figure.update_layout(
        LAYOUT,
        height=400,
        title={"text": title, "x": 0.5},
        barmode="group",
        yaxis_title="dB of the named shape, own caption less another's",
    )
    return figure
