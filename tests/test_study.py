import copy
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.epochs import epoch_metrics

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.space import load_space
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.study import SamplerSettings, Study
from tune_mnist.tuning.study_file import facts

SPACE = load_space("default")
EPOCHS = 9


def new_study(seed: int = 0, startup_trials: int = 10) -> Study:
    return Study(SamplerSettings(seed, startup_trials), "val_accuracy", None)


def ask(study: Study, number: int, **fixed: Any) -> dict[str, Any]:
    return study.ask(number, SPACE.sample, fixed, {"ray_trial_id": f"ray{number}"})


def rules(**changes: Any) -> Rules:
    asked: dict[str, Any] = {
        "space": SPACE, "metric": "val_accuracy", "trials": 1000, "epochs": EPOCHS,
        "time_budget": float("inf"), "grace_epochs": 1, "reduction_factor": 3.0,
        "startup_trials": 8, "seed": 5,
    }  # fmt: skip
    return Rules(**asked | changes)


def open_experiment(folder: RunFolder, rules: Rules) -> Experiment:
    history = History.load(folder)
    history.open_session({})
    study = Study(SamplerSettings(rules.seed, rules.startup_trials), rules.metric, None)
    return Experiment(rules, history, study, Checkpoints(folder))


def advance(experiment: Experiment, number: int, generator: random.Random) -> bool:
    """Let a trial train an epoch, diverge or fail, and return whether it goes on."""
    fate = generator.random()
    if fate < 0.03:
        experiment.fail(number, "the worker died")
        return False
    epoch = experiment.history.trials[number].epochs + 1
    metrics = epoch_metrics(epoch, generator.random() if fate >= 0.1 else math.nan)
    if experiment.report(number, metrics, b"state", None):
        experiment.finish(number)
        return False
    return True


def run_beside(experiment: Experiment, trials: int, at_once: int) -> Iterator[int]:
    """Run an experiment with several trials at once and yield before each new one."""
    generator = random.Random(at_once)
    live: list[int] = []
    for number in range(trials):
        yield number
        live.append(experiment.next_trial(f"ray{number}").number)
        while len(live) >= at_once:
            chosen = generator.choice(live)
            if not advance(experiment, chosen, generator):
                live.remove(chosen)


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_resumed_search_proposes_what_the_unbroken_one_does(
    tmp_path: Path, at_once: int
) -> None:
    """With conditional parameters, start points, and trials of all ends or still running."""
    folder = RunFolder.create(tmp_path / "run")
    unbroken = open_experiment(folder, rules())
    expected: dict[int, TrainConfig] = {}
    for number in run_beside(unbroken, trials=70, at_once=at_once):
        if number % 6 == 2 or number > 62:
            copied = Path(shutil.copytree(folder.path, tmp_path / f"copy{number}"))
            resumed = open_experiment(RunFolder(copied), rules())
            for record in resumed.history.unfinished():
                assert resumed.next_trial("again").number == record.number
            assert resumed.next_trial("new").number == number
            expected[number] = resumed.history.trials[number].config
    for number, config in expected.items():
        assert unbroken.history.trials[number].config == config
    states = {record.state for record in unbroken.history.trials.values()}
    assert states >= {"complete", "stopped", "diverged", "failed"}
    assert ("running" in states) == (at_once > 1)


def test_a_study_built_again_equals_the_live_one(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    live = open_experiment(folder, rules())
    for _ in run_beside(live, trials=40, at_once=4):
        pass
    resumed = open_experiment(RunFolder(folder.path), rules())
    for one, other in zip(live._study.trials(), resumed._study.trials(), strict=True):
        assert facts(one) == facts(other)
        assert one.number == other.number


def test_what_the_sampler_notes_for_its_peers_is_not_kept() -> None:
    study = new_study(startup_trials=2)
    for number in range(6):
        ask(study, number)
        if number < 4:
            study.report(number, 1, 0.1 * number)
            study.tell(number, TrialState.PRUNED, {})
    assert all(not trial.system_attrs for trial in study.trials())


def test_proposals_depend_on_the_seed_and_the_number_alone() -> None:
    def proposals(seed: int) -> list[dict[str, Any]]:
        study = new_study(seed)
        return [ask(study, number) for number in range(6)]

    random.seed(1)
    first = proposals(0)
    random.seed(2)
    assert proposals(0) == first
    assert proposals(1) != first
    assert len({str(config) for config in first}) == 6


def test_a_start_point_is_taken_as_it_is_and_what_it_leaves_out_is_sampled() -> None:
    study = new_study()
    point = {"optimizer": "sgd", "lr": 0.05, "dropout": 0.02}
    sampled = ask(study, 0, **point)
    assert sampled.items() >= point.items()
    assert sampled.items() >= study.trials()[0].params.items() > point.items()
    assert ask(study, 1) != sampled


def test_each_end_is_told_as_what_it_was() -> None:
    study = new_study()
    for number in range(4):
        ask(study, number)
    for epoch, value in ((1, 0.9), (2, 0.8), (10, 0.7)):
        for number in (0, 1):
            study.report(number, epoch, value)
    study.tell(0, TrialState.COMPLETE, {"state": "complete", "reason": ""})
    study.tell(1, TrialState.PRUNED, {"state": "stopped", "reason": "poor"})
    study.tell(2, TrialState.FAIL, {"state": "failed", "reason": "died"})
    trials = study.trials()
    assert [(trial.state, trial.value) for trial in trials] == [
        (TrialState.COMPLETE, 0.7),
        (TrialState.PRUNED, 0.7),
        (TrialState.FAIL, None),
        (TrialState.RUNNING, None),
    ]
    assert trials[1].intermediate_values == {1: 0.9, 2: 0.8, 10: 0.7}
    assert trials[1].user_attrs == {"ray_trial_id": "ray1", "state": "stopped", "reason": "poor"}
    assert study.close() is None
    assert [trial.state for trial in study.trials()][3] == TrialState.WAITING


def template(number: int, state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    trial = create_trial(state=state, values=[0.5] if state == TrialState.COMPLETE else None)
    trial.number = number
    return trial


def test_a_trial_taken_over_goes_on() -> None:
    study = new_study()
    study.add(template(0, TrialState.COMPLETE))
    study.add(template(1))
    study.report(1, 1, 0.25)
    study.tell(1, TrialState.PRUNED, {})
    assert study.trials()[1].value == 0.25
    assert ask(study, 2)


def test_numbers_are_the_searchs_own_or_an_error() -> None:
    study = new_study()
    with pytest.raises(RuntimeError, match="Optuna numbers trial 3 as 0"):
        study.add(template(3))
    with pytest.raises(RuntimeError, match="Optuna numbered trial 7 as 0"):
        ask(study, 7)


def test_a_trial_once_handed_out_never_changes() -> None:
    """The mirror's thread reads trials while the search goes on."""
    study = new_study()
    ask(study, 0)
    before = study.trials()[0]
    copied = copy.deepcopy(before)
    study.report(0, 1, 0.5)
    study.tell(0, TrialState.COMPLETE, {"state": "complete"})
    assert before == copied


def test_asking_uses_nothing_deprecated(recwarn: pytest.WarningsRecorder) -> None:
    ask(new_study(), 0)
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]
