"""Where a search stands: counts, best epochs, running trials and the time left.

It is updated as the search goes, so that a look at it costs the same after any number of trials.
"""

from collections import Counter

from tune_mnist.runs.formatting import differences, duration
from tune_mnist.runs.history import History, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar
from tune_mnist.tuning.experiment import Rules


class Tally:
    """The state of a search, and how much longer it may take.

    `catch_up` reads new trials and epochs from the history; `start` and `end` must be called for
    a trial that is resumed or has ended.
    """

    def __init__(self, rules: Rules, history: History, best: BestSoFar, elapsed: float) -> None:
        self.rules, self.best = rules, best
        self._history = history
        self._baseline_config = rules.space.baseline()
        self.states: Counter[State] = Counter()  # of the trials that have ended
        self.running: dict[int, TrialRecord] = {}  # with a worker, or on the way to one
        self.baseline = BestSoFar(rules.metric)  # among its own epochs
        self.last_failure: TrialRecord | None = None
        self._ended: set[int] = set()
        self._lengths = [0] * (rules.epochs + 1)  # how many trials ended after so many epochs
        self._began, self._epochs_before = elapsed, len(history.rows)
        self._trials_seen = len(history.trials)
        self.epochs = 0  # trained in all
        for record in history.trials.values():
            if record.state != "running":  # the others are announced when they are resumed
                self._count(record)
        self.catch_up()

    @property
    def done(self) -> int:
        return len(self._ended)

    def catch_up(self) -> None:
        """Read the trials and epochs that are new in the history."""
        trials = self._history.trials
        for number in range(self._trials_seen, len(trials)):
            self.start(number)  # does nothing for one that has ended since
        self._trials_seen = len(trials)
        for record, row in self._history.rows[self.epochs :]:
            if record.origin == "baseline":
                self.baseline.take(record, row)
        self.epochs = len(self._history.rows)

    def start(self, number: int) -> None:
        """Count a trial, new or resumed, as running."""
        record = self._history.trials[number]
        if record.state == "running" and number not in self.running:
            self.running[number] = record

    def end(self, number: int) -> TrialRecord | None:
        """Count a trial as ended and return it; None if a resume will continue it."""
        self.catch_up()
        record = self._history.trials[number]
        self.running.pop(number, None)
        if record.state == "running" or number in self._ended:
            return None
        self._count(record)
        return record

    def differences(self, record: TrialRecord) -> str:
        """Return in what a trial's configuration differs from the baseline."""
        return differences(record.config, self._baseline_config)

    def time_left(self, elapsed: float) -> str:
        """Return how long the search may still take; empty while that would be a wild guess."""
        limit = max(self.rules.time_limit - elapsed, 0.0)
        expected = self._expected_time(elapsed)
        if expected is not None and expected < limit:
            return f"about {_rough(expected)} left"
        return f"at most {_rough(limit)} left" if limit < float("inf") else ""

    def _count(self, record: TrialRecord) -> None:
        self._ended.add(record.number)
        self.states[record.state] += 1
        self._lengths[min(record.epochs, self.rules.epochs)] += 1
        if record.state == "failed":
            self.last_failure = record

    def _expected_time(self, elapsed: float) -> float | None:
        """Estimate from this session's pace and from how long the trials so far have trained."""
        new = self.epochs - self._epochs_before
        # The first trials to end are the poor ones. A third of a small search, or ten trials of
        # a large one, are enough to know how long a trial trains on average.
        enough = self.done >= max(3, min(10, self.rules.trials // 3))
        if not enough or new < max(1, 2 * len(self.running)) or elapsed <= self._began:
            return None
        residual = self._residual_epochs()
        waiting = max(self.rules.trials - self.done - len(self.running), 0)
        epochs, longest = waiting * residual[0], 0.0
        for record in self.running.values():
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
