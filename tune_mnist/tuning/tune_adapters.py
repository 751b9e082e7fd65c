"""Tune's four ways to talk to the experiment, which itself knows nothing of Tune.

The searcher is asked for trials, the scheduler sees every report, the callback learns of starts,
ends and failures, and the stopper may end the whole search. Each of them only translates; what
the search does is decided in `Experiment`. The supervisor is callback and stopper in one.
"""

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

from tune_mnist.errors import SearchFailedError, StateError, named, one_line
from tune_mnist.tuning.experiment import Experiment
from tune_mnist.tuning.ray_patches import OUT_OF_MEMORY, actor_of

NODE_LOST = "its node was lost"
MAX_LOSSES = 20  # of a trial's nodes in a row; it may be the trial that takes them down
HOPELESS = 3  # so many failures before any epoch: it is not the configurations


def number_of(trial: Trial) -> int:
    """Return the number that every file knows a Tune trial by."""
    return int(trial.config["assignment"].number)


class ExperimentSearcher(Searcher):
    """Hands out the experiment's next trial whenever there is room for one.

    It learns nothing here: Tune tells a searcher neither the stopping report nor why a trial
    ended, so the scheduler and the supervisor tell the experiment.
    """

    def __init__(
        self, experiment: Experiment, room: Callable[[], int], over: Callable[[], bool]
    ) -> None:
        super().__init__(metric=experiment.rules.metric, mode="max")
        self._experiment, self._room, self._over = experiment, room, over

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's assignment, FINISHED, or None while there is none."""
        live, has_next = len(self._experiment.running), self._experiment.has_next
        # A running trial may still fail and have to be handed out again.
        if self._over() or not (has_next or live):
            return Searcher.FINISHED
        if not has_next or live >= self._room():
            return None
        return {"assignment": self._experiment.next_trial(trial_id)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    # The run's folder holds everything that a resume needs.
    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class ExperimentScheduler(FIFOScheduler):
    """Passes every report to the experiment and answers with its decision.

    Of Tune's parts, only the scheduler sees every report, and it sees them first.
    """

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._experiment = experiment

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the first waiting trial; Tune's own way looks through all trials of the past."""
        waiting = [
            trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING
        ]
        return min(waiting, key=number_of, default=None)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        with self._experiment.ending_on_error():
            must_stop = self._experiment.report(
                number_of(trial), result["metrics"], result["state"], result["model"]
            )
            return str(TrialScheduler.STOP if must_stop else TrialScheduler.CONTINUE)
        return str(TrialScheduler.NOOP)


class SearchOverError(BaseException):
    """Leaves Tune at once; by itself it would wait for workers that are only just starting.

    Nothing is lost: no worker has anything that the driver does not have.
    """


class Supervisor(Callback, Stopper):
    """Retries trials that fail, ends workers that hang, and ends the search when it is over.

    A failed trial is resumed from its last epoch, up to `retries` times without an epoch in
    between. A lost node, such as a spot node, does not count as a failure. A trial without a
    report for `hang_timeout` seconds is marked failed. To Tune every failure is final, and a
    retry is a new trial from the searcher: its own retries cover neither a worker that dies
    between two trials nor a state to resume from.
    """

    def __init__(self, experiment: Experiment, *, retries: int, hang_timeout: float) -> None:
        self._experiment, self._retries, self._hang_timeout = experiment, retries, hang_timeout
        self._failures: Counter[int] = Counter()  # by trial, since its last epoch
        self._losses: Counter[int] = Counter()  # of its nodes, likewise
        self._last_sign: dict[Trial, float] = {}
        self._hung: set[str] = set()
        self.signal: int | None = None  # that the search was told to end with

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its stopper into snapshots that nobody reads

    def heed(self, number: int) -> None:
        """End the search because of a signal."""
        self.signal = number

    def stop_all(self) -> bool:
        """Return True if the search ends now; a resume continues its running trials."""
        experiment = self._experiment
        return bool(self.signal or experiment.broken or experiment.out_of_time)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # whether a single trial stops is the scheduler's decision

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._last_sign[trial] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Drop the states, which Tune would keep, and forgive earlier failures."""
        result.pop("state", None)
        result.pop("model", None)
        self._failures.pop(number_of(trial), None)
        self._losses.pop(number_of(trial), None)
        self._last_sign[trial] = time.monotonic()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self._last_sign.pop(trial, None)
        with self._experiment.ending_on_error():
            self._experiment.finish(number_of(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._last_sign.pop(trial, None)
        with self._experiment.ending_on_error():
            self._retry_or_fail(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """End workers that hang, or raise SearchOverError if the search ends now."""
        if self.stop_all():
            raise SearchOverError
        now = time.monotonic()
        for trial, last in list(self._last_sign.items()):
            if now - last > self._hang_timeout:
                self._hung.add(trial.trial_id)
                del self._last_sign[trial]
                if actor := actor_of(trial):
                    ray.kill(actor)

    def _retry_or_fail(self, trial: Trial) -> None:
        number, error = number_of(trial), self._error_of(trial)
        counted = self._losses if error.startswith(NODE_LOST) else self._failures
        counted[number] += 1
        within = self._failures[number] <= self._retries and self._losses[number] <= MAX_LOSSES
        # A trial that hangs would hang again.
        if trial.trial_id not in self._hung and within:
            self._experiment.retry(number, error)
            return
        self._experiment.fail(number, error)
        records = self._experiment.history.trials.values()
        enough = min(HOPELESS, self._experiment.rules.trials)
        if len(records) >= enough and all(r.state == "failed" and not r.rows for r in records):
            raise SearchFailedError(
                f"every trial failed before its first epoch, {len(records)} so far; a resume "
                f"tries them again: {error}"
            )

    def _error_of(self, trial: Trial) -> str:
        if trial.trial_id in self._hung:
            return f"no report for {self._hang_timeout:g} s: taken to hang and ended"
        # Not trial.get_pickled_error: that looks where the file is moved to later.
        path = Path(trial.pickled_error_file or trial.error_file)
        if path.suffix == ".pkl":
            error = ray.cloudpickle.loads(path.read_bytes())  # this process wrote it
            _refuse_unusable_state(number_of(trial), error)
            return describe(error)
        return " ".join(path.read_text(encoding="utf-8").split())[-500:]


def _refuse_unusable_state(number: int, error: BaseException) -> None:
    """Raise SearchFailedError if a trial's worker could not resume from its state.

    To try again would fail again, and the end of the trial would remove the state.
    """
    if isinstance(error, RayTaskError) and isinstance(error.cause, StateError):
        raise SearchFailedError(
            f"trial {number} cannot be resumed: {error.cause}; put back what the run's folder "
            f"was, or remove its files {number:05d}.* in checkpoints/ to train the trial anew"
        )


def describe(error: BaseException) -> str:
    """Return on one line why a worker failed."""
    if isinstance(error, RayTaskError):
        return named(error.cause)
    if not isinstance(error, RayActorError):
        return one_line(error)
    text = " ".join(str(error).split())
    if OUT_OF_MEMORY in text:
        return OUT_OF_MEMORY
    if "its node has died" in text or isinstance(error, ActorUnavailableError):
        node = re.search(r"\bip: (\S+)", text)
        return f"{NODE_LOST} ({node[1]})" if node else NODE_LOST
    _, _, detail = text.partition("Worker exit detail: ")  # the rest is names and advice
    return f"the worker died: {(detail or text).split(' Some common causes')[0][:300]}"
