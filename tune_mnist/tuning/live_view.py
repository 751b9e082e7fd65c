"""What a person sees while a search runs: a live view on a terminal, elsewhere single lines."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from tune_mnist.errors import named
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, differences, duration, percent, short_path
from tune_mnist.runs.history import ENDS, EpochRow, History, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar, RankedTrial
from tune_mnist.runs.tables import write_tables
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.resources import Node, TrialResources, in_words
from tune_mnist.tuning.tune_adapters import number_of

_NODES_NAMED = 6  # in a larger cluster, nodes of a kind are counted

SECONDS_BETWEEN_VIEWS = 0.25
SECONDS_BETWEEN_TABLES = 2.0
TABLES_SHARE = 0.01  # of the driver's time, at most
VIEWS_SHARE = 0.02  # of the driver's time, at most: a terminal may be slow


def announce(
    console: Console, start: str, nodes: Sequence[Node], resources: TrialResources
) -> None:
    """Print what is about to run and, if there are several nodes, where."""
    # A log gets whole lines, however wide its reader's window is.
    whole = not console.is_terminal
    console.print(Text(start), soft_wrap=whole)
    if len(nodes) > 1:
        console.print(Text(nodes_line(nodes, resources)), soft_wrap=whole)


def start_line(
    folder: RunFolder,
    rules: Rules,
    history: History,
    resources: TrialResources,
    at_once: int,
    data: Split,
) -> str:
    where = short_path(folder.path)
    what = f"up to {count(rules.trials, 'trial')} of at most {count(rules.epochs, 'epoch')}"
    if history.trials:
        done = len(history.trials) - len(history.unfinished())
        where = f"resuming {where}"
        what = (
            f"{done:,} of {count(rules.trials, 'trial')} done in {duration(history.elapsed)}, "
            f"at most {count(rules.epochs, 'epoch')} each"
        )
    if rules.time_limit < float("inf"):
        what += f", for at most {duration(rules.time_limit)}"
    workers = in_words(at_once * resources.cpus, at_once * resources.gpus)
    held_out = len(data.val_images)
    steering = f"held-out {held_out:,} steer" if held_out else "the test set steers"
    return (
        f"{where}: {what}, {at_once} at a time on {workers}, "
        f"{count(len(data.train_images), 'training image')}, {steering}"
    )


def nodes_line(nodes: Sequence[Node], resources: TrialResources) -> str:
    """Return how many trials run where; for a large cluster, how many nodes are of a kind."""
    if len(nodes) <= _NODES_NAMED:
        parts = []
        for node in nodes:
            lacks = "" if resources.slots_on(node) else f" ({_offer(node, resources)})"
            parts.append(f"{node.address} {_trials_on(node, resources)}{lacks}")
    else:
        alike = Counter((_offer(node, resources), _trials_on(node, resources)) for node in nodes)
        parts = [
            f"{number} of {offer} {trials}{' each' * (number > 1)}"
            for (offer, trials), number in alike.most_common()
        ]
    return f"{len(nodes)} nodes: {', '.join(parts)}"


def _trials_on(node: Node, resources: TrialResources) -> str:
    return count(slots, "trial") if (slots := resources.slots_on(node)) else "no trial"


def _offer(node: Node, resources: TrialResources) -> str:
    return str(node) + ", no GPU" * (resources.gpus > 0 and not node.gpus)


class Tally:
    """Where a search stands, and how much longer it may take.

    It counts the trials that end, so that a look costs the same after any number of them.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.rules, self.best = experiment.rules, experiment.best
        self._experiment, self._history = experiment, experiment.history
        self._baseline_config = self.rules.space.baseline()
        self.states: Counter[State] = Counter()  # of the trials that have ended
        self.last_failure: TrialRecord | None = None
        self._lengths = [0] * (self.rules.epochs + 1)  # how many ended after so many epochs
        self._baseline, self._epochs_seen = BestSoFar(self.rules.metric), 0
        self._began, self._epochs_before = experiment.elapsed, self.epochs
        for number in self._history.trials:
            self.end(number)

    @property
    def done(self) -> int:
        return self.states.total()

    @property
    def epochs(self) -> int:
        return len(self._history.rows)

    @property
    def running(self) -> list[TrialRecord]:
        return self._experiment.running

    @property
    def baseline(self) -> BestSoFar:
        """The best among the baseline's own epochs."""
        for record, row in self._history.rows[self._epochs_seen :]:
            if record.origin == "baseline":
                self._baseline.take(record, row)
        self._epochs_seen = self.epochs
        return self._baseline

    def end(self, number: int) -> TrialRecord | None:
        """Count a trial as ended and return it; None if it runs, or a resume will continue it."""
        record = self._history.trials[number]
        if record.state == "running":
            return None
        self.states[record.state] += 1
        self._lengths[min(record.epochs, self.rules.epochs)] += 1
        if record.state == "failed":
            self.last_failure = record
        return record

    def differences(self, record: TrialRecord) -> str:
        return differences(record.config, self._baseline_config)

    def time_left(self, elapsed: float) -> str:
        """Return how long the search may still take; empty while that would be a wild guess."""
        limit = max(self.rules.time_limit - elapsed, 0.0)
        expected = self._expected_time(elapsed)
        if expected is not None and expected < limit:
            return f"about {_rough(expected)} left"
        return f"at most {_rough(limit)} left" if limit < float("inf") else ""

    def _expected_time(self, elapsed: float) -> float | None:
        """Estimate from this session's pace and from how long the trials so far have trained."""
        new, running = self.epochs - self._epochs_before, self.running
        # The first trials to end are the poor ones. A third of a small search, or ten trials of
        # a large one, are enough to know how long a trial trains on average.
        enough = self.done >= max(3, min(10, self.rules.trials // 3))
        if not enough or new < max(1, 2 * len(running)) or elapsed <= self._began:
            return None
        residual = self._residual_epochs()
        waiting = max(self.rules.trials - self.done - len(running), 0)
        epochs, longest = waiting * residual[0], 0.0
        for record in running:
            left = residual[min(record.epochs, self.rules.epochs)]
            epochs += left
            longest = max(longest, left * (seconds_per_epoch(record) or 0.0))
        pace = (elapsed - self._began) / new
        return max(epochs * pace, longest)  # at the end there are fewer trials than workers

    def _residual_epochs(self) -> list[float]:
        """Return how many more epochs a trial trains on average, by the epochs it has trained."""
        budget = self.rules.epochs
        residual = [0.0] * (budget + 1)
        longer, total = 0, 0  # trials that trained longer, and what they trained beyond
        for epoch in range(budget - 1, -1, -1):
            longer += self._lengths[epoch + 1]
            total += longer
            residual[epoch] = total / longer if longer else float(budget - epoch)
        return residual


def seconds_per_epoch(record: TrialRecord) -> float | None:
    """Return how long a trial's last epoch took, with its evaluation."""
    if not record.rows:
        return None
    row = record.rows[-1]
    return row.seconds + row.evaluation_seconds


def _rough(seconds: float) -> str:
    """Return a time no finer than an estimate can be."""
    step = 10 if seconds < 120 else 60 if seconds < 7200 else 600
    return duration(max(round(seconds / step), 1) * step)


def finished_line(tally: Tally, record: TrialRecord, elapsed: float) -> str:
    """Return on one line how a trial ended."""
    metric = tally.rules.metric
    reason = f" ({record.reason})" if record.state in ("diverged", "failed") else ""
    judged = "no epoch to judge it by"
    if best := RankedTrial.of(record, metric).best:
        judged = f"{_accuracies(best, metric)} at epoch {best.epoch}"
    return (
        f"[{duration(elapsed)}] {tally.done:,}/{tally.rules.trials:,} done: "
        f"trial {record.number} {record.state}{reason} after {count(record.epochs, 'epoch')}, "
        f"{judged}, {tally.differences(record)}"
    )


def live_view(tally: Tally, folder: RunFolder, elapsed: float, height: int) -> Text:
    """Return the view of a running search, no higher than `height` lines."""
    rules = tally.rules
    ends = ", ".join(f"{tally.states[s]:,} {s}" for s in ENDS if tally.states[s])
    left = tally.time_left(elapsed)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(short_path(folder.path), "bold")
    _line(
        text,
        "trials",
        f"{tally.done:,} of {rules.trials:,} done{f' ({ends})' if ends else ''}, "
        f"{len(tally.running):,} running",
    )
    _line(text, "epochs", f"{tally.epochs:,}")
    _line(text, "time", duration(elapsed) + (f", {left}" if left else ""))
    for label, found in (("best", tally.best.found), ("baseline", tally.baseline.found)):
        if found:
            record, row = found
            where = f"trial {record.number} at epoch {row.epoch}"
            _line(text, label, f"{_accuracies(row, rules.metric)}  {where}")
        elif tally.best.found:
            _line(text, label, "no epoch yet")
    if tally.last_failure:
        reason = f"trial {tally.last_failure.number}: {tally.last_failure.reason}"
        _line(text, "failed", reason, "red")
    _append_running(text, tally, height - str(text).count("\n") - 3)
    return text


def _append_running(text: Text, tally: Tally, room: int) -> None:
    trials = tally.running
    if not trials or room < 1:
        return
    metric = tally.rules.metric.removesuffix("_accuracy")
    header = f"\n\n{'trial':>5}  {'epoch':>7}  {metric:>7}  {'s/epoch':>7}  "
    text.append(header + "differs from the baseline in", "dim")
    shown = trials if len(trials) <= room else trials[: room - 1]
    for record in shown:
        text.append("\n" + _row(tally, record))
    if len(shown) < len(trials):
        text.append(f"\n{'':>5}  and {len(trials) - len(shown):,} more", "dim")


def _row(tally: Tally, record: TrialRecord) -> str:
    seconds, rules = seconds_per_epoch(record), tally.rules
    accuracy = percent(record.rows[-1].accuracy(rules.metric)) if record.rows else "-"
    took = "-" if seconds is None else f"{seconds:.3g}"
    epoch, differences = f"{record.epochs}/{rules.epochs}", tally.differences(record)
    return f"{record.number:>5}  {epoch:>7}  {accuracy:>7}  {took:>7}  {differences}"


def _line(text: Text, label: str, value: str, style: str = "") -> None:
    text.append(f"\n{label:<10}", "dim")
    text.append(value, style)


def _accuracies(row: EpochRow, metric: Metric) -> str:
    val = f"val {percent(row.val_accuracy)}, " if metric == "val_accuracy" else ""
    return f"{val}test {percent(row.test_accuracy)}"


class Progress(Callback):
    """Shows a search's progress, and rewrites trials.csv and best.csv as it goes.

    On a terminal it is a live view, which disappears when it is closed; elsewhere it is a line
    for each trial that has ended. If the display fails, the search continues. If a table cannot
    be written, the search ends, as it would for any other file of the run.
    """

    def __init__(
        self,
        console: Console,
        experiment: Experiment,
        folder: RunFolder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console, self._clock = console, clock
        self._experiment, self._folder = experiment, folder
        # FORCE_COLOR makes rich take a pipe for a terminal; a dumb one cannot move its cursor.
        self._is_live = self._console.is_interactive and self._console.file.isatty()
        self._live: Live | None = None
        self._view, self._width = Text(), 0  # what is on the terminal, and how wide that was
        self._shows = True
        self._next_view = self._next_tables = -float("inf")
        self._ends = 0  # trials that have ended
        self._in_tables = (-1, -1, -1)  # how much had happened when they were last written
        self._guard(self._begin)

    def close(self) -> None:
        """Remove the live view from the terminal; from here on nothing is shown."""
        self._shows = False
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception, SystemExit):
                live.stop()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self._ends += 1
        self._guard(lambda: self._end(number_of(trial)))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        self._write_tables()
        if self._is_live:
            self._guard(self._refresh)

    def _begin(self) -> None:
        self._tally = Tally(self._experiment)
        if self._is_live:
            # Without a thread of its own: Tune ends a step, and we refresh, ten times a second.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def _end(self, number: int) -> None:
        record = self._tally.end(number)
        if record and not self._is_live:
            line = finished_line(self._tally, record, self._experiment.elapsed)
            self._console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)
            self._console.file.flush()

    def _refresh(self) -> None:
        began = self._clock()
        if self._live is None or began < self._next_view:
            return
        size = self._console.size
        self._erase_wrapped_lines(size.width)
        view = live_view(self._tally, self._folder, self._experiment.elapsed, size.height)
        if not self._console.encoding.startswith("utf"):  # it has no ellipsis
            view.overflow = "crop"
        self._live.update(view, refresh=True)
        self._view, self._width = view, size.width
        ended = self._clock()
        self._next_view = ended + max(SECONDS_BETWEEN_VIEWS, (ended - began) / VIEWS_SHARE)

    def _erase_wrapped_lines(self, width: int) -> None:
        """Erase what rich does not: a terminal made narrower wraps the lines it shows."""
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
        """Show something; if the display fails, close it and let the search continue."""
        if not self._shows:
            return
        try:
            show()
        except (Exception, SystemExit) as error:  # rich exits when nobody reads its output
            self.close()
            ended = isinstance(error, SystemExit)
            reason = "nobody reads its output" if ended else named(error)
            with contextlib.suppress(Exception):
                sys.stderr.write(f"the display failed ({reason}); the search continues\n")
