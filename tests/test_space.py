import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from tune_mnist.errors import SearchSpaceError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs import space as space_file
from tune_mnist.runs.confirmed import read_asked
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.space import SearchSpace, available_spaces, load_space

RESULTS = Path(__file__).parents[1] / "results"
NAMES = ["default", "quick", "refined", "sgd"]

# Every kind of parameter at once: grids, whole numbers, conditions on text, booleans, numbers and
# constants, several at a time and one below the other.
THOROUGH = """
epochs: 3
batch_size: 64
parameters:
  label_smoothing: 0.1
  optimizer: {choices: [sgd, adamw]}
  lr: {low: 1.0e-3, high: 0.1, log: true, when: {label_smoothing: 0.1}}
  momentum: {low: 0.5, high: 0.9, step: 0.1, when: {optimizer: sgd}}
  nesterov: {choices: [false, true], when: {optimizer: sgd}}
  beta1: {low: 0.8, high: 0.95, when: {optimizer: [adamw]}}
  schedule: {choices: [constant, step, cosine, onecycle]}
  step_every: {low: 2, high: 10, step: 2, when: {schedule: step}}
  step_factor: {choices: [0.1, 0.5], when: {schedule: step}}
  peak_position: {low: 0.1, high: 0.5, when: {schedule: [onecycle], nesterov: true}}
  dropout: {low: 0.0, high: 0.5, when: {step_factor: [0.5]}}
  weight_decay: {low: 0.0, high: 0.001, when: {schedule: [cosine, onecycle]}}
start:
  - {optimizer: sgd, momentum: 0.8, lr: 0.05}
  - {schedule: step, step_every: 8, dropout: 0}
"""

# In each table, a line is what a file holds and what the message must hold, parts between `|`.
BAD_PARAMETERS = r"""
momentom: {low: 0.5, high: 0.9} => parameters|hyperparameter 'momentom'|did you mean 'momentum'?
1: {low: 0.5, high: 0.9} => parameters|unknown hyperparameter '1'
"a\nb": 1 => parameters|unknown hyperparameter 'a b'
lr: [0.1, 0.2] => parameters.lr|constant|searched|[0.1, 0.2]|choices: [
lr: => parameters.lr|constant|searched|got None
lr: {low: 0.1} => parameters.lr|needs low and high|add high
lr: {low: 0.1, hihg: 0.2} => parameters.lr|key 'hihg'|did you mean 'high'?|choices, low, high
lr: {low: 0.2, high: 0.1} => parameters.lr|low must not exceed high|0.2|0.1
lr: {low: 0, high: 0.1} => parameters.lr.low|must be > 0|got 0
momentum: {low: 0.5, high: 1} => parameters.momentum.high|< 1|got 1
lr: {low: 1e-4, high: 0.1} => parameters.lr.low|must be a number|'1e-4'|write 0.0001
dropout: {low: 0.0, high: 0.5, log: true} => parameters.dropout.low|log is true|0.0|drop log
lr: {low: 0.1, high: 0.2, log: 1} => parameters.lr.log|true or false|got 1
lr: {low: 0.1, high: 0.5, step: 0} => parameters.lr.step|> 0|got 0
lr: {low: 0.1, high: 0.5, step: 0.3} => parameters.lr.step|multiple|0.3|change
lr: {low: 0.1, high: 0.5, step: 0.1, log: true} => parameters.lr.step|log: true|0.1|remove one
step_every: {low: 1.5, high: 4} => parameters.step_every.low|whole number|1.5
step_every: {low: 1, high: 4, step: 0.5} => parameters.step_every.step|whole number|0.5
step_every: {choices: [2, 2.5]} => parameters.step_every.choices|whole number|2.5
lr: {choices: [0.1], low: 0.1, high: 0.2} => parameters.lr|got choices and low, high|remove
dropout: {choices: [0.1], zero: true} => parameters.dropout|got choices and zero|remove
dropout: {low: 0.1, high: 0.2, zero: 1} => parameters.dropout.zero|true or false|1
dropout: {low: 0.0, high: 0.2, zero: true} => parameters.dropout.low|> 0 where zero is true|drop
lr: {low: 0.1, high: 0.2, zero: true} => parameters.lr.zero: must be > 0
lr: {choices: []} => parameters.lr.choices|at least one value|[]
lr: {choices: 0.1} => parameters.lr.choices|list|0.1
lr: {choices: [0.1, 0.10]} => parameters.lr.choices|once|0.1|remove
optimizer: {choices: [sgd, adam]} => parameters.optimizer.choices|'adam'|did you mean 'adamw'?
optimizer: {choices: [sgd, on]} => one of sgd, adamw|True|bare yes, no, on and off
nesterov: {choices: ['true', false]} => one of true, false|'true'|without quotes
optimizer: {low: sgd, high: adamw} => parameters.optimizer|needs choices|{choices: [sgd, adamw]}
lr: 0.1 => parameters|nothing to search|low: 0.0
"""

# Conditions on momentum, which follows optimizer, nesterov and dropout and precedes schedule.
BAD_CONDITIONS = """
sgd => must be a mapping|{optimizer: sgd}|'sgd'
 => must be a mapping|None
{optimiser: sgd} => unknown hyperparameter 'optimiser'|did you mean 'optimizer'?
{optimizer: sdg} => .optimizer: must be one of sgd, adamw|did you mean 'sgd'?
{optimizer: []} => .optimizer: must be a value or a list|empty
{schedule: cosine} => .schedule:|earlier|schedule comes later|put it before
{rotation: 1} => .rotation:|earlier|rotation is not in this space
{momentum: 0.9} => .momentum:|cannot depend on itself
{dropout: 0.1} => .dropout:|choices or a constant|dropout has low and high
{scale: 0.3} => .scale:|scale can take|got 0.3|scale takes 0.1
{ema_decay: [0.0, 0.9]} => .ema_decay:|can take|got 0.9|takes 0.0, 0.99
{optimizer: adamw, nesterov: true} => can never hold|optimizer, nesterov|change
"""
CONDITIONS = """
parameters:
  scale: 0.1
  ema_decay: {choices: [0.0, 0.99]}
  optimizer: {choices: [sgd, adamw]}
  nesterov: {choices: [true, false], when: {optimizer: sgd}}
  dropout: {low: 0.0, high: 0.1}
  momentum:
    low: 0.5
    high: 0.9
    when: %s
  schedule: {choices: [cosine, constant]}
"""

# Momentum where nesterov can be true.
BAD_MOMENTUM = """
0 => parameters.momentum: must be > 0 wherever nesterov can be true
{low: 0.0, high: 0.9, when: {nesterov: [false, true]}} => parameters.momentum: must be > 0
{low: 0.0, high: 0.9, when: {optimizer: sgd}} => parameters.momentum: must be > 0
"""
NESTEROV = """
parameters:
  optimizer: {choices: [sgd, adamw]}
  nesterov: {choices: [true, false]}
  momentum: %s
"""

# Start lists of THOROUGH; peak_position has a condition whose parameter has one.
BAD_STARTS = """
{lr: 0.1} => start:|must be a list|{'lr': 0.1}
 => start:|must be a list|None
[{}] => start[1]:|must be a mapping|{}
[{lr: 0.1}, {momentom: 0.9}] => start[2]:|hyperparameter 'momentom'|did you mean 'momentum'?
[{rotation: 8}] => start[1].rotation|rotation is not in this space|searched are
[{label_smoothing: 0.1}] => start[1].label_smoothing|is a constant|leave it out
[{lr: 0.5}] => start[1].lr|from low 0.001 to high 0.1|got 0.5|parameters.lr
[{step_every: 3}] => start[1].step_every|2 plus a multiple of step 2|got 3
[{optimizer: adam}] => start[1].optimizer|one of sgd, adamw|did you mean 'adamw'?
[{optimizer: adamw, momentum: 0.9}] => start[1].momentum|active when optimizer is sgd|leave
[{peak_position: 0.2, optimizer: adamw}] => start[1].peak_position|active when optimizer is sgd
"""

# Whole files, a line break in one written as a semicolon.
BAD_FILES = r"""
 => must be a mapping|None
- lr => must be a mapping|['lr']
epochs: 20 => parameters|must be a mapping|None
parameters: {} => parameters|must be a mapping|{}
epoch: 3 => top level|unknown key 'epoch'|did you mean 'epochs'?|batch_size
batch_size: 1;parameters: {lr: 0.1} => batch_size|>= 2|got 1
batch_size: 128;parameters: {batch_size: {choices: [64]}} => top level and in parameters|remove
epochs: 0;parameters: {dropout: {low: 0, high: 0.5}} => epochs|from 1 to 1000|got 0
epochs: 2.5;parameters: {dropout: {low: 0, high: 0.5}} => epochs|from 1 to 1000|got 2.5
epochs: yes;parameters: {dropout: {low: 0, high: 0.5}} => epochs|from 1 to 1000|got True
parameters: {nesterov: true, momentum: {low: 0.0, high: 0.9}} => momentum: must be > 0
parameters: {nesterov: true, momentum: 0.0, lr: {low: 0.1, high: 0.2}} => momentum: must be > 0
parameters:;TABlr: 0.1 => line 2, column 1|YAML|\t
a: 1;---;b: 1 => line 2|YAML|another document
parameters:;  lr: 1;  lr: 2 => line 3, column 3|'lr'|given twice
lr: !!python/name:os.system => line 1|YAML|could not determine a constructor
lr: 2024-99-99 => YAML|month
? [a];: b => line 1|YAML|unhashable
NUL => YAML|UTF-8
lr: BINARY => not YAML|save it as UTF-8 text
DEEP => YAML|recursion
"""
NOT_TYPED = {"TAB": "\t", "NUL": "\x00", "BINARY": "\udcff\udcfe", "DEEP": "[" * 10_000}


def bad_files() -> Iterator[Any]:
    """Every file of the tables, with what the message must hold."""
    for table, template in (
        (BAD_PARAMETERS, "parameters:\n  %s\n"),
        (BAD_CONDITIONS, CONDITIONS),
        (BAD_MOMENTUM, NESTEROV),
        (BAD_STARTS, re.sub(r"start:.*", "start: %s", THOROUGH, flags=re.DOTALL)),
        (BAD_FILES, "%s"),
    ):
        for line in table.strip("\n").splitlines():
            text, parts = line.split(" => ")
            for name, meant in NOT_TYPED.items():
                text = text.replace(name, meant)
            text = template % (text.replace(";", "\n") if table is BAD_FILES else text)
            yield pytest.param(text, parts.split("|"), id=line)


def space_of(text: str) -> SearchSpace:
    return SearchSpace.from_dict(yaml.safe_load(text), name="test", source="test.yaml")


@pytest.mark.parametrize(("text", "parts"), list(bad_files()))
def test_a_bad_file_is_refused_with_place_rule_value_and_way_out(
    text: str, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SearchSpaceError) as caught:
        load_space(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


UNKNOWN = r".*did you mean 'default'\?.*known are default, quick, refined, sgd"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/", "cannot be read: Is a directory"),
        ("a" * 5000, "cannot be read: File name too long"),
        ("", "no space has this name"),
        *((name, f"'{name}'{UNKNOWN}") for name in ("defualt", "defualt.yaml", "x/default.yaml")),
    ],
)
def test_a_name_without_a_file_is_refused_with_a_suggestion_and_the_list(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SearchSpaceError, match=rf"^[^\n]*{words}[^\n]*$"):
        load_space(name)


@pytest.mark.parametrize(
    "parameters",
    [
        "{nesterov: true, momentum: {low: 0.1, high: 0.9}}",
        "{nesterov: {choices: [true, false]}}",
        "{nesterov: false, momentum: {low: 0.0, high: 0.9}}",
        "{nesterov: {choices: [true, false]}, "
        "momentum: {low: 0.0, high: 0.9, when: {nesterov: false}}}",
        "{momentum: {choices: [0.0, 0.9]}, "
        "nesterov: {choices: [true, false], when: {momentum: 0.9}}}",
    ],
)
def test_nesterov_is_allowed_where_momentum_cannot_be_0(parameters: str) -> None:
    space = space_of(f"parameters: {parameters}")
    for trial in sample_trials(space, RandomSampler(seed=0), 20):
        space.config(trial.params)


def test_a_constant_may_be_a_parent() -> None:
    space = space_of(
        "parameters: {schedule: step, step_every: {low: 1, high: 3, when: {schedule: step}}}"
    )
    values = space.sample(optuna.trial.FixedTrial({"step_every": 3}))
    assert values == {"batch_size": 128, "schedule": "step", "step_every": 3}


def test_a_merged_key_may_be_overridden_and_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "parameters:\n"
        "  dropout: &fraction {low: 0.0, high: 0.3}\n"
        "  shift: {<<: *fraction, high: 0.2}\n"
    )
    space = load_space(str(path))
    assert space.parameters["shift"].distribution == FloatDistribution(0.0, 0.2)
    assert (space.epochs, space.constants, space.start) == (20, {"batch_size": 128}, [])


def test_the_batch_size_can_be_searched() -> None:
    space = space_of("parameters: {batch_size: {choices: [64, 256]}}")
    assert space.constants == {}
    assert space.baseline() == TrainConfig()
    assert space.frozen_params(space.baseline()) is None
    assert SearchSpace.from_dict(space.as_dict(), "test", "test.yaml") == space


@pytest.mark.parametrize("name", NAMES)
def test_a_space_of_the_project_holds_to_its_promises(name: str) -> None:
    assert available_spaces() == NAMES
    space = load_space(name)
    assert space.name == name
    assert load_space(space.source) == space
    assert Path(space.source).read_text().startswith("# ")
    assert space.constants["batch_size"] == 128
    assert space.epochs <= 20
    assert space.baseline() == TrainConfig()
    # Where the baseline can be expressed, it teaches the sampler.
    assert (space.frozen_params(space.baseline()) is None) == (name == "refined")


def test_sgd_searches_three_and_default_everything_but_the_fixed_and_the_betas() -> None:
    assert set(load_space("sgd").parameters) == {"lr", "momentum", "dropout"}
    space = load_space("default")
    left_out = set(TrainConfig().as_dict()) - set(space.parameters)
    assert left_out == {"batch_size", "beta1", "beta2", "elastic", "ema_decay"}
    conditional = {name for name, parameter in space.parameters.items() if parameter.when}
    assert conditional == {"momentum", "nesterov", "step_every", "step_factor", "peak_position"}
    for point in space.start:  # complete: nothing of a known good point is left to chance
        params, _ = space.frozen_params(space.config(point)) or ({}, {})
        assert params == space.params(point)


def test_default_can_reach_what_was_confirmed() -> None:
    space = load_space("default")
    baseline, winner = read_asked(RunFolder(RESULTS / "confirmed/confirm")).configurations
    for candidate, is_zero in ((baseline, True), (winner, False)):
        params, _ = space.frozen_params(candidate.config) or ({}, {})
        assert params["weight_decay_is_zero"] == is_zero
        assert ("weight_decay" in params) != is_zero


def test_an_installed_package_holds_the_spaces_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tune_mnist"
    monkeypatch.setattr(space_file, "_PACKAGE", package)
    assert space_file.spaces_folder() == tmp_path / "search_spaces"
    (package / "search_spaces").mkdir(parents=True)
    assert space_file.spaces_folder() == package / "search_spaces"


@pytest.fixture(params=[*NAMES, "thorough"])
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return space_of(THOROUGH) if request.param == "thorough" else load_space(request.param)


def test_a_space_survives_plain_data_and_yaml(space: SearchSpace) -> None:
    data = yaml.safe_load(yaml.safe_dump(space.as_dict(), sort_keys=False))
    read = SearchSpace.from_dict(data, space.name, space.source)
    assert read == space
    assert list(read.parameters) == list(space.parameters)


def sample_trials(
    space: SearchSpace, sampler: BaseSampler, count: int
) -> list[optuna.trial.FrozenTrial]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    for point in space.start:
        study.enqueue_trial(space.params(point))
    for number in range(count):
        trial = study.ask()
        values = space.sample(trial)
        assert TrainConfig.from_mapping(values) == space.config(trial.params)
        searched = {name: value for name, value in values.items() if name in space.parameters}
        assert space.params(searched) == trial.params
        study.tell(trial, number % 7)
    return study.trials


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samples_respect_conditions_and_can_be_turned_back_into_trials(space: SearchSpace) -> None:
    tpe = TPESampler(multivariate=True, group=True, constant_liar=True, n_startup_trials=5, seed=1)
    trials = sample_trials(space, tpe, 25) + sample_trials(space, RandomSampler(seed=1), 200)
    for trial in trials:
        values = {**space.constants, **trial.params}
        for parameter in space.parameters.values():
            holds = all(values.get(parent) in ok for parent, ok in parameter.when.items())
            first = parameter.switch if parameter.or_zero else parameter.name
            assert (first in trial.params) == holds
        assert space.frozen_params(space.config(trial.params)) == (
            trial.params,
            trial.distributions,
        )
    for trial, point in zip(trials, space.start, strict=False):
        named = {key: value for key, value in space.params(point).items() if key in trial.params}
        assert {key: trial.params[key] for key in named} == named


THOROUGH_CONFIG: dict[str, Any] = {
    "batch_size": 64,
    "label_smoothing": 0.1,
    "lr": 0.05,
    "momentum": 0.7,
    "schedule": "step",
    "step_every": 6,
    "step_factor": 0.5,
    "dropout": 0.2,
}


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.5},  # outside the bounds
        {"momentum": 0.75},  # off the grid
        {"step_factor": 0.2},  # no choice
        {"step_factor": 0.1},  # makes dropout inactive, which is not at its default
        {"batch_size": 128},  # another constant
        {"weight_decay": 0.0005},  # inactive, not at its default
        {"rotation": 5.0},  # not in the space
    ],
)
def test_frozen_params_say_what_the_space_cannot_express(change: dict[str, Any]) -> None:
    space = space_of(THOROUGH)
    params, distributions = space.frozen_params(TrainConfig(**THOROUGH_CONFIG)) or ({}, {})
    assert params["dropout"] == 0.2
    assert set(params) == set(distributions)
    assert space.frozen_params(TrainConfig(**{**THOROUGH_CONFIG, **change})) is None


def test_weights_averaged_otherwise_are_no_other_training() -> None:
    space = space_of("parameters: {lr: {low: 0.001, high: 0.1}, ema_decay: 0.99, rotation: 5}")
    config = TrainConfig(lr=0.02, rotation=5.0)
    assert (space.frozen_params(config) or ({}, {}))[0] == {"lr": 0.02}
    assert space.frozen_params(TrainConfig(lr=0.02)) is None
