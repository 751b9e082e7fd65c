"""What the sampler is shown of a long search."""

import random
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.runs.space import load_space
from tune_mnist.tuning import study as model_trials
from tune_mnist.tuning.study import MODELLED, ModelTrials, SamplerSettings, Study

SPACE = load_space("sgd")


def run_trials(study: Study, count: int) -> list[dict[str, object]]:
    generator = random.Random(1)
    proposals = []
    for number in range(len(study.trials()), len(study.trials()) + count):
        proposals.append(study.ask(number, SPACE.sample, {}, {}))
        for epoch in range(1, 2 + number % 3):
            study.report(number, epoch, generator.random())
        study.tell(number, (TrialState.COMPLETE, TrialState.PRUNED)[number % 2], {})
    return proposals


def new_study() -> Study:
    return Study(SamplerSettings(0, 5), "val_accuracy", None)


def shown(study: Study) -> list[FrozenTrial]:
    with study._storage.serving_sampler():
        return study.trials()


def numbers(trials: list[FrozenTrial]) -> list[int]:
    return [trial.number for trial in trials]


def shrink(monkeypatch: pytest.MonkeyPatch, modelled: int, best: int) -> None:
    monkeypatch.setattr(model_trials, "MODELLED", modelled)
    monkeypatch.setattr(model_trials, "MODELLED_BEST", best)


def test_the_sampler_sees_everything_in_a_search_of_usual_size() -> None:
    study = new_study()
    run_trials(study, 30)
    assert MODELLED >= 250  # TPE takes a tenth of them for good ones, 25 at most
    assert shown(study) == study.trials()


def test_the_sampler_sees_the_best_the_latest_and_what_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink(monkeypatch, 10, 4)
    study = new_study()
    run_trials(study, 40)
    study.ask(40, SPACE.sample, {}, {})
    early = study.trials()[:34]
    complete = [trial for trial in early if trial.state == TrialState.COMPLETE]
    best = sorted(complete, key=lambda trial: trial.value or 0.0)[-4:]
    assert numbers(shown(study)) == [*sorted(numbers(best)), *range(34, 41)]


def test_trials_that_were_stopped_rank_by_how_far_they_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template: dict[str, Any] = {
        "params": {},
        "distributions": {},
        "state": TrialState.PRUNED,
        "value": 0.5,
    }
    trials = [
        optuna.trial.create_trial(**template, intermediate_values={step: value})
        for step, value in ((1, 0.9), (3, 0.7), (3, 0.8), (1, 0.1), (1, 0.1))
    ]
    shrink(monkeypatch, 3, 2)
    chosen = ModelTrials()
    for number, trial in enumerate(trials):
        trial.number = number
        chosen.end(trial)
    assert chosen.numbers == [1, 2, 4]


def test_the_order_in_which_trials_end_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 12, 4)
    study = new_study()
    run_trials(study, 60)
    ended = study.trials()
    expected = numbers(shown(study))
    for seed in range(20):
        random.Random(seed).shuffle(ended)
        chosen = ModelTrials()
        for trial in ended:
            chosen.begin(trial.number)
        for trial in ended:
            chosen.end(trial)
        assert chosen.numbers == expected


def test_proposals_go_on_and_do_not_depend_on_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 12, 4)
    whole = new_study()
    proposals = run_trials(whole, 40)
    assert len({repr(proposal) for proposal in proposals}) == 40
    resumed = new_study()
    for trial in whole.trials():
        resumed.add(trial)
    following = [each.ask(40, SPACE.sample, {}, {}) for each in (whole, resumed)]
    assert following[0] == following[1]
    assert len(whole.trials()) == 41
