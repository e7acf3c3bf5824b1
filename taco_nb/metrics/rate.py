"""Bits: the rate of one file, and the average gap between two rate-distortion curves.

Bjøntegaard's measure integrates that gap over the range that both curves cover, with the rate on a logarithmic axis
(G. Bjøntegaard, "Calculation of average PSNR differences between RD-curves", ITU-T VCEG-M33, 2001). Two ways of
drawing a curve through its points are in use, and published numbers come from both:

- `"pchip"` (the default) joins the points by monotone piecewise cubics, as the spreadsheets of JCT-VC's common test
  conditions and their successors do. It passes through every measurement and never overshoots between two of them.
- `"cubic"` is M33's own: a single third-order polynomial, exact for four points, least squares for more. Of more
  points it misses some (of JPEG's 19 published on Kodak by up to 0.13 dB), so use it only to compare with figures
  that were computed that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial import Polynomial
from scipy.interpolate import PchipInterpolator

from taco_nb.errors import SettingError

# method: (fewest points, the antiderivative of the curve through them)
_METHODS: dict[str, tuple[int, Callable]] = {
    "pchip": (2, lambda x, y: PchipInterpolator(x, y).antiderivative()),
    "cubic": (4, lambda x, y: Polynomial.fit(x, y, 3).integ()),
}


def bpp(n_bytes: int, width: int, height: int) -> float:
    """Bits per pixel of a file of `n_bytes` that holds a picture of `width` x `height` pixels.

    Raises `SettingError` for a negative size or a picture without pixels.
    """
    if n_bytes < 0 or width < 1 or height < 1:
        raise SettingError(
            f"A file of {n_bytes} bytes for {width}x{height} pixels has no bpp: sizes must be positive."
        )
    return 8 * n_bytes / (width * height)


def bd_rate(
    anchor_rate: Sequence[float],
    anchor_quality: Sequence[float],
    rate: Sequence[float],
    quality: Sequence[float],
    method: str = "pchip",
) -> float:
    """Average difference in rate at equal quality, in percent of the anchor's: -10 means a tenth fewer bits.

    Rates are positive, in any one unit; the points of a curve come in any order. Quality is any measure that rises
    with the rate (PSNR, MS-SSIM) or falls with it (LPIPS), the same for both curves. See the module for `method`.
    Raises `SettingError` for too few points (2 for "pchip", 4 for "cubic"), rates that are not positive or not
    distinct, a quality that does not follow the rate in one direction, and curves that share no quality.
    """
    anchor, other = (
        _curve(anchor_rate, anchor_quality, "anchor", method),
        _curve(rate, quality, "compared", method),
    )
    if _direction(*anchor, "anchor") != _direction(*other, "compared"):
        raise SettingError(
            "Quality rises with the rate on one curve and falls on the other: is it the same measure?"
        )
    return 100 * math.expm1(_mean_gap(anchor[::-1], other[::-1], method, "quality"))


def bd_quality(
    anchor_rate: Sequence[float],
    anchor_quality: Sequence[float],
    rate: Sequence[float],
    quality: Sequence[float],
    method: str = "pchip",
) -> float:
    """Average difference in quality at equal rate, in quality's own unit (for PSNR this is BD-PSNR, in dB).

    Positive means a higher value than the anchor's, which for LPIPS is worse. Arguments are those of `bd_rate`; as
    quality is read off at a rate, a curve may dip. Raises `SettingError` for too few points, rates that are not
    positive or not distinct, and curves that share no rate.
    """
    anchor, other = (
        _curve(anchor_rate, anchor_quality, "anchor", method),
        _curve(rate, quality, "compared", method),
    )
    return _mean_gap(anchor, other, method, "rate")


def rate_at(rate: Sequence[float], quality: Sequence[float], wanted: float) -> float:
    """The rate at which a curve reaches the quality `wanted`, in the curve's own unit: monotone cubics between its points.

    The curve is one that `bd_rate` takes. Raises `SettingError` as that does, and for a quality beyond its two ends.
    """
    log_rate, quality = _curve(rate, quality, "given", "pchip")
    direction = _direction(log_rate, quality, "given")
    if not quality.min() <= wanted <= quality.max():
        raise SettingError(
            f"The curve runs from {quality.min():.6g} to {quality.max():.6g}; {wanted:.6g} is not on it."
        )
    return math.exp(float(PchipInterpolator(direction * quality, log_rate)(direction * wanted)))


def _curve(rate, quality, name: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """A checked curve as (natural logarithm of the rate, quality), by ascending rate."""
    if method not in _METHODS:
        raise SettingError(
            f"There is no method {method!r} for Bjøntegaard's measure; choose from {sorted(_METHODS)}."
        )
    rate, quality = np.asarray(rate, dtype=float), np.asarray(quality, dtype=float)
    if rate.ndim != 1 or rate.shape != quality.shape:
        raise SettingError(
            f"The {name} curve needs one quality for each rate, but their shapes are {rate.shape} and {quality.shape}."
        )
    fewest = _METHODS[method][0]
    if len(rate) < fewest:
        raise SettingError(
            f"The {name} curve has {len(rate)} points; method {method!r} needs at least {fewest}."
        )
    if not (np.isfinite(rate).all() and np.isfinite(quality).all() and (rate > 0).all()):
        raise SettingError(
            f"The {name} curve needs finite qualities and finite rates above 0; leave out other points."
        )
    order = np.argsort(rate)
    rate, quality = rate[order], quality[order]
    if not np.diff(rate).all():
        raise SettingError(f"The {name} curve has two points of the same rate; keep one of them.")
    return np.log(rate), quality


def _direction(log_rate: np.ndarray, quality: np.ndarray, name: str) -> float:
    """+1 where quality rises with the rate, -1 where it falls."""
    steps = np.sign(np.diff(quality))
    turns = np.flatnonzero((steps == 0) | (steps != steps[0]))
    if turns.size:
        raise SettingError(
            f"The quality of the {name} curve turns or stands still after rate {math.exp(log_rate[turns[0]]):.6g}, "
            "so one quality is reached at several rates; leave out such points, or use bd_quality."
        )
    return steps[0]


def _mean_gap(anchor, other, method: str, axis: str) -> float:
    """Mean of (other's y - anchor's y) over the x that both curves, given as (x, y), cover."""
    low, high = max(anchor[0].min(), other[0].min()), min(anchor[0].max(), other[0].max())
    if low >= high:
        scale = np.exp if axis == "rate" else np.asarray
        ranges = ["{:.6g} to {:.6g}".format(*scale([x.min(), x.max()])) for x, _ in (anchor, other)]
        raise SettingError(
            f"The curves share no {axis}: the anchor's runs from {ranges[0]}, the compared one's from {ranges[1]}."
        )
    areas = []
    for x, y in (anchor, other):
        order = np.argsort(x)
        antiderivative = _METHODS[method][1](x[order], y[order])
        areas.append(float(antiderivative(high) - antiderivative(low)))
    return (areas[1] - areas[0]) / (high - low)
