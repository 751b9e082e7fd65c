"""`study.db`: the study as a SQLite file, kept equal to the study in memory.

A background thread writes it, so a reader who locks the file, or a slow disk, delays nothing. The
file is a copy and never a source: one that is damaged, or that contradicts the study, is put aside
(`study.db.damaged`, `study.db.outdated`) and written anew.
"""

import contextlib
import json
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tune_mnist.errors import one_line, root_cause
from tune_mnist.tuning.background import BackgroundThread, Pace

STUDY_NAME = "tune_mnist"
WRITE_EVERY = 2.0  # seconds between two rounds: many changes of a trial cost one write
RETRY_AFTER = 0.5  # seconds more until a file that is locked or full is tried again
PAUSE_AT_MOST = 8.0
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end, as for a reader's lock
_MANY = 20  # new trials from which they are written together
_AT_ONCE = 500
LOCK_TIMEOUT = 1.0  # seconds that SQLite itself waits for a lock


class StudyFile:
    """Writes trials to a SQLite file in the background, each as it was last put."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._metric = path, metric
        self._lock = threading.Lock()
        self._latest: dict[int, FrozenTrial] = {}  # all trials as they were last put
        self._changed: set[int] = set()  # of those, the ones that the file may lack
        self._written: dict[int, FrozenTrial] = {}  # all trials as they are in the file
        self._storage: RDBStorage | None = None
        self._inode = 0
        self._study_id = 0
        pace = Pace(WRITE_EVERY, RETRY_AFTER, PAUSE_AT_MOST, CLOSING_PATIENCE)
        self._thread = BackgroundThread("study.db", pace, self._work, self._failed)
        self._thread.start()

    def put(self, trial: FrozenTrial) -> None:
        with self._lock:
            self._latest[trial.number] = trial
            self._changed.add(trial.number)

    def close(self) -> str | None:
        """Write what is left; return why that failed, or None."""
        return self._thread.close()

    def _work(self, closing: bool) -> None:
        if self._changed or closing:
            self._write_changes()
        if closing:
            self._check_file()
            self._close_file()

    def _failed(self, error: Exception) -> str:
        cause = root_cause(error)
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # without the detail in its upper bits
        if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):  # both leave the file usable
            self._close_file()
        return one_line(cause)

    def _write_changes(self) -> None:
        self._open_storage()
        while self._changed and not self._thread.given_up:
            with self._lock:
                changed = [self._latest[number] for number in sorted(self._changed)]
            new = [trial for trial in changed if trial.number not in self._written]
            if len(new) >= _MANY:
                self._done(self._insert(self._open_storage(), new[:_AT_ONCE]))
                continue
            for trial in changed:
                if self._thread.given_up:
                    return
                # Before each: Optuna tries for many seconds to write a file that was deleted.
                if not self._write(self._open_storage(), trial):
                    self._put_aside("outdated")
                    break
                self._done([trial])

    def _done(self, trials: Sequence[FrozenTrial]) -> None:
        """Note that the file has these trials."""
        for trial in trials:
            self._written[trial.number] = trial
            with self._lock:
                if self._latest[trial.number] is trial:
                    self._changed.discard(trial.number)
        self._thread.made_progress()

    def _check_file(self) -> None:
        """At the end, replace a file that somebody has damaged or added trials to."""
        if not is_sound(self._path):
            self._put_aside("damaged")
        elif self._written.keys() - self._latest.keys():
            self._put_aside("outdated")
        self._write_changes()

    def _open_storage(self) -> RDBStorage:
        """Return the open file's storage; open it again if somebody replaced or deleted it."""
        if self._storage is not None and _inode(self._path) == self._inode:
            return self._storage
        self._close_file()
        if self._path.exists() and not is_sound(self._path):
            self._put_aside("damaged")
        try:
            return self._open_file()
        except RuntimeError:  # Optuna's word for tables of another version's
            self._put_aside("outdated")
            return self._open_file()

    def _open_file(self) -> RDBStorage:
        # By a connection of our own making: in a URL, a path with a ? or a % means another file.
        storage = RDBStorage("sqlite:///study.db", engine_kwargs={"creator": self._connect})
        study = optuna.create_study(
            storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
        if study.metric_names != [self._metric]:
            study.set_metric_names([self._metric])
        self._study_id = storage.get_study_id_from_name(STUDY_NAME)
        self._written = {trial.number: trial for trial in self._read(storage)}
        self._inode = _inode(self._path)
        self._storage = storage
        with self._lock:
            self._changed = set(self._latest)
        return storage

    def _read(self, storage: RDBStorage) -> Iterator[FrozenTrial]:
        """Yield the file's trials, read some at a time: all of a long search take seconds."""
        with storage.engine.connect() as connection:
            query = "SELECT trial_id FROM trials WHERE study_id = ? ORDER BY trial_id"
            keys = [key for (key,) in connection.exec_driver_sql(query, (self._study_id,))]
        for first in range(0, len(keys), _AT_ONCE):
            yield from storage._get_trials(
                self._study_id, None, set(keys[first : first + _AT_ONCE]), keys[-1]
            )
            self._thread.made_progress()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT)
        connection.execute("PRAGMA synchronous = OFF")  # after a power cut it is written anew
        return connection

    def _close_file(self) -> None:
        if self._storage is not None:
            self._storage.engine.dispose()
            self._storage = None

    def _put_aside(self, why: str) -> None:
        self._close_file()
        # With its journal, which SQLite would otherwise play back into the file's successor.
        for suffix in ("-journal", "-wal", "-shm", ""):
            path = self._path.with_name(f"{self._path.name}{suffix}")
            if path.exists():
                path.replace(self._path.with_name(f"{self._path.name}.{why}{suffix}"))

    def _write(self, storage: RDBStorage, trial: FrozenTrial) -> bool:
        """Bring the file's version of a trial up to date, or return False if it contradicts."""
        old = self._written.get(trial.number)
        if old is None:
            key = storage.create_new_trial(self._study_id, template_trial=trial)
            if storage.get_trial_number_from_id(key) != trial.number:
                return False
        elif not _extends(trial, old):
            return False
        elif not old.state.is_finished():
            self._update(storage, old, trial)
        return True

    def _insert(self, storage: RDBStorage, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """Add trials that follow those of the file, and return them.

        A resume may have thousands, and Optuna's public functions take 20 ms for each.
        """
        from optuna.storages._rdb.models import BaseModel  # here, as it takes half a second

        tables = BaseModel.metadata.tables
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        with storage.engine.begin() as connection:
            last = connection.exec_driver_sql("SELECT max(trial_id) FROM trials").scalar() or 0
            for key, trial in enumerate(trials, last + 1):
                for table, entries in _rows_of(trial, self._study_id).items():
                    rows[table] += [{"trial_id": key, **entry} for entry in entries]
            for table, entries in rows.items():
                connection.execute(tables[table].insert(), entries)
        return trials

    def _update(self, storage: RDBStorage, old: FrozenTrial, trial: FrozenTrial) -> None:
        """Add to an unfinished trial what it lacks, its state last."""
        key = storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        for name, value in _new(trial.params, old.params).items():
            kind = trial.distributions[name]
            storage.set_trial_param(key, name, kind.to_internal_repr(value), kind)
        for name, value in _new(trial.user_attrs, old.user_attrs).items():
            storage.set_trial_user_attr(key, name, value)
        for step, value in _new(trial.intermediate_values, old.intermediate_values).items():
            storage.set_trial_intermediate_value(key, step, value)
        if trial.state != old.state:
            storage.set_trial_state_values(key, trial.state, trial.values)


def is_sound(path: Path) -> bool:
    """Return True if a file is an intact SQLite database; a locked one is taken for intact."""
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1)
        with contextlib.closing(connection):
            return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.OperationalError:
        return True
    except sqlite3.DatabaseError:
        return False


def facts(trial: FrozenTrial) -> tuple[object, ...]:
    """Return a trial's content, without the times and ids that differ between copies."""
    results = trial.state, trial.values, trial.intermediate_values
    return *results, trial.params, trial.distributions, trial.user_attrs


def _rows_of(trial: FrozenTrial, study: int) -> dict[str, list[dict[str, Any]]]:
    """Return by table what Optuna keeps of a trial, without the trial's key in the file."""
    from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialValueModel

    reports = [
        (step, *TrialIntermediateValueModel.intermediate_value_to_stored_repr(value))
        for step, value in trial.intermediate_values.items()
    ]
    values = [TrialValueModel.value_to_stored_repr(value) for value in trial.values or ()]
    return {
        "trials": [
            {
                "number": trial.number,
                "study_id": study,
                "state": trial.state,
                "datetime_start": _in_utc(trial.datetime_start),
                "datetime_complete": _in_utc(trial.datetime_complete),
            }
        ],
        "trial_values": [
            {"objective": place, "value": value, "value_type": kind}
            for place, (value, kind) in enumerate(values)
        ],
        "trial_params": [
            {
                "param_name": name,
                "param_value": kind.to_internal_repr(trial.params[name]),
                "distribution_json": distribution_to_json(kind),
            }
            for name, kind in trial.distributions.items()
        ],
        "trial_user_attributes": [
            {"key": key, "value_json": json.dumps(value)}
            for key, value in trial.user_attrs.items()
        ],
        "trial_intermediate_values": [
            {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
            for step, value, kind in reports
        ],
    }


def _in_utc(time: datetime | None) -> datetime | None:
    return time and time.astimezone(UTC).replace(tzinfo=None)


def _extends(trial: FrozenTrial, old: FrozenTrial) -> bool:
    """Return True if `old` is `trial`, or can have been an earlier version of it.

    A finished one may have more attributes: users write notes there.
    """
    if old.state.is_finished():
        same = facts(old)[:-1] == facts(trial)[:-1]
        return same and not _new(trial.user_attrs, old.user_attrs)
    parts = ("params", "distributions", "intermediate_values")
    return not any(_new(getattr(old, part), getattr(trial, part)) for part in parts)


def _new(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of `now` that `then` lacks or has with another value."""
    return {key: value for key, value in now.items() if key not in then or then[key] != value}


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
