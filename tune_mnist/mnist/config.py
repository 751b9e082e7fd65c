"""One training configuration: its hyperparameters, their defaults and limits, and how to write it.

The defaults are the reference baseline: constant-rate SGD without augmentation. People write a
configuration as a YAML file, with `NAME=VALUE` texts over it.
"""

import operator
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import chain
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

import yaml

from tune_mnist.errors import ConfigError, did_you_mean, shown

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "cosine", "onecycle"]
Value = str | bool | int | float
MAX_EPOCHS = 1000  # of a trial

# How precisely a GPU computes the training steps. float32 is the default: only its losses can be
# compared with a CPU's, step by step. Evaluation is always in float32, and so are weights, their
# updates and batch norm's statistics.
Precision = Literal["float32", "tf32", "bf16"]


def check_precision(precision: Precision, device: str) -> None:
    """Raise ConfigError unless the device computes in that precision."""
    if precision != "float32" and device == "cpu":
        raise ConfigError(f"--precision {precision} is for GPUs: a CPU computes in float32")


LARGEST_YAML = 1 << 20  # bytes
_MOST_NODES = 100_000  # of a YAML file, once what it refers to is put in
_HOLDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class Limits:
    """Within what a number must lie that is typed or read: rules such as `> 0` and `<= 10`."""

    def __init__(self, *rules: str, or_nan: bool = False) -> None:
        """Allow NaN, which stands for a missing number, if `or_nan`."""
        self._rules, self._or_nan = rules, or_nan
        self._bounds = [(_HOLDS[sign], float(bound)) for sign, bound in map(str.split, rules)]

    def hold(self, value: float) -> bool:
        within = all(holds(value, bound) for holds, bound in self._bounds)
        return within or (self._or_nan and isnan(value))

    def __str__(self) -> str:
        return " and ".join(self._rules)


def _number(default: float, *rules: str) -> Any:
    return field(default=default, metadata={"limits": Limits(*rules)})


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of one training run; a value outside its limits raises ConfigError."""

    optimizer: Optimizer = "sgd"
    lr: float = _number(0.01, "> 0", "<= 10")  # peak rate of the schedule
    momentum: float = _number(0.9, ">= 0", "< 1")  # sgd
    nesterov: bool = False  # sgd; needs momentum > 0
    beta1: float = _number(0.9, ">= 0", "< 1")  # adamw: decay of the first moment
    beta2: float = _number(0.999, ">= 0", "< 1")  # adamw: decay of the second moment
    weight_decay: float = _number(0.0, ">= 0", "<= 1")  # sgd: L2 term; adamw: decoupled
    batch_size: int = _number(128, ">= 2", "<= 10000")  # images; batch norm needs 2
    schedule: Schedule = "constant"
    step_every: int = _number(8, ">= 1", "<= 1000")  # step: epochs between two cuts of the rate
    step_factor: float = _number(0.1, "> 0", "<= 1")  # step: what a cut multiplies by
    peak_position: float = _number(0.3, "> 0", "< 1")  # onecycle: of the run
    dropout: float = _number(0.1, ">= 0", "< 1")  # probability of a zero
    label_smoothing: float = _number(0.0, ">= 0", "< 1")
    rotation: float = _number(0.0, ">= 0", "<= 180")  # degrees, uniform in +-rotation
    shift: float = _number(0.0, ">= 0", "<= 0.5")  # of the width, uniform in +-shift, each axis
    scale: float = _number(0.0, ">= 0", "<= 0.9")  # fraction, factor uniform in 1 +- scale
    elastic: float = _number(0.0, ">= 0", "<= 0.5")  # of the width: displacement, r.m.s.
    augmented_part: float = _number(1.0, "> 0", "<= 1")  # of the run, from its start
    ema_decay: float = _number(0.0, ">= 0", "< 1")  # a step; 0: raw weights are evaluated

    def __post_init__(self) -> None:
        for name in CONFIG_FIELDS:
            object.__setattr__(self, name, check_value(name, getattr(self, name)))
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov: true needs momentum > 0, but got momentum: 0")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from names and values; what is not named keeps its default."""
        for name in values:
            check_name(name)
        return cls(**values)

    def uses(self, name: str) -> bool:
        """Return True if a hyperparameter has an effect beside the others."""
        other, needed = _ONLY_WITH.get(name, (name, getattr(self, name)))
        return bool(getattr(self, other) == needed)

    def as_dict(self) -> dict[str, Value]:
        return dict(vars(self))


# Hyperparameters that do nothing unless another one has a certain value.
_ONLY_WITH: dict[str, tuple[str, Value]] = {
    "momentum": ("optimizer", "sgd"),
    "nesterov": ("optimizer", "sgd"),
    "beta1": ("optimizer", "adamw"),
    "beta2": ("optimizer", "adamw"),
    "step_every": ("schedule", "step"),
    "step_factor": ("schedule", "step"),
    "peak_position": ("schedule", "onecycle"),
}
CONFIG_FIELDS = {entry.name: entry for entry in fields(TrainConfig)}
_TYPES = get_type_hints(TrainConfig)


@cache
def choices_of(name: str) -> tuple[Value, ...]:
    """Return the values that the hyperparameter may take, or `()` where it is a number."""
    if _TYPES[name] is bool:
        return (True, False)
    return get_args(_TYPES[name])


def is_integer(name: str) -> bool:
    return _TYPES[name] is int


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a hyperparameter."""
    if name not in CONFIG_FIELDS:
        raise ConfigError(
            f"unknown hyperparameter '{name}'{did_you_mean(str(name), CONFIG_FIELDS)}; "
            f"known are {', '.join(CONFIG_FIELDS)}"
        )


def check_value(name: str, value: Any) -> Value:
    """Return `value` in the hyperparameter's type, or raise ConfigError with the rule."""
    choices = choices_of(name)
    if choices:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        texts = [str(choice).lower() for choice in choices]
        raise ConfigError(
            f"{name}: must be one of {', '.join(texts)}, but got {shown(value)}"
            f"{_hint_for_choice(value, texts)}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{name}: must be a number, but got {shown(value)}{_hint_for_number(value)}"
        )
    if is_integer(name) and value % 1 != 0:  # true of NaN and infinities as well
        raise ConfigError(f"{name}: must be a whole number, but got {shown(value)}")
    limits: Limits = CONFIG_FIELDS[name].metadata["limits"]
    if not limits.hold(value):  # before float(), which overflows on huge integers
        raise ConfigError(f"{name}: must be {limits}, but got {shown(value)}")
    return int(value) if is_integer(name) else float(value)


def _hint_for_choice(value: Any, texts: list[str]) -> str:
    if isinstance(value, bool):
        return " (bare yes, no, on and off are booleans in YAML: quote what is text)"
    if value in ("true", "false") and value in texts:
        return f" (text: write {value} without quotes)"
    return did_you_mean(value, texts) if isinstance(value, str) else ""


def _hint_for_number(value: Any) -> str:
    """Return how to write a number that arrived as text: YAML 1.1 reads 1e-4 so, for one."""
    try:
        number = float(value) if isinstance(value, str) else nan
    except ValueError:
        return ""
    if not isfinite(number):
        return ""
    # YAML 1.1 wants a dot in a number with an exponent, which Python leaves out of 1e-05.
    mantissa, *exponent = repr(number).split("e")
    dotted = mantissa if "." in mantissa else f"{mantissa}.0"
    return (
        f" (text: YAML needs a dot and a signed exponent; write {'e'.join((dotted, *exponent))})"
    )


def read_config(path: Path) -> TrainConfig:
    """Return the configuration in a YAML file, or raise ConfigError with what is wrong in it."""
    try:
        values = read_users_yaml(path)
        if not isinstance(values, dict):
            rule = "must hold hyperparameters, one `name: value` a line"
            raise ConfigError(f"{rule}, but holds {shown(values)}")
        return TrainConfig.from_mapping(values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def override(config: TrainConfig, texts: Iterable[str]) -> TrainConfig:
    """Put `NAME=VALUE` texts over a configuration, the last one winning, or raise ConfigError."""
    values: dict[str, Any] = dict(config.as_dict())
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"must be NAME=VALUE, as in lr=0.05, but got {text!r}")
        check_name(name)
        values[name] = check_value(name, _parse_value(name, value))
    return TrainConfig.from_mapping(values)


def _parse_value(name: str, text: str) -> Any:
    if not choices_of(name):
        with suppress(ValueError):  # before YAML, which takes 1e-4 for text
            return float(text)
    try:
        return parse_yaml(text.encode())
    except ValueError:
        return text  # the check of the value names the rule


def parse_yaml(content: bytes) -> Any:
    """Return what YAML holds, or raise ValueError with the place and what is wrong there."""
    try:
        return yaml.load(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}not usable YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"not YAML: {error.reason} at position {error.position}; save it as UTF-8 text"
        ) from error
    # What PyYAML does not wrap: a date such as 2024-99-99, `!!bool maybe`, endless nesting.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"not usable YAML: {type(error).__name__}: {error}") from error


def read_users_yaml(path: Path) -> Any:
    """Return what a user's YAML file holds, or raise OSError or ValueError.

    It may be a link or come from a pipe.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise ValueError(f"has more than {LARGEST_YAML:,} bytes")
    return parse_yaml(content)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, and references that make a small file a huge one.

    PyYAML's safe loader keeps the last of two keys silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, before merge keys (`<<`) are resolved: what they bring may be overridden.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _nodes(node, {}) > _MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem="refers to itself, or too often to the same", problem_mark=node.start_mark
            )
        return super().construct_document(node)


def _nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the nodes in one, each as often as it is referred to."""
    if id(node) not in known:
        known[id(node)] = inf  # if it is met again before it is counted, it holds itself
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_nodes(child, known) for child in children)
    return known[id(node)]
