"""ASHA's memory and its one decision: does a trial that reaches a rung continue?

Asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020), in the variant that stops trials; the paper's algorithm 2 promotes them. It
decides as Ray's AsyncHyperBandScheduler with one bracket does, with one exception: a rung stops
nothing before it has seen as many trials as the reduction factor. Ray-free, so that a resumed
search, the tests and the benchmarks replay it.
"""

import math

import numpy as np


class Rungs:
    """The values seen at each rung, higher being better, and what was decided there."""

    def __init__(self, grace_epochs: int, reduction_factor: float, epochs: int) -> None:
        """Place a rung at the first epoch at or after grace, grace * factor, grace * factor² ...

        No rung lies at or beyond `epochs`, a trial's budget.
        """
        if grace_epochs < 1 or not reduction_factor > 1:
            raise ValueError(f"no rungs from epoch {grace_epochs} by a factor {reduction_factor}")
        self._factor = reduction_factor
        self._seen: dict[int, dict[int, float]] = {}  # by epoch and trial
        self._stops: set[tuple[int, int]] = set()
        for epoch in range(grace_epochs, epochs):
            # The margin: the logarithm of a power of the factor may be just below a whole number.
            power = math.floor(math.log(epoch / grace_epochs) / math.log(reduction_factor) + 1e-9)
            if grace_epochs * reduction_factor**power > epoch - 1:
                self._seen[epoch] = {}

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
        recorded = self._seen[epoch]
        if trial not in recorded:
            # With one value or two to compare with, "among the best third" means nothing: a good
            # trial that starts slowly would be stopped for being the second to arrive.
            enough = len(recorded) + 1 >= self._factor
            percentile = (1 - 1 / self._factor) * 100
            if enough and value < np.percentile(list(recorded.values()), percentile):
                self._stops.add((trial, epoch))
            recorded[trial] = value
        return (trial, epoch) in self._stops
