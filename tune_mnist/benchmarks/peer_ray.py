"""Ray Tune as its documentation shows it: OptunaSearch, ASHAScheduler, a function that trains."""

import sys
from pathlib import Path
from typing import Any

import ray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tune_mnist.benchmarks.peer_task import REDUCTION_FACTOR, Task, note_epoch
from tune_mnist.runs.parameter import Distribution


def train_mnist(config: dict[str, Any]) -> None:
    """Train one trial; Tune calls this in a worker."""
    from tune_mnist.benchmarks.peer_training import train_textbook

    task = Task.read(config["task"])
    values = {name: value for name, value in config.items() if name != "task"}
    for accuracy in train_textbook(task, values):
        note_epoch(task.folder, tune.get_context().get_trial_id(), accuracy)
        tune.report({"val_accuracy": accuracy})


def domain(distribution: Distribution) -> Any:
    """Return Tune's word for a distribution."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return tune.choice(list(choices))
        case IntDistribution(low=low, high=high, log=log):
            return (tune.lograndint if log else tune.randint)(low, high + 1)
        case FloatDistribution(low=low, high=high, log=log):
            return (tune.loguniform if log else tune.uniform)(low, high)


def main() -> None:
    """Search."""
    task = Task.read(sys.argv[1])
    searched, constants = task.searched()
    space = {name: domain(distribution) for name, distribution in searched.items()}
    ray.init(address="local")  # by itself it would join whatever cluster this machine runs
    tuner = tune.Tuner(
        tune.with_resources(train_mnist, {"cpu": 1}),
        param_space={**space, **constants, "task": sys.argv[1]},
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=OptunaSearch(seed=task.seed),
            scheduler=ASHAScheduler(
                max_t=task.epochs, grace_period=1, reduction_factor=REDUCTION_FACTOR
            ),
            num_samples=task.trials,
            max_concurrent_trials=task.at_once,
        ),
        run_config=tune.RunConfig(storage_path=str(Path(task.folder) / "ray_results")),
    )
    tuner.fit()


if __name__ == "__main__":
    from tune_mnist.benchmarks import peer_ray

    peer_ray.main()  # under its real name, by which workers import train_mnist
