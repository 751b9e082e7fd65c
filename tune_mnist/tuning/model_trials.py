"""Which trials the sampler's model is made of.

TPE asks which region the best 25 trials come from and how the others spread; its work grows with
their number, to 60 ms a proposal for 2,000. So in a long search it is shown a part of them.
"""

import bisect
import heapq

from optuna.trial import FrozenTrial, TrialState

MODELLED = 250  # finished trials at most; from so many on TPE takes those 25
MODELLED_BEST = 50  # of these the best; the others are the latest

_Standing = tuple[int, int, float]


class ModelTrials:
    """The unfinished trials, the best and the latest.

    Kept up as trials begin and end: a choice among all of them would cost more with every trial.
    """

    def __init__(self) -> None:
        self._unfinished: set[int] = set()
        self._latest: list[tuple[int, _Standing]] = []  # finished, by number
        self._best: list[tuple[_Standing, int]] = []  # of the earlier ones: a heap, poorest first

    def begin(self, number: int) -> None:
        """Take in a trial that has not finished."""
        self._unfinished.add(number)

    def end(self, trial: FrozenTrial) -> None:
        """Take in a trial that has finished."""
        self._unfinished.discard(trial.number)
        bisect.insort(self._latest, (trial.number, _standing(trial)))
        if len(self._latest) > MODELLED - MODELLED_BEST:
            number, standing = self._latest.pop(0)
            heapq.heappush(self._best, (standing, -number))  # of equals the earlier one stays
            if len(self._best) > MODELLED_BEST:
                heapq.heappop(self._best)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the trials, ascending."""
        best = (-negative for _, negative in self._best)
        return sorted([*self._unfinished, *best, *(number for number, _ in self._latest)])


def _standing(trial: FrozenTrial) -> _Standing:
    """Rank a finished trial as TPE does: those told to stop by how far they came."""
    match trial.state:
        case TrialState.COMPLETE if trial.value is not None:
            return 2, 0, trial.value
        case TrialState.PRUNED if trial.intermediate_values:
            step, value = max(trial.intermediate_values.items())
            return 1, step, value
        case _:
            return 0, 0, 0.0
