"""Handing a search's course to trackers, which are where people already look: TensorBoard, MLflow.

A thread of its own follows what the run's history says, so that a tracker may be slow, hang or
fail and the search neither waits nor hears of it before its end. What a tracker lacks after a
failure, a kill or a resume, it gets from the history.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from tune_mnist.analysis.history import History, Row, TrialRecord

FOLLOW_EVERY = 2.0  # seconds
RETRY_AFTER = 2.0  # seconds until a tracker that failed is tried again; then longer
RETRY_AFTER_AT_MOST = 60.0
CLOSING_PATIENCE = 30.0  # seconds that a search's end waits for the last epochs to arrive


class Tracker(Protocol):
    """Something that shows trials and their epochs; whatever it raises is a failure to do so."""

    def begin(self, record: TrialRecord) -> int:
        """Take up a trial and return how many of its epochs are there already."""

    def add_epoch(self, record: TrialRecord, row: Row) -> None:
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
