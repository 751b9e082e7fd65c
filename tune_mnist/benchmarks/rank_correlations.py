"""How well a young trial's standing foretells its end, from recorded learning curves.

Spearman's rank correlation between the validation accuracy after a few epochs and the test
accuracy after the last one, over the configurations of one schedule and over all.
"""

import pandas as pd

from tune_mnist.benchmarks.recorded_curves import PREFIX
from tune_mnist.runs.confirmed import interval

YOUNG = (1, 3, 9)  # ASHA's rungs


def rank_correlations(curves: pd.DataFrame) -> str:
    """Draw a line for each schedule and each kind of weights.

    Args:
        curves: the rows that `bench curves` has recorded.
    """
    lines = [
        f"{'rank correlation with the end':<32}"
        + f"{'weights':<10}"
        + "".join(f"{f'epoch {epoch}':>10}" for epoch in YOUNG)
        + f"{'n':>6}"
    ]
    for schedule in ("all", *sorted(curves["config_schedule"].unique())):
        rows = curves if schedule == "all" else curves[curves["config_schedule"] == schedule]
        for weights, prefix in PREFIX.items():
            values = rows.pivot(index="config", columns="epoch", values=f"{prefix}val_accuracy")
            end = rows[rows["epoch"] == rows["epoch"].max()].set_index("config")
            final = end[f"{prefix}test_accuracy"].reindex(values.index)
            found = [
                values[epoch].corr(final, method="spearman") if epoch in values else float("nan")
                for epoch in YOUNG
            ]
            lines.append(
                f"{schedule:<32}{weights:<10}"
                + "".join(f"{each:>10.2f}" for each in found)
                + f"{len(values):>6}"
            )
    return "\n".join([*lines, _gain(curves)])


def _gain(curves: pd.DataFrame) -> str:
    end = curves.dropna(subset=["test_accuracy", "averaged_test_accuracy"])
    gains = 100 * (end["averaged_test_accuracy"] - end["test_accuracy"])
    mean, low, high = interval(gains.tolist())
    return (
        f"averaged weights end {mean:.2f} points above the raw (95% interval {low:.2f} to "
        f"{high:.2f}, n = {len(gains)}); median {gains.median():.2f}"
    )
