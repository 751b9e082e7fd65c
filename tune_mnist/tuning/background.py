"""Work beside the search, in rounds: a slow or failing place to write to delays no trial.

`study.db`, a run's copy elsewhere and the trackers each have one such thread. None of them holds
anything that the run's folder lacks, so the search hears of their failures only at its end.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """When a background thread works; all but `load` in seconds."""

    every: float  # between two rounds
    retry_after: float  # in addition, after a failure; doubled with every further one
    pause_at_most: float  # between two rounds, whatever happened
    patience: float  # without progress, that close() waits
    load: float = 1.0  # the share of the time that rounds may take
    retries_at_end: bool = True  # whether close() has a failed round repeated


class BackgroundThread(threading.Thread):
    """Calls `do_round` again and again, until it is closed and one last call has succeeded.

    `do_round` is told whether this is the last round, `on_failure` what a round raised: it
    returns that in words.
    """

    def __init__(
        self,
        name: str,
        pace: Pace,
        do_round: Callable[[bool], None],
        on_failure: Callable[[Exception], str],
    ) -> None:
        # A daemon: what hangs on a dead disk or server must not keep the process from ending.
        super().__init__(name=name, daemon=True)
        self._pace, self._do_round, self._on_failure = pace, do_round, on_failure
        # Set once and never cleared, so no moment exists at which a close() could be missed.
        self._closing = threading.Event()
        self._steps = 0
        self._failure: str | None = None
        self.given_up = False  # close() has stopped waiting

    def made_progress(self) -> None:
        """Give a sign of life from within a round, for which close() waits longer."""
        self._steps += 1

    def close(self) -> str | None:
        """Wait for one last round, as long as it makes progress; return what failed, or None."""
        self._closing.set()
        while self.is_alive() and not self.given_up:
            before = self._steps
            self.join(self._pace.patience)
            if self.is_alive() and self._steps == before:
                self.given_up = True
                self._failure = self._failure or f"no answer within {self._pace.patience:g} s"
        return self._failure

    def run(self) -> None:
        pace = self._pace
        pause, retry_after = pace.every, pace.retry_after
        while not self.given_up:
            closing, began = self._closing.wait(pause), time.monotonic()
            try:
                self._do_round(closing)
            except Exception as error:  # whatever it is: the search continues
                self._failure = self._on_failure(error)
                if closing:
                    if not pace.retries_at_end:
                        return
                    time.sleep(pace.retry_after)
                pause = min(pace.every + retry_after, pace.pause_at_most)
                retry_after *= 2
                continue
            self._failure, retry_after = None, pace.retry_after
            if closing:
                return
            took = time.monotonic() - began
            pause = min(max(pace.every, took * (1 / pace.load - 1)), pace.pause_at_most)
