"""trials.csv and best.csv: what a search found, as tables that people read.

METRIC is what the search selected by, val_accuracy or test_accuracy; LOSS is the loss on the same
images. A trial's best epoch is the one with the highest METRIC (of equals, the lower LOSS, then
the earlier one), its last is the last one that it finished. Epochs that diverged are neither.
Accuracies are fractions in [0, 1], losses are means per image, epochs count from 1. A cell is
empty where there is nothing to say.

trials.csv, one row per trial, in the order of their start:

    trial                   number of the trial, the same in every file of a run
    state                   complete (used its budget), stopped (early, by ASHA), diverged (loss
                            not finite), failed (gave up) or running (not at its end yet)
    reason                  why it was stopped, diverged, failed or, last, started again
    origin                  baseline, start (from the space's start list) or sampled
    ray_id                  Ray's name for the trial
    seed                    of its training
    retries                 times that it was started again after its worker died
    epochs                  epochs used, one that diverged included
    best_epoch              its best epoch
    best_METRIC             METRIC at its best epoch
    LOSS_at_best            LOSS at its best epoch
    test_accuracy_at_best   test accuracy at its best epoch
    last_epoch              its last epoch, and five values there:
    last_train_loss, last_val_loss, last_val_accuracy, last_test_loss, last_test_accuracy
    diverged_step           step, within its epoch, at which the loss was found not finite
    seconds                 training and evaluation of all its epochs, s
    started, ended          on the search's clock, which runs only while the search does, s
    config_NAME             each hyperparameter, in full precision

best.csv, the ten best trials by their best epoch and the ten best by their last:

    rank                    by METRIC at the best epoch (of equals, the lower LOSS)
    rank_by_last            by METRIC at the last epoch (of equals, the lower LOSS)
    trial, state, origin, epochs, best_epoch, best_METRIC, LOSS_at_best, test_accuracy_at_best
                            as in trials.csv
    gain_at_best            test_accuracy_at_best minus the baseline trial's
    last_epoch, last_METRIC, last_test_accuracy
                            as in trials.csv
    gain_at_last            last_test_accuracy minus the baseline trial's
    first_epoch_at_9883     first epoch with a test accuracy of at least 98.83%, the best of the
                            baseline's reference log
    seconds, seed, config_NAME
                            as in trials.csv
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.runs.ranking import (
    RankedTrial,
    gain,
    rank_by_best,
    rank_by_last,
    standings,
)

REFERENCE_ACCURACY = 0.9883  # best test accuracy of the baseline's reference log
FIRST_AT_REFERENCE = "first_epoch_at_9883"
BEST_ROWS = 10  # of each ranking

_LAST = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
_TEXTS = ("state", "reason", "origin", "ray_id")
_MAYBE_INTEGERS = (
    *("best_epoch", "last_epoch", "diverged_step", FIRST_AT_REFERENCE),
    *("rank", "rank_by_last", "trial", "seed", "retries", "epochs"),
)
_PLACES = 6  # accuracies in steps of 1/10,000, losses: nothing readable is lost


def trials_table(history: History, metric: Metric) -> pd.DataFrame:
    """Return one row per trial, in the order of their start."""
    return _trials_table(standings(history, metric), metric)


def best_table(history: History, metric: Metric) -> pd.DataFrame:
    """Return the best trials, by their best epoch and by their last."""
    return _best_table(standings(history, metric), metric)


def write_tables(folder: RunFolder, history: History, metric: Metric) -> None:
    """Write trials.csv and best.csv.

    Raises:
        OSError: they could not be written; the older ones are untouched.
    """
    trials = standings(history, metric)
    for path, table in (
        (folder.trials, _trials_table(trials, metric)),
        (folder.best, _best_table(trials, metric)),
    ):
        replace_file(path, table.to_csv(index=False, lineterminator="\n"))


def read_table(path: Path) -> pd.DataFrame:
    """Read trials.csv or best.csv: whole numbers stay whole where cells are empty, texts texts.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    dtypes: dict[str, Any] = dict.fromkeys(_MAYBE_INTEGERS, "Int64") | dict.fromkeys(_TEXTS, "str")
    table = pd.read_csv(path, dtype=dtypes)
    texts = [name for name in _TEXTS if name in table]
    return table.fillna(dict.fromkeys(texts, ""))


def _trials_table(trials: list[RankedTrial], metric: Metric) -> pd.DataFrame:
    return _table([_trial_row(each, metric) for each in trials], _trial_row(_NOTHING, metric))


def _best_table(trials: list[RankedTrial], metric: Metric) -> pd.DataFrame:
    ranks_by_last = {
        each.record.number: rank for rank, each in enumerate(rank_by_last(trials, metric), start=1)
    }
    baseline = next((each for each in trials if each.is_baseline), _NOTHING)
    rows = []
    for rank, each in enumerate(rank_by_best(trials, metric), start=1):
        ranks = (rank, ranks_by_last[each.record.number])
        if min(ranks) <= BEST_ROWS:
            rows.append(_best_row(each, ranks, baseline, metric))
    return _table(rows, _best_row(_NOTHING, (0, 0), _NOTHING, metric))


def _table(rows: list[dict[str, Any]], example: dict[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(rows or [example]).head(len(rows))
    whole = [name for name in _MAYBE_INTEGERS if name in table]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _trial_row(standing: RankedTrial, metric: Metric) -> dict[str, Any]:
    record, last = standing.record, standing.last
    return {
        "trial": record.number,
        "state": record.state,
        "reason": record.reason,
        "origin": record.origin,
        "ray_id": record.ray_id,
        "seed": record.seed,
        "retries": record.retries,
        **_epochs_and_best(standing, metric),
        "last_epoch": last and last.epoch,
        **{f"last_{name}": _rounded(getattr(last, name, None)) for name in _LAST},
        "diverged_step": record.rows[-1].diverged_step if record.rows else None,
        "seconds": _seconds(record),
        "started": round(record.started, 3),
        "ended": round(record.ended, 3),
        **_config(record),
    }


def _best_row(
    standing: RankedTrial, ranks: tuple[int, int], baseline: RankedTrial, metric: Metric
) -> dict[str, Any]:
    record, last = standing.record, standing.last
    return {
        "rank": ranks[0],
        "rank_by_last": ranks[1],
        "trial": record.number,
        "state": record.state,
        "origin": record.origin,
        **_epochs_and_best(standing, metric),
        "gain_at_best": round(gain(standing.best, baseline.best), _PLACES),
        "last_epoch": last and last.epoch,
        f"last_{metric}": _rounded(last.accuracy(metric) if last else None),
        # One column where that is the metric itself.
        "last_test_accuracy": _rounded(last.test_accuracy if last else None),
        "gain_at_last": round(gain(last, baseline.last), _PLACES),
        FIRST_AT_REFERENCE: _first_at_reference(record),
        "seconds": _seconds(record),
        "seed": record.seed,
        **_config(record),
    }


def _epochs_and_best(standing: RankedTrial, metric: Metric) -> dict[str, Any]:
    best = standing.best
    return {
        "epochs": standing.record.epochs,
        "best_epoch": best and best.epoch,
        f"best_{metric}": _rounded(best.accuracy(metric) if best else None),
        f"{metric.replace('accuracy', 'loss')}_at_best": _rounded(
            best.loss(metric) if best else None
        ),
        "test_accuracy_at_best": _rounded(best.test_accuracy if best else None),
    }


def _config(record: TrialRecord) -> dict[str, Any]:
    return {f"config_{name}": value for name, value in record.config.as_dict().items()}


def _first_at_reference(record: TrialRecord) -> int | None:
    for row in record.finite_rows:
        # Rounded: an accuracy that went through single precision still counts.
        if round(row.test_accuracy, _PLACES) >= REFERENCE_ACCURACY:
            return row.epoch
    return None


def _seconds(record: TrialRecord) -> float:
    parts = [part for row in record.rows for part in (row.seconds, row.evaluation_seconds)]
    return round(math.fsum(part for part in parts if not math.isnan(part)), 3)


def _rounded(value: float | None) -> float:
    return math.nan if value is None else round(value, _PLACES)


# What a table without rows takes its columns from.
_NOTHING = RankedTrial(
    TrialRecord(number=0, config=TrainConfig(), seed=0, origin="baseline"), None, None
)
