"""Hyperparameters against what came of them, drawn."""

import html
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.reporting.charts import (
    BASELINE,
    BEST,
    STATES,
    accuracy_axis,
    error,
    name_of_metric,
)
from tune_mnist.runs.ranking import RankedTrial
from tune_mnist.runs.view import RunView

# MERGED-DOC analysis.parameters: What a search varied, as its search.yaml tells it, and how much
# each part of it mattered.

ENOUGH_TRIALS = 10  # for a first idea of what matters


@dataclass(frozen=True)
class Searched:
    """One hyperparameter that a search varied."""

    name: str
    distribution: BaseDistribution
    when: Mapping[str, Sequence[Any]]  # parent -> the values with which this one counts

    @property
    def is_log(self) -> bool:
        """Whether equal ratios of it are equal steps."""
        return bool(getattr(self.distribution, "log", False))

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Its values, where it has no order."""
        if isinstance(self.distribution, CategoricalDistribution):
            return tuple(self.distribution.choices)
        return None


def searched_parameters(space: Any) -> list[Searched]:
    """Return what the space of a search.yaml varies; what cannot be read there is left out."""
    parameters = space.get("parameters") if isinstance(space, Mapping) else None
    found = []
    for name, entry in parameters.items() if isinstance(parameters, Mapping) else ():
        if isinstance(entry, Mapping) and (distribution := _distribution(entry)) is not None:
            when = entry.get("when")
            conditions = {
                str(parent): values if isinstance(values, list) else [values]
                for parent, values in (when.items() if isinstance(when, Mapping) else ())
            }
            found.append(Searched(str(name), distribution, conditions))
    return found


def active_values(config: TrainConfig, searched: Sequence[Searched]) -> dict[str, Any]:
    """Return the searched parameters that count in a configuration, with their values."""
    conditional = {each.name for each in searched}
    values: dict[str, Any] = {}
    for each in searched:
        counts = all(
            getattr(config, parent) in allowed and (parent in values or parent not in conditional)
            for parent, allowed in each.when.items()
        )
        if counts:
            values[each.name] = getattr(config, each.name)
    return values


def importances(
    trials: Sequence[RankedTrial], searched: Sequence[Searched], metric: Metric
) -> dict[str, float]:
    """Return the share that each parameter has in reaching the best accuracies, most first.

    By PED-ANOVA, Optuna's own, over what each trial reached at its best. Empty where there are
    too few trials, or nothing to tell them apart.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        if trial.best is None:
            continue
        values = active_values(trial.record.config, searched)
        known = {each.name: each.distribution for each in searched if each.name in values}
        try:
            frozen = create_trial(
                state=TrialState.COMPLETE,
                params=values,
                distributions=known,
                value=trial.best.accuracy(metric),
            )
        except ValueError:  # outside the space, as the baseline may be
            continue
        study.add_trial(frozen)
    if len(study.trials) < ENOUGH_TRIALS:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of branches with few trials
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError):  # such as trials that are all alike
            return {}


def _distribution(entry: Mapping[str, Any]) -> BaseDistribution | None:
    low, high, step = entry.get("low"), entry.get("high"), entry.get("step")
    log = bool(entry.get("log", False))
    try:
        if "choices" in entry:
            return CategoricalDistribution(tuple(entry["choices"]))
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log, step=int(step or 1))
        if low is None or high is None:
            return None
        return FloatDistribution(float(low), float(high), log=log, step=step)
    except (ValueError, TypeError):
        return None


_COLOURS = [[0.0, "#8a94a3"], [0.6, "#3f86d0"], [1.0, "#2a9d5c"]]
_ABSENT = "-"


def parallel_coordinates(run: RunView, searched: Sequence[Searched]) -> go.Figure:
    """Draw every trial as a line through its values; a parameter that does not count is a dash.

    Not Optuna's own: that leaves out every trial that lacks a parameter, here all of them.
    """
    trials = sorted((t for t in run.ranked), key=lambda t: t.accuracy(run.metric))
    values = [trial.accuracy(run.metric) for trial in trials]
    configs = [active_values(trial.record.config, searched) for trial in trials]
    # By rank: most trials are close together at the top, where the differences matter.
    shades = [position / max(len(trials) - 1, 1) for position in range(len(trials))]
    dimensions = [_dimension(each, configs) for each in searched]
    best_at = {
        "label": name_of_metric(run.metric),
        "values": [-math.log10(error(value)) for value in values],
        **_accuracy_ticks(values),
    }
    figure = go.Figure(
        go.Parcoords(
            dimensions=[*dimensions, best_at],
            line={"color": shades, "colorscale": _COLOURS},
            labelangle=-20,
            labelside="top",
        )
    )
    figure.update_layout(height=460, margin={"l": 60, "r": 60, "t": 90, "b": 30})
    return figure


def importance_bars(shares: Mapping[str, float]) -> go.Figure:
    """Draw each parameter's share in reaching the best accuracies."""
    names = list(shares)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[shares[name] for name in names],
            y=[html.escape(name) for name in names],
            orientation="h",
            marker={"color": STATES["complete"]},
            texttemplate="%{x:.0%}",
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )
    figure.update_layout(
        height=90 + 26 * len(names),
        xaxis={"tickformat": ".0%", "range": [0, 1.2 * max(shares.values())]},
    )
    return figure


def slices(run: RunView, searched: Sequence[Searched]) -> dict[str, go.Figure]:
    """Draw each parameter's values against what the trials reached at their best."""
    return {each.name: _slice(run, each, searched) for each in searched}


def _slice(run: RunView, parameter: Searched, searched: Sequence[Searched]) -> go.Figure:
    figure = go.Figure()
    ranked = run.ranked
    groups: list[tuple[str, list[RankedTrial], str, str, float]] = [
        (state, [t for t in ranked if t.record.state == state], colour, "circle", 7)
        for state, colour in reversed(STATES.items())
    ]
    groups.append(("baseline", [t for t in ranked if t.is_baseline], BASELINE, "diamond", 12))
    groups.append(("best", ranked[:1], BEST, "star", 14))
    for name, trials, colour, symbol, size in groups:
        points = []
        for trial in trials:
            values = active_values(trial.record.config, searched)
            if parameter.name in values:
                accuracy = trial.accuracy(run.metric)
                points.append((values[parameter.name], accuracy, trial.record.number))
        if points:
            figure.add_trace(
                go.Scatter(
                    x=[_shown(value) if parameter.choices else value for value, _, _ in points],
                    y=[error(accuracy) for _, accuracy, _ in points],
                    customdata=[accuracy for _, accuracy, _ in points],
                    text=[f"trial {trial}" for _, _, trial in points],
                    name=name,
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": size, "opacity": 0.8},
                    hovertemplate="%{x}: %{customdata:.2%}<br>%{text}<extra></extra>",
                )
            )
    axis: dict[str, Any] = {"type": "log"} if parameter.is_log else {"tickformat": "~g"}
    if parameter.choices is not None:
        order = [_shown(choice) for choice in parameter.choices]
        axis = {"type": "category", "categoryorder": "array", "categoryarray": order}
    figure.update_layout(
        height=260,
        showlegend=False,
        hovermode="closest",
        margin={"l": 8, "r": 8, "t": 10, "b": 8},
        xaxis={**axis, "title": {"text": html.escape(parameter.name)}},
        yaxis={
            **accuracy_axis("", [each.accuracy(run.metric) for each in ranked]),
            "autorange": False,
            "range": _errors(ranked, run.metric),
        },
    )
    return figure


def _errors(ranked: Sequence[RankedTrial], metric: Metric) -> list[float]:
    """Return one range for all small charts, so that their heights can be compared."""
    errors = [math.log10(error(each.accuracy(metric))) for each in ranked]
    room = 0.06 * (max(errors) - min(errors)) + 0.02
    return [max(errors) + room, min(errors) - room]


def _dimension(parameter: Searched, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one axis; below it, where any trial is without it, a place for those."""
    values = [config.get(parameter.name) for config in configs]
    if parameter.choices is not None:
        known = [_shown(choice) for choice in parameter.choices]
        places = [known.index(s) if (s := _shown(v)) in known else None for v in values]
        low, high = 0.0, max(len(known) - 1.0, 1.0)
        ticks = {float(place): name for place, name in enumerate(known)}
        numbers: list[float | None] = [None if p is None else float(p) for p in places]
    else:
        scale = math.log10 if parameter.is_log else float
        # The baseline has a 0 where a space searches on a log scale, which has no place for it.
        numbers = [
            None if v is None or (parameter.is_log and v <= 0) else scale(v) for v in values
        ]
        bounds = vars(parameter.distribution)
        low, high = scale(bounds["low"]), scale(bounds["high"])
        inner = [low, low + (high - low) / 2, high]
        ticks = {at: f"{10**at if parameter.is_log else at:.3g}" for at in inner}
    absent = low - (high - low) * 0.15
    if None in numbers:
        ticks = {absent: _ABSENT, **ticks}
    placed = [absent if value is None else value for value in numbers]
    return {
        "label": html.escape(parameter.name),
        "values": placed,
        "range": [min([low, *placed]), max([high, *placed])],
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def _accuracy_ticks(values: Sequence[float]) -> dict[str, Any]:
    known = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
    ticks = [tick for tick in known if min(values) <= tick <= max(values)]
    ticks = [min(values), *ticks, max(values)]
    return {
        "tickvals": [-math.log10(error(tick)) for tick in ticks],
        "ticktext": [f"{100 * tick:.4g}%" for tick in ticks],
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return html.escape(f"{value:g}" if isinstance(value, float) else str(value))
