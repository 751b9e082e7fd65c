"""The course of one search: which trial comes next, whether it continues, what is recorded.

Ray-free: Tune talks to this one object through thin adapters, and the benchmarks replay whole
searches on it. Every step is on disk before anyone acts on it: the trial before it starts, the
checkpoint before its epoch's row, the row before the next epoch.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_mnist.cli import tell
from tune_mnist.mnist.config import TrainConfig, Value
from tune_mnist.mnist.metrics import EpochMetrics, Metric
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.history import Assignment, EpochRow, History, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar
from tune_mnist.runs.space import SearchSpace
from tune_mnist.tuning.asha import Rungs
from tune_mnist.tuning.settings import SearchOptions
from tune_mnist.tuning.study import Study

_OPTUNA_STATES: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True, kw_only=True)
class Rules(SearchOptions):
    """What a search goes by: its options, each resolved to a value."""

    space: SearchSpace
    trials: int = field()  # to start in all
    epochs: int = field()  # the budget of a trial
    fixed_trials: Sequence[TrialRecord] = ()  # all of them; without, space and sampler propose

    @property
    def points(self) -> Sequence[Mapping[str, Value]]:
        """The space's start points, unless they are left out."""
        return () if self.no_start else self.space.start

    @property
    def lasting(self) -> dict[str, Any]:
        """What a resume goes on with, in JSON's types: all but trials and time."""
        names = (entry.name for entry in fields(SearchOptions))
        options = {n: getattr(self, n) for n in names if n not in ("trials", "time_budget")}
        return {**options, "space": self.space.as_dict()}

    @property
    def time_limit(self) -> float:
        """Seconds over all sessions; infinite without a time budget."""
        return math.inf if self.time_budget is None else self.time_budget


class Experiment:
    """The course of one search."""

    def __init__(
        self,
        rules: Rules,
        history: History,
        study: Study,
        checkpoints: Checkpoints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules, self.history = rules, history
        self.best = BestSoFar(rules.metric)
        self.broken: Exception | None = None  # what ends the search, see `ending_on_error`
        self._study, self._checkpoints = study, checkpoints
        self._rungs = Rungs(rules.grace_epochs, rules.reduction_factor, rules.epochs)
        self._waiting: deque[TrialRecord] = deque()  # unfinished, and with no worker
        self._baseline_number = _number_of_baseline(rules, history)
        self._add_rows_of_checkpoints()
        self._clock, self._began = clock, clock() - history.elapsed
        self._replay_history()

    @property
    def elapsed(self) -> float:
        """Seconds that the search has run, over all sessions."""
        return self._clock() - self._began

    @property
    def out_of_time(self) -> bool:
        return self.elapsed >= self.rules.time_limit

    @property
    def has_next(self) -> bool:
        """Whether a trial is left to start or to resume."""
        return bool(self._waiting) or len(self.history.trials) < self.rules.trials

    @property
    def running(self) -> list[TrialRecord]:
        """The trials that are with a worker, or on their way to one."""
        waiting = {record.number for record in self._waiting}
        return [record for record in self.history.unfinished() if record.number not in waiting]

    @contextlib.contextmanager
    def ending_on_error(self) -> Iterator[None]:
        """Catch an error and end the search with it; Tune would blame the trial at hand.

        The first error counts: later ones are likely its consequences.
        """
        try:
            yield
        except Exception as error:
            self.broken = self.broken or error

    def next_trial(self, ray_id: str) -> Assignment:
        """Return the next trial to run: an interrupted one if there is any, else a new one."""
        if self._waiting:
            record = self._waiting.popleft()
            self.history.rerun_trial(record.number, self.elapsed, ray_id=ray_id, error="")
        else:
            record = self._propose(len(self.history.trials), ray_id)
            self.history.start_trial(record, self.elapsed)
        saved = self._checkpoints.load(record, up_to=record.epochs)
        _tell_of_a_lost_state(record, saved.row.epoch if saved else 0)
        return Assignment(
            number=record.number,
            config=record.config,
            seed=record.seed,
            epochs=self.rules.epochs,
            metric=self.rules.metric,
            state=saved.state if saved else None,
        )

    def report(
        self, number: int, metrics: EpochMetrics, state: bytes, model: bytes | None
    ) -> bool:
        """Record an epoch and return True if the trial must stop there.

        The best model is written first and the row last. After a kill in between, the epoch is
        either trained again or its row is taken from the checkpoint. Of an epoch that is trained
        again from an earlier state the first row stands: on a CPU the second would equal it.
        """
        record = self.history.trials[number]
        row = EpochRow(**metrics.as_dict(), trial=number, elapsed=self.elapsed)
        if row.epoch <= record.epochs:
            row = record.rows[row.epoch - 1]
        elif self.best.take(record, row) and model is not None:
            self._checkpoints.save_best(model)
        self._checkpoints.save(record, row, state)
        if self.history.add_epoch(row) and not row.diverged:
            self._study.report(number, row.epoch, row.accuracy(self.rules.metric))
        return self._should_stop(record, row)

    def finish(self, number: int) -> None:
        """Record the end of a trial that was told to stop."""
        last = self.history.trials[number].rows[-1]
        if last.diverged:
            where = f"step {last.diverged_step} of epoch {last.epoch}"
            self._end(number, "diverged", f"the loss was not finite at {where}")
        elif last.epoch >= self.rules.epochs:
            self._end(number, "complete", "")
        else:
            self._end(number, "stopped", f"among the poorer ones at epoch {last.epoch}")

    def fail(self, number: int, error: str) -> None:
        self._end(number, "failed", error)

    def retry(self, number: int, error: str) -> None:
        """Record that a trial's worker failed, and make the trial the next to run."""
        record = self.history.trials[number]
        self.history.rerun_trial(number, self.elapsed, ray_id=record.ray_id, error=error)
        self._waiting.appendleft(record)

    def close(self, why: str) -> str | None:
        """End the session; returns why study.db could not be brought up to date, or None."""
        try:
            self.history.close_session(why, self.elapsed)
        finally:
            study_failure = self._study.close()
        return study_failure

    def _end(self, number: int, state: State, reason: str) -> None:
        self.history.end_trial(number, self.elapsed, state, reason)
        record = self.history.trials[number]
        self._study.tell(number, _optuna_state(record, self.rules.metric), _attributes(record))
        self._checkpoints.remove(number)

    def _should_stop(self, record: TrialRecord, row: EpochRow) -> bool:
        if row.diverged or row.epoch >= self.rules.epochs:
            return True
        # A yardstick, not a rival: it runs to its end, and stands in no rung. It learns fast at
        # first, and with it there the second trial to report would have to beat it at once.
        if record.origin == "baseline":
            return False
        accuracy = row.accuracy(self.rules.metric)
        return self._rungs.should_stop(record.number, row.epoch, accuracy)

    def _propose(self, number: int, ray_id: str) -> TrialRecord:
        """Choose trial `number` and start it in the study."""
        space, points = self.rules.space, self.rules.points
        seed = int(np.random.SeedSequence([self.rules.seed, number, 1]).generate_state(1)[0])
        if self.rules.fixed_trials or number == self._baseline_number:
            baseline = TrialRecord(number, space.baseline(), seed, "baseline")
            record = self.rules.fixed_trials[number] if self.rules.fixed_trials else baseline
            record = replace(record, ray_id=ray_id)
            self._study.add(_frozen_trial(record, space))
            return record
        place = number - (number > self._baseline_number)
        start = space.params(points[place]) if place < len(points) else {}
        sampled = self._study.ask(number, space.sample, start, {"ray_trial_id": ray_id})
        config = TrainConfig.from_mapping(sampled)
        return TrialRecord(number, config, seed, "start" if start else "sampled", ray_id)

    def _add_rows_of_checkpoints(self) -> None:
        """Record the epochs that a kill left with a checkpoint but without a row."""
        for record in self.history.unfinished():
            saved = self._checkpoints.load(record, up_to=record.epochs + 1)
            if saved and saved.row.epoch == record.epochs + 1:
                self.history.add_epoch(saved.row)

    def _replay_history(self) -> None:
        """Rebuild study, rungs and best from the record, and queue the interrupted trials."""
        stops: dict[int, bool] = {}
        for record, row in self.history.rows:
            stops[record.number] = self._should_stop(record, row)
            self.best.take(record, row)
        for record in self.history.trials.values():
            self._study.add(_recorded_trial(record, self.rules))
            if record.state == "running":
                if stops.get(record.number, False):
                    self.finish(record.number)
                else:
                    self._waiting.append(record)
        self._checkpoints.remove_others({record.number for record in self._waiting})


def _number_of_baseline(rules: Rules, history: History) -> int:
    """Return which trial is the baseline: the one after the start points, or the last.

    A run that has one keeps it. Earlier versions began with it.
    """
    origins = [record.origin for record in history.trials.values()]
    if "baseline" in origins:
        return origins.index("baseline")
    return max(min(len(rules.points), rules.trials - 1), len(origins))


def _optuna_state(record: TrialRecord, metric: Metric) -> TrialState:
    state = _OPTUNA_STATES[record.state]
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and not record.rows_that_count(metric):
        return TrialState.FAIL  # the others need a value
    return state


def _tell_of_a_lost_state(record: TrialRecord, resumed_after: int) -> None:
    if resumed_after < record.epochs:
        where = f"after epoch {resumed_after}" if resumed_after else "from its beginning"
        tell(
            f"trial {record.number} continues {where}: its state after epoch {record.epochs} is "
            "missing or damaged; the epochs that it had recorded stay as they are"
        )


def _attributes(record: TrialRecord) -> dict[str, str]:
    """Return what joins Optuna's trial with Ray's and with the run's tables."""
    attributes = {"ray_trial_id": record.ray_id}
    if record.state != "running":
        attributes |= {"state": record.state, "reason": record.reason}
    return attributes


def _recorded_trial(record: TrialRecord, rules: Rules) -> FrozenTrial:
    """Return a trial of an earlier session as Optuna's."""
    trial = _frozen_trial(record, rules.space)
    trial.intermediate_values = {
        row.epoch: row.accuracy(rules.metric) for row in record.rows_that_count(rules.metric)
    }
    trial.state = _optuna_state(record, rules.metric)
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        trial.value = trial.intermediate_values[max(trial.intermediate_values)]
    trial.datetime_start = datetime.fromtimestamp(record.started_at)
    if record.state != "running":
        trial.datetime_complete = datetime.fromtimestamp(record.ended_at)
    return trial


def _frozen_trial(record: TrialRecord, space: SearchSpace) -> FrozenTrial:
    """Return a running trial; one that the space cannot express has no parameters in Optuna."""
    params, distributions = space.frozen_params(record.config) or ({}, {})
    trial = create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=distributions,
        user_attrs=_attributes(record),
    )
    trial.number = record.number
    return trial
