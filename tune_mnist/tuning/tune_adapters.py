"""Tune's way to tell the experiment of results, and to learn which trials stop."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune_mnist.errors import SearchFailedError
from tune_mnist.tuning.experiment import Experiment
from tune_mnist.tuning.ray_patches import OUT_OF_MEMORY


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
                result["metrics"],
                result["state"],
                result["model"],
            )
            decision = TrialScheduler.STOP if stop else TrialScheduler.CONTINUE
        except Exception as error:  # Tune would wrap it up until nobody knows it again
            self._experiment.broken = error
        return decision


# MERGED-DOC tuning.searcher: Tune's way to ask the experiment for trials.


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


# MERGED-DOC tuning.supervisor: Tune's way to tell the experiment of ends and failures, and to end
# a search in order.

NODE_LOST = "its node was lost"
MAX_LOSSES = 20  # of a trial's nodes in a row; one that goes on may be what takes them down
HOPELESS = 3  # so many failures before any epoch: it is not the configurations


class SearchOverError(BaseException):
    """Leaves Tune at once; by itself it would wait for workers that are only just starting.

    Nothing is lost: no worker has anything that the driver does not have.
    """


class Supervisor(Callback, Stopper):
    """Watches over a search's trials.

    A trial that fails goes on from its last epoch until it has failed more than `retries` times
    without an epoch in between; that its node was lost, as spot nodes are, is not its failure.
    One that has not reported for `hang_timeout` seconds is given up.
    To Tune every failure is final: a trial that goes on is a new one there, by the searcher. Its
    own retries would cover neither a worker that dies between two trials nor a state to go on
    from.
    """

    def __init__(self, experiment: Experiment, *, retries: int, hang_timeout: float) -> None:
        self._experiment, self._retries, self._hang_timeout = experiment, retries, hang_timeout
        self._failures: Counter[int] = Counter()  # by trial, since its last epoch
        self._losses: Counter[int] = Counter()  # of its nodes, the same
        self._last_sign: dict[Trial, float] = {}
        self._hung: set[str] = set()
        self.interrupted = False

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its stopper into snapshots of its own; nothing is ever read from there."""
        return {}

    def stop_all(self) -> bool:
        """Say whether the search is to end now, its running trials to be gone on with later."""
        experiment = self._experiment
        return self.interrupted or experiment.broken is not None or experiment.out_of_time

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here: that is the scheduler's to decide."""
        return False

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Note that a trial's worker has begun."""
        self._last_sign[trial] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Let go of the states, which Tune would keep, and forgive earlier failures."""
        result.pop("state", None)
        result.pop("model", None)
        self._failures.pop(number_of(trial), None)
        self._losses.pop(number_of(trial), None)
        self._last_sign[trial] = time.monotonic()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """Record the end of a trial that was told to stop."""
        self._last_sign.pop(trial, None)
        self._record(lambda: self._experiment.finish(number_of(trial)))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Have a trial that failed gone on with, or give it up."""
        self._last_sign.pop(trial, None)
        self._record(lambda: self._take_failure(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """End workers that have hung, or the search.

        Raises:
            SearchOverError: the search is to end before its time.
        """
        if self.stop_all():
            raise SearchOverError
        now = time.monotonic()
        for trial, last in list(self._last_sign.items()):
            if now - last > self._hang_timeout:
                self._hung.add(trial.trial_id)
                del self._last_sign[trial]
                actor = trial.temporary_state.ray_actor
                if actor is not None:
                    ray.kill(actor)

    def _take_failure(self, trial: Trial) -> None:
        number, error = number_of(trial), self._error_of(trial)
        counted = self._losses if error.startswith(NODE_LOST) else self._failures
        counted[number] += 1
        within = self._failures[number] <= self._retries and self._losses[number] <= MAX_LOSSES
        # A second try of a trial that hangs would hang as well.
        if trial.trial_id not in self._hung and within:
            self._experiment.retry(number, error)
            return
        self._experiment.fail(number, error)
        failed = self._experiment.history.trials.values()
        if len(failed) >= HOPELESS and all(t.state == "failed" and not t.rows for t in failed):
            raise SearchFailedError(
                f"the first {len(failed)} trials all failed before their first epoch: {error}"
            )

    def _record(self, write: Callable[[], None]) -> None:
        """Write something down; Tune would take a failure in here for the trial's own."""
        try:
            write()
        except Exception as error:
            self._experiment.broken = error

    def _error_of(self, trial: Trial) -> str:
        if trial.trial_id in self._hung:
            return f"no report for {self._hang_timeout:g} s: taken to hang and ended"
        # Not trial.get_pickled_error: that looks where the file only ends up later.
        path = Path(trial.pickled_error_file or trial.error_file)
        if path.suffix == ".pkl":
            return describe(ray.cloudpickle.loads(path.read_bytes()))  # this process wrote it
        return " ".join(path.read_text(encoding="utf-8").split())[-500:]


def describe(error: BaseException) -> str:
    """Say in one line what befell a worker."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    if isinstance(error, RayActorError):
        text = " ".join(str(error).split())
        if OUT_OF_MEMORY in text:
            return OUT_OF_MEMORY
        if "its node has died" in text or isinstance(error, ActorUnavailableError):
            node = re.search(r"\bip: (\S+)", text)
            return f"{NODE_LOST} ({node[1]})" if node else NODE_LOST
        _, _, detail = text.partition("Worker exit detail: ")  # the rest is names and advice
        return f"the worker died: {(detail or text).split(' Some common causes')[0][:300]}"
    return " ".join(str(error).split())[:300]
