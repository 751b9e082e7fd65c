"""`study.db`: the study as a SQLite file, kept in line with the study in memory.

A thread of its own writes, so that a reader who locks the file, or a slow disk, holds up nothing.
"""

import queue
import sqlite3
import threading
import time
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

STUDY_NAME = "tune_mnist"
LOCK_PATIENCE = 20.0  # seconds to wait at the end for a reader who holds the file's lock
RETRY_EVERY = 0.5  # seconds between two tries to write a file that is locked or full
WRITE_EVERY = 0.5  # seconds between two rounds: many changes of a trial cost one write

_FAILURES = (SQLAlchemyError, sqlite3.Error, OSError, optuna.exceptions.OptunaError)


class Mirror:
    """Writes trials to a SQLite file, in a thread, each as it was last put."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._metric = path, metric
        self._queue: queue.SimpleQueue[FrozenTrial | None] = queue.SimpleQueue()
        self._latest: dict[int, FrozenTrial] = {}
        self._written: dict[int, FrozenTrial] = {}
        self._storage: RDBStorage | None = None
        self._study_id = 0
        self._inode = 0
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="study.db", daemon=True)
        self._thread.start()

    def put(self, trial: FrozenTrial) -> None:
        """Have a trial written as it is now."""
        self._queue.put(trial)

    def close(self) -> str | None:
        """Write what is left.

        Returns:
            Why that could not be done, or None.
        """
        self._queue.put(None)
        self._thread.join()
        return self._failure

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._collect()
            deadline = time.monotonic() + LOCK_PATIENCE
            while not self._try_to_write():
                if closing and time.monotonic() > deadline:
                    return
                time.sleep(RETRY_EVERY)
                closing = self._collect(block=False) or closing
        if self._storage is not None:
            self._storage.engine.dispose()

    def _collect(self, block: bool = True) -> bool:
        """Take what was put; return True once there is no more to come."""
        if block:
            trial = self._queue.get()
            if trial is None:
                return True
            self._latest[trial.number] = trial
            time.sleep(WRITE_EVERY)
        while not self._queue.empty():
            trial = self._queue.get()
            if trial is None:
                return True
            self._latest[trial.number] = trial
        return False

    def _try_to_write(self) -> bool:
        try:
            if self._storage is None or not self._is_same_file():
                self._open()
            for number in sorted(self._latest):
                if self._written.get(number) is not self._latest[number]:
                    self._write(self._latest[number])
                    self._written[number] = self._latest[number]
        except _FAILURES as error:
            # Start over from what the file holds: it may have been replaced or half written.
            self._storage = None
            self._failure = " ".join(str(error.__cause__ or error).split())[:300]
            return False
        self._failure = None
        return True

    def _is_same_file(self) -> bool:
        return self._path.exists() and self._path.stat().st_ino == self._inode

    def _open(self) -> None:
        """Open the file and read what it holds; a damaged one is put aside and made anew."""
        if self._path.exists() and not is_sound(self._path):
            self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
        storage = RDBStorage(
            f"sqlite:///{self._path}", engine_kwargs={"connect_args": {"timeout": 1}}
        )
        study = optuna.create_study(
            storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
        )
        if study.metric_names != [self._metric]:
            study.set_metric_names([self._metric])
        self._study_id = study._study_id
        self._written = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        self._inode = self._path.stat().st_ino
        self._storage = storage

    def _write(self, trial: FrozenTrial) -> None:
        """Bring the file's version of one trial in line with `trial`."""
        storage = self._storage
        if storage is None:  # only after `_open`
            raise RuntimeError("the mirror is not open")
        old = self._written.get(trial.number)
        if old is None:
            storage.create_new_trial(self._study_id, template_trial=trial)
            return
        if old.state.is_finished():
            if facts(old) == facts(trial):
                return
            self._start_anew()
            return
        self._update(storage, old, trial)

    def _update(self, storage: RDBStorage, old: FrozenTrial, trial: FrozenTrial) -> None:
        """Add to an unfinished trial what has come since it was written."""
        key = storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        for name in trial.params.keys() - old.params.keys():
            distribution = trial.distributions[name]
            internal = distribution.to_internal_repr(trial.params[name])
            storage.set_trial_param(key, name, internal, distribution)
        for name, value in trial.user_attrs.items() - old.user_attrs.items():
            storage.set_trial_user_attr(key, name, value)
        for step in trial.intermediate_values.keys() - old.intermediate_values.keys():
            storage.set_trial_intermediate_value(key, step, trial.intermediate_values[step])
        if trial.state != old.state:
            storage.set_trial_state_values(key, trial.state, trial.values)

    def _start_anew(self) -> None:
        """Put aside a file that disagrees with the run's history about a finished trial."""
        self._path.replace(self._path.with_name(f"{self._path.name}.outdated"))
        raise OSError(f"{self._path.name} disagrees with the run's history and is made anew")


def is_sound(path: Path) -> bool:
    """Say whether a file is an intact SQLite database (a locked one is taken to be)."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1)
    try:
        return bool(connection.execute("PRAGMA quick_check").fetchone() == ("ok",))
    except sqlite3.OperationalError:
        return True
    except sqlite3.DatabaseError:
        return False
    finally:
        connection.close()


def facts(trial: FrozenTrial) -> tuple[object, ...]:
    """Return what a trial says, without the times and ids that differ between copies."""
    return (
        trial.state,
        trial.values,
        trial.params,
        trial.intermediate_values,
        trial.user_attrs,
    )
