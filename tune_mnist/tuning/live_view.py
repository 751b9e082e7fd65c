"""How a running search looks: one view for a terminal, single lines for everything else."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from ray.tune import Callback
from ray.tune.experiment import Trial
from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, percent, short_path
from tune_mnist.runs.history import EpochRow, History, State, TrialRecord
from tune_mnist.runs.ranking import RankedTrial
from tune_mnist.runs.tables import write_tables
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.resources import Node, TrialResources, in_words
from tune_mnist.tuning.tally import Running, Tally
from tune_mnist.tuning.tune_adapters import number_of

_ENDS: tuple[State, ...] = ("complete", "stopped", "diverged", "failed")
_LABEL = 10  # columns
_NODES_NAMED = 6  # of a larger cluster, alike nodes are counted


def announce(console: Console, start: str, nodes: Sequence[Node], share: TrialResources) -> None:
    """Say what is about to run and, of several nodes, where."""
    lines = [start] if len(nodes) == 1 else [start, nodes_line(nodes, share)]
    for line in lines:
        # A log's lines are whole, however wide its reader's window is.
        console.print(Text(line), soft_wrap=not console.is_terminal)


def start_line(
    folder: RunFolder,
    rules: Rules,
    history: History,
    share: TrialResources,
    at_once: int,
    data: Split,
) -> str:
    """Say what is about to run."""
    where = short_path(folder.path)
    what = f"up to {count(rules.trials, 'trial')} of at most {count(rules.epochs, 'epoch')}"
    if history.trials:
        done = len(history.trials) - len(history.unfinished())
        where = f"going on with {where}"
        what = (
            f"{done:,} of {count(rules.trials, 'trial')} done in {duration(history.elapsed)}, "
            f"at most {count(rules.epochs, 'epoch')} each"
        )
    if rules.time_budget < float("inf"):
        what += f", for at most {duration(rules.time_budget)}"
    workers = in_words(at_once * share.cpus, at_once * share.gpus)
    held_out = len(data.val_images)
    steering = f"held-out {held_out:,} steer" if held_out else "the test set steers"
    return (
        f"{where}: {what}, {at_once} at a time on {workers}, "
        f"{count(len(data.train_images), 'training image')}, {steering}"
    )


def nodes_line(nodes: Sequence[Node], share: TrialResources) -> str:
    """Say how many trials run where; of a large cluster, how many nodes are alike."""
    if len(nodes) <= _NODES_NAMED:
        parts = []
        for node in nodes:
            lacks = "" if share.slots_on(node) else f" ({_resources(node, share)})"
            parts.append(f"{node.address} {_trials_on(node, share)}{lacks}")
    else:
        alike = Counter((_resources(node, share), _trials_on(node, share)) for node in nodes)
        parts = [
            f"{number} of {resources} {trials}{' each' * (number > 1)}"
            for (resources, trials), number in alike.most_common()
        ]
    return f"{len(nodes)} nodes: {', '.join(parts)}"


def _trials_on(node: Node, share: TrialResources) -> str:
    return count(slots, "trial") if (slots := share.slots_on(node)) else "no trial"


def _resources(node: Node, share: TrialResources) -> str:
    return in_words(node.cpus, node.gpus) + ", no GPU" * (share.gpus > 0 and not node.gpus)


def finished_line(tally: Tally, record: TrialRecord, elapsed: float) -> str:
    """Say in one line what came of a trial that has ended."""
    best, reason = _best_of(tally, record), ""
    if record.state in ("diverged", "failed"):
        reason = f" ({record.reason})"
    return (
        f"[{duration(elapsed)}] {tally.done:,}/{tally.rules.trials:,} done: "
        f"trial {record.number} {record.state}{reason} after {count(record.epochs, 'epoch')}, "
        f"{best}, {tally.differences(record)}"
    )


def live_view(tally: Tally, folder: RunFolder, elapsed: float, height: int) -> Text:
    """Return the view of a running search, no higher than `height` lines."""
    rules = tally.rules
    ends = [f"{tally.states[s]:,} {s}" for s in _ENDS if tally.states[s]]
    left = tally.time_left(elapsed)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(short_path(folder.path), "bold")
    _line(
        text,
        "trials",
        f"{tally.done:,} of {rules.trials:,} done{_in_brackets(ends)}, "
        f"{len(tally.running):,} running",
    )
    _line(text, "epochs", f"{tally.epochs:,}")
    _line(text, "time", duration(elapsed) + (f", {left}" if left else ""))
    for label, found in (("best", tally.best.found), ("baseline", tally.baseline.found)):
        if found:
            record, row = found
            where = f"trial {record.number} at epoch {row.epoch}"
            _line(text, label, f"{_accuracies(row, rules.metric)}  {where}")
    if tally.last_failure:
        reason = f"trial {tally.last_failure.number}: {tally.last_failure.reason}"
        _line(text, "failed", reason, "red")
    _append_running(text, tally, height - str(text).count("\n") - 3)
    return text


def _append_running(text: Text, tally: Tally, room: int) -> None:
    trials = list(tally.running.values())
    if not trials or room < 1:
        return
    metric = tally.rules.metric.removesuffix("_accuracy")
    header = f"\n\n{'trial':>5}  {'epoch':>7}  {metric:>7}  {'s/epoch':>7}  "
    text.append(header + "differs from the baseline in", "dim")
    shown = trials if len(trials) <= room else trials[: room - 1]
    for trial in shown:
        text.append("\n" + _row(trial, tally.rules))
    if len(shown) < len(trials):
        text.append(f"\n{'':>5}  and {len(trials) - len(shown):,} more", "dim")


def _row(trial: Running, rules: Rules) -> str:
    record, seconds = trial.record, trial.seconds_per_epoch
    accuracy = percent(record.rows[-1].accuracy(rules.metric)) if record.rows else "-"
    took = "-" if seconds is None else f"{seconds:.3g}"
    epoch = f"{record.epochs}/{rules.epochs}"
    return f"{record.number:>5}  {epoch:>7}  {accuracy:>7}  {took:>7}  {trial.differences}"


def _line(text: Text, label: str, value: str, style: str = "") -> None:
    text.append(f"\n{label:<{_LABEL}}", "dim")
    text.append(value, style)


def _in_brackets(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _accuracies(row: EpochRow, metric: Metric) -> str:
    test = f"test {percent(row.test_accuracy)}"
    if metric == "test_accuracy":
        return test
    return f"val {percent(row.val_accuracy)}, {test}"


def _best_of(tally: Tally, record: TrialRecord) -> str:
    best = RankedTrial.of(record, tally.rules.metric).best
    if best is None:
        return "no epoch to judge it by"
    return f"{_accuracies(best, tally.rules.metric)} at epoch {best.epoch}"


# MERGED-DOC tuning.progress: What a person sees while a search runs, and the tables that grow with
# it.

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
