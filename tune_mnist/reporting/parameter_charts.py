"""Charts of the searched parameters: their values against the accuracies that trials reached."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import create_trial

from tune_mnist.mnist.metrics import Metric
from tune_mnist.reporting.charts import (
    BASELINE,
    BEST,
    STATES,
    accuracy_axis,
    accuracy_ticks,
    error,
    name_of_metric,
)
from tune_mnist.runs.parameter import Parameter
from tune_mnist.runs.ranking import RankedTrial
from tune_mnist.runs.space import SearchSpace
from tune_mnist.runs.view import RunView

ENOUGH_TRIALS = 10  # for a first idea of what matters
_COLOURS = [[0.0, "#8a94a3"], [0.6, "#3f86d0"], [1.0, "#2a9d5c"]]


def importances(
    trials: Sequence[RankedTrial], space: SearchSpace, metric: Metric
) -> dict[str, float]:
    """Return each parameter's share in reaching the best accuracies, the largest first.

    Computed by Optuna's PED-ANOVA from the best accuracy of each trial in the space, which the
    baseline may not be. Empty if there are too few trials, or no difference between them.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study, known = optuna.create_study(direction="maximize"), 0
    for trial in trials:
        frozen = space.frozen_params(trial.record.config)
        if trial.best is not None and frozen is not None:
            params, distributions = frozen
            value = trial.best.accuracy(metric)
            study.add_trial(create_trial(value=value, params=params, distributions=distributions))
            known += 1
    if known < ENOUGH_TRIALS:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental; that a branch has few trials
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError):  # such as trials that are all alike
            return {}


def importance_bars(shares: Mapping[str, float]) -> go.Figure:
    names = list(shares)[::-1]
    bars = go.Bar(
        x=[shares[name] for name in names],
        y=names,
        orientation="h",
        marker_color=STATES["complete"],
        texttemplate="%{x:.0%}",
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )
    axis = {"tickformat": ".0%", "range": [0, 1.2 * max(shares.values())]}
    return go.Figure(bars, go.Layout(height=90 + 26 * len(names), xaxis=axis))


def parallel_coordinates(run: RunView, space: SearchSpace) -> go.Figure:
    """Draw every trial as a line through its values, with a dash where a parameter is inactive.

    Optuna's own chart leaves out every trial that lacks a parameter: here that would be all.
    """
    trials = run.ranked[::-1]
    values = [trial.accuracy(run.metric) for trial in trials]
    configs = [space.active_values(trial.record.config) for trial in trials]
    # Coloured by rank: most trials are close together at the top, where the differences matter.
    shades = [position / max(len(trials) - 1, 1) for position in range(len(trials))]
    dimensions = [_dimension(parameter, configs) for parameter in space.parameters.values()]
    inner = [tick for tick in accuracy_ticks(values) if values[0] < tick < values[-1]]
    ticks = [values[0], *inner, values[-1]]
    reached = {
        "label": name_of_metric(run.metric),
        "values": [-math.log10(error(value)) for value in values],
        "tickvals": [-math.log10(error(tick)) for tick in ticks],
        "ticktext": [f"{100 * tick:.4g}%" for tick in ticks],
    }
    lines = go.Parcoords(
        dimensions=[*dimensions, reached],
        line={"color": shades, "colorscale": _COLOURS},
        labelangle=-20,
        labelside="top",
    )
    return go.Figure(lines, go.Layout(height=460, margin={"l": 60, "r": 60, "t": 90, "b": 30}))


def _dimension(parameter: Parameter, configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one axis; if the parameter is inactive in a trial, with a place for that below."""
    values = [config.get(parameter.name) for config in configs]
    if parameter.choices is not None:
        known = [_shown(choice) for choice in parameter.choices]
        # The baseline's value need not be among the choices.
        numbers = [float(known.index(s)) if (s := _shown(v)) in known else None for v in values]
        low, high = 0.0, max(len(known) - 1.0, 1.0)
        ticks = {float(place): name for place, name in enumerate(known)}
    else:
        domain: Any = parameter.distribution
        scale = math.log10 if domain.log else float
        # Nor has a baseline's 0 a place on a log scale.
        numbers = [
            None if v is None or (domain.log and float(v) <= 0) else scale(float(v))
            for v in values
        ]
        low, high = scale(domain.low), scale(domain.high)
        inner = [low, low + (high - low) / 2, high]
        ticks = {at: f"{10**at if domain.log else at:.3g}" for at in inner}
    inactive = low - (high - low) * 0.15
    if None in numbers:
        ticks = {inactive: "0" if parameter.or_zero and not parameter.when else "-", **ticks}
    placed = [inactive if number is None else number for number in numbers]
    return {
        "label": parameter.name,
        "values": placed,
        "range": [min([low, *placed]), max([high, *placed])],
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def slices(run: RunView, space: SearchSpace) -> dict[str, go.Figure]:
    active = {each.record.number: space.active_values(each.record.config) for each in run.ranked}
    return {name: _slice(run, each, active) for name, each in space.parameters.items()}


def _slice(
    run: RunView, parameter: Parameter, active: Mapping[int, Mapping[str, Any]]
) -> go.Figure:
    """Draw a parameter's values in the trials in which it is active, by their numbers."""
    traces = []
    ranked = run.ranked
    groups: list[tuple[str, list[RankedTrial], str, str, float]] = [
        (state, [t for t in ranked if t.record.state == state], colour, "circle", 7)
        for state, colour in reversed(STATES.items())
    ]
    groups.append(("baseline", [t for t in ranked if t.is_baseline], BASELINE, "diamond", 12))
    groups.append(("best", ranked[:1], BEST, "star", 14))
    for name, trials, colour, symbol, size in groups:
        points = [
            (values[parameter.name], trial.accuracy(run.metric), trial.record.number)
            for trial in trials
            if parameter.name in (values := active[trial.record.number])
        ]
        if points:
            traces.append(
                go.Scatter(
                    x=[_drawn(parameter, value) for value, _, _ in points],
                    y=[error(accuracy) for _, accuracy, _ in points],
                    customdata=[accuracy for _, accuracy, _ in points],
                    text=[f"trial {trial}" for _, _, trial in points],
                    name=name,
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": size, "opacity": 0.8},
                    hovertemplate="%{x}: %{customdata:.2%}<br>%{text}<extra></extra>",
                )
            )
    accuracies = [trial.accuracy(run.metric) for trial in ranked]
    layout = go.Layout(
        height=260,
        showlegend=False,
        margin={"l": 8, "r": 8, "t": 10, "b": 8},
        xaxis=_value_axis(parameter) | {"title": parameter.name},
        yaxis=accuracy_axis("", accuracies)
        | {"autorange": False, "range": _error_range(accuracies)},
    )
    return go.Figure(traces, layout)


def _value_axis(parameter: Parameter) -> dict[str, Any]:
    if parameter.choices is not None:
        order = [_shown(choice) for choice in parameter.choices]
        return {"type": "category", "categoryorder": "array", "categoryarray": order}
    domain: Any = parameter.distribution
    if not domain.log:
        return {"tickformat": "~g"}
    if not parameter.or_zero:
        return {"type": "log"}
    shown = (domain.low, math.sqrt(domain.low * domain.high), domain.high)
    places = [_drawn(parameter, value) for value in (0.0, *shown)]
    return {"type": "log", "tickvals": places, "ticktext": ["0", *(f"{v:.2g}" for v in shown)]}


def _drawn(parameter: Parameter, value: Any) -> Any:
    """Return where a value stands on its axis; a 0 beside a log scale stands below it."""
    if parameter.choices is not None:
        return _shown(value)
    domain: Any = parameter.distribution
    return domain.low / 3 if domain.log and parameter.or_zero and value == 0 else value


def _error_range(accuracies: Sequence[float]) -> list[float]:
    """Return one range for all small charts, so that their heights can be compared."""
    errors = [math.log10(error(accuracy)) for accuracy in accuracies]
    room = 0.06 * (max(errors) - min(errors)) + 0.02
    return [max(errors) + room, min(errors) - room]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
