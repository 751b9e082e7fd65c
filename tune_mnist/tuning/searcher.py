"""Tune's way to ask the experiment for trials."""

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tune_mnist.tuning.experiment import Experiment


class ExperimentSearcher(Searcher):
    """Hands out the experiment's next trial whenever there is room for one.

    It keeps no state: the experiment is told of results by the scheduler, which sees every one
    of them, where Tune tells a searcher neither the stopping report nor why a trial ended.
    """

    def __init__(
        self, experiment: Experiment, room: Callable[[], int], over: Callable[[], bool]
    ) -> None:
        super().__init__(metric=experiment.rules.metric, mode="max")
        self._experiment, self._room, self._over = experiment, room, over

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's assignment, FINISHED, or None while there is none."""
        if self._over():
            return Searcher.FINISHED
        if not self._experiment.has_next:
            # A running trial may yet fail and have to be handed out again.
            return None if self._experiment.live else Searcher.FINISHED
        if self._experiment.live >= self._room():
            return None
        return {"assignment": self._experiment.next_trial(trial_id)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to do here: the scheduler has told the experiment."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the run's folder is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
