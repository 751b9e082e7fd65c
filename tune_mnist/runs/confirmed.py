"""confirmed.csv: the winners and the baseline on fresh seeds, with the uncertainty of their means.

One row per configuration: the baseline first, the others as the search ranked them. The columns
are described in results/README.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, Any

import pandas as pd

from tune_mnist.errors import RunFolderError, one_line
from tune_mnist.mnist.config import MAX_EPOCHS, Limits, TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.files import Count, read_plain, record_of, replace_file
from tune_mnist.runs.folder import RunFolder, damaged
from tune_mnist.runs.formatting import count, percent, points
from tune_mnist.runs.history import TrialRecord

CONFIDENCE = 0.95
ALL_IMAGES = 60_000
_COUNTS = ("trial", "rank", "seeds", "n", "epochs", "images")
_FRACTIONS = (
    *("test_accuracy_mean", "test_accuracy_std", "interval_low", "interval_high"),
    *("gain", "gain_low", "gain_high", "behind", "behind_low", "behind_high"),
    "optimistic_best_epoch_mean",
)
_WIDEST = 100  # what an interval of two seeds that differ as much as can be has for its ends
_PLACES = 6  # beyond the fifth, differences of means are noise


@dataclass(frozen=True)
class Candidate:
    """A configuration to confirm."""

    name: str  # `baseline`, `trial N`
    trial: Count  # its number in the search
    rank: Count  # in the search; 0: not ranked
    config: TrainConfig


@dataclass(frozen=True)
class AskedConfirmation:
    """What a confirmation was asked, as its search.yaml says."""

    epochs: Annotated[int, Limits(">= 1", f"<= {MAX_EPOCHS}")]
    images: Count | None  # None: all of them
    seeds: tuple[Annotated[int, Limits(">= 0", f"<= {2**64}")], ...]
    configurations: tuple[Candidate, ...]  # the baseline first


def read_asked(folder: RunFolder) -> AskedConfirmation:
    """Return what the confirmation in a folder was asked, or raise RunFolderError."""
    content = folder.read_search()
    try:
        return record_of(AskedConfirmation, content.get("confirmation"), "confirmation")
    except ValueError as error:
        raise damaged(folder.search, error) from error


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95% interval (Student's t); NaN where there are too few values."""
    if not values:
        return math.nan, math.nan, math.nan
    series = pd.Series(values, dtype=float)
    mean = float(series.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy import stats  # here, because it is slow to import

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * float(series.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def confirmed_table(
    candidates: Sequence[Candidate],
    records: Sequence[Sequence[TrialRecord]],
    *,
    epochs: int,
    images: int,
) -> pd.DataFrame:
    """Return the table of the candidates, the baseline first, and each one's trainings by seed.

    A training that diverged or failed before its last epoch counts in `seeds`, not in `n`.
    """
    done = [
        [each for each in trainings if each.state == "complete" and each.epochs == epochs]
        for trainings in records
    ]
    lasts = [{each.seed: each.rows[-1].test_accuracy for each in trainings} for trainings in done]
    ranked = [(each.rank or math.inf, i) for i, each in enumerate(candidates) if i and lasts[i]]
    winner = lasts[min(ranked)[1] if ranked else 0]  # the first that has come to an end at all
    rows = []
    for candidate, trainings, finished, last in zip(candidates, records, done, lasts, strict=True):
        bests = [max(row.test_accuracy for row in each.rows) for each in finished]
        mean, low, high = interval(list(last.values()))
        rows.append(
            {
                "configuration": candidate.name,
                "trial": candidate.trial,
                "rank": candidate.rank,
                "seeds": len(trainings),
                "n": len(last),
                "epochs": epochs,
                "images": images,
                "test_accuracy_mean": mean,
                "test_accuracy_std": pd.Series(list(last.values()), dtype=float).std(),
                "interval_low": low,
                "interval_high": high,
                **_difference("gain", last, lasts[0]),
                **_difference("behind", winner, last),
                "optimistic_best_epoch_mean": interval(bests)[0],
                **{f"config_{name}": value for name, value in candidate.config.as_dict().items()},
            }
        )
    return pd.DataFrame(rows).round(_PLACES)


def _difference(
    name: str, left: Mapping[int, float], right: Mapping[int, float]
) -> dict[str, float]:
    """Return the mean paired difference over the seeds that both have, and its interval."""
    found = interval([left[seed] - right[seed] for seed in left if seed in right])
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def write_confirmed(folder: RunFolder, table: pd.DataFrame) -> None:
    replace_file(folder.confirmed, table.to_csv(index=False, lineterminator="\n"))


def read_confirmed(folder: RunFolder) -> pd.DataFrame | None:
    """Return confirmed.csv, None if there is none, or raise RunFolderError if it is damaged."""
    try:
        content = read_plain(folder.confirmed)
        table = pd.read_csv(BytesIO(content), dtype={"configuration": str})
        numbers = table[[*_COUNTS, *_FRACTIONS]].astype(float)
        counts, fractions = numbers[list(_COUNTS)], numbers[list(_FRACTIONS)]
        sound = (counts >= 0) & (counts < 1e9) & (counts % 1 == 0)
        within = fractions.isna() | (fractions.abs() <= _WIDEST)
        if table.empty or not sound.all(axis=None) or not within.all(axis=None):
            raise ValueError("rows of numbers were expected")
        if table["configuration"].isna().any():
            raise ValueError("a configuration has no name")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, OverflowError) as error:
        raise RunFolderError(
            f"{folder.confirmed} cannot be read ({one_line(error)}): confirm the run again"
        ) from error
    return table.astype(dict.fromkeys(_COUNTS, int))


def confirmation_of(folder: RunFolder) -> AskedConfirmation | None:
    """Return what was asked of a run's confirmation, or None if it cannot be read."""
    try:
        return read_asked(folder.confirmation)
    except RunFolderError:
        return None


def conclusion(table: pd.DataFrame, metric: Metric) -> str:
    """Return in sentences what the winner gains over the baseline, and how sure that is.

    `metric` is what the search picked its winners by.
    """
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    baseline, *others = rows
    others.sort(key=lambda row: row["rank"] or math.inf)
    finished = [row for row in others if row["n"]]
    sentences = _of_winner(finished, baseline) if finished else [_reached(baseline)]
    if not others:
        sentences.append("The search found nothing better to confirm")
    sentences += [_reached(row) for row in others if not row["n"]]
    if finished and metric == "test_accuracy":
        sentences.append(
            "The search picked by accuracy on these same test images, so the gain is optimistic"
        )
    return "".join(f"{sentence}. " for sentence in sentences).rstrip()


def _of_winner(finished: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> list[str]:
    winner, *rest = finished
    sentences = [_reached(winner) + _against_baseline(winner, baseline)]
    if winner["n"] < winner["seeds"]:
        lost = winner["seeds"] - winner["n"]
        sentences.append(f"It diverged or failed on {lost} of its seeds")
    return sentences + _against_others(rest)


def _reached(row: Mapping[str, Any]) -> str:
    name = str(row["configuration"])
    name = f"the {name}" if name == "baseline" else name
    if not row["n"]:
        of_seeds = f"none of its {row['seeds']} fresh seeds" if row["seeds"] else "no seed yet"
        return f"{name[0].upper()}{name[1:]} has finished on {of_seeds}"
    shortened = "" if row["images"] >= ALL_IMAGES else f" on {row['images']:,} training images"
    of_mean = "a test accuracy" if row["n"] == 1 else "a mean test accuracy"
    return (
        f"Over {count(int(row['n']), 'fresh seed')}{shortened} {name} reaches {of_mean} of "
        f"{percent(row['test_accuracy_mean'])} at the last of {count(int(row['epochs']), 'epoch')}"
        + _in_brackets(percent(row["interval_low"]), percent(row["interval_high"]))
    )


def _against_baseline(winner: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    gain = winner["gain"]
    if not math.isfinite(gain):
        return ", with no baseline to compare with"
    interval = _in_brackets(points(winner["gain_low"]), points(winner["gain_high"]), "paired, ")
    reference = f"the baseline's {percent(baseline['test_accuracy_mean'])}"
    of_means = winner["test_accuracy_mean"] - baseline["test_accuracy_mean"]
    if not math.isclose(of_means, gain, abs_tol=3 * 10**-_PLACES):  # one lacks a seed
        reference = "the baseline on the seeds that both finished"
    if not interval:
        said = f"{points(gain)} points from {reference}"
        return f", {said}; one seed cannot say how sure that is"
    if winner["gain_low"] <= 0 <= winner["gain_high"]:
        return f", which cannot be told from {reference}: {points(gain)} points{interval}"
    return f", {_distance(gain)} {'above' if gain > 0 else 'below'} {reference}{interval}"


def _against_others(rest: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [
        str(row["configuration"])
        for row in rest
        if not row["behind_low"] > 0 and not row["behind_high"] < 0  # true also of one seed's NaN
    ]
    sentences = [f"It cannot be told from {' or '.join(names)}"] if names else []
    return sentences + [
        f"{row['configuration'].capitalize()}, which the search ranked lower, is above it by "
        f"{_distance(row['behind'])}"
        f"{_in_brackets(points(-row['behind_high']), points(-row['behind_low']))}"
        for row in rest
        if row["behind_high"] < 0
    ]


def _distance(difference: float) -> str:
    shown = f"{abs(100 * difference):.2f} points"
    return "less than 0.01 points" if shown.startswith("0.00") else shown


def _in_brackets(low: str, high: str, prefix: str = "") -> str:
    return "" if low == "-" else f" ({prefix}95% interval {low} to {high})"
