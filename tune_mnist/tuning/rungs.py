"""ASHA's memory and its one decision: does a trial that reaches a rung go on?

Asynchronous successive halving, the stopping variant (Li et al., "A System for Massively Parallel
Hyperparameter Tuning", MLSys 2020, algorithm 2; as in Ray's AsyncHyperBandScheduler with one
bracket). No Ray in here, so that a resumed search, the tests and the benchmarks replay it.
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Rungs:
    """The values that were seen at each rung; higher is better."""

    grace_epochs: int  # no trial is stopped before it has trained this many epochs
    reduction_factor: float  # about one in so many goes on from a rung
    epochs: int  # the budget of a trial; no rung lies at or beyond it
    seen: dict[int, dict[int, float]] = field(
        default_factory=dict
    )  # rung's epoch -> trial -> value

    def __post_init__(self) -> None:
        rung: float = self.grace_epochs
        while int(rung) < self.epochs:
            self.seen[int(rung)] = {}
            rung *= self.reduction_factor

    def should_stop(self, trial: int, epoch: int, value: float) -> bool:
        """Record a trial's value at an epoch and say whether the trial is to stop there.

        Asked again for the same trial and rung, it answers from what it had recorded.
        """
        recorded = self.seen.get(epoch)
        if recorded is None or not math.isfinite(value):
            return False
        others = [other for name, other in recorded.items() if name != trial]
        recorded.setdefault(trial, value)
        if not others:
            return False
        return value < float(np.quantile(others, 1 - 1 / self.reduction_factor))
