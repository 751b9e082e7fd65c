import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.recorded import RecordedSearch

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.confirmed import (
    Candidate,
    conclusion,
    confirmed_table,
    read_confirmed,
    write_confirmed,
)
from tune_mnist.runs.history import TrialRecord

EPOCHS = 3
CANDIDATES = [
    Candidate("baseline", 0, 4, TrainConfig(lr=0.01)),
    Candidate("trial 7", 7, 1, TrainConfig(lr=0.02)),
    Candidate("trial 5", 5, 2, TrainConfig(lr=0.03)),
]
BASELINE = [0.990, 0.991, 0.992, 0.991, 0.990]


def _table(path: Path, *accuracies: list[float], images: int = 60_000) -> pd.DataFrame:
    """Return the table of trainings with these last accuracies, by candidate and seed."""
    search = RecordedSearch(path)
    records: list[list[TrialRecord]] = []
    for finals in accuracies:
        records.append([])
        for seed, final in enumerate(finals):
            if math.isnan(final):
                number = search.start()
                search.epoch(number, 0.5)
                search.diverged_epoch(number)
                search.end(number, "diverged", "no luck")
            else:
                number = search.trial([0.9, final + 0.0005, final])
            record = search.history.trials[number]
            record.seed = seed
            records[-1].append(record)
    return confirmed_table(CANDIDATES[: len(records)], records, epochs=EPOCHS, images=images)


def test_means_intervals_and_paired_differences_are_students(tmp_path: Path) -> None:
    winner = [0.9950, 0.9952, 0.9955, 0.9951, 0.9947]
    table = _table(tmp_path, BASELINE, winner)
    row = table.iloc[1]
    assert row["n"] == row["seeds"] == 5
    assert row["test_accuracy_mean"] == pytest.approx(0.9951)
    assert row["test_accuracy_std"] == pytest.approx(np.std(winner, ddof=1), abs=1e-6)
    # The quantile of Student's t that leaves 2.5% above it, for 4 degrees of freedom: 2.7764.
    half = 2.7764 * np.std(winner, ddof=1) / math.sqrt(5)
    assert row["interval_low"] == pytest.approx(0.9951 - half, abs=2e-6)
    assert row["interval_high"] == pytest.approx(0.9951 + half, abs=2e-6)
    differences = np.subtract(winner, BASELINE)
    assert row["gain"] == pytest.approx(differences.mean(), abs=1e-6)
    half = 2.7764 * differences.std(ddof=1) / math.sqrt(5)
    assert row["gain_high"] - row["gain"] == pytest.approx(half, abs=2e-6)
    assert row["optimistic_best_epoch_mean"] == pytest.approx(0.9956)


def test_a_sure_gain_is_told_with_its_interval(tmp_path: Path) -> None:
    table = _table(tmp_path, BASELINE, [0.995, 0.995, 0.996, 0.995, 0.994])
    assert conclusion(table) == (
        "Over 5 fresh seeds trial 7 reaches a mean test accuracy of 99.50% at the last of 3 "
        "epochs (95% interval 99.41% to 99.59%), 0.42 points above the baseline's 99.08% "
        "(paired, 95% interval +0.36 to +0.48)."
    )


def test_a_gain_that_may_be_chance_and_a_loss_are_called_so(tmp_path: Path) -> None:
    said = conclusion(_table(tmp_path / "gain", BASELINE, [0.991, 0.990, 0.993, 0.992, 0.989]))
    assert ", which cannot be told from the baseline's 99.08%: +0.02 points (paired, " in said
    said = conclusion(_table(tmp_path / "loss", BASELINE, [0.98, 0.981, 0.982, 0.981, 0.98]))
    assert "1.00 points below the baseline's 99.08%" in said


def test_a_runner_up_that_is_as_good_or_better_is_named(tmp_path: Path) -> None:
    winner, alike = [0.995, 0.996, 0.995, 0.994, 0.995], [0.996, 0.995, 0.994, 0.995, 0.9952]
    said = conclusion(_table(tmp_path / "alike", BASELINE, winner, alike))
    assert said.endswith(" It cannot be told from trial 5.")
    better = [accuracy + 0.002 for accuracy in winner]
    said = conclusion(_table(tmp_path / "better", BASELINE, winner, better))
    assert said.endswith(
        " Trial 5, which the search ranked lower, is above it by 0.20 points "
        "(95% interval +0.20 to +0.20)."
    )


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    table = _table(tmp_path, BASELINE[:1], [0.995], [0.994], images=6000)
    assert conclusion(table) == (
        "Over 1 fresh seed on 6,000 training images trial 7 reaches a test accuracy of 99.50% at "
        "the last of 3 epochs, +0.50 points from the baseline's 99.00%; one seed cannot say how "
        "sure that is. It cannot be told from trial 5."
    )


def test_seeds_that_diverged_are_told(tmp_path: Path) -> None:
    said = conclusion(_table(tmp_path, BASELINE, [0.995, math.nan, 0.996, math.nan, 0.994]))
    assert said.startswith("Over 3 fresh seeds trial 7 reaches")
    assert said.endswith(" It diverged or failed on 2 of its seeds.")
    none = _table(tmp_path / "none", BASELINE, [math.nan] * 5)
    assert conclusion(none).startswith("Trial 7 finished on none of its 5 fresh seeds")


def test_the_file_reads_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    table = _table(tmp_path, BASELINE, [0.995, 0.995, 0.996, 0.995, 0.994])
    folder = RecordedSearch(tmp_path, "run").folder
    assert read_confirmed(folder) is None
    write_confirmed(folder, table)
    found = read_confirmed(folder)
    assert found is not None
    pd.testing.assert_frame_equal(found, table, check_dtype=False)
    (folder.path / "confirmed.csv").write_text("configuration,trial\nx,y\n")
    with pytest.raises(RunFolderError, match=r"confirmed\.csv cannot be read"):
        read_confirmed(folder)
