"""Tune's way to tell the experiment of results, and to learn which trials stop."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune_mnist.analysis.history import METRICS
from tune_mnist.tuning.experiment import Experiment


def number_of(trial: Trial) -> int:
    """Return the number by which a Tune trial is known in every file."""
    return int(trial.config["assignment"].number)


class ExperimentScheduler(FIFOScheduler):
    """Passes every report on and answers with the experiment's decision.

    Of Tune's parts the scheduler is the first to see a report and the only one to see them all.
    """

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._experiment = experiment

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the first trial that waits; Tune's own way looks at all that there ever were."""
        waiting = [
            trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING
        ]
        return min(waiting, key=number_of, default=None)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Take in a report; the answer is to stop or to continue."""
        decision: str = TrialScheduler.NOOP
        try:
            stop = self._experiment.report(
                number_of(trial),
                {name: result[name] for name in METRICS},
                result["state"],
                result["model"],
            )
            decision = TrialScheduler.STOP if stop else TrialScheduler.CONTINUE
        except Exception as error:  # Tune would wrap it up until nobody knows it again
            self._experiment.broken = error
        return decision
