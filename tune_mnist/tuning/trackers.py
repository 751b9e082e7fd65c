"""Trackers show a search where people already look: TensorBoard and MLflow.

Background threads follow the run's history, so a tracker may be slow, hang or fail: the search
neither waits for it nor hears of it before its end. What a tracker lacks after a failure, a kill
or a resume, it gets from the history.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tune_mnist.errors import ConfigError, named
from tune_mnist.locations import masked
from tune_mnist.runs.files import read_plain
from tune_mnist.runs.history import EpochRow, History, TrialRecord
from tune_mnist.tuning.background import BackgroundThread, Pace

FOLLOW_EVERY = 2.0  # seconds between two rounds
RETRY_AFTER = 2.0  # seconds more until a tracker that failed is tried again
PAUSE_AT_MOST = 60.0
CLOSING_PATIENCE = 30.0  # seconds that a search's end waits for the last epochs to arrive


class Tracker(Protocol):
    """Shows trials and their epochs; any exception that it raises is a failure to do so."""

    def begin(self, record: TrialRecord) -> int: ...  # returns how many epochs are there already
    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None: ...
    def end(self, record: TrialRecord) -> None: ...
    def close(self) -> None: ...  # lets go of trials that have not ended


class Tracking:
    """Hands the trials and epochs of a history to a tracker, in the background.

    `start` makes the tracker, in the thread; after a failure it makes another.
    """

    def __init__(self, name: str, history: History, start: Callable[[], Tracker]) -> None:
        self._name, self._history, self._start = name, history, start
        self._tracker: Tracker | None = None
        self._taken: dict[int, int] = {}  # epochs, by trial
        self._ended: set[int] = set()
        times = (FOLLOW_EVERY, RETRY_AFTER, PAUSE_AT_MOST, CLOSING_PATIENCE)
        pace = Pace(*times, retries_at_end=False)
        self._thread = BackgroundThread(name, pace, self._work, self._failed)
        self._thread.start()

    def close(self) -> str | None:
        """Hand over what is left; return a warning if that failed, else None."""
        failure = self._thread.close()
        return failure and f"{self._name} has not got everything ({failure}); epochs.csv has"

    def _work(self, closing: bool) -> None:
        if self._tracker is None:
            self._tracker = self._start()
        for record in list(self._history.trials.values()):
            if record.number not in self._ended:
                self._follow(record, self._tracker)
        if closing:
            self._tracker.close()

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

    def _failed(self, error: Exception) -> str:
        """Give up a tracker that failed; its successor is told everything."""
        tracker, self._tracker = self._tracker, None
        self._taken.clear()
        self._ended.clear()
        if tracker is not None:
            with contextlib.suppress(Exception):
                tracker.close()
        return masked(named(error))


_SCALARS = (
    *("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "evaluation_seconds"),
)
_BYTES_AROUND = 16  # an event: its length and two checksums


class EventFiles:
    """Curves and hyperparameters for TensorBoard: `tensorboard --logdir results/<run>`.

    Each trial has a file in a folder named after its number. Every session writes the files anew
    that are not whole: no kill leaves a gap or an epoch twice. What an earlier session wrote comes
    out the same, byte by byte, so that a TensorBoard which is half through a file reads on.
    """

    def __init__(self, folder: Path) -> None:
        # Imported in the thread, where the second that it takes delays nothing.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._hparams = Event, Summary, hparams_pb
        self._inner = HParamsPluginData
        self._writer, self._writers = RecordWriter, dict[int, RecordWriter]()
        self._folder = folder
        # A trial's name among the runs that TensorBoard may look at together.
        self._run = "/".join(folder.absolute().parts[-3:-1])

    def begin(self, record: TrialRecord) -> int:
        path = self._folder / f"{record.number}/events.out.tfevents.0"  # by its name it is known
        head = self._head(record)
        epochs = (self._of_epoch(record, row) for row in record.rows)
        if record.state != "running" and _has_all(path, [*head, *epochs]):
            return record.epochs
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir()  # and not the run's, which may have been moved away
        path.parent.mkdir(exist_ok=True)
        self._writers[record.number] = self._writer(path.open("wb"))
        for event in head:
            self._write(record, event)
        return 0

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        self._write(record, self._of_epoch(record, row))

    def end(self, record: TrialRecord) -> None:
        if writer := self._writers.pop(record.number, None):
            writer.close()

    def close(self) -> None:
        while self._writers:
            self._writers.popitem()[1].close()

    def _head(self, record: TrialRecord) -> list[bytes]:
        began = record.started_at
        hparams = self._hparams(_hyperparameters(record), f"{self._run}/{record.number}", began)
        inner = hparams.value[0].metadata.plugin_data
        inner.content = _packed(self._inner.FromString(inner.content))  # else in any order
        return [
            _packed(self._event(wall_time=began, file_version="brain.Event:2")),
            _packed(self._event(wall_time=began, summary=hparams)),
        ]

    def _of_epoch(self, record: TrialRecord, row: EpochRow) -> bytes:
        scalars = [
            self._summary.Value(tag=name, simple_value=getattr(row, name))
            for name in _SCALARS
            if math.isfinite(getattr(row, name))
        ]
        when = record.time_of(row)
        summary = self._summary(value=scalars)
        return _packed(self._event(wall_time=when, step=row.epoch, summary=summary))

    def _write(self, record: TrialRecord, event: bytes) -> None:
        writer = self._writers[record.number]
        writer.write(event)
        writer.flush()


def _packed(event: Any) -> bytes:
    packed: bytes = event.SerializeToString(deterministic=True)
    return packed


def _has_all(path: Path, events: Sequence[bytes]) -> bool:
    """Return True if a file has these events and no others.

    To write it anew would take longer: the library computes checksums in Python.
    """
    try:
        content = read_plain(path)
    except OSError:
        return False
    size = sum(_BYTES_AROUND + len(event) for event in events)
    return len(content) == size and all(event in content for event in events)


_RETRIES = "2"  # of a request; MLflow's default takes minutes, and this module retries anyway
_STEP = "training_iteration"  # the metric that holds the epoch, by Tune's name for it


class MlflowRuns:
    """Logs each trial as a run of an MLflow experiment: hyperparameters, metrics, final state.

    A trial that an earlier session has begun continues in the same run.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        _quieten()
        self._metric, self._param = Metric, Param
        self._client = MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        create = self._client.create_experiment
        self._experiment = known.experiment_id if known else create(experiment)
        self._there = self._runs_there()
        self._run_ids: dict[int, str] = {}  # of the trials that have not ended

    def begin(self, record: TrialRecord) -> int:
        # The number does not suffice: an earlier search may have had the same name.
        name, started_at = f"trial {record.number}", repr(record.started_at)
        run = self._there.get((name, started_at))
        if run is None:
            tags = {"trial_name": name, "started_at": started_at, "origin": record.origin}
            run = self._client.create_run(self._experiment, run_name=name, tags=tags)
        elif run.data.tags.get("state") == record.state:  # its end is there
            return record.epochs
        else:
            self._client.update_run(run.info.run_id, "RUNNING")
        self._run_ids[record.number] = run.info.run_id
        values = _hyperparameters(record).items()
        params = [self._param(name, str(value)) for name, value in values]
        self._client.log_batch(run.info.run_id, params=params)
        return int(run.data.metrics.get(_STEP, 0))

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        values = row.as_dict()
        values[_STEP] = values.pop("epoch")  # last: if it arrived, the others did
        now = int(1000 * time.time())
        finite = [
            self._metric(name, float(value), now, row.epoch)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        self._client.log_batch(self._run_ids[record.number], metrics=finite)

    def end(self, record: TrialRecord) -> None:
        run_id = self._run_ids.get(record.number)
        if run_id is None:  # an earlier session has logged its end
            return
        status = "FAILED" if record.state == "failed" else "FINISHED"
        self._client.set_terminated(run_id, status)
        if record.reason:
            self._client.set_tag(run_id, "reason", record.reason)
        self._client.set_tag(run_id, "state", record.state)
        del self._run_ids[record.number]

    def close(self) -> None:
        for run_id in self._run_ids.values():
            self._client.set_terminated(run_id, "KILLED")

    def _runs_there(self) -> dict[tuple[str, str], Any]:
        """Return the experiment's runs by name and by when their trials started."""
        search = partial(self._client.search_runs, [self._experiment], max_results=1000)
        page = search()
        found = list(page)
        while page.token:
            page = search(page_token=page.token)
            found += page
        return {(run.info.run_name, run.data.tags.get("started_at", "")): run for run in found}


def _hyperparameters(record: TrialRecord) -> dict[str, Any]:
    return {**record.config.as_dict(), "seed": record.seed}


def mlflow_tracker(tracking_uri: str, experiment: str) -> Callable[[], Tracker]:
    """Return what starts MLflow's tracker, or raise ConfigError if it cannot be used."""
    if find_spec("mlflow") is None:
        raise ConfigError(
            "--mlflow needs MLflow's client, which is not installed: pip install mlflow-skinny"
        )
    from mlflow.tracking import MlflowClient

    _quieten()
    try:
        MlflowClient(tracking_uri).search_experiments(max_results=1)
    except Exception as error:  # its stores have many ways to say no
        raise ConfigError(
            f"--mlflow: {masked(tracking_uri)} is no tracking server or store that answers "
            f"({masked(named(error))})"
        ) from error
    return partial(MlflowRuns, tracking_uri, experiment)


def _quieten() -> None:
    """Keep MLflow, once it is imported, from writing into the live view and waiting for long."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
