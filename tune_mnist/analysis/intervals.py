"""The mean of repeated measurements with its uncertainty."""

import math
from collections.abc import Sequence

import pandas as pd

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and the ends of its 95% interval (Student's t); NaN from too few values."""
    if not values:
        return math.nan, math.nan, math.nan
    series = pd.Series(values, dtype=float)
    mean = float(series.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy import stats  # slow to import, and only needed here

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * float(series.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half
