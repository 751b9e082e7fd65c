"""Handing a search's course to trackers, which are where people already look: TensorBoard, MLflow.

A thread of its own follows what the run's history says, so that a tracker may be slow, hang or
fail and the search neither waits nor hears of it before its end. What a tracker lacks after a
failure, a kill or a resume, it gets from the history.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tune_mnist.errors import ConfigError
from tune_mnist.runs.history import EpochRow, History, TrialRecord

FOLLOW_EVERY = 2.0  # seconds
RETRY_AFTER = 2.0  # seconds until a tracker that failed is tried again; then longer
RETRY_AFTER_AT_MOST = 60.0
CLOSING_PATIENCE = 30.0  # seconds that a search's end waits for the last epochs to arrive


class Tracker(Protocol):
    """Something that shows trials and their epochs; whatever it raises is a failure to do so."""

    def begin(self, record: TrialRecord) -> int:
        """Take up a trial and return how many of its epochs are there already."""

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        """Take an epoch."""

    def end(self, record: TrialRecord) -> None:
        """Take a trial's final state."""

    def flush(self) -> None:
        """Have what was taken be seen."""

    def close(self) -> None:
        """Let go of trials that have not ended."""


class Tracking:
    """Follows a history and hands its trials and epochs to a tracker."""

    def __init__(self, name: str, history: History, start: Callable[[], Tracker]) -> None:
        """Begin to follow.

        Args:
            name: what a person calls the tracker.
            history: what happens.
            start: makes the tracker, in the thread; after a failure it makes another.
        """
        self._name, self._history, self._start = name, history, start
        self._tracker: Tracker | None = None
        self._taken: dict[int, int] = {}  # epochs, by trial
        self._ended: set[int] = set()
        self._failure: str | None = None
        self._closing = threading.Event()
        # A daemon: what hangs on a dead disk or server must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def close(self) -> str | None:
        """Hand over what is left.

        Returns:
            A warning that not everything could be, or None.
        """
        self._closing.set()
        self._thread.join(CLOSING_PATIENCE)
        if self._thread.is_alive() and self._failure is None:
            self._failure = f"it takes longer than {CLOSING_PATIENCE:g} s"
        if self._failure is None:
            return None
        return f"{self._name} has not got everything ({self._failure}); epochs.csv has"

    def _work(self) -> None:
        pause = RETRY_AFTER
        closing = False
        while not closing:
            closing = self._closing.wait(FOLLOW_EVERY)
            try:
                self._catch_up()
                if closing and self._tracker:
                    self._tracker.close()
                self._failure, pause = None, RETRY_AFTER
            except Exception as error:
                self._failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._give_up_tracker()
                self._closing.wait(pause)
                pause = min(2 * pause, RETRY_AFTER_AT_MOST)

    def _catch_up(self) -> None:
        if self._tracker is None:
            self._tracker = self._start()
        for record in list(self._history.trials.values()):
            if record.number not in self._ended:
                self._follow(record, self._tracker)
        self._tracker.flush()

    def _follow(self, record: TrialRecord, tracker: Tracker) -> None:
        has_ended = record.state != "running"  # asked first: all its epochs are there then
        if record.number not in self._taken:
            self._taken[record.number] = tracker.begin(record)
        for row in record.rows[self._taken[record.number] :]:
            tracker.add_epoch(record, row)
            self._taken[record.number] += 1
        if has_ended:
            tracker.end(record)
            self._ended.add(record.number)

    def _give_up_tracker(self) -> None:
        """Let go of a tracker that failed; its successor is told everything."""
        tracker, self._tracker = self._tracker, None
        self._taken.clear()
        self._ended.clear()
        if tracker is not None:
            with contextlib.suppress(Exception):
                tracker.close()


# MERGED-DOC tuning.tensorboard: The trials' curves and hyperparameters for TensorBoard:
# `tensorboard --logdir results/<run>`.

_NAME = "events.out.tfevents.0"  # by which TensorBoard knows its files
_SCALARS = (
    *("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "evaluation_seconds"),
)


class EventFiles:
    """Writes an event file for each trial into a folder of its own, named after its number.

    They are written anew in every session, so a trial that was broken off goes on without a gap
    and without an epoch twice, whenever the kill came. What an earlier session wrote comes out
    the same, byte by byte, so that a TensorBoard which is half through a file reads on.
    """

    def __init__(self, folder: Path) -> None:
        # Here and not above: a thread may take its time for them.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._hparams = Event, Summary, hparams_pb
        self._writer, self._writers = RecordWriter, dict[int, RecordWriter]()
        self._folder = folder
        # A trial's name among the runs that TensorBoard may look at together.
        self._run = "/".join(folder.absolute().parts[-3:-1])

    def begin(self, record: TrialRecord) -> int:
        """Begin a trial's file with its hyperparameters."""
        path = self._folder / f"{record.number}" / _NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writers[record.number] = self._writer(path.open("wb"))
        began = record.started_at
        self._write(record, self._event(wall_time=began, file_version="brain.Event:2"))
        values = {**record.config.as_dict(), "seed": record.seed}
        hparams = self._hparams(values, f"{self._run}/{record.number}", began)
        self._write(record, self._event(wall_time=began, summary=hparams))
        return 0

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        """Write an epoch's measurements, by the names that they have in epochs.csv."""
        summary = self._summary(
            value=[
                self._summary.Value(tag=name, simple_value=getattr(row, name))
                for name in _SCALARS
                if math.isfinite(getattr(row, name))
            ]
        )
        when = record.started_at + row.elapsed - record.started
        self._write(record, self._event(wall_time=when, step=row.epoch, summary=summary))

    def end(self, record: TrialRecord) -> None:
        """Close a trial's file."""
        self._writers.pop(record.number).close()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Close all files."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _write(self, record: TrialRecord, event: Any) -> None:
        self._writers[record.number].write(event.SerializeToString(deterministic=True))


# MERGED-DOC tuning.mlflow: The trials as runs of an MLflow experiment, by Ray's own callback.

_RETRIES = "2"  # of a request; MLflow's own would try for minutes, and we try again anyway
_PAGE = 1000  # runs asked for at once
_STEP = "training_iteration"  # of Ray's callback: a metric that it wants, the epoch


@dataclass(frozen=True)
class _LoggedTrial:
    """What Ray's callback is shown of a trial: no states, no bytes, nothing of ours."""

    number: int
    config: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        return f"trial {self.number}"


class MlflowRuns:
    """Logs each trial as a run: its hyperparameters, its metrics by epoch, its final state.

    A trial that is there already, from an earlier session, goes on in the same run.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        from mlflow.tracking import MlflowClient
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        _quieten()
        self._client = MlflowClient(tracking_uri)
        callback: Any = MLflowLoggerCallback(tracking_uri, experiment_name=experiment)
        callback.setup()
        self._callback = callback
        self._trials: dict[int, _LoggedTrial] = {}
        self._there = self._runs_there()

    def begin(self, record: TrialRecord) -> int:
        """Take up a trial, in the run that it has already or in a new one."""
        trial = _LoggedTrial(record.number, {**record.config.as_dict(), "seed": record.seed})
        # That the number alone does not tell: another search may have had the run's name.
        tags = {"started_at": repr(record.started_at)}
        run = self._there.get((str(trial), tags["started_at"]))
        if run is not None:
            if "state" in run.data.tags:
                return record.epochs
            self._callback._trial_runs[trial] = run.info.run_id
            self._client.update_run(run.info.run_id, "RUNNING")
        self._trials[record.number] = trial
        self._callback.tags = {**tags, "origin": record.origin}
        self._callback.log_trial_start(trial)
        return int(run.data.metrics.get(_STEP, 0)) if run is not None else 0

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        """Log an epoch's finite metrics."""
        metrics = {name: value for name, value in row.as_dict().items() if name != "epoch"}
        finite = {name: v for name, v in metrics.items() if v is not None and math.isfinite(v)}
        trial = self._trials[record.number]
        # The step last: where it is, the others are.
        self._callback.log_trial_result(0, trial, {**finite, _STEP: row.epoch})

    def end(self, record: TrialRecord) -> None:
        """Log how a trial ended."""
        trial = self._trials.get(record.number)
        if trial is None:  # an earlier session has
            return
        run_id = self._callback._trial_runs[trial]
        self._callback.log_trial_end(trial, failed=record.state == "failed")
        if record.reason:
            self._client.set_tag(run_id, "reason", record.reason)
        self._client.set_tag(run_id, "state", record.state)
        del self._trials[record.number]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Show the trials that have not ended as such."""
        for trial in self._trials.values():
            self._client.set_terminated(self._callback._trial_runs[trial], "KILLED")

    def _runs_there(self) -> dict[tuple[str, str], Any]:
        """Return the experiment's runs by name and by when their trials started."""
        experiment = self._callback.mlflow_util.experiment_id
        page = self._client.search_runs([experiment], max_results=_PAGE)
        found = list(page)
        while page.token:
            page = self._client.search_runs([experiment], max_results=_PAGE, page_token=page.token)
            found += page
        return {(run.info.run_name, run.data.tags.get("started_at", "")): run for run in found}


def mlflow_trackers(tracking_uri: str | None, experiment: str) -> dict[str, Callable[[], Tracker]]:
    """Return what shows a search to MLflow, by its name; nothing where nobody asked for it."""
    return (
        {} if tracking_uri is None else {"MLflow": partial(MlflowRuns, tracking_uri, experiment)}
    )


def check_mlflow(tracking_uri: str) -> None:
    """See, before anything is started, that MLflow is installed and answers.

    Raises:
        ConfigError: it is not, or does not.
    """
    if find_spec("mlflow") is None:
        raise ConfigError(
            "--mlflow needs MLflow's client, which is not installed: pip install mlflow-skinny"
        )
    from mlflow.tracking import MlflowClient

    _quieten()
    try:
        MlflowClient(tracking_uri).search_experiments(max_results=1)
    except Exception as error:  # its stores have many ways to say no
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"--mlflow: {tracking_uri} is no tracking server or store that answers ({what})"
        ) from error


def _quieten() -> None:
    """Keep MLflow, once it is imported, from writing into the live view and waiting for long."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
