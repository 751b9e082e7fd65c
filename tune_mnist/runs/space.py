"""A search space: what is searched, what is fixed, how long a trial trains, where to start.

    space = load_space("default")           # by name, or the path of a YAML file
    values = space.sample(study.ask())      # samples the active parameters only
    config = TrainConfig.from_mapping(values)

A hyperparameter that is not in the space, or inactive in a trial, has `TrainConfig`'s default.
The project's own spaces lie in search_spaces/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from optuna.distributions import BaseDistribution
from optuna.trial import BaseTrial

from tune_mnist.errors import InvalidInputError, SearchSpaceError, did_you_mean, one_line, shown
from tune_mnist.locations import user_path
from tune_mnist.mnist.config import (
    CONFIG_FIELDS,
    MAX_EPOCHS,
    TrainConfig,
    Value,
    read_users_yaml,
)
from tune_mnist.runs.parameter import (
    Conditions,
    Parameter,
    all_conditions,
    check_conditions,
    check_hyperparameter,
    check_keys,
    check_nesterov,
    checked,
    parse_parameter,
    show,
)

_DEFAULTS = TrainConfig().as_dict()
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class SearchSpace:
    """A checked search space: whatever is sampled from it is a valid `TrainConfig`."""

    name: str  # stem of the file's name
    source: str  # where it was read from, for messages
    epochs: int  # that a trial may train
    parameters: Mapping[str, Parameter]  # searched; after the parameters of its conditions
    constants: Mapping[str, Value]  # with batch_size, unless that is searched
    start: Sequence[Mapping[str, Value]]  # points to try first; the rest of a point is sampled

    def sample(self, trial: BaseTrial) -> dict[str, Value]:
        """Sample the active parameters and return them with the constants."""
        values = dict(self.constants)
        for name, parameter in self.parameters.items():
            if parameter.active(values):
                values[name] = parameter.suggest(trial)
        return values

    def config(self, sampled: Mapping[str, Value]) -> TrainConfig:
        """Return the configuration of sampled values, such as a trial's `params`."""
        values = {**self.constants, **sampled}
        for name, parameter in self.parameters.items():
            if values.pop(parameter.switch, False):
                values[name] = 0.0
        return TrainConfig.from_mapping(values)

    def baseline(self) -> TrainConfig:
        """Return the reference baseline: all defaults, except the batch size if it is fixed."""
        size = self.constants.get("batch_size", CONFIG_FIELDS["batch_size"].default)
        return TrainConfig.from_mapping({"batch_size": size})

    def active_values(self, config: TrainConfig) -> dict[str, Value]:
        """Return the searched parameters that are active in a configuration, with their values.

        The configuration need not be one of this space.
        """
        return self._active_of(config.as_dict())

    def _active_of(self, given: Mapping[str, Value]) -> dict[str, Value]:
        known = {name: given[name] for name in self.constants}
        for name, parameter in self.parameters.items():
            if parameter.active(known):
                known[name] = given[name]
        return {name: value for name, value in known.items() if name in self.parameters}

    def frozen_params(
        self, config: TrainConfig
    ) -> tuple[dict[str, Value], dict[str, BaseDistribution]] | None:
        """Return the Optuna params and distributions of a trial that had this configuration.

        None if no trial can have had it: a value is out of bounds or off the grid, a constant
        differs, or a hyperparameter that is inactive or not in the space is not at its default.

        A constant `ema_decay` may differ: averaging does not change how the weights are trained.
        That telling the sampler of such a baseline helps it has not been shown.
        """
        given = config.as_dict()
        if "ema_decay" in self.constants:
            given["ema_decay"] = self.constants["ema_decay"]
        params = self._active_of(given)
        broken = any(self.parameters[name].rule_broken_by(value) for name, value in params.items())
        if broken or given != {**_DEFAULTS, **self.constants, **params}:
            return None
        frozen = self._frozen(params)
        return self.params(params), {name: domain for name, (_, domain) in frozen.items()}

    def params(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the Optuna params of searched values, such as a start point's."""
        return {name: value for name, (value, _) in self._frozen(values).items()}

    def _frozen(self, values: Mapping[str, Value]) -> dict[str, tuple[Value, BaseDistribution]]:
        return {
            name: pair
            for searched, value in values.items()
            for name, pair in self.parameters[searched].frozen(value).items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the space as a file holds it; `from_dict` makes an equal space of it."""
        fixed = dict(self.constants)
        data: dict[str, Any] = {"epochs": self.epochs}
        if "batch_size" in fixed:
            data["batch_size"] = fixed.pop("batch_size")
        # The constants first: a condition may name one.
        searched = {name: parameter.as_dict() for name, parameter in self.parameters.items()}
        data["parameters"] = {**fixed, **searched}
        data["start"] = [dict(point) for point in self.start]
        return data

    @classmethod
    def from_dict(cls, data: Any, name: str, source: str) -> Self:
        """Make a space of a file's content, or raise a SearchSpaceError of one line.

        It has the file, the key, the rule, the value and the way out.
        """
        try:
            return cls._parse(data, name, source)
        except InvalidInputError as error:
            # Names and values come from the file and may hold line breaks.
            raise SearchSpaceError(" ".join(f"{source}: {error}".split())) from error

    @classmethod
    def _parse(cls, data: Any, name: str, source: str) -> Self:
        if not isinstance(data, Mapping):
            raise SearchSpaceError(
                f"must be a mapping with the key parameters, but got {shown(data)}; "
                "see search_spaces/default.yaml"
            )
        check_keys("top level", data, ("epochs", "batch_size", "parameters", "start"))
        parameters, constants = _parse_parameters(data)
        needs = all_conditions(parameters)
        check_nesterov(parameters, constants, needs)
        epochs = data.get("epochs", 20)
        if type(epochs) is not int or not 1 <= epochs <= MAX_EPOCHS:
            raise SearchSpaceError(
                f"epochs: must be a whole number from 1 to {MAX_EPOCHS}, but got {shown(epochs)}"
            )
        start = _parse_start(data.get("start", []), parameters, constants, needs)
        return cls(name, source, epochs, parameters, constants, start)


def _parse_parameters(data: Mapping[str, Any]) -> tuple[dict[str, Parameter], dict[str, Value]]:
    given = data.get("parameters")
    if not isinstance(given, Mapping) or not given:
        raise SearchSpaceError(
            "parameters: must be a mapping of hyperparameters, one or more of them searched such "
            f"as 'dropout: {{low: 0.0, high: 0.3}}', but got {shown(given)}"
        )
    if "batch_size" in given and "batch_size" in data:
        raise SearchSpaceError(
            "batch_size: stands at the top level and in parameters; remove one of them"
        )
    for name in given:
        check_hyperparameter("parameters", name)
    constants: dict[str, Value] = {}
    if "batch_size" not in given:
        size = data.get("batch_size", CONFIG_FIELDS["batch_size"].default)
        constants["batch_size"] = checked("batch_size", "batch_size", size)
    parameters: dict[str, Parameter] = {}
    for name, entry in given.items():
        if isinstance(entry, Mapping):
            parameters[name] = parse_parameter(name, entry)
            check_conditions(parameters[name], parameters, constants, given)
        else:
            constants[name] = _parse_constant(name, entry)
    if not parameters:
        raise SearchSpaceError(
            "parameters: holds constants only, so there is nothing to search; "
            "give one a mapping such as 'dropout: {low: 0.0, high: 0.3}'"
        )
    return parameters, constants


def _parse_constant(name: str, entry: Any) -> Value:
    where = f"parameters.{name}"
    if entry is None or isinstance(entry, list):
        raise SearchSpaceError(
            f"{where}: must be one value (a constant) or a mapping (searched), but got "
            f"{shown(entry)}; write {{choices: [...]}} or {{low: ..., high: ...}}"
        )
    return checked(where, name, entry)


def _parse_start(
    start: Any,
    parameters: Mapping[str, Parameter],
    constants: Mapping[str, Value],
    needs: Mapping[str, Conditions],
) -> list[dict[str, Value]]:
    if not isinstance(start, list):
        raise SearchSpaceError(
            "start: must be a list of mappings such as '- {lr: 0.01}', or [], but got "
            f"{shown(start)}"
        )
    points = []
    for number, given in enumerate(start, 1):
        where = f"start[{number}]"
        if not isinstance(given, Mapping) or not given:
            raise SearchSpaceError(
                f"{where}: must be a mapping such as {{lr: 0.01}}, but got {shown(given)}"
            )
        point: dict[str, Value] = {}
        for name, value in given.items():
            check_hyperparameter(where, name)
            if name not in parameters:
                rule = "is a constant" if name in constants else "is not in this space"
                raise SearchSpaceError(
                    f"{where}.{name}: must be a searched parameter, but {name} {rule}; "
                    f"leave it out or add it to parameters; searched are {', '.join(parameters)}"
                )
            point[name] = checked(f"{where}.{name}", name, value)
            if rule := parameters[name].rule_broken_by(point[name]):
                raise SearchSpaceError(
                    f"{where}.{name}: {rule} (parameters.{name}), but got {show([point[name]])}; "
                    "change the point or widen the parameter"
                )
        _check_active(where, point, needs)
        points.append(point)
    return points


def _check_active(where: str, point: Mapping[str, Value], needs: Mapping[str, Conditions]) -> None:
    for name in point:
        for parent, values in needs[name].items():
            if parent in point and point[parent] not in values:
                raise SearchSpaceError(
                    f"{where}.{name}: is only active when {parent} is {show(values)}, but the "
                    f"point has {parent}: {show([point[parent]])}; leave {name} out"
                )


def load_space(name_or_path: str) -> SearchSpace:
    """Return the space of this name or in this file, or raise SearchSpaceError."""
    path = _find_space(name_or_path)
    return SearchSpace.from_dict(_read_yaml(path), name=path.stem, source=str(path))


def spaces_folder() -> Path:
    """Return the project's folder of space files: in the package (wheel) or beside it (checkout).

    The package comes first: a folder beside an installed package is somebody else's.
    """
    packaged = _PACKAGE / "search_spaces"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "search_spaces"


def available_spaces() -> list[str]:
    return sorted(path.stem for path in spaces_folder().glob("*.yaml"))


def _find_space(name_or_path: str) -> Path:
    names = available_spaces()
    if name_or_path in names:
        return spaces_folder() / f"{name_or_path}.yaml"
    path = user_path(name_or_path) if name_or_path else Path()
    try:
        if name_or_path and path.exists():
            return path
    except OSError as error:  # a folder without permission, a name too long
        raise _unreadable(name_or_path, error) from error
    raise SearchSpaceError(
        f"search space {name_or_path!r}: no space has this name and no file lies at this path"
        f"{did_you_mean(path.stem, names)}; known are {', '.join(names)}, "
        "or give the path of a YAML file"
    )


def _read_yaml(path: Path) -> Any:
    try:
        return read_users_yaml(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise SearchSpaceError(f"{path}: {one_line(error)}; correct it") from error


def _unreadable(path: Path | str, error: OSError) -> SearchSpaceError:
    return SearchSpaceError(f"{path}: cannot be read: {error.strerror}; give a readable YAML file")
