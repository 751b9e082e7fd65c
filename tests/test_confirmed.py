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


NONE = math.nan  # a training that does not come to its end
SURE = [0.995, 0.995, 0.996, 0.995, 0.994]
CHANCE = [0.991, 0.990, 0.993, 0.992, 0.989]
OVER_5 = "Over 5 fresh seeds trial 7 reaches a mean test accuracy of "
AT_LAST = " at the last of 3 epochs "
OF_SURE = f"{OVER_5}99.50%{AT_LAST}(95% interval 99.41% to 99.59%), "
GAIN = f"{OF_SURE}0.42 points above the baseline's 99.08% (paired, 95% interval +0.36 to +0.48)."
ALMOST = [accuracy + 0.00002 for accuracy in BASELINE]


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([SURE], GAIN),
        (
            [CHANCE],
            f"{OVER_5}99.10%{AT_LAST}(95% interval 98.90% to 99.30%), which cannot be told from "
            "the baseline's 99.08%: +0.02 points (paired, 95% interval -0.12 to +0.16).",
        ),
        (
            [[0.98, 0.981, 0.982, 0.981, 0.98]],
            f"{OVER_5}98.08%{AT_LAST}(95% interval 97.98% to 98.18%), 1.00 points below the "
            "baseline's 99.08% (paired, 95% interval -1.00 to -1.00).",
        ),
        (
            [ALMOST],
            f"{OVER_5}99.08%{AT_LAST}(95% interval 98.98% to 99.19%), less than 0.01 points above "
            "the baseline's 99.08% (paired, 95% interval +0.00 to +0.00).",
        ),
        ([SURE, [0.9945, *SURE[1:]]], f"{GAIN} It cannot be told from trial 5."),
        (
            [SURE, [accuracy + 0.002 for accuracy in SURE]],
            f"{GAIN} Trial 5, which the search ranked lower, is above it by 0.20 points "
            "(95% interval +0.20 to +0.20).",
        ),
        (
            [SURE, [accuracy + 0.00002 for accuracy in SURE]],
            f"{GAIN} Trial 5, which the search ranked lower, is above it by less than 0.01 points "
            "(95% interval +0.00 to +0.00).",
        ),
        ([SURE, [0.98] * 5], GAIN),
        ([SURE, [NONE] * 5], f"{GAIN} Trial 5 has finished on none of its 5 fresh seeds."),
        ([SURE, []], f"{GAIN} Trial 5 has finished on no seed yet."),
        (
            [[0.993, NONE, 0.994, NONE, 0.992]],
            f"Over 3{OVER_5[6:]}99.30%{AT_LAST}(95% interval 99.05% to 99.55%), 0.23 points above "
            "the baseline on the seeds that both finished (paired, 95% interval +0.09 to +0.38). "
            "It diverged or failed on 2 of its seeds.",
        ),
        (
            [[NONE, NONE, 0.993, NONE, NONE]],
            "Over 1 fresh seed trial 7 reaches a test accuracy of 99.30% at the last of 3 epochs, "
            "+0.10 points from the baseline on the seeds that both finished; one seed cannot say "
            "how sure that is. It diverged or failed on 4 of its seeds.",
        ),
        (
            [[NONE] * 5],
            f"Over 5 fresh seeds the baseline{OVER_5[26:]}99.08%{AT_LAST}(95% interval 98.98% to "
            "99.18%). Trial 7 has finished on none of its 5 fresh seeds.",
        ),
        (
            [[NONE] * 5, SURE],
            f"{GAIN.replace('trial 7', 'trial 5')} Trial 7 has finished on none of its 5 fresh "
            "seeds.",
        ),
        (
            [],
            f"Over 5 fresh seeds the baseline{OVER_5[26:]}99.08%{AT_LAST}(95% interval 98.98% to "
            "99.18%). The search found nothing better to confirm.",
        ),
    ],
)
def test_the_conclusion_says_what_the_seeds_tell(
    tmp_path: Path, accuracies: list[list[float]], said: str
) -> None:
    table = _table(tmp_path, BASELINE, *accuracies)
    assert conclusion(table, "val_accuracy") == said
    optimistic = " The search picked by accuracy on these same test images, so the gain is optimi"
    compared = any(value > 0 for values in accuracies for value in values)
    assert (optimistic in conclusion(table, "test_accuracy")) == compared


def test_seeds_that_the_baseline_lacks_do_not_count_in_the_comparison(tmp_path: Path) -> None:
    """By the means alone the winner is 0.63 points above it, on other seeds."""
    baseline = [0.9946, 0.9944, 0.978, NONE, NONE]
    said = conclusion(_table(tmp_path, baseline, [0.9953, 0.9951, *[NONE] * 3]), "val_accuracy")
    assert "99.52%" in said
    assert ", 0.07 points above the baseline on the seeds that both finished (paired, " in said
    none = conclusion(_table(tmp_path / "none", [NONE] * 5, SURE), "val_accuracy")
    assert none == f"{OF_SURE}with no baseline to compare with."


def test_one_seed_on_few_images_has_no_interval(tmp_path: Path) -> None:
    table = _table(tmp_path, BASELINE[:1], [0.995], [0.994], images=6000)
    assert conclusion(table, "val_accuracy") == (
        "Over 1 fresh seed on 6,000 training images trial 7 reaches a test accuracy of 99.50% at "
        "the last of 3 epochs, +0.50 points from the baseline's 99.00%; one seed cannot say how "
        "sure that is. It cannot be told from trial 5."
    )


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
