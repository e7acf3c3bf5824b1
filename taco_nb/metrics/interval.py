"""The bootstrap interval of a mean over images says how sure it is: what another choice of images would have given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from taco_nb.metrics.networks import OF_SETS

FEWEST = 10
"""An interval is given from so many images on. The bootstrap can only reshuffle the images that there are."""
DRAWS = 2000
"""An interval rests on so many bootstrap samples."""


def interval(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of `values`, one per image.

    It lies between percentiles of the means of resampled values (Efron and Tibshirani 1993, ch. 13). Both ends are NaN for
    fewer than two values, which say nothing about a spread.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = bootstrap(
        (values,), np.mean, n_resamples=draws, batch=max(1, 4_000_000 // len(values)), method="percentile",
        confidence_level=0.95, random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def interval_of(
    metric: str, values: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the `interval` of a metric's values; NaN twice for fewer than `FEWEST`, or figures of a whole data set."""
    few = len(values) < FEWEST or metric in OF_SETS
    return (math.nan, math.nan) if few else interval(values, draws, seed)
