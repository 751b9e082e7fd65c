"""confirmed.csv: what the winners and the baseline reach on fresh seeds, and how sure that is.

One row per configuration, the baseline first, the others as the search ranked them. Accuracies
are fractions in [0, 1] on the 10,000 test images; intervals are Student's, 95%, over the seeds.

    configuration           `baseline` or `trial N`
    trial                   its number in the search
    rank                    its rank in the search, 1 being the winner
    seeds, n                seeds that were begun, and that came to their end (the others diverged
                            or failed: a mean over the rest flatters)
    epochs, images          that each was trained for, and on
    test_accuracy_mean, test_accuracy_std, interval_low, interval_high
                            at the last epoch
    gain, gain_low, gain_high
                            paired difference to the baseline: the same seeds
    behind, behind_low, behind_high
                            paired difference of the winner to it
    optimistic_best_epoch_mean
                            mean of each seed's best epoch, picked on the test set itself
    config_NAME             each hyperparameter
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, percent, points
from tune_mnist.runs.history import TrialRecord

ALL_IMAGES = 60_000
_COLUMNS = (
    *("configuration", "trial", "rank", "seeds", "n", "epochs", "images"),
    *("test_accuracy_mean", "test_accuracy_std", "interval_low", "interval_high"),
    *("gain", "gain_low", "gain_high", "behind", "behind_low", "behind_high"),
    "optimistic_best_epoch_mean",
)
_PLACES = 6  # beyond the fifth, differences of means are noise


@dataclass(frozen=True)
class Candidate:
    """A configuration that is confirmed."""

    name: str  # `baseline`, `trial N`
    trial: int  # in the search
    rank: int  # in the search; 0: it has none
    config: TrainConfig


def confirmed_table(
    candidates: Sequence[Candidate],
    records: Sequence[Sequence[TrialRecord]],
    *,
    epochs: int,
    images: int,
) -> pd.DataFrame:
    """Make the table.

    Args:
        candidates: what was confirmed, the baseline first.
        records: for each of them its trainings, in the order of the seeds.
        epochs: that each was to be trained for.
        images: that each was trained on.
    """
    lasts = [_by_seed(trainings, epochs) for trainings in records]
    bests = [
        [max(row.test_accuracy for row in record.rows) for record in _done(t, epochs)]
        for t in records
    ]
    winner = _winner(candidates)
    rows = []
    for candidate, trainings, last, best in zip(candidates, records, lasts, bests, strict=True):
        mean, low, high = interval(list(last.values()))
        gain = interval(_paired(last, lasts[0]))
        behind = interval(_paired(lasts[winner], last))
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
                **dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True)),
                **dict(zip(("behind", "behind_low", "behind_high"), behind, strict=True)),
                "optimistic_best_epoch_mean": interval(best)[0],
                **{f"config_{name}": value for name, value in candidate.config.as_dict().items()},
            }
        )
    return pd.DataFrame(rows).round(_PLACES)


def write_confirmed(folder: RunFolder, table: pd.DataFrame) -> None:
    """Write confirmed.csv.

    Raises:
        OSError: it could not be written; an older one is untouched.
    """
    replace_file(folder.path / "confirmed.csv", table.to_csv(index=False, lineterminator="\n"))


def read_confirmed(folder: RunFolder) -> pd.DataFrame | None:
    """Read confirmed.csv; None where there is none yet.

    Raises:
        RunFolderError: it is damaged.
    """
    path = folder.path / "confirmed.csv"
    try:
        table = pd.read_csv(path, dtype={"configuration": str})
        numbers = table[[name for name in _COLUMNS if name != "configuration"]]
        if table.empty or not all(map(pd.api.types.is_numeric_dtype, numbers.dtypes)):
            raise ValueError("rows of numbers were expected")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        what = " ".join(str(error).split())
        raise RunFolderError(f"{path} cannot be read ({what}): confirm the run again") from error
    return table


def claim(table: pd.DataFrame) -> str:
    """Say what was gained and how sure that is."""
    rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    baseline = rows[0]
    others = sorted(rows[1:], key=lambda row: row["rank"] or math.inf)
    if not others:
        return f"{_reached(baseline)}. The search found nothing better to confirm."
    winner, rest = others[0], [row for row in others[1:] if row["n"]]
    said = f"{_reached(winner)}{_against_baseline(winner, baseline)}."
    if winner["n"] < winner["seeds"]:
        said += f" It diverged or failed on {winner['seeds'] - winner['n']} of its seeds."
    if rest and winner["n"]:
        said += _against_others(winner, rest)
    return said


def confirmed_lines(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return the table as people read it, the header first."""
    lines: list[tuple[str, ...]] = [
        ("", "mean", "std", "n", "95% interval", "gain", "95% interval", "best epoch*")
    ]
    for row in table.to_dict("records"):
        lines.append(
            (
                str(row["configuration"]),
                percent(row["test_accuracy_mean"]),
                percent(row["test_accuracy_std"]),
                f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}",
                _range(percent(row["interval_low"]), percent(row["interval_high"])),
                "" if row["configuration"] == "baseline" else points(row["gain"]),
                ""
                if row["configuration"] == "baseline"
                else _range(points(row["gain_low"]), points(row["gain_high"])),
                percent(row["optimistic_best_epoch_mean"]),
            )
        )
    return lines


def _reached(row: Mapping[str, Any]) -> str:
    name = str(row["configuration"])
    name = f"the {name}" if name == "baseline" else name
    shortened = "" if row["images"] >= ALL_IMAGES else f" on {row['images']:,} training images"
    if not row["n"]:
        return f"{name[0].upper()}{name[1:]} finished on none of its {row['seeds']} fresh seeds"
    of_mean = "a test accuracy" if row["n"] == 1 else "a mean test accuracy"
    return (
        f"Over {count(int(row['n']), 'fresh seed')}{shortened} {name} reaches {of_mean} of "
        f"{percent(row['test_accuracy_mean'])} at the last of {count(int(row['epochs']), 'epoch')}"
        + _in_brackets(percent(row["interval_low"]), percent(row["interval_high"]))
    )


def _against_baseline(winner: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    if not math.isfinite(winner["gain"]):
        return ", with no baseline to compare with"
    difference = f"{points(winner['gain'])} points"
    interval = _in_brackets(points(winner["gain_low"]), points(winner["gain_high"]), "paired, ")
    reference = f"the baseline's {percent(baseline['test_accuracy_mean'])}"
    if not interval:
        return f", {difference} from {reference}; one seed cannot say how sure that is"
    if winner["gain_low"] <= 0 <= winner["gain_high"]:
        return f", which cannot be told from {reference}: {difference}{interval}"
    side = "above" if winner["gain"] > 0 else "below"
    return f", {abs(100 * winner['gain']):.2f} points {side} {reference}{interval}"


def _against_others(winner: Mapping[str, Any], rest: Sequence[Mapping[str, Any]]) -> str:
    names = [
        str(row["configuration"])
        for row in rest
        if not row["behind_low"] > 0 and not row["behind_high"] < 0  # so is a lone seed's NaN
    ]
    said = f" It cannot be told from {' or '.join(names)}." if names else ""
    for row in rest:
        if row["behind_high"] < 0:
            said += (
                f" {row['configuration'].capitalize()}, which the search ranked lower, is above "
                f"it by {-100 * row['behind']:.2f} points"
                f"{_in_brackets(points(-row['behind_high']), points(-row['behind_low']))}."
            )
    return said


def _winner(candidates: Sequence[Candidate]) -> int:
    """Return the position of the one that the search put first, the baseline aside."""
    ranked = [(each.rank or math.inf, i) for i, each in enumerate(candidates) if i]
    return min(ranked)[1] if ranked else 0


def _done(trainings: Sequence[TrialRecord], epochs: int) -> list[TrialRecord]:
    return [each for each in trainings if each.state == "complete" and each.epochs == epochs]


def _by_seed(trainings: Sequence[TrialRecord], epochs: int) -> dict[int, float]:
    return {each.seed: each.rows[-1].test_accuracy for each in _done(trainings, epochs)}


def _paired(left: Mapping[int, float], right: Mapping[int, float]) -> list[float]:
    return [left[seed] - right[seed] for seed in left if seed in right]


def _range(low: str, high: str) -> str:
    return "-" if low == "-" else f"{low} to {high}"


def _in_brackets(low: str, high: str, prefix: str = "") -> str:
    return "" if low == "-" else f" ({prefix}95% interval {low} to {high})"


# MERGED-DOC analysis.intervals: The mean of repeated measurements with its uncertainty.

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and the ends of its 95% interval (Student's t); NaN from too few values."""
    if not values:
        return math.nan, math.nan, math.nan
    series = pd.Series(values, dtype=float)
    mean = float(series.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy import stats  # slow to import, and only needed here

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * float(series.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half
