"""trials.csv and best.csv: what a search found, as tables that people read.

Their columns are described in results/README.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import EpochRow, History, TrialRecord
from tune_mnist.runs.ranking import (
    RankedTrial,
    baseline_of,
    gain,
    rank_by_best,
    rank_by_last,
    ranked_trials,
)

REFERENCE_ACCURACY = 0.9883  # best test accuracy of the baseline's reference log
FIRST_AT_REFERENCE = "first_epoch_at_9883"
BEST_ROWS = 10  # of each ranking

_LAST = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
_INTEGERS = (  # also where cells are empty
    *("best_epoch", "last_epoch", "diverged_step", FIRST_AT_REFERENCE),
    *("rank", "rank_by_last", "trial", "seed", "retries", "epochs"),
)
_PLACES = 6  # accuracies come in steps of 1/10,000; losses need no more to be compared by eye


def write_tables(folder: RunFolder, history: History, metric: Metric) -> None:
    """Write trials.csv and best.csv; an OSError leaves the old file untouched."""
    trials = ranked_trials(history, metric)
    for path, table_of in ((folder.trials, trials_table), (folder.best, best_table)):
        table = table_of(trials, metric)
        replace_file(path, table.to_csv(index=False, lineterminator="\n"))


def trials_table(trials: Sequence[RankedTrial], metric: Metric) -> pd.DataFrame:
    """Return one row per trial, in the given order."""
    return _table([_trial_row(trial, metric) for trial in trials], _trial_row(_NOTHING, metric))


def best_table(trials: Sequence[RankedTrial], metric: Metric) -> pd.DataFrame:
    """Return the best trials, by their best epoch and by their last."""
    by_last = enumerate(rank_by_last(trials, metric), start=1)
    ranks_by_last = {trial.record.number: rank for rank, trial in by_last}
    baseline = baseline_of(trials) or _NOTHING
    rows = []
    for rank, trial in enumerate(rank_by_best(trials, metric), start=1):
        ranks = (rank, ranks_by_last[trial.record.number])
        if min(ranks) <= BEST_ROWS:
            rows.append(_best_row(trial, ranks, baseline, metric))
    return _table(rows, _best_row(_NOTHING, (0, 0), _NOTHING, metric))


def _table(rows: list[dict[str, Any]], example: dict[str, Any]) -> pd.DataFrame:
    """Make a table; one without rows takes its columns from the example."""
    table = pd.DataFrame(rows or [example]).head(len(rows))
    return table.astype({name: "Int64" for name in _INTEGERS if name in table})


def _trial_row(trial: RankedTrial, metric: Metric) -> dict[str, Any]:
    record, last = trial.record, trial.last
    return {
        "trial": record.number,
        "state": record.state,
        "reason": record.reason,
        "origin": record.origin,
        "ray_id": record.ray_id,
        "seed": record.seed,
        "retries": record.retries,
        **_epochs_and_best(trial, metric),
        "last_epoch": last and last.epoch,
        **{f"last_{name}": _rounded(last, name) for name in _LAST},
        "diverged_step": record.rows[-1].diverged_step if record.rows else None,
        "seconds": _seconds(record),
        "started": round(record.started, 3),
        "ended": round(record.ended, 3),
        **_config(record),
    }


def _best_row(
    trial: RankedTrial, ranks: tuple[int, int], baseline: RankedTrial, metric: Metric
) -> dict[str, Any]:
    record, last = trial.record, trial.last
    return {
        "rank": ranks[0],
        "rank_by_last": ranks[1],
        "trial": record.number,
        "state": record.state,
        "origin": record.origin,
        **_epochs_and_best(trial, metric),
        "gain_at_best": round(gain(trial.best, baseline.best), _PLACES),
        "last_epoch": last and last.epoch,
        # One column if the metric is the test accuracy itself.
        f"last_{metric}": _rounded(last, metric),
        "last_test_accuracy": _rounded(last, "test_accuracy"),
        "gain_at_last": round(gain(last, baseline.last), _PLACES),
        FIRST_AT_REFERENCE: _first_at_reference(record),
        "seconds": _seconds(record),
        "seed": record.seed,
        **_config(record),
    }


def _epochs_and_best(trial: RankedTrial, metric: Metric) -> dict[str, Any]:
    best, loss = trial.best, metric.replace("accuracy", "loss")
    return {
        "epochs": trial.record.epochs,
        "best_epoch": best and best.epoch,
        f"best_{metric}": _rounded(best, metric),
        f"{loss}_at_best": _rounded(best, loss),
        "test_accuracy_at_best": _rounded(best, "test_accuracy"),
    }


def _config(record: TrialRecord) -> dict[str, Any]:
    return {f"config_{name}": value for name, value in record.config.as_dict().items()}


def _first_at_reference(record: TrialRecord) -> int | None:
    # Rounded, so that an accuracy that was single precision once still counts.
    accuracies = ((row.epoch, round(row.test_accuracy, _PLACES)) for row in record.finite_rows)
    return next((epoch for epoch, reached in accuracies if reached >= REFERENCE_ACCURACY), None)


def _seconds(record: TrialRecord) -> float:
    parts = [part for row in record.rows for part in (row.seconds, row.evaluation_seconds)]
    return round(math.fsum(part for part in parts if not math.isnan(part)), 3)


def _rounded(row: EpochRow | None, name: str) -> float:
    return math.nan if row is None else round(getattr(row, name), _PLACES)


_NOTHING = RankedTrial(
    TrialRecord(number=0, config=TrainConfig(), seed=0, origin="baseline"), None, None
)
