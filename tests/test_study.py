import copy
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.course import Course
from support.epochs import epoch_metrics

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.space import load_space
from tune_mnist.tuning import study as module
from tune_mnist.tuning.experiment import Experiment
from tune_mnist.tuning.settings import SearchOptions
from tune_mnist.tuning.study import MODELLED, ModelTrials, Study

SPACE = load_space("default")


def new_study(seed: int = 0, startup_trials: int = 10) -> Study:
    return Study(SearchOptions(seed=seed, startup_trials=startup_trials), None)


def ask(study: Study, number: int, **fixed: Any) -> dict[str, Any]:
    return study.ask(number, SPACE.sample, fixed, {"ray_trial_id": f"ray{number}"})


def conditional_search(path: Path) -> Course:
    rules: dict[str, Any] = {"trials": 1000, "reduction_factor": 3.0, "startup_trials": 8}
    return Course(path, space="default", seed=5, **rules)


def advance(experiment: Experiment, number: int, generator: random.Random) -> bool:
    """Let a trial train an epoch, diverge or fail, and return True if it continues."""
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
    course = conditional_search(tmp_path / "run")
    unbroken = course.experiment
    expected: dict[int, TrainConfig] = {}
    for number in run_beside(unbroken, trials=50, at_once=at_once):
        if number % 9 == 2 or number > 45:
            copied = Path(shutil.copytree(course.path, tmp_path / f"copy{number}"))
            resumed = conditional_search(copied).experiment
            for record in resumed.history.unfinished():
                assert resumed.next_trial("again").number == record.number
            assert resumed.next_trial("new").number == number
            expected[number] = resumed.history.trials[number].config
    for number, config in expected.items():
        assert unbroken.history.trials[number].config == config
    states = {record.state for record in unbroken.history.trials.values()}
    assert states >= {"complete", "stopped", "diverged", "failed"}
    assert ("running" in states) == (at_once > 1)


def test_what_the_sampler_stores_for_its_peers_is_not_kept() -> None:
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
    params = study.trials()[0].params
    assert params.items() > point.items()
    assert SPACE.config(params) == SPACE.config(sampled)
    assert ask(study, 1) != sampled


def test_numbers_are_the_searchs_own_or_an_error() -> None:
    study, trial = new_study(), create_trial(state=TrialState.RUNNING)
    trial.number = 3
    with pytest.raises(RuntimeError, match="Optuna numbers trial 3 as 0"):
        study.add(trial)
    with pytest.raises(RuntimeError, match="Optuna numbered trial 7 as 0"):
        ask(study, 7)


def test_a_trial_once_handed_out_never_changes() -> None:
    """The thread that writes study.db reads trials while the search runs."""
    study = new_study()
    ask(study, 0)
    before = study.trials()[0]
    copied = copy.deepcopy(before)
    study.report(0, 1, 0.5)
    study.tell(0, TrialState.COMPLETE, {"state": "complete"})
    assert before == copied


@pytest.mark.filterwarnings("error:.*deprecated")
def test_asking_uses_nothing_deprecated() -> None:
    ask(new_study(), 0)


LITTLE = load_space("sgd")


def run_trials(study: Study, count: int) -> list[dict[str, object]]:
    generator = random.Random(1)
    proposals = []
    for number in range(len(study.trials()), len(study.trials()) + count):
        proposals.append(study.ask(number, LITTLE.sample, {}, {}))
        for epoch in range(1, 2 + number % 3):
            study.report(number, epoch, generator.random())
        study.tell(number, (TrialState.COMPLETE, TrialState.PRUNED)[number % 2], {})
    return proposals


def shown(study: Study) -> list[FrozenTrial]:
    with study._storage.serving_sampler():
        return study.trials()


def numbers(trials: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the sampler see at most ten ended trials, and of these at least the four best."""
    monkeypatch.setattr(module, "MODELLED", 10)
    monkeypatch.setattr(module, "MODELLED_BEST", 4)


def test_the_sampler_sees_everything_in_a_search_of_usual_size() -> None:
    study = new_study(startup_trials=5)
    run_trials(study, 30)
    assert MODELLED >= 250  # TPE takes a tenth of them for good ones, 25 at most
    assert shown(study) == study.trials()


@pytest.mark.usefixtures("few")
def test_the_sampler_sees_the_best_the_latest_and_what_runs() -> None:
    study = new_study(startup_trials=5)
    run_trials(study, 40)
    study.ask(40, LITTLE.sample, {}, {})
    early = study.trials()[:34]
    complete = [trial for trial in early if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: trial.value or 0.0)[-4:]
    assert numbers(shown(study)) == [*sorted(numbers(best)), *range(34, 41)]


def test_trials_that_were_stopped_rank_by_how_far_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MODELLED", 3)
    monkeypatch.setattr(module, "MODELLED_BEST", 2)
    chosen = ModelTrials()
    for number, (step, value) in enumerate(((1, 0.9), (3, 0.7), (3, 0.8), (1, 0.1), (1, 0.1))):
        trial = create_trial(state=TrialState.PRUNED, value=0.5, intermediate_values={step: value})
        trial.number = number
        chosen.update(trial)
    assert chosen.numbers == [1, 2, 4]


@pytest.mark.usefixtures("few")
def test_the_order_in_which_trials_end_does_not_matter() -> None:
    study = new_study(startup_trials=5)
    run_trials(study, 60)
    ended = study.trials()
    expected = numbers(shown(study))
    for seed in range(20):
        random.Random(seed).shuffle(ended)
        chosen = ModelTrials()
        for trial in ended:
            chosen.update(trial)
        assert chosen.numbers == expected


@pytest.mark.usefixtures("few")
def test_proposals_continue_and_do_not_depend_on_a_resume() -> None:
    whole = new_study(startup_trials=5)
    proposals = run_trials(whole, 40)
    assert len({repr(proposal) for proposal in proposals}) == 40
    resumed = new_study(startup_trials=5)
    for trial in whole.trials():
        resumed.add(trial)
    following = [each.ask(40, LITTLE.sample, {}, {}) for each in (whole, resumed)]
    assert following[0] == following[1]
    assert len(whole.trials()) == 41
