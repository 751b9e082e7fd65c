"""A configuration as people write it: a YAML file, and `NAME=VALUE` texts over it."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig, check_name, check_value, choices_of


def read_config(path: Path) -> TrainConfig:
    """Read a configuration from a YAML mapping of hyperparameters; the others keep their defaults.

    Raises:
        ConfigError: the file cannot be read, or a name or value in it is not usable.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        rule = "must hold hyperparameters, one `name: value` a line"
        raise ConfigError(f"{path}: {rule}, but holds {str(values)[:60]!r}")
    try:
        return TrainConfig.from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def override(config: TrainConfig, texts: Iterable[str]) -> TrainConfig:
    """Put `NAME=VALUE` texts over a configuration; a later one goes over an earlier one.

    Raises:
        ConfigError: a text is of another form, or a name or value is not usable.
    """
    values: dict[str, Any] = dict(config.as_dict())
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"must be NAME=VALUE, as in lr=0.05, but got {text!r}")
        check_name(name)
        values[name] = check_value(name, _parse(name, value))
    return TrainConfig.from_mapping(values)


def _parse(name: str, text: str) -> Any:
    if not choices_of(name):
        with suppress(ValueError):  # before YAML, which takes 1e-4 for text
            return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the check of the value says what would do
