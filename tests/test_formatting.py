import math
from pathlib import Path
from typing import Any

import pytest

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.formatting import (
    count,
    differences,
    duration,
    percent,
    points,
    setting,
    short_path,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (605, "10 min 05 s"),
        (3600, "1 h"),
        (3900, "1 h 05 min"),
        (math.inf, "no limit"),
    ],
)
def test_a_time_is_said_in_the_units_that_fit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_accuracies_gains_and_counts_are_said_in_words() -> None:
    assert (percent(0.9883), percent(math.nan)) == ("98.83%", "-")
    assert (points(0.0041), points(-0.001), points(math.nan)) == ("+0.41", "-0.10", "-")
    assert (count(1, "trial"), count(55_000, "image")) == ("1 trial", "55,000 images")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "as the baseline"),
        ({"lr": 0.0031234}, "lr 0.00312"),
        ({"optimizer": "adamw", "weight_decay": 1e-4}, "adamw, weight_decay 0.0001"),
        ({"nesterov": True, "batch_size": 64}, "nesterov, batch_size 64"),
        ({"schedule": "onecycle", "peak_position": 0.25}, "onecycle, peak_position 0.25"),
        ({"optimizer": "adamw", "momentum": 0.5}, "adamw"),  # AdamW has no momentum
    ],
)
def test_a_configuration_is_said_by_what_differs_from_the_baseline(
    config: dict[str, Any], text: str
) -> None:
    assert differences(TrainConfig(**config), TrainConfig()) == text


def test_a_setting_that_does_nothing_is_a_dash() -> None:
    assert setting(TrainConfig(), "step_every") == "-"
    assert setting(TrainConfig(schedule="step"), "step_every") == "8"
    assert setting(TrainConfig(), "nesterov") == "no"


def test_a_path_is_said_from_the_current_folder_where_it_lies_in_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert short_path(tmp_path / "here" / "results" / "one") == "results/one"
    assert short_path(Path("results/one")) == "results/one"
    assert short_path(tmp_path / "there") == str(tmp_path / "there")
