"""ASHA's memory and its one decision: does a trial that reaches a rung continue?

Asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020), in the variant that stops trials; the paper's algorithm 2 promotes them. It
decides as Ray's AsyncHyperBandScheduler with one bracket does, with one exception: a rung stops
nothing before it has seen as many trials as the reduction factor. Ray-free, so that a resumed
search, the tests and the benchmarks replay it.
"""

import math
from bisect import insort
from collections.abc import Sequence


class Rungs:
    """The values seen at each rung, higher being better, and what was decided there."""

    def __init__(self, grace_epochs: int, reduction_factor: float, epochs: int) -> None:
        """Place a rung at the first epoch at or after grace, grace * factor, grace * factor² ...

        No rung lies at or beyond `epochs`, a trial's budget.
        """
        self._factor = reduction_factor
        self._seen: dict[int, set[int]] = {}  # by epoch: trials
        self._values: dict[int, list[float]] = {}  # by epoch: theirs, ascending
        self._stops: set[tuple[int, int]] = set()
        for epoch in range(grace_epochs, epochs):
            # The margin: the logarithm of a power of the factor may be just below a whole number.
            power = math.floor(math.log(epoch / grace_epochs) / math.log(reduction_factor) + 1e-9)
            if grace_epochs * reduction_factor**power > epoch - 1:
                self._seen[epoch], self._values[epoch] = set(), []

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs at which there is a rung."""
        return tuple(self._seen)

    def should_stop(self, trial: int, epoch: int, value: float) -> bool:
        """Record a trial's value at an epoch and return True if the trial must stop there.

        Asked again for the same trial and rung, it answers as before.
        """
        if epoch not in self._seen or not math.isfinite(value):
            return False
        values = self._values[epoch]
        if trial not in self._seen[epoch]:
            # With one value or two to compare with, "among the best third" means nothing: a good
            # trial that starts slowly would be stopped for being the second to arrive.
            enough = len(values) + 1 >= self._factor
            if enough and value < quantile(values, 1 - 1 / self._factor):
                self._stops.add((trial, epoch))
            self._seen[epoch].add(trial)
            insort(values, value)
        return (trial, epoch) in self._stops


def quantile(values: Sequence[float], share: float) -> float:
    """Return what NumPy's percentile does, to the last digit, of values that are sorted."""
    place = (len(values) - 1) * share
    low, high = values[math.floor(place)], values[math.ceil(place)]
    part = place % 1
    if part < 0.5:
        return low + (high - low) * part
    return high - (high - low) * (1 - part)
