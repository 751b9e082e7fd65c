"""Syne Tune's local backend with ASHA, as its README shows it; run twice over.

With a task alone it is the tuner. Started by that tuner, with `--NAME VALUE` for each parameter
and the task among them, it is one trial.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tune_mnist.benchmarks.peer_task import REDUCTION_FACTOR, Task, note_epoch
from tune_mnist.mnist.config import choices_of, is_integer
from tune_mnist.runs.parameter import Distribution


def domain(distribution: Distribution) -> Any:
    """Return Syne Tune's word for a distribution."""
    words = import_module("syne_tune.config_space")
    match distribution:
        case CategoricalDistribution(choices=choices):
            return words.choice(list(choices))
        case IntDistribution(low=low, high=high, log=log):
            return (words.lograndint if log else words.randint)(low, high)
        case FloatDistribution(low=low, high=high, log=log):
            return (words.loguniform if log else words.uniform)(low, high)


def main() -> None:
    """Search."""
    syne_tune = import_module("syne_tune")
    baselines = import_module("syne_tune.optimizer.baselines")
    backend = import_module("syne_tune.backend")
    task = Task.read(sys.argv[1])
    searched, constants = task.searched()
    space = {name: domain(distribution) for name, distribution in searched.items()}
    tuner = syne_tune.Tuner(
        trial_backend=backend.LocalBackend(entry_point=__file__),
        scheduler=baselines.ASHA(
            config_space={**space, **constants, "task": sys.argv[1]},
            metric="val_accuracy",
            time_attr="epoch",
            max_t=task.epochs,
            do_minimize=False,
            random_seed=task.seed,
            reduction_factor=REDUCTION_FACTOR,
        ),
        stop_criterion=syne_tune.StoppingCriterion(max_num_trials_finished=task.trials),
        n_workers=task.at_once,
        trial_backend_path=str(Path(task.folder) / "syne_tune"),
    )
    tuner.run()


def run_trial(arguments: list[str]) -> None:
    """Train one trial."""
    from tune_mnist.benchmarks.peer_training import train_textbook

    report = import_module("syne_tune").Reporter()
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    options = {name.removeprefix("--"): value for name, value in given.items()}
    task = Task.read(options["task"])
    searched, constants = task.searched()
    values = {name: parse(name, options[name]) for name in (*searched, *constants)}
    for epoch, accuracy in enumerate(train_textbook(task, values), start=1):
        note_epoch(task.folder, "-".join(map(str, values.values())), accuracy)
        report(epoch=epoch, val_accuracy=accuracy)


def parse(name: str, text: str) -> Any:
    """Read a hyperparameter's value from the command line."""
    if choices := choices_of(name):
        return next(choice for choice in choices if str(choice) == text)
    return int(text) if is_integer(name) else float(text)


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        run_trial(sys.argv[1:])
    else:
        main()
