"""What a person sees while a search runs, and the tables that grow with it."""

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from tune_mnist.analysis.history import TrialRecord
from tune_mnist.analysis.run import RunFolder
from tune_mnist.analysis.tables import write_tables
from tune_mnist.tuning.display import finished_line, live_view
from tune_mnist.tuning.experiment import Experiment
from tune_mnist.tuning.scheduler import number_of
from tune_mnist.tuning.tally import Tally

SECONDS_BETWEEN_VIEWS = 0.25
SECONDS_BETWEEN_TABLES = 2.0
TABLES_SHARE = 0.01  # of the driver's time, at most
VIEWS_SHARE = 0.02  # of the driver's time, at most: a terminal may be slow


class Progress(Callback):
    """Shows a search's course and rewrites trials.csv and best.csv as it goes.

    On a terminal it is a live view, which is gone once it is closed; elsewhere, a line for each
    trial that has ended. Whatever befalls the display, the search goes on; a table that cannot
    be written ends it, as the disk that it cannot be written to would.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        # FORCE_COLOR makes rich take a pipe for a terminal; a dumb one cannot move its cursor.
        self._is_live = self._console.is_interactive and self._console.file.isatty()
        self._live: Live | None = None
        self._view, self._width = Text(), 0  # what is on the terminal, and how wide that was
        self._shows = False
        self._next_view = self._next_tables = -float("inf")
        self._ends = 0  # trials that have ended
        self._in_tables = (-1, -1, -1)  # how much had happened when they were last written

    def watch(self, experiment: Experiment, folder: RunFolder) -> None:
        """Begin to show a search."""
        self._experiment, self._folder = experiment, folder
        self._shows = True
        self._guard(self._begin)

    def close(self) -> None:
        """Take the live view off the terminal; nothing is shown from then on."""
        self._shows = False
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception, SystemExit):
                live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Show a trial that begins or goes on."""
        self._guard(lambda: self._tally.start(number_of(trial)))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """Show a trial's end."""
        self._ends += 1
        self._guard(lambda: self._end(number_of(trial)))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Show that a trial was given up."""
        self._ends += 1
        self._guard(lambda: self._end(number_of(trial)))

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Show where the search stands.

        Raises:
            OSError: the tables could not be written.
        """
        self._write_tables()
        if self._is_live:
            self._guard(self._refresh)

    def _begin(self) -> None:
        experiment = self._experiment
        self._tally = Tally(experiment.rules, experiment.history, experiment.elapsed)
        if self._is_live:
            # Without a thread of its own: Tune ends a step, and we look, ten times a second.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def _end(self, number: int) -> None:
        record = self._tally.end(number)
        if record is not None and not self._is_live:
            self._print(record)

    def _print(self, record: TrialRecord) -> None:
        line = finished_line(self._tally, record, self._experiment.elapsed)
        self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
        self._console.file.flush()

    def _refresh(self) -> None:
        began = self._clock()
        if self._live is None or began < self._next_view:
            return
        self._tally.catch_up()
        size = self._console.size
        self._erase_wrapped_lines(size.width)
        view = live_view(self._tally, self._folder, self._experiment.elapsed, size.height)
        if not self._console.encoding.startswith("utf"):  # nothing to write an ellipsis with
            view.overflow = "crop"
        self._live.update(view, refresh=True)
        self._view, self._width = view, size.width
        ended = self._clock()
        self._next_view = ended + max(SECONDS_BETWEEN_VIEWS, (ended - began) / VIEWS_SHARE)

    def _erase_wrapped_lines(self, width: int) -> None:
        """Erase what rich will not: a terminal made narrower wraps the lines already there."""
        if width >= self._width:
            return
        lengths = [min(len(line), self._width) for line in self._view.plain.split("\n")]
        wrapped = sum((length - 1) // width for length in lengths if length)
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
        self._console.control(Control(ControlType.CARRIAGE_RETURN, *(up * wrapped)))

    def _write_tables(self) -> None:
        began = self._clock()
        if began < self._next_tables:
            return
        history, metric = self._experiment.history, self._experiment.rules.metric
        content = (len(history.trials), len(history.rows), self._ends)
        if content == self._in_tables:
            return
        write_tables(self._folder, history, metric)
        self._in_tables = content
        ended = self._clock()
        self._next_tables = ended + max(SECONDS_BETWEEN_TABLES, (ended - began) / TABLES_SHARE)

    def _guard(self, show: Callable[[], None]) -> None:
        """Show something; a display that fails is given up, and the search goes on."""
        if not self._shows:
            return
        try:
            show()
        except (Exception, SystemExit) as error:  # rich exits when nobody reads its output
            self.close()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, SystemExit):
                reason = "nobody reads its output"
            with contextlib.suppress(Exception):
                sys.stderr.write(f"the display failed ({reason}); the search goes on\n")
