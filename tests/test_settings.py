import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tune_mnist.cli import exit_code, flag
from tune_mnist.errors import ConfigError
from tune_mnist.tuning.settings import ConfirmSettings, RunOn, SearchSettings, parse_duration


def settings_of(*arguments: str) -> SearchSettings:
    made: list[SearchSettings] = []
    assert exit_code("search", SearchSettings, made.append, arguments) == 0
    return made[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("0.5", 0.5), ("1e3", 1000), ("90s", 90), ("10m", 600), ("1.5h", 5400)),
        *(("1h30m", 5400), ("2d", 172_800), ("1d2h3m4.5s", 93_784.5), ("0s", 0), ("-5", -5)),
        ("inf", math.inf),
    ],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "5min", "10 m", "1h-3m", "-5m", "1h 30m", "m", "h30", "30m1h", "1h1h", "1.h"),
        *(".5h", "1,5h", "1h30", "soon", "10M", "5m\n", "٣m", "1:30"),
    ],
)
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="a time is written like 90s, 10m") as caught:
        parse_duration(text)
    assert f"got '{text}'" in str(caught.value)


def test_arguments_become_settings() -> None:
    assert settings_of() == SearchSettings()
    assert settings_of(
        *("--space", "sgd", "--trials", "7", "--time-budget", "1h30m", "--hang-timeout", "90"),
        *("--metric", "test_accuracy", "--gpus-per-trial", "0.25", "--results-dir", "some where"),
    ) == SearchSettings(
        space="sgd",
        trials=7,
        time_budget=5400.0,
        hang_timeout=90.0,
        metric="test_accuracy",
        gpus_per_trial=0.25,
        results_dir=Path("some where"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1, but got 0"),
        (["--trials", "many"], 'Invalid value for --trials: unable to convert "many" into int'),
        (["--epochs", "0"], "--epochs must be at least 1, but got 0"),
        (["--epochs", "1001"], "--epochs must be at most 1000, but got 1001"),
        (["--images", "-1"], "--images must be at least 1, but got -1"),
        (["--grace-epochs", "0"], "--grace-epochs must be at least 1, but got 0"),
        (["--max-concurrent", "0"], "--max-concurrent must be at least 1, but got 0"),
        (["--startup-trials", "-1"], "--startup-trials must be at least 0, but got -1"),
        (["--seed", "-1"], "--seed must be at least 0, but got -1"),
        (["--retries", "-1"], "--retries must be at least 0, but got -1"),
        (["--cpus-per-trial", "-0.5"], "--cpus-per-trial must be at least 0, but got -0.5"),
        (["--cpus-per-trial", "inf"], "--cpus-per-trial must be at least 0, but got inf"),
        (["--cpus-per-trial", "1e-5"], "--cpus-per-trial must be 0, or from 0.0001 to 1000, but"),
        (["--gpus-per-trial", "1.5"], "--gpus-per-trial must be 0, or from 0.0001 to 1: a trial"),
        (["--gpus-per-trial", "2"], "--gpus-per-trial must be 0, or from 0.0001 to 1: a trial"),
        (["--reduction-factor", "1"], "--reduction-factor must be above 1, but got 1"),
        (["--reduction-factor", "nan"], "--reduction-factor must be above 1, but got nan"),
        (["--time-budget", "0"], "--time-budget must be above 0 seconds, but got 0"),
        (["--time-budget=-90"], "--time-budget must be above 0 seconds, but got -90"),
        (["--time-budget", "nan"], "--time-budget must be above 0 seconds, but got nan"),
        (["--time-budget", "5min"], "Invalid value for --time-budget: a time is written like 90s"),
        (["--hang-timeout", "0s"], "--hang-timeout must be above 0 seconds, but got 0"),
        (["--metric", "accuracy"], 'Invalid value "accuracy" for --metric. Choose from: "val_'),
        (["--run", "a/b"], "--run must be a plain name, without folders, but got 'a/b'"),
        (["--resume", "x", "--epochs", "3"], "--epochs cannot be changed with --resume, which"),
        (["--resume", "x", "--seed", "3"], "--seed cannot be changed with --resume, which takes"),
        (["--resume", "x", "--run", "y"], "--run cannot be changed with --resume, which takes"),
        (["--trails", "3"], "Unknown option: --trails. Did you mean --trials?"),
    ],
)
def test_a_bad_value_is_one_line_that_names_option_rule_and_value(
    arguments: Sequence[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("search", SearchSettings, lambda _: None, arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


ON_OTHER_MACHINES: dict[str, Any] = {
    "max_concurrent": 2,
    "cpus_per_trial": 2.0,
    "gpus_per_trial": 0.5,
    "precision": "tf32",
    "address": "auto",
    "retries": 0,
    "hang_timeout": 5.0,
    "report": False,
    "mlflow": "http://here",
    "data_dir": Path("data"),
}


def test_a_resume_and_a_confirmation_may_run_on_other_machines() -> None:
    SearchSettings(resume=Path("run"), trials=100, time_budget=60.0, **ON_OTHER_MACHINES)
    assert ON_OTHER_MACHINES.keys() | {"pack"} == {entry.name for entry in fields(RunOn)}
    confirming = ConfirmSettings(Path("run"), **ON_OTHER_MACHINES)
    assert ON_OTHER_MACHINES.items() <= vars(confirming).items()


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"top": 0}, "--top must be at least 1"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"epochs": 1001}, "--epochs must be at most 1000"),
        ({"images": 0}, "--images must be at least 1"),
        ({"time_budget": 0.0}, "--time-budget must be above 0 seconds"),
        ({"cpus_per_trial": -1}, "--cpus-per-trial must be at least 0, but got -1"),
    ],
)
def test_what_is_confirmed_has_its_limits(option: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        ConfirmSettings(**option)


SEARCH_WORDS = (
    "python -m tune_mnist.search [OPTIONS]",
    "--time-budget TIME Stop after this long: 90s, 10m, 1.5h.",
    *("--hang-timeout TIME", "[choices: val_accuracy, test_accuracy]", "[default: val_accuracy]"),
)
CONFIRM_WORDS = ("RUN --run Folder of the search.", "[default: 3]", "[choices: off, auto]")


@pytest.mark.parametrize(
    ("settings", "words"), [(SearchSettings, SEARCH_WORDS), (ConfirmSettings, CONFIRM_WORDS)]
)
def test_every_option_is_explained(
    settings: type,
    words: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert exit_code("search", settings, lambda _: None, ["--help"]) == 0
    out, err = capfd.readouterr()
    text = " ".join(" ".join(line.strip("│ ") for line in out.splitlines()).split())
    assert err == ""
    for entry in fields(settings):
        assert f"{'--list' if entry.name == 'list_runs' else flag(entry.name)} " in text
    for expected in words:
        assert expected in text
    assert "None" not in text


def test_a_search_is_resumed_with_what_it_ran_on() -> None:
    asked = SearchSettings(trials=9, max_concurrent=1, report=False, storage="/copies")
    on: dict[str, Any] = {"max_concurrent": 1, "report": False, "storage": "/copies"}
    assert asked.resuming(Path("results/a")) == SearchSettings(resume=Path("results/a"), **on)
    assert asked.resuming(None) is asked
    again = SearchSettings(resume=Path("results/a"), trials=9)
    assert again.resuming(Path("results/a")) is again
