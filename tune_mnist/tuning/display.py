"""How a running search looks: one view for a terminal, single lines for everything else."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tune_mnist.analysis.history import History, Metric, Row, State, TrialRecord
from tune_mnist.analysis.ranking import Standing, number
from tune_mnist.analysis.run import RunFolder
from tune_mnist.analysis.wording import count, duration, percent, short_path
from tune_mnist.mnist.data import Split
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.nodes import Node, Share, in_words
from tune_mnist.tuning.tally import Running, Tally

_ENDS: tuple[State, ...] = ("complete", "stopped", "diverged", "failed")
_LABEL = 10  # columns
_NODES_NAMED = 6  # of a larger cluster, alike nodes are counted


def announce(console: Console, start: str, nodes: Sequence[Node], share: Share) -> None:
    """Say what is about to run and, of several nodes, where."""
    lines = [start] if len(nodes) == 1 else [start, nodes_line(nodes, share)]
    for line in lines:
        # A log's lines are whole, however wide its reader's window is.
        console.print(Text(line), soft_wrap=not console.is_terminal)


def start_line(
    folder: RunFolder, rules: Rules, history: History, share: Share, at_once: int, data: Split
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


def nodes_line(nodes: Sequence[Node], share: Share) -> str:
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


def _trials_on(node: Node, share: Share) -> str:
    return count(slots, "trial") if (slots := share.slots_on(node)) else "no trial"


def _resources(node: Node, share: Share) -> str:
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
    for label, found in (("best", tally.best), ("baseline", tally.baseline)):
        if found:
            record, row = found
            where = f"trial {record.number} at epoch {row['epoch']}"
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
    accuracy = percent(number(record.rows[-1], rules.metric)) if record.rows else "-"
    took = "-" if seconds is None else f"{seconds:.3g}"
    epoch = f"{record.epochs}/{rules.epochs}"
    return f"{record.number:>5}  {epoch:>7}  {accuracy:>7}  {took:>7}  {trial.differences}"


def _line(text: Text, label: str, value: str, style: str = "") -> None:
    text.append(f"\n{label:<{_LABEL}}", "dim")
    text.append(value, style)


def _in_brackets(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _accuracies(row: Row, metric: Metric) -> str:
    test = f"test {percent(number(row, 'test_accuracy'))}"
    if metric == "test_accuracy":
        return test
    return f"val {percent(number(row, 'val_accuracy'))}, {test}"


def _best_of(tally: Tally, record: TrialRecord) -> str:
    best = Standing.of(record, tally.rules.metric).best
    if best is None:
        return "no epoch to judge it by"
    return f"{_accuracies(best, tally.rules.metric)} at epoch {best['epoch']}"
