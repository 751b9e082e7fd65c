"""`study.db`: the study as a SQLite file, kept in line with the study in memory.

A thread of its own writes, so that a reader who locks the file, or a slow disk, holds up nothing.
The file is a copy and never a source: where it is damaged, or says otherwise than the study, it is
put aside (`study.db.damaged`, `study.db.outdated`) and made anew.
"""

import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

STUDY_NAME = "tune_mnist"
CLOSING_PATIENCE = 20.0  # seconds without progress to wait at the end, as for a reader's lock
WRITE_EVERY = 2.0  # seconds between two rounds: many changes of a trial cost one write
RETRY_AFTER = 0.5  # seconds until a file that is locked or full is tried again; then longer
RETRY_AFTER_AT_MOST = 8.0
LOCK_TIMEOUT = 1.0  # seconds that SQLite itself waits for a lock


class StudyFile:
    """Writes trials to a SQLite file, in a thread, each as it was last put."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._metric = path, metric
        self._lock = threading.Lock()
        self._latest: dict[int, FrozenTrial] = {}  # all trials as they were last put
        self._changed: set[int] = set()  # of those, what is perhaps not in the file
        self._written: dict[int, FrozenTrial] = {}  # all trials as they are in the file
        self._steps = 0  # trials written, for a sign of life
        self._work_to_do, self._closing = threading.Event(), threading.Event()
        self._given_up = False
        self._failure: str | None = None
        self._storage: RDBStorage | None = None
        self._inode = 0
        self._study_id = 0
        # A daemon: what hangs on a dead disk must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="study.db", daemon=True)
        self._thread.start()

    def put(self, trial: FrozenTrial) -> None:
        """Have a trial written as it is now."""
        with self._lock:
            self._latest[trial.number] = trial
            self._changed.add(trial.number)
        self._work_to_do.set()

    def close(self) -> str | None:
        """Write what is left.

        Returns:
            Why that could not be done, or None.
        """
        self._closing.set()
        self._work_to_do.set()
        while self._thread.is_alive() and not self._given_up:
            before = self._steps
            self._thread.join(CLOSING_PATIENCE)
            if self._thread.is_alive() and self._steps == before:
                self._given_up = True
                self._failure = self._failure or f"no progress for {CLOSING_PATIENCE:g} s"
        return self._failure

    def _work(self) -> None:
        pause = RETRY_AFTER
        while not self._given_up:
            self._work_to_do.wait()
            self._closing.wait(WRITE_EVERY)
            self._work_to_do.clear()
            closing = self._closing.is_set()  # after clear(): a close() in between is not missed
            try:
                self._write_changes()
                if closing:
                    self._check_file()
            except Exception as error:  # whatever it is: the search goes on, and hears of it
                self._failure = _in_words(error)
                if not _is_lock(error):
                    self._close_file()
                self._work_to_do.set()
                if self._closing.wait(pause):
                    time.sleep(RETRY_AFTER)
                pause = min(2 * pause, RETRY_AFTER_AT_MOST)
                continue
            self._failure, pause = None, RETRY_AFTER
            if closing and not self._changed:
                break
        self._close_file()

    def _write_changes(self) -> None:
        self._see_to_the_file()
        while self._changed and not self._given_up:
            with self._lock:
                trial = self._latest[min(self._changed)]
            # Before each: Optuna tries for many seconds to write a file that has been deleted.
            self._see_to_the_file()
            try:
                self._write(trial)
            except _DisagreementError:
                self._start_anew("outdated")
                continue
            with self._lock:
                if self._latest[trial.number] is trial:
                    self._changed.discard(trial.number)
            self._steps += 1

    def _see_to_the_file(self) -> None:
        if self._storage is None or _inode(self._path) != self._inode:
            self._close_file()
            self._open_file()

    def _check_file(self) -> None:
        """See, at the end, that nobody has spoilt the file or added to it."""
        if not is_sound(self._path):
            self._start_anew("damaged")
        elif self._written.keys() - self._latest.keys():
            self._start_anew("outdated")
        self._write_changes()

    def _open_file(self) -> None:
        if self._path.exists() and not is_sound(self._path):
            self._put_aside("damaged")
        try:
            self._load_file()
        except RuntimeError:  # Optuna's word for tables of another version's
            self._put_aside("outdated")
            self._load_file()

    def _load_file(self) -> None:
        # By a connection of our own making: in a URL, a path with a ? or a % means another file.
        storage = RDBStorage("sqlite:///study.db", engine_kwargs={"creator": self._connect})
        study = optuna.create_study(
            storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
        if study.metric_names != [self._metric]:
            study.set_metric_names([self._metric])
        self._study_id = storage.get_study_id_from_name(STUDY_NAME)
        self._written = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        self._inode = _inode(self._path)
        self._storage = storage
        with self._lock:
            self._changed = set(self._latest)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=LOCK_TIMEOUT)
        connection.execute("PRAGMA synchronous = OFF")  # after a power cut it is made anew
        return connection

    def _close_file(self) -> None:
        if self._storage is not None:
            self._storage.engine.dispose()
            self._storage = None

    def _start_anew(self, why: str) -> None:
        self._close_file()
        self._put_aside(why)

    def _put_aside(self, why: str) -> None:
        # With its journal, which SQLite would otherwise play back into the file's successor.
        for suffix in ("-journal", "-wal", "-shm", ""):
            path = self._path.with_name(f"{self._path.name}{suffix}")
            if path.exists():
                path.replace(self._path.with_name(f"{self._path.name}.{why}{suffix}"))

    def _write(self, trial: FrozenTrial) -> None:
        """Bring the file's version of one trial in line with `trial`."""
        storage = self._storage
        if storage is None:
            raise RuntimeError("the mirror is not open")
        old = self._written.get(trial.number)
        if old is None:
            key = storage.create_new_trial(self._study_id, template_trial=trial)
            if storage.get_trial_number_from_id(key) != trial.number:
                raise _DisagreementError
        elif not _extends(trial, old):
            raise _DisagreementError
        elif not old.state.is_finished():
            self._update(storage, old, trial)
        self._written[trial.number] = trial

    def _update(self, storage: RDBStorage, old: FrozenTrial, trial: FrozenTrial) -> None:
        """Add to an unfinished trial what has come since it was written, its state last."""
        key = storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        for name, value in _new(trial.params, old.params).items():
            distribution = trial.distributions[name]
            internal = distribution.to_internal_repr(value)
            storage.set_trial_param(key, name, internal, distribution)
        for name, value in _new(trial.user_attrs, old.user_attrs).items():
            storage.set_trial_user_attr(key, name, value)
        for step, value in _new(trial.intermediate_values, old.intermediate_values).items():
            storage.set_trial_intermediate_value(key, step, value)
        if trial.state != old.state:
            storage.set_trial_state_values(key, trial.state, trial.values)


class _DisagreementError(Exception):
    """The file says of a trial what the study does not."""


def is_sound(path: Path) -> bool:
    """Say whether a file is an intact SQLite database (a locked one is taken to be)."""
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return True
    except sqlite3.DatabaseError:
        return False


def facts(trial: FrozenTrial) -> tuple[object, ...]:
    """Return what a trial says, without the times and ids that differ between copies."""
    return (
        trial.state,
        trial.values,
        trial.params,
        trial.distributions,
        trial.intermediate_values,
        trial.user_attrs,
    )


def _extends(trial: FrozenTrial, old: FrozenTrial) -> bool:
    """Say whether `old` can have been an earlier version of `trial`, or is the same.

    A finished one may have more attributes: users note things there.
    """
    if old.state.is_finished():
        same = facts(old)[:-1] == facts(trial)[:-1]
        return same and not _new(trial.user_attrs, old.user_attrs)
    return not (
        _new(old.params, trial.params)
        or _new(old.distributions, trial.distributions)
        or _new(old.intermediate_values, trial.intermediate_values)
    )


def _new(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of `now` that `then` lacks or has with another value."""
    return {key: value for key, value in now.items() if key not in then or then[key] != value}


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _is_lock(error: BaseException | None) -> bool:
    """Say whether an error comes from a lock; then the connection is as good as before."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the detail in its upper bits
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _in_words(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
