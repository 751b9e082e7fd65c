"""What happened in a search: its trials and their epochs, as its files tell it.

`events.jsonl` and `epochs.csv` only ever grow and are the whole truth of a run; every other file
can be made again from them. One process writes (the search's driver), any number may read.
"""

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tune_mnist.analysis.files import AppendLog
from tune_mnist.analysis.run import RunFolder
from tune_mnist.errors import RunFolderError

State = Literal["running", "complete", "stopped", "diverged", "failed"]
Origin = Literal["baseline", "start", "sampled"]
Metric = Literal["val_accuracy", "test_accuracy"]

INTEGERS = ("trial", "epoch", "test_correct", "diverged_step")
METRICS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "test_correct",
    "seconds",
    "evaluation_seconds",
    "diverged_step",
)
COLUMNS = ("trial", *METRICS, "elapsed")

Row = dict[str, float | int | None]


@dataclass
class TrialRecord:
    """One trial: what it was asked to do and what came of it."""

    number: int  # Optuna's, the trial's one name in every file
    config: dict[str, Any]  # every hyperparameter
    seed: int
    origin: Origin
    ray_id: str = ""  # Ray's name for it, in the session that ran it last
    state: State = "running"  # also while it waits, interrupted, to be gone on with
    reason: str = ""  # why it was stopped, diverged or failed
    retries: int = 0  # times it was started again after its worker died
    started: float = math.nan  # seconds on the search's clock
    ended: float = math.nan
    started_at: float = math.nan  # seconds since 1970, by the driver's wall clock
    ended_at: float = math.nan
    rows: list[Row] = field(default_factory=list)  # one an epoch, in order

    @property
    def epochs(self) -> int:
        """Epochs finished."""
        return len(self.rows)

    @property
    def finite_rows(self) -> list[Row]:
        """The epochs that did not diverge."""
        return [row for row in self.rows if row["diverged_step"] is None]


class History:
    """The record of a search, in memory and on disk."""

    def __init__(self, folder: RunFolder) -> None:
        self.trials: dict[int, TrialRecord] = {}
        self.rows: list[tuple[TrialRecord, Row]] = []  # all epochs in the order they were judged
        self.elapsed = 0.0  # last known time on the search's clock, over all sessions
        self.closed_as: str | None = None  # how the last session ended; None: it was killed
        self.sessions = 0
        self._events = AppendLog(folder.events)
        self._epochs = AppendLog(folder.epochs)

    @classmethod
    def load(cls, folder: RunFolder) -> "History":
        """Read a run's history; a line that was never finished does not count.

        Raises:
            RunFolderError: a file is damaged; the message names the line.
        """
        history = cls(folder)
        for count, line in enumerate(history._events.read(), start=1):
            try:
                history._take_event(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(folder.events, count, error) from error
        for count, line in enumerate(history._epochs.read()[1:], start=2):
            try:
                history._take_row(parse_row(line))
            except (ValueError, KeyError, StopIteration) as error:
                raise _damaged(folder.epochs, count, error) from error
        return history

    def open_session(self, facts: Mapping[str, Any]) -> None:
        """Note that a driver has begun to work on the run."""
        if not self._epochs.read():
            self._epochs.append(",".join(COLUMNS))
        self._add("session", **facts)

    def close_session(self, why: str, elapsed: float) -> None:
        """Note how the driver's work ended and let go of the files."""
        self._add("close", why=why, elapsed=elapsed)
        self._events.close()
        self._epochs.close()

    def start_trial(self, record: TrialRecord, elapsed: float) -> None:
        """Note a new trial, before anyone runs it."""
        self._add(
            "start",
            trial=record.number,
            elapsed=elapsed,
            ray_id=record.ray_id,
            origin=record.origin,
            seed=record.seed,
            config=record.config,
        )

    def rerun_trial(self, number: int, elapsed: float, *, ray_id: str, error: str) -> None:
        """Note that a trial goes on: in a new session, or (with an error) on a new worker."""
        self._add("rerun", trial=number, elapsed=elapsed, ray_id=ray_id, error=error)

    def end_trial(self, number: int, elapsed: float, state: State, reason: str) -> None:
        """Note a trial's final state."""
        self._add("end", trial=number, elapsed=elapsed, state=state, reason=reason)

    def add_epoch(self, row: Row) -> bool:
        """Append an epoch, or return False where it is there already."""
        if int(row["epoch"] or 0) <= self.trials[int(row["trial"] or 0)].epochs:
            return False
        self._epochs.append(format_row(row))
        self._take_row(row)
        return True

    def unfinished(self) -> list[TrialRecord]:
        """Return the trials without a final state, oldest first."""
        return [record for record in self.trials.values() if record.state == "running"]

    def _add(self, event: str, **facts: Any) -> None:
        entry = {"event": event, "time": time.time(), **facts}
        self._events.append(json.dumps(entry, allow_nan=False))
        self._take_event(entry)

    def _take_event(self, entry: dict[str, Any]) -> None:
        self.elapsed = max(self.elapsed, entry.get("elapsed", 0.0))
        match entry["event"]:
            case "session":
                self.sessions += 1
                self.closed_as = None
            case "close":
                self.closed_as = entry["why"]
            case "start":
                self.trials[entry["trial"]] = TrialRecord(
                    number=entry["trial"],
                    config=entry["config"],
                    seed=entry["seed"],
                    origin=entry["origin"],
                    ray_id=entry["ray_id"],
                    started=entry["elapsed"],
                    started_at=entry["time"],
                )
            case "rerun":
                record = self.trials[entry["trial"]]
                record.ray_id = entry["ray_id"]
                if entry["error"]:
                    record.retries += 1
                    record.reason = entry["error"]
            case "end":
                record = self.trials[entry["trial"]]
                if entry["state"] not in get_args(State):
                    raise ValueError(f"unknown state {entry['state']!r}")
                record.state, record.reason = entry["state"], entry["reason"]
                record.ended, record.ended_at = entry["elapsed"], entry["time"]
            case unknown:
                raise ValueError(f"unknown event {unknown!r}")

    def _take_row(self, row: Row) -> None:
        record = self.trials[int(row["trial"] or 0)]
        if row["epoch"] != record.epochs + 1:
            raise ValueError(
                f"epoch {row['epoch']} of trial {record.number} follows epoch {record.epochs}"
            )
        record.rows.append(row)
        self.rows.append((record, row))
        self.elapsed = max(self.elapsed, float(row["elapsed"] or 0.0))


def format_row(row: Row) -> str:
    """Return an epoch as a line of CSV: floats in full, what was not measured left empty."""
    return ",".join(_cell(row[column]) for column in COLUMNS)


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value)


def parse_row(line: str) -> Row:
    """Read a line that `format_row` wrote."""
    cells = next(csv.reader(io.StringIO(line)))
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(COLUMNS)} cells were expected, but got {len(cells)}")
    row: Row = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        if column in INTEGERS:
            row[column] = int(cell) if cell else None
        else:
            row[column] = float(cell) if cell else math.nan
    return row


def values_of(rows: Iterable[Row], metric: str) -> list[float]:
    """Return one column of some epochs."""
    return [float(row[metric] or 0.0) for row in rows]


def _damaged(path: Any, line: int, error: Exception) -> RunFolderError:
    return RunFolderError(
        f"{path} is damaged in line {line} ({' '.join(str(error).split())}): "
        "put back a copy, or cut the file before that line"
    )
