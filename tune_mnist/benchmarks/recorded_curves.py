"""Recorded learning curves as something that a search can be replayed on."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import CONFIG_FIELDS, TrainConfig
from tune_mnist.runs.space import SearchSpace

Floats = npt.NDArray[np.float64]
Weights = Literal["raw", "averaged"]

PREFIX: dict[Weights, str] = {"raw": "", "averaged": "averaged_"}
SCORES = ("val_accuracy", "val_loss", "test_accuracy")
CHANCE = 0.1  # accuracy of a guess among ten digits
OTHER_KIND = 1000.0  # more than any distance between two configurations of one kind


def read_curves(path: Path) -> pd.DataFrame:
    """Read the rows that `bench curves` has recorded: one a configuration and epoch.

    Raises:
        ConfigError: there is no such file, or it is another kind of file.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--curves: cannot read {path} ({error}): python -m tune_mnist.bench curves makes it"
        ) from error
    needed = {"config", "epoch", "config_schedule"} | {
        f"{prefix}{column}" for prefix in PREFIX.values() for column in SCORES
    }
    if missing := needed - set(table.columns):
        raise ConfigError(f"--curves: {path} has no column {min(missing)}: not recorded curves")
    return table


@dataclass(frozen=True)
class RecordedCurves:
    """Whole curves of N configurations over E epochs, scored with one kind of weights.

    A configuration that diverged has NaN from there on.
    """

    space: SearchSpace
    configs: list[TrainConfig]
    val_accuracy: Floats  # [N, E]
    val_loss: Floats  # [N, E]
    test_accuracy: Floats  # [N], after the last epoch; that of a guess if it diverged
    _places: Floats  # [N, D]: each configuration in a unit cube, NaN where inactive

    @classmethod
    def of(cls, table: pd.DataFrame, space: SearchSpace, weights: Weights) -> Self:
        """Take the curves of one kind of weights out of the recorded rows."""
        by_config = [rows.sort_values("epoch") for _, rows in table.groupby("config")]
        configs = [_config(rows.iloc[0]) for rows in by_config]
        prefix = PREFIX[weights]
        test = _matrix(by_config, f"{prefix}test_accuracy")[:, -1]
        test[np.isnan(test)] = CHANCE
        return cls(
            space,
            configs,
            _matrix(by_config, f"{prefix}val_accuracy"),
            _matrix(by_config, f"{prefix}val_loss"),
            test,
            np.array([_place(space, config) for config in configs]),
        )

    @property
    def epochs(self) -> int:
        """The length of a whole curve."""
        return int(self.val_accuracy.shape[1])

    def nearest(self, config: TrainConfig, taken: Collection[int] = ()) -> int:
        """Return the recorded configuration that stands in for `config`.

        It has the same values of what conditions hang on (optimizer and schedule), where any has,
        and is the nearest in the numbers, each scaled to its range.

        Args:
            config: what a search proposes.
            taken: the ones that it has had, not all there are.
        """
        # NaN where it is inactive in the one or the other, as with another optimizer or schedule.
        distances = np.nan_to_num(self._places - _place(self.space, config))
        parents = [self._column(name) for name in _parents(self.space)]
        other = (distances[:, parents] != 0).any(axis=1)
        cost = (distances**2).sum(axis=1) + OTHER_KIND * other
        cost[list(taken)] = np.inf
        return int(np.argmin(cost))

    def _column(self, name: str) -> int:
        return list(self.space.parameters).index(name)


def _parents(space: SearchSpace) -> list[str]:
    """Return the parameters that conditions hang on."""
    found = {name for parameter in space.parameters.values() for name in parameter.when}
    return [name for name in space.parameters if name in found]


def _config(row: "pd.Series[float]") -> TrainConfig:
    values = {name: row[f"config_{name}"] for name in CONFIG_FIELDS if f"config_{name}" in row}
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in values.items()
    }
    return TrainConfig.from_mapping(plain)


def _matrix(by_config: list[pd.DataFrame], column: str) -> Floats:
    """Return a column as [N, E], NaN after a curve's last row."""
    epochs = max(len(rows) for rows in by_config)
    matrix = np.full((len(by_config), epochs), np.nan)
    for number, rows in enumerate(by_config):
        matrix[number, : len(rows)] = rows[column]
    return matrix


def _place(space: SearchSpace, config: TrainConfig) -> Floats:
    """Return where a configuration lies, each searched parameter on a scale from 0 to 1, [D]."""
    values = config.as_dict()
    return np.array(
        [
            _scaled(parameter.distribution, values[name]) if parameter.active(values) else np.nan
            for name, parameter in space.parameters.items()
        ]
    )


def _scaled(distribution: BaseDistribution, value: object) -> float:
    internal = distribution.to_internal_repr(value)
    if isinstance(distribution, CategoricalDistribution):
        return internal  # equal or a whole step apart
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    if distribution.log:  # type: ignore[attr-defined]
        internal, low, high = np.log(internal), np.log(low), np.log(high)
    return float((internal - low) / (high - low)) if high > low else 0.0
