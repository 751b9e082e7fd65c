import math
from pathlib import Path
from typing import Any

import pytest

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import (
    TrainConfig,
    check_value,
    override,
    read_config,
)


def test_the_defaults_are_the_reference_baseline() -> None:
    config = TrainConfig()
    assert (config.optimizer, config.lr, config.momentum) == ("sgd", 0.01, 0.9)
    assert (config.dropout, config.schedule, config.batch_size) == (0.1, "constant", 128)
    assert not config.nesterov
    extras = (config.weight_decay, config.label_smoothing, config.ema_decay)
    assert (*extras, config.rotation, config.shift, config.scale, config.elastic) == (0,) * 7


def test_values_take_the_type_of_their_hyperparameter_and_survive_plain_data() -> None:
    config = TrainConfig.from_mapping({"optimizer": "adamw", "rotation": 8, "batch_size": 64.0})
    assert type(config.rotation) is float
    assert type(config.batch_size) is int
    assert TrainConfig.from_mapping(config.as_dict()) == config


@pytest.mark.parametrize(
    ("name", "just_inside", "just_outside"),
    [
        ("lr", [1e-12, 10], [0, -1, 10.1]),
        ("momentum", [0, 0.999], [-0.1, 1]),
        ("beta2", [0, 0.9999], [1]),
        ("weight_decay", [0, 1], [-1e-9, 1.1]),
        ("batch_size", [2, 10_000], [1, 10_001]),
        ("step_every", [1, 1000], [0, 1001]),
        ("step_factor", [1e-9, 1], [0, 1.1]),
        ("peak_position", [0.01, 0.99], [0, 1]),
        ("dropout", [0, 0.99], [1, -0.1]),
        ("rotation", [0, 180], [181]),
        ("shift", [0, 0.5], [0.51]),
        ("scale", [0, 0.9], [0.91]),
        ("elastic", [0, 0.5], [0.51]),
        ("augmented_part", [0.01, 1], [0, 1.01]),
        ("ema_decay", [0, 0.9999], [1]),
        ("lr", [], [math.nan, math.inf, 10**400]),
    ],
)
def test_limits_are_closed_or_open_as_they_should_be(
    name: str, just_inside: list[float], just_outside: list[float]
) -> None:
    for value in just_inside:
        assert check_value(name, value) == value
    for value in just_outside:
        with pytest.raises(ConfigError, match=rf"^{name}: must be >=? 0?.* and <=? "):
            check_value(name, value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"momentom": 0.9}, ["'momentom'", "did you mean 'momentum'?", "known are optimizer, lr"]),
        ({3: 0.9}, ["unknown hyperparameter '3'"]),
        ({"optimizer": "adam"}, ["one of sgd, adamw", "'adam'", "did you mean 'adamw'?"]),
        ({"optimizer": True}, ["one of sgd, adamw", "True", "quote"]),
        ({"optimizer": ["sgd"]}, ["one of sgd, adamw", "['sgd']"]),
        ({"nesterov": 1}, ["one of true, false", "got 1"]),
        ({"nesterov": "true"}, ["one of true, false", "'true'", "without quotes"]),
        ({"lr": None}, ["must be a number", "None"]),
        ({"lr": True}, ["must be a number", "True"]),
        ({"lr": "fast"}, ["must be a number", "'fast'"]),
        ({"lr": "1e-4"}, ["must be a number", "'1e-4'", "; write 0.0001)"]),
        ({"lr": "1e-5"}, ["; write 1.0e-05)"]),
        ({"lr": "1.25e-7"}, ["; write 1.25e-07)"]),
        ({"lr": "1e22"}, ["; write 1.0e+22)"]),
        ({"lr": "nan"}, ["lr: must be a number, but got 'nan'"]),
        ({"batch_size": 64.5}, ["must be a whole number", "64.5"]),
        ({"batch_size": math.nan}, ["must be a whole number", "nan"]),
        ({"batch_size": math.inf}, ["must be a whole number", "inf"]),
        ({"nesterov": True, "momentum": 0}, ["nesterov", "needs momentum > 0", "momentum: 0"]),
        (["lr"], ["must be NAME=VALUE"]),
        (["lr 0.1"], ["must be NAME=VALUE"]),
        (["lr="], ["lr: must be a number, but got None"]),
        (["lr=nan"], ["lr: must be > 0"]),
        (["lr=["], ["lr: must be a number"]),
        (["lr=2024-99-99"], ["lr: must be a number"]),
        (["optimizer=" + "[" * 3000], ["optimizer: must be one of sgd, adamw"]),
        (["nesterov=maybe"], ["nesterov: must be one of true, false"]),
        (["momentum=0", "nesterov=true"], ["needs momentum > 0"]),
    ],
)
def test_a_bad_value_or_text_is_named_with_rule_value_and_way_out(
    given: dict[str, Any] | list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        if isinstance(given, dict):
            TrainConfig.from_mapping(given)
        else:
            override(TrainConfig(), given)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert ("; write" in message) == any("; write" in part for part in parts)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be read: No such file"),
        (b"lr: [", "not usable YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"lr: 2024-99-99", "not usable YAML"),
        (b"lr: 0.1\nlr: 0.2", "'lr' is given twice"),
        (b"[" * 3000, "not usable YAML"),
        (b"#" * 2_000_000, "has more than"),
        (b"", "must hold hyperparameters"),
        (b"- lr", "must hold hyperparameters"),
        (b"momentun: 0.5", "did you mean 'momentum'?"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None, rule: str
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert rule in str(caught.value)
    path.write_text("optimizer: adamw  # better?\nlr: 1.0e-3\n")  # what differs is enough
    assert read_config(path) == TrainConfig(optimizer="adamw", lr=1e-3)


def test_the_last_of_several_texts_wins_over_a_configuration() -> None:
    config = TrainConfig(lr=0.5, dropout=0.3)
    texts = ["lr=1e-4", "nesterov=true", "optimizer=adamw", "batch_size=64", "lr=2e-4"]
    assert override(config, texts) == TrainConfig(
        lr=2e-4, dropout=0.3, nesterov=True, optimizer="adamw", batch_size=64
    )
    assert override(config, []) == config
