"""This module counts bits: the rate of one file, and the average gap between two rate-distortion curves.

Bjøntegaard's measure integrates that gap over the range that both curves cover, with the rate on a logarithmic axis
(G. Bjøntegaard, "Calculation of average PSNR differences between RD-curves", ITU-T VCEG-M33, 2001). Two ways of
drawing a curve through its points are in use, and published numbers come from both:

- `"pchip"` (the default) joins the points by monotone piecewise cubics, as the spreadsheets of JCT-VC's common test
  conditions and their successors do. It passes through every measurement and never overshoots between two of them.
- `"cubic"` is M33's own: a single third-order polynomial, exact for four points, least squares for more. Of more
  points it misses some (of JPEG's 19 published on Kodak by up to 0.13 dB), so use it only to compare with figures
  that were computed that way.

The integral is the `bjontegaard` package's; the checks before it say what is wrong with a curve, and where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from taco_nb.errors import SettingError

BD_POINTS = 4
"""Bjøntegaard's measure was made for curves of four points.

Fewer do not determine a curve well enough to measure a difference of a few per cent.
"""
_FEWEST_POINTS = {"pchip": 2, "cubic": 4}  # what each method can draw a curve through at all


def bpp(n_bytes: int, width: int, height: int) -> float:
    """Return the bits per pixel of a file of `n_bytes` that holds a picture of `width` x `height` pixels.

    Raises `SettingError` for a negative size or a picture without pixels.
    """
    if n_bytes < 0 or width < 1 or height < 1:
        raise SettingError(f"{n_bytes} bytes for {width}x{height} pixels have no bpp: sizes are positive.")
    return 8 * n_bytes / (width * height)


def bd_rate(
    anchor_rate: Sequence[float],
    anchor_quality: Sequence[float],
    rate: Sequence[float],
    quality: Sequence[float],
    method: str = "pchip",
) -> float:
    """Return the average difference in rate at equal quality, in percent of the anchor's: -10 means a tenth fewer bits.

    Rates are positive, in any one unit; the points of a curve come in any order. Quality is any measure that rises
    with the rate (PSNR, MS-SSIM) or falls with it (LPIPS), the same for both curves. See the module for `method`.
    Where the result is shown, `few_points` belongs beside it.
    Raises `SettingError` for too few points (2 for "pchip", 4 for "cubic"), rates that are not positive or not
    distinct, a quality that does not follow the rate in one direction, and curves that share no quality.
    """
    import bjontegaard  # here, because it loads matplotlib

    anchor = _curve(anchor_rate, anchor_quality, "anchor", method)
    other = _curve(rate, quality, "compared", method)
    direction = _direction(*anchor, "anchor")
    if direction != _direction(*other, "compared"):
        raise SettingError("Quality rises with the rate on one curve only: is it the same measure on both?")
    _check_overlap(anchor[1], other[1], "quality")
    # The package draws log-rate over quality, and wants the points by rising quality.
    by_quality = [values[::direction] for values in (*anchor, *other)]
    return float(bjontegaard.bd_rate(*by_quality, method, require_matching_points=False, min_overlap=0))


def bd_quality(
    anchor_rate: Sequence[float],
    anchor_quality: Sequence[float],
    rate: Sequence[float],
    quality: Sequence[float],
    method: str = "pchip",
) -> float:
    """Return the average difference in quality at equal rate, in quality's own unit (for PSNR it is BD-PSNR, in dB).

    Positive means a higher value than the anchor's, which for LPIPS is worse. Arguments are those of `bd_rate`; as
    quality is read off at a rate, a curve may dip. Raises `SettingError` for too few points, rates that are not
    positive or not distinct, and curves that share no rate.
    """
    import bjontegaard

    anchor = _curve(anchor_rate, anchor_quality, "anchor", method)
    other = _curve(rate, quality, "compared", method)
    _check_overlap(anchor[0], other[0], "rate")
    # "PSNR" is the package's word for any quality.
    return float(bjontegaard.bd_psnr(*anchor, *other, method, require_matching_points=False, min_overlap=0))


def few_points(*counts: int) -> str:
    """Return what to say beside curves with so many points: "only 3 points", or "" if each has `BD_POINTS` or more."""
    fewest = min(counts)
    return "" if fewest >= BD_POINTS else f"only {fewest} point{'s' * (fewest != 1)}"


def rate_at(rate: Sequence[float], quality: Sequence[float], wanted: float) -> float:
    """Return the rate at which a curve reaches the quality `wanted`, by monotone cubics between its points.

    The curve is one that `bd_rate` takes, and the result is in the unit of its rates. Raises `SettingError` as that does,
    and for a quality beyond the two ends of the curve.
    """
    rate, quality = _curve(rate, quality, "given", "pchip")
    direction = _direction(rate, quality, "given")
    if not quality.min() <= wanted <= quality.max():
        ends = f"{quality.min():.6g} to {quality.max():.6g}"
        raise SettingError(f"The curve runs from {ends}; {wanted:.6g} is not on it.")
    return math.exp(float(PchipInterpolator(direction * quality, np.log(rate))(direction * wanted)))


def _curve(rate, quality, name: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Check a curve and return it as (rate, quality), by ascending rate."""
    if method not in _FEWEST_POINTS:
        known = sorted(_FEWEST_POINTS)
        raise SettingError(f"There is no method {method!r} for Bjøntegaard's measure; choose from {known}.")
    rate, quality = np.asarray(rate, dtype=float), np.asarray(quality, dtype=float)
    if rate.ndim != 1 or rate.shape != quality.shape:
        shapes = f"{rate.shape} and {quality.shape}"
        raise SettingError(f"The {name} curve needs one quality for each rate, but the shapes are {shapes}.")
    fewest = _FEWEST_POINTS[method]
    if len(rate) < fewest:
        raise SettingError(f"The {name} curve has {len(rate)} points; {method!r} needs at least {fewest}.")
    if not (np.isfinite(rate).all() and np.isfinite(quality).all() and (rate > 0).all()):
        raise SettingError(
            f"The {name} curve needs finite qualities and finite rates above 0; leave out other points."
        )
    order = np.argsort(rate)
    rate, quality = rate[order], quality[order]
    if not np.diff(rate).all():
        raise SettingError(f"The {name} curve has two points of the same rate; keep one of them.")
    return rate, quality


def _direction(rate: np.ndarray, quality: np.ndarray, name: str) -> int:
    """Return 1 if quality rises with the rate, -1 if it falls; raise `SettingError` if it does neither throughout."""
    steps = np.sign(np.diff(quality))
    turns = np.flatnonzero((steps == 0) | (steps != steps[0]))
    if turns.size:
        raise SettingError(
            f"The quality of the {name} curve turns or stands still after rate {rate[turns[0]]:.6g}, "
            "so one quality is reached at several rates; leave out such points, or use bd_quality."
        )
    return int(steps[0])


def _check_overlap(anchor: np.ndarray, other: np.ndarray, axis: str) -> None:
    """Raise `SettingError` if two curves share no more than a point of the axis along which they are compared."""
    if max(anchor.min(), other.min()) >= min(anchor.max(), other.max()):
        ranges = [f"{values.min():.6g} to {values.max():.6g}" for values in (anchor, other)]
        raise SettingError(
            f"The curves share no {axis}: the anchor's runs from {ranges[0]}, the compared one's from {ranges[1]}."
        )
