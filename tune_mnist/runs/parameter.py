"""The searched parameters of a space: the values each may take, and when it is active.

A parameter with conditions (`when`) is active only where all of them hold. The functions at the
end check what the conditions of several parameters mean together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from tune_mnist.errors import ConfigError, SearchSpaceError, did_you_mean, shown
from tune_mnist.mnist.config import (
    CONFIG_FIELDS,
    Value,
    check_name,
    check_value,
    choices_of,
    is_integer,
)

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
Conditions = Mapping[str, tuple[Value, ...]]  # by name, the values with which they hold

_RANGE_KEYS = ("low", "high", "log", "step", "zero")
_KEYS = ("choices", *_RANGE_KEYS, "when")
_SWITCH = CategoricalDistribution((False, True))


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter that a search samples, with Optuna's distribution of its values."""

    name: str
    distribution: Distribution
    when: Conditions  # one on a parameter that is itself inactive does not hold
    or_zero: bool = False  # beside a range that lacks it, as one on a log scale must

    @property
    def switch(self) -> str:
        """What Optuna calls the choice between 0 and the range; the range is active without 0."""
        return f"{self.name}_is_zero"

    @property
    def choices(self) -> tuple[Any, ...] | None:
        return getattr(self.distribution, "choices", None)

    def active(self, values: Mapping[str, Value]) -> bool:
        """Return True if the parameter is sampled, given what was sampled before it."""
        return all(name in values and values[name] in ok for name, ok in self.when.items())

    def suggest(self, trial: BaseTrial) -> Value:
        if self.or_zero and trial.suggest_categorical(self.switch, _SWITCH.choices):
            return 0.0
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return cast(Value, trial.suggest_categorical(self.name, choices))
            case IntDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_float(self.name, low, high, step=step, log=log)

    def frozen(self, value: Value) -> dict[str, tuple[Value, Distribution]]:
        """Return Optuna's parameters of a trial with this value, with their distributions."""
        frozen: dict[str, tuple[Value, Distribution]] = {}
        if self.or_zero:
            frozen[self.switch] = value == 0, _SWITCH
        if not self.or_zero or value != 0:
            frozen[self.name] = value, self.distribution
        return frozen

    def rule_broken_by(self, value: Any) -> str:
        """Return the rule that a value of the right type breaks, or an empty string."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return "" if value in domain.choices else f"must be one of {show(domain.choices)}"
        if self.or_zero and value == 0:
            return ""
        if not domain.low <= value <= domain.high:
            return f"must be {'0 or ' * self.or_zero}from low {domain.low} to high {domain.high}"
        steps = 0 if domain.step is None else (value - domain.low) / domain.step
        if abs(steps - round(steps)) > 1e-8:  # Optuna's own tolerance
            return f"must be low {domain.low} plus a multiple of step {domain.step}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Return the mapping that stands in a space file."""
        domain = self.distribution
        data: dict[str, Any]
        if isinstance(domain, CategoricalDistribution):
            data = {"choices": list(domain.choices)}
        else:
            data = {"low": domain.low, "high": domain.high}
            if domain.log:
                data["log"] = True
            elif domain.step is not None:
                data["step"] = domain.step
            if self.or_zero:
                data["zero"] = True
        if self.when:
            data["when"] = {
                name: values[0] if len(values) == 1 else list(values)
                for name, values in self.when.items()
            }
        return data


def parse_parameter(name: str, data: Mapping[Any, Any]) -> Parameter:
    """Parse `{choices | low, high [, log] [, step] [, zero]} [, when]`, or raise SearchSpaceError.

    Other parameters are not looked at. The message begins with the key that is not usable.
    """
    where = f"parameters.{name}"
    check_keys(where, data, _KEYS)
    domain = _choices(where, name, data) if "choices" in data else _range(where, name, data)
    conditions = _when(f"{where}.when", data.get("when", {}))
    return Parameter(name, domain, conditions, _or_zero(where, name, data))


def _choices(where: str, name: str, data: Mapping[str, Any]) -> CategoricalDistribution:
    if mixed := [key for key in _RANGE_KEYS if key in data]:
        raise SearchSpaceError(
            f"{where}: takes either choices or low and high, but got choices and "
            f"{', '.join(mixed)}; remove one or the other"
        )
    given = data["choices"]
    if not isinstance(given, list) or not given:
        raise SearchSpaceError(
            f"{where}.choices: must be a list of at least one value, but got {shown(given)}"
        )
    values: list[Value] = []
    for value in (checked(f"{where}.choices", name, each) for each in given):
        if value in values:
            raise SearchSpaceError(
                f"{where}.choices: each value may stand there once, but got {show([value])} "
                "twice; remove one"
            )
        values.append(value)
    return CategoricalDistribution(values)


def _range(where: str, name: str, data: Mapping[str, Any]) -> FloatDistribution | IntDistribution:
    if possible := choices_of(name):
        raise SearchSpaceError(
            f"{where}: is no number and needs choices, but got {shown(data)}; "
            f"write {{choices: [{show(possible)}]}}"
        )
    if missing := [key for key in ("low", "high") if key not in data]:
        raise SearchSpaceError(
            f"{where}: needs low and high, or choices, but got {shown(data)}; add {missing[0]}"
        )
    low: Any = checked(f"{where}.low", name, data["low"])
    high: Any = checked(f"{where}.high", name, data["high"])
    if low > high:
        raise SearchSpaceError(
            f"{where}: low must not exceed high, but got low {low} and high {high}; swap them"
        )
    log = _flag(where, data, "log")
    if log and low <= 0:
        raise SearchSpaceError(
            f"{where}.low: must be > 0 where log is true, but got {low}; raise it or drop log"
        )
    step = _step(where, low, high, data["step"], is_integer(name)) if "step" in data else None
    if log and step is not None:
        raise SearchSpaceError(
            f"{where}.step: does not go with log: true, but got {step}; remove one of them"
        )
    if is_integer(name):
        return IntDistribution(low, high, log=log, step=1 if step is None else int(step))
    return FloatDistribution(low, high, log=log, step=step)


def _flag(where: str, data: Mapping[str, Any], key: str) -> bool:
    flag = data.get(key, False)
    if not isinstance(flag, bool):
        raise SearchSpaceError(f"{where}.{key}: must be true or false, but got {shown(flag)}")
    return flag


def _or_zero(where: str, name: str, data: Mapping[str, Any]) -> bool:
    """Return True if 0 is a choice beside the range, or raise SearchSpaceError."""
    if not _flag(where, data, "zero"):
        return False
    checked(f"{where}.zero", name, 0)
    if data["low"] <= 0:
        raise SearchSpaceError(
            f"{where}.low: must be > 0 where zero is true, but got {data['low']}; "
            "raise it or drop zero"
        )
    return True


def _step(where: str, low: float, high: float, step: Any, whole: bool) -> float:
    of_type = isinstance(step, int if whole else int | float) and not isinstance(step, bool)
    if not of_type or not 0 < step < float("inf"):
        kind = "a whole number" if whole else "a number"
        raise SearchSpaceError(f"{where}.step: must be {kind} > 0, but got {shown(step)}")
    # In decimals, as written: in binary, 0.3 is no multiple of 0.1.
    if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)) != 0:
        raise SearchSpaceError(
            f"{where}.step: high must be low plus a multiple of step, but got low {low}, "
            f"high {high} and step {step}; change high or step"
        )
    return step if whole else float(step)


def _when(where: str, data: Any) -> Conditions:
    if not isinstance(data, Mapping):
        raise SearchSpaceError(
            f"{where}: must be a mapping of names to values such as {{optimizer: sgd}}, "
            f"but got {shown(data)}"
        )
    conditions: dict[str, tuple[Value, ...]] = {}
    for name, given in data.items():
        check_hyperparameter(where, name)
        values = given if isinstance(given, list) else [given]
        if not values:
            raise SearchSpaceError(
                f"{where}.{name}: must be a value or a list of values, but got an empty list"
            )
        conditions[name] = tuple(checked(f"{where}.{name}", name, value) for value in values)
    return conditions


def check_keys(where: str, data: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Raise SearchSpaceError if a mapping has an unknown key."""
    for key in data:
        if key not in known:
            raise SearchSpaceError(
                f"{where}: unknown key {shown(key)}{did_you_mean(str(key), known)}; "
                f"known are {', '.join(known)}"
            )


def check_hyperparameter(where: str, name: Any) -> None:
    """Raise SearchSpaceError, beginning with the key, unless this is a hyperparameter's name."""
    try:
        check_name(name)
    except ConfigError as error:
        raise SearchSpaceError(f"{where}: {error}") from error


def checked(where: str, name: str, value: Any) -> Value:
    """Return a value in the hyperparameter's type, or raise SearchSpaceError with the key."""
    try:
        return check_value(name, value)
    except ConfigError as error:
        raise SearchSpaceError(f"{where}: {str(error).removeprefix(f'{name}: ')}") from error


def show(values: Iterable[Any]) -> str:
    """Return values as they stand in a space file."""
    return ", ".join(str(value).lower() for value in values)


def merged(conditions: Iterable[Conditions]) -> Conditions | None:
    """Return the conditions that hold where all the given do, or None if that is nowhere."""
    together: dict[str, tuple[Value, ...]] = {}
    for condition in conditions:
        for name, values in condition.items():
            known = together.get(name, values)
            together[name] = tuple(value for value in known if value in values)
    return together if all(together.values()) else None


def check_conditions(
    child: Parameter,
    parameters: Mapping[str, Parameter],
    constants: Mapping[str, Value],
    given: Mapping[str, Any],
) -> None:
    """Raise SearchSpaceError unless each condition can hold and names an earlier parameter."""
    for name, values in child.when.items():
        where = f"parameters.{child.name}.when.{name}"
        if name == child.name:
            raise SearchSpaceError(f"{where}: a parameter cannot depend on itself; remove it")
        if name not in constants and name not in parameters:
            rule = "comes later" if name in given else "is not in this space"
            raise SearchSpaceError(
                f"{where}: must name a parameter that comes earlier in the file, but {name} "
                f"{rule}; put it before {child.name}"
            )
        known = (constants[name],) if name in constants else parameters[name].choices
        if known is None:
            raise SearchSpaceError(
                f"{where}: must name a parameter with choices or a constant, but {name} has "
                f"low and high; give {name} choices or drop the condition"
            )
        for value in values:
            if value not in known:
                raise SearchSpaceError(
                    f"{where}: must be a value that {name} can take, but got {show([value])}; "
                    f"{name} takes {show(known)}"
                )


def all_conditions(parameters: Mapping[str, Parameter]) -> dict[str, Conditions]:
    """Return each parameter's conditions with its parents', or raise if they can never hold."""
    needs: dict[str, Conditions] = {}
    for name, parameter in parameters.items():
        parents = (needs[parent] for parent in parameter.when if parent in needs)
        together = merged((parameter.when, *parents))
        if together is None:
            raise SearchSpaceError(
                f"parameters.{name}.when: can never hold, because it contradicts the conditions "
                f"of {', '.join(parameter.when)}; change one of them"
            )
        needs[name] = together
    return needs


def check_nesterov(
    parameters: Mapping[str, Parameter],
    constants: Mapping[str, Value],
    needs: Mapping[str, Conditions],
) -> None:
    """Raise SearchSpaceError if a trial could have Nesterov momentum with momentum 0."""

    def can_be(name: str, value: Value) -> bool:
        if name in parameters:
            return not parameters[name].rule_broken_by(value)
        return constants.get(name, CONFIG_FIELDS[name].default) == value

    if not (can_be("nesterov", True) and can_be("momentum", 0.0)):
        return
    wanted: Conditions = {"nesterov": (True,), "momentum": (0.0,)}
    if merged((wanted, needs.get("nesterov", {}), needs.get("momentum", {}))) is not None:
        raise SearchSpaceError(
            "parameters.momentum: must be > 0 wherever nesterov can be true, but can be 0; "
            "raise its low, or make one conditional on the other"
        )
