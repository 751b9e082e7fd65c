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

from tune_mnist.mnist.data import Split
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, percent, short_path
from tune_mnist.runs.history import EpochRow, History, State, TrialRecord
from tune_mnist.runs.ranking import RankedTrial
from tune_mnist.runs.tables import write_tables
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.resources import Node, TrialResources, in_words
from tune_mnist.tuning.tally import Tally, seconds_per_epoch
from tune_mnist.tuning.tune_adapters import number_of

_ENDS: tuple[State, ...] = ("complete", "stopped", "diverged", "failed")
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
    ends = ", ".join(f"{tally.states[s]:,} {s}" for s in _ENDS if tally.states[s])
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

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._guard(lambda: self._tally.start(number_of(trial)))

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
        experiment = self._experiment
        self._tally = Tally(
            experiment.rules, experiment.history, experiment.best, experiment.elapsed
        )
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
        self._tally.catch_up()
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
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, SystemExit):
                reason = "nobody reads its output"
            with contextlib.suppress(Exception):
                sys.stderr.write(f"the display failed ({reason}); the search continues\n")
