"""What the conditions (`when`) of a space's parameters mean together."""

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution

from tune_mnist.errors import SearchSpaceError
from tune_mnist.mnist.config import CONFIG_FIELDS, Value
from tune_mnist.tuning.parameter import Conditions, Parameter, show


def merged(conditions: Iterable[Conditions]) -> Conditions | None:
    """Return the conditions that say the same as all the given, or None if they contradict."""
    together: dict[str, tuple[Value, ...]] = {}
    for condition in conditions:
        for name, values in condition.items():
            known = together.get(name, values)
            together[name] = tuple(value for value in known if value in values)
    return together if all(together.values()) else None


def check_parents(
    child: Parameter,
    parameters: Mapping[str, Parameter],
    constants: Mapping[str, Value],
    given: Mapping[str, Any],
) -> None:
    """Raise SearchSpaceError unless each condition names something earlier and can hold."""
    for name, values in child.when.items():
        where = f"parameters.{child.name}.when.{name}"
        if name == child.name:
            raise SearchSpaceError(f"{where}: a parameter cannot depend on itself; remove it")
        if name in constants:
            possible: tuple[Any, ...] = (constants[name],)
        elif name not in parameters:
            rule = "comes later" if name in given else "is not in this space"
            raise SearchSpaceError(
                f"{where}: must name a parameter that comes earlier in the file, but {name} "
                f"{rule}; put it before {child.name}"
            )
        else:
            distribution = parameters[name].distribution
            if not isinstance(distribution, CategoricalDistribution):
                raise SearchSpaceError(
                    f"{where}: must name a parameter with choices or a constant, but {name} has "
                    f"low and high; give {name} choices or drop the condition"
                )
            possible = distribution.choices
        for value in values:
            if value not in possible:
                raise SearchSpaceError(
                    f"{where}: must be a value that {name} can take, but got {show([value])}; "
                    f"{name} takes {show(possible)}"
                )


def all_conditions(parameters: Mapping[str, Parameter]) -> dict[str, Conditions]:
    """Return all that must hold for each parameter to be active, its parents' conditions too."""
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
    """Raise SearchSpaceError if some trial could have Nesterov momentum with momentum 0."""

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
