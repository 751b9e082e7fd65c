import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.recorded import RecordedSearch, read_table

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.history import History
from tune_mnist.runs.ranking import ranked_trials
from tune_mnist.runs.tables import best_table, trials_table, write_tables


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    return RecordedSearch(tmp_path)


def _written(search: RecordedSearch) -> tuple[pd.DataFrame, pd.DataFrame]:
    write_tables(search.folder, search.history, "val_accuracy")
    return read_table(search.folder.trials), read_table(search.folder.best)


def _trials(search: RecordedSearch) -> pd.DataFrame:
    return trials_table(ranked_trials(search.history, "val_accuracy"), "val_accuracy")


def _best(search: RecordedSearch, metric: Metric = "val_accuracy") -> pd.DataFrame:
    return best_table(ranked_trials(search.history, metric), metric)


def _cells(table: pd.DataFrame, row: int, *names: str) -> list[Any]:
    return [table[name].iloc[row] for name in names]


def test_a_trial_has_its_best_and_its_last_epoch(search: RecordedSearch) -> None:
    search.trial([0.97, 0.99, 0.98], [0.96, 0.985, 0.987])
    trials, _ = _written(search)
    best = _cells(trials, 0, "best_epoch", "best_val_accuracy", "test_accuracy_at_best")
    assert best == [2, 0.99, 0.985]
    last = _cells(trials, 0, "last_epoch", "last_val_accuracy", "last_test_accuracy")
    assert last == [3, 0.98, 0.987]
    assert _cells(trials, 0, "epochs", "state", "seconds") == [3, "complete", 7.5]


def test_a_trial_without_an_end_is_running_and_ranks(search: RecordedSearch) -> None:
    search.trial([0.98])
    search.epoch(search.start(), 0.99)
    trials, best = _written(search)
    assert _cells(trials, 1, "state", "epochs") == ["running", 1]
    assert trials["ended"].isna().tolist() == [False, True]
    assert best["trial"].tolist() == [1, 0]


def test_a_diverged_epoch_ranks_nowhere(search: RecordedSearch) -> None:
    search.trial([0.98])
    for before in ([0.99], []):
        trial = search.start()
        for accuracy in before:
            search.epoch(trial, accuracy)
        search.diverged_epoch(trial, step=33)
        search.end(trial, "diverged", "the loss was not finite")
    trials, best = _written(search)
    cells = _cells(trials, 1, "epochs", "best_epoch", "last_epoch", "diverged_step")
    assert cells == [2, 1, 1, 33]
    assert trials["best_epoch"].isna().tolist() == [False, False, True]
    assert trials["seconds"].tolist() == [2.5, 4.5, 2.0]
    assert best["trial"].tolist() == [1, 0]
    assert best["last_val_accuracy"].tolist() == [0.99, 0.98]


def test_a_failed_trial_keeps_its_reason_its_retries_and_its_epochs(
    search: RecordedSearch,
) -> None:
    trial = search.start()
    search.epoch(trial, 0.9)
    reason = 'the worker died: "killed",\nby signal 9'
    search.history.rerun_trial(trial, 5.0, ray_id="12345678", error=reason)
    search.end(trial, "failed", reason)
    trials, _ = _written(search)
    cells = _cells(trials, 0, "state", "reason", "retries", "ray_id", "best_epoch")
    assert cells == ["failed", reason, 1, "12345678", 1]


def test_equal_accuracies_rank_by_loss_then_by_epochs_used(search: RecordedSearch) -> None:
    for loss, epochs in ((0.2, 2), (0.1, 2), (0.1, 1)):
        trial = search.start()
        for _ in range(epochs):
            search.epoch(trial, 0.98, val_loss=loss)
    trial = search.start()
    for loss in (0.3, 0.2, 0.2, 0.4):
        search.epoch(trial, 0.99, val_loss=loss)
    search.trial([math.nan, 0.5])  # one without a number to compare is never best
    assert _best(search)["trial"].tolist() == [3, 2, 1, 0, 4]
    assert _trials(search)["best_epoch"].tolist() == [1, 1, 1, 2, 2]


def test_the_test_set_ranks_only_if_it_was_asked_to(search: RecordedSearch) -> None:
    search.trial([0.98, 0.97], [0.90, 0.95])
    search.trial([0.97, 0.96], [0.99, 0.98])
    by_test = _best(search, "test_accuracy")
    assert _best(search)["trial"].tolist() == [0, 1]
    assert by_test["trial"].tolist() == [1, 0]
    assert by_test["best_test_accuracy"].tolist() == [0.99, 0.95]
    assert by_test["test_loss_at_best"].tolist() == [0.01, 0.05]
    assert not by_test.columns.duplicated().any()


def test_the_ten_best_by_either_ranking_are_kept(search: RecordedSearch) -> None:
    for number in range(30):
        search.trial([0.5 + number / 100, 0.9 - number / 100])
    best = _best(search)
    by_best = best[best["rank"] <= 10]
    by_last = best[best["rank_by_last"] <= 10]
    assert len(by_best) == len(by_last) == 10
    assert len(best) == len(by_best.index.union(by_last.index))


def test_best_has_both_ranks_and_the_gain_in_test_accuracy_over_a_baseline_with_an_epoch(
    search: RecordedSearch,
) -> None:
    baseline = search.start()
    for accuracies in ([0.97, 0.97], [0.99, 0.95], [0.98, 0.98]):
        search.trial(accuracies, [0.98, 0.985])
    _, best = _written(search)
    assert best["trial"].tolist() == [2, 3, 1]
    assert best["rank"].tolist() == [1, 2, 3]
    assert best["rank_by_last"].tolist() == [3, 1, 2]
    assert best[["gain_at_best", "gain_at_last"]].isna().all(axis=None)
    search.epoch(baseline, 0.96, 0.971)
    search.epoch(baseline, 0.95, 0.972)
    _, best = _written(search)
    assert best["gain_at_best"].tolist() == [0.009, 0.009, 0.009, 0.0]
    assert best["gain_at_last"].tolist() == [0.013, 0.013, 0.013, 0.0]


def test_the_first_epoch_at_the_reference_accuracy_is_found(search: RecordedSearch) -> None:
    search.trial([0.97, 0.98, 0.99], [0.9882, 0.9883, 0.9890])
    search.trial([0.9], [0.9882])
    single_precision = 0.98829999
    search.trial([0.8], [single_precision])
    _, best = _written(search)
    first = best.set_index("trial")["first_epoch_at_9883"]
    assert (first[0], first[2]) == (2, 1)
    assert first.isna()[1]


def test_an_empty_search_has_tables_with_all_columns(search: RecordedSearch) -> None:
    empty = _written(search)
    search.trial([0.98])
    for before, after in zip(empty, _written(search), strict=True):
        assert len(before) == 0
        assert before.columns.tolist() == after.columns.tolist()


def test_every_hyperparameter_is_read_back_exactly(search: RecordedSearch) -> None:
    values: dict[str, Any] = {"lr": 0.1 + 0.2, "dropout": 1 / 7, "nesterov": True}
    config = TrainConfig.from_mapping(values)
    search.epoch(search.start(**values), 0.98)
    for table in _written(search):
        names = config.as_dict()
        read = {name: table[f"config_{name}"].tolist()[0] for name in names}  # Python's own types
        assert TrainConfig.from_mapping(read) == config


def test_numbers_are_written_whole_or_rounded(search: RecordedSearch) -> None:
    search.trial([0.98123456789], [0.98123456789])
    search.start()  # with empty cells
    trials, _ = _written(search)
    epochs_and_best = ",1,1,0.981235,0.018765,"
    assert epochs_and_best in search.folder.trials.read_text()
    assert trials["val_loss_at_best"].iloc[0] == 0.018765


def test_a_history_read_from_disk_makes_the_same_tables_and_a_failure_leaves_them(
    search: RecordedSearch,
) -> None:
    search.trial([0.97, 0.98])
    trial = search.start(lr=0.3)
    search.epoch(trial, 0.9)
    search.diverged_epoch(trial)
    search.end(trial, "diverged", "the loss was not finite")
    search.start(dropout=0.2)
    _written(search)
    before = search.folder.trials.read_text(), search.folder.best.read_text()
    write_tables(search.folder, History.load(search.folder), "val_accuracy")
    assert before == (search.folder.trials.read_text(), search.folder.best.read_text())
    search.folder.best.unlink()
    search.folder.best.mkdir()  # so that it cannot be replaced
    with pytest.raises(OSError, match="directory"):
        write_tables(search.folder, search.history, "val_accuracy")
    assert before[0] == search.folder.trials.read_text()
    assert not list(search.folder.path.glob(".*.tmp"))
