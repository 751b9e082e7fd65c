"""What happened in a search: its trials and their epochs, as its files tell it.

`events.jsonl` and `epochs.csv` only ever grow. With `search.yaml`, what was asked, they are the
whole truth of a run: the tables, `study.db` and the report can be made again from them, but
neither `best.pt` nor the states in `checkpoints/`. One process writes, the search's driver; any
number may read.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from tune_mnist.errors import RunFolderError, shown
from tune_mnist.mnist.config import Limits, TrainConfig
from tune_mnist.mnist.metrics import METRICS, EpochMetrics, Metric
from tune_mnist.runs.files import AppendLog, Count, Seconds, record_of
from tune_mnist.runs.folder import RunFolder, damaged

End = Literal["complete", "stopped", "diverged", "failed"]
State = Literal["running", End]
ENDS: tuple[End, ...] = get_args(End)
Origin = Literal["baseline", "start", "sampled"]
COLUMNS = ("trial", *METRICS, "elapsed")
_INTEGERS = ("trial", "epoch", "test_correct", "diverged_step")


@dataclass(frozen=True, kw_only=True)
class EpochRow(EpochMetrics):
    """An epoch of a trial: a line of epochs.csv."""

    trial: Count
    elapsed: Seconds  # at its end, on the search's clock

    def line(self) -> str:
        """Return the line of CSV: floats in full precision, missing values empty."""
        return ",".join(_cell(column, getattr(self, column)) for column in COLUMNS)

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read a line that `line` wrote, or raise ValueError if it is damaged."""
        cells = line.split(",")
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(COLUMNS)} cells were expected, but got {len(cells)}")
        given = zip(COLUMNS, cells, strict=True)
        return cls.of(
            {name: _number(name, cell) for name, cell in given if cell or name not in _INTEGERS}
        )

    @classmethod
    def of(cls, values: Any) -> Self:
        """Make a row of values from a file, or raise ValueError if they are none of an epoch's."""
        row = record_of(cls, values)
        if not row.diverged and math.isnan(row.test_accuracy):
            raise ValueError("test_accuracy is missing")
        return row


def _cell(column: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    # The repr of Python's own numbers; NumPy's differs.
    return int.__repr__(int(value)) if column in _INTEGERS else float.__repr__(float(value))


def _number(column: str, cell: str) -> float:
    if column in _INTEGERS:
        return int(cell)
    return float(cell) if cell else math.nan


@dataclass(frozen=True, kw_only=True)
class _Event:
    """A line of events.jsonl."""

    time: Annotated[float, Limits(">= 0", "<= 1e11")]  # by the driver's clock, seconds since 1970
    elapsed: Seconds = 0.0  # on the search's clock


@dataclass(frozen=True, kw_only=True)
class _SessionBegun(_Event):
    asked: dict[str, Any] = field(default_factory=dict)  # of the search; earlier versions: nothing


@dataclass(frozen=True, kw_only=True)
class _SessionClosed(_Event):
    why: str


@dataclass(frozen=True, kw_only=True)
class _Started(_Event):
    trial: Count
    ray_id: str
    origin: Origin
    seed: Annotated[int, Limits(">= 0", f"<= {2**64}")]
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class _Rerun(_Event):
    trial: Count
    ray_id: str
    error: str


@dataclass(frozen=True, kw_only=True)
class _Ended(_Event):
    trial: Count
    state: End
    reason: str
    epochs: Count | None = None  # older versions did not say


_EVENTS: dict[str, type[_Event]] = {
    "session": _SessionBegun,
    "close": _SessionClosed,
    "start": _Started,
    "rerun": _Rerun,
    "end": _Ended,
}


@dataclass
class TrialRecord:
    """One trial: its configuration, and what came of it."""

    number: int  # Optuna's; the same in every file
    config: TrainConfig
    seed: int
    origin: Origin
    ray_id: str = ""  # Ray's name for it, in the session that last ran it
    state: State = "running"  # also while it waits to be resumed
    reason: str = ""  # why it was stopped, diverged or failed
    retries: int = 0  # restarts after its worker died
    started: float = math.nan  # on the search's clock, s
    ended: float = math.nan
    started_at: float = math.nan  # by the driver's wall clock, seconds since 1970
    ended_at: float = math.nan
    rows: list[EpochRow] = field(default_factory=list)  # one per epoch, in order

    @property
    def epochs(self) -> int:
        return len(self.rows)

    def time_of(self, row: EpochRow) -> float:
        """Return when one of its epochs was reported, seconds since 1970."""
        return self.started_at + row.elapsed - self.started

    @property
    def finite_rows(self) -> list[EpochRow]:
        return [row for row in self.rows if not row.diverged]

    def rows_that_count(self, metric: Metric) -> list[EpochRow]:
        """Return the epochs by which the trial can be ranked."""
        return [row for row in self.rows if row.counts(metric)]


class History:
    """The record of a search, in memory and on disk."""

    def __init__(self, folder: RunFolder) -> None:
        self.trials: dict[int, TrialRecord] = {}
        self.rows: list[tuple[TrialRecord, EpochRow]] = []  # all epochs, as they were reported
        self.elapsed = 0.0  # last known time on the search's clock, over all sessions, s
        self.closed_as: str | None = None  # how the last session ended; None: it was killed
        self.sessions = 0
        self.asked: Mapping[str, Any] = {}  # of the last session; older versions did not say
        self._folder = folder
        self._unfinished: dict[int, TrialRecord] = {}  # few, where `trials` may be thousands
        self._reopened: list[TrialRecord] = []
        self._epochs_at_end: dict[int, int] = {}
        self._events = AppendLog(folder.events)
        self._epochs = AppendLog(folder.epochs)

    @classmethod
    def load(cls, folder: RunFolder) -> "History":
        """Read a run's history, or raise RunFolderError with the damaged line.

        An unfinished last line is ignored.
        """
        history = cls(folder)
        events = 0
        for events, content in _numbered(history._events):
            try:
                history._apply_event(json.loads(content.decode()))
            except (ValueError, RecursionError) as error:
                raise _damaged_line(folder.events, events, error) from error
        for line, content in _numbered(history._epochs):
            try:
                history._apply_line(line, content.decode())
            except _UnknownTrialError as error:
                # No damage if the trial started after its events were read.
                if len(AppendLog(folder.events).read()) == events:
                    raise _damaged_line(folder.epochs, line, error) from error
            except ValueError as error:
                raise _damaged_line(folder.epochs, line, error) from error
        history._check_ends()
        return history

    def open_session(self, facts: Mapping[str, Any]) -> None:
        """Record that a driver has begun to work; like all that record, it may raise OSError."""
        if not self._epochs.read():
            self._epochs.append(",".join(COLUMNS))
        self._record("session", **facts)
        for record in self._reopened:
            self.rerun_trial(record.number, self.elapsed, ray_id=record.ray_id, error="")

    def close_session(self, why: str, elapsed: float) -> None:
        """Record how the driver's work ended, and close the files."""
        try:
            self._record("close", why=why, elapsed=elapsed)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the files, as a kill does."""
        self._events.close()
        self._epochs.close()

    def start_trial(self, record: TrialRecord, elapsed: float) -> None:
        """Record a new trial, before any worker has it."""
        self._record(
            "start",
            trial=record.number,
            elapsed=elapsed,
            ray_id=record.ray_id,
            origin=record.origin,
            seed=record.seed,
            config=record.config.as_dict(),
        )
        self._events.sync()

    def rerun_trial(self, number: int, elapsed: float, *, ray_id: str, error: str) -> None:
        """Record that a trial is resumed: in a new session or, after an error, on a new worker."""
        self._record("rerun", trial=number, elapsed=elapsed, ray_id=ray_id, error=error)

    def end_trial(self, number: int, elapsed: float, state: State, reason: str) -> None:
        """Record a trial's final state; from then on even a power cut does not undo it."""
        self._epochs.sync()
        result = {"state": state, "reason": reason, "epochs": self.trials[number].epochs}
        self._record("end", trial=number, elapsed=elapsed, **result)
        self._events.sync()

    def add_epoch(self, row: EpochRow) -> bool:
        """Append an epoch, or return False if it is already there."""
        if row.epoch <= self.trials[row.trial].epochs:
            return False
        self._epochs.append(row.line())
        self._apply_row(row)
        return True

    def reopen_hopeless(self) -> None:
        """Take up again what failed before any epoch was finished: no trial caused that."""
        if not self.rows:
            self._reopened = [each for each in self.trials.values() if each.state == "failed"]
            for record in self._reopened:
                self._reopen(record)

    def unfinished(self) -> list[TrialRecord]:
        """Return the trials without a final state, oldest first."""
        return list(self._unfinished.values())

    def _record(self, event: str, **facts: Any) -> None:
        entry = {"event": event, "time": time.time(), **facts}
        self._events.append(json.dumps(entry, allow_nan=False))
        self._apply_event(entry)

    def _apply_event(self, entry: Any) -> None:
        kind = entry.get("event") if isinstance(entry, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"an event was expected, but got {shown(entry)}")
        if kind not in _EVENTS:
            raise ValueError(
                f"event {shown(kind)} is not known to this version of tune_mnist: "
                "a newer one wrote it"
            )
        event = record_of(_EVENTS[kind], entry)
        match event:
            case _SessionBegun():
                self.sessions += 1
                self.closed_as = None
                self.asked = event.asked
            case _SessionClosed():
                self.closed_as = event.why
            case _Started():
                self._apply_start(event)
            case _Rerun():
                record = self._trial(event.trial)
                record.ray_id = event.ray_id
                self._reopen(record)
                if event.error:
                    record.retries += 1
                    record.reason = event.error
            case _Ended():
                self._apply_end(event)
        self.elapsed = max(self.elapsed, event.elapsed)

    def _apply_start(self, event: _Started) -> None:
        number = event.trial
        if number != len(self.trials):
            raise ValueError(f"trial {number} follows {len(self.trials)} trials")
        self.trials[number] = self._unfinished[number] = TrialRecord(
            number=number,
            config=event.config,
            seed=event.seed,
            origin=event.origin,
            ray_id=event.ray_id,
            started=event.elapsed,
            started_at=event.time,
        )

    def _reopen(self, record: TrialRecord) -> None:
        record.state, record.ended, record.ended_at = "running", math.nan, math.nan
        self._unfinished[record.number] = record
        self._epochs_at_end.pop(record.number, None)

    def _apply_end(self, event: _Ended) -> None:
        record = self._trial(event.trial)
        record.state, record.reason = event.state, event.reason
        record.ended, record.ended_at = event.elapsed, event.time
        self._unfinished.pop(record.number, None)
        if event.epochs is not None:
            self._epochs_at_end[record.number] = event.epochs

    def _apply_line(self, line: int, content: str) -> None:
        if line > 1:
            self._apply_row(EpochRow.parse(content))
        elif tuple(content.strip().split(",")) != COLUMNS:
            raise ValueError(
                f"the columns {','.join(COLUMNS)} were expected; another version of tune_mnist "
                "may have written others"
            )

    def _apply_row(self, row: EpochRow) -> None:
        record = self._trial(row.trial)
        if row.epoch != record.epochs + 1:
            raise ValueError(
                f"epoch {row.epoch} of trial {record.number} follows epoch {record.epochs}"
            )
        record.rows.append(row)
        self.rows.append((record, row))
        self.elapsed = max(self.elapsed, row.elapsed)

    def _trial(self, number: int) -> TrialRecord:
        if number not in self.trials:
            raise _UnknownTrialError(f"no trial {number} has started")
        return self.trials[number]

    def _check_ends(self) -> None:
        for number, epochs in self._epochs_at_end.items():
            if epochs != self.trials[number].epochs:
                raise RunFolderError(
                    f"{self._folder.epochs} is damaged: it has {self.trials[number].epochs} of "
                    f"the {epochs} epochs of trial {number}, which has ended: put back a copy, or "
                    f"remove the trial's end from {self._folder.events} to run it again"
                )


class _UnknownTrialError(ValueError):
    """An event or a row names a trial that no event has started."""


def _numbered(log: AppendLog) -> Iterator[tuple[int, bytes]]:
    """Return a log's lines, counted from 1, or raise RunFolderError."""
    try:
        yield from enumerate(log.read(), start=1)
    except OSError as error:
        raise RunFolderError(f"{log.path} cannot be read ({error.strerror})") from error


def _damaged_line(path: Path, line: int, error: Exception) -> RunFolderError:
    return damaged(path, error, f" in line {line}", ", or cut the file before that line")


@dataclass(frozen=True)
class Assignment:
    """What a worker is told to do: train this configuration, from this state on."""

    number: int  # the trial's
    config: TrainConfig
    seed: int
    epochs: int
    metric: Metric
    state: bytes | None  # None: from the start

    def __repr__(self) -> str:  # Tune puts configurations into folder names and logs
        return f"trial {self.number}"
