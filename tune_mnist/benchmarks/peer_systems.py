"""The systems that `bench peers` compares with ours, used as their own documentation shows.

    python -m tune_mnist.benchmarks.peer_systems SYSTEM TASK

runs one search of the textbook recipe: with Ray Tune's OptunaSearch and ASHAScheduler, with Optuna
alone in threads or processes, or with Syne Tune. TASK is the file of a `Task`; every trial appends
its epochs to one file. Ray and Syne Tune are imported only where they run, and torch only where a
trial trains, as in a user's script. Syne Tune starts this file itself for each trial, with
`--NAME VALUE` for each parameter.
"""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig, override
from tune_mnist.mnist.data import HOLDOUT_SHARE, choose_stratified, load_mnist
from tune_mnist.runs.parameter import Distribution
from tune_mnist.runs.space import SearchSpace, load_space

CHOSEN = ("train", "val")  # files <name>.npy: which of the 60,000 images
PROGRESS = "progress"  # file: the epochs of all trials
REDUCTION_FACTOR = 3  # of successive halving, from epoch 1 on; in every system


@dataclass(frozen=True)
class Task:
    """A search to run."""

    space: str
    trials: int
    images: int
    epochs: int
    at_once: int
    seed: int
    tests: bool  # after every epoch on the test images too, not only on the validation images
    data_dir: str
    folder: str  # for progress, and whatever the system writes

    @property
    def file(self) -> str:
        return str(Path(self.folder) / "task.json")

    @classmethod
    def read(cls, file: str) -> Self:
        return cls(**json.loads(Path(file).read_text("utf-8")))

    def write(self) -> None:
        """Write the task and which images it trains on and validates with, as `split` does."""
        Path(self.file).write_text(json.dumps(asdict(self)), "utf-8")
        labels = load_mnist(Path(self.data_dir)).train_labels
        val = choose_stratified(labels, len(labels) // HOLDOUT_SHARE)
        rest = np.setdiff1d(np.arange(len(labels)), val)
        train = rest[choose_stratified(labels[rest], self.images)]
        for name, indices in zip(CHOSEN, (train, val), strict=True):
            np.save(Path(self.folder) / f"{name}.npy", indices)

    def load_space(self) -> SearchSpace:
        """Return the search space, or raise ConfigError if it has conditions."""
        space = load_space(self.space)
        searched = space.parameters.items()
        if conditional := [name for name, each in searched if each.when or each.or_zero]:
            raise ConfigError(
                f"--space: {self.space} has conditions (on {', '.join(conditional)}), which not "
                "all systems can express; sgd and quick have none"
            )
        return space

    def train(self, config: TrainConfig) -> Iterator[float]:
        """Train one trial and yield its validation accuracies, each of which is recorded."""
        from tune_mnist.benchmarks.textbook import train_textbook

        folder = Path(self.folder)
        train, val = (np.load(folder / f"{name}.npy").tolist() for name in CHOSEN)
        for accuracy in train_textbook(
            config, Path(self.data_dir), train, val, epochs=self.epochs, tests=self.tests
        ):
            with (folder / PROGRESS).open("ab", buffering=0) as file:  # a line is one write
                file.write(f"{time.time()!r},{accuracy!r}\n".encode())
            yield accuracy


def read_progress(folder: Path) -> list[tuple[float, float]]:
    """Return when each epoch of a trial ended, s since 1970, and its validation accuracy."""
    path = folder / PROGRESS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [(float(ended), float(accuracy)) for ended, accuracy in csv.reader(lines)]


def domains(space: SearchSpace, words: Any, *, excluded: int) -> dict[str, Any]:
    """Return the space in the terms of `words`, the module of Ray Tune or of Syne Tune.

    `excluded` is 1 where the upper end of an integer's range does not belong to it.
    """

    def domain(distribution: Distribution) -> Any:
        match distribution:
            case CategoricalDistribution(choices=choices):
                return words.choice(list(choices))
            case IntDistribution(low=low, high=high, log=log):
                return (words.lograndint if log else words.randint)(low, high + excluded)
            case FloatDistribution(low=low, high=high, log=log):
                return (words.loguniform if log else words.uniform)(low, high)

    searched = {name: domain(each.distribution) for name, each in space.parameters.items()}
    return searched | dict(space.constants)


def train_for_ray(config: dict[str, Any]) -> None:
    """Train one trial; Tune calls this in a worker."""
    from ray import tune

    task = Task.read(config["task"])
    values = {name: value for name, value in config.items() if name != "task"}
    for accuracy in task.train(TrainConfig.from_mapping(values)):
        tune.report({"val_accuracy": accuracy})


def search_with_ray(task: Task) -> None:
    """Search with OptunaSearch, ASHAScheduler and a function that trains."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    space = domains(task.load_space(), tune, excluded=1)
    ray.init(address="local")  # by itself it would join whatever cluster this machine runs
    tune.Tuner(
        tune.with_resources(train_for_ray, {"cpu": 1}),
        param_space={**space, "task": task.file},
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=OptunaSearch(seed=task.seed),
            scheduler=ASHAScheduler(max_t=task.epochs, reduction_factor=REDUCTION_FACTOR),
            num_samples=task.trials,
            max_concurrent_trials=task.at_once,
        ),
        run_config=tune.RunConfig(storage_path=str(Path(task.folder) / "ray_results")),
    ).fit()


def objective(task: Task, space: SearchSpace, trial: optuna.Trial) -> float:
    accuracy = 0.0
    for epoch, accuracy in enumerate(task.train(space.config(space.sample(trial))), start=1):
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def make_study(task: Task, storage: JournalStorage | None, seed: int) -> optuna.Study:
    """Return the study in a storage, with TPE and the pruner that is Optuna's ASHA."""
    return optuna.create_study(
        storage=storage,
        study_name="peer",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION_FACTOR),
    )


def search_in_threads(task: Task) -> None:
    """Search with `study.optimize(n_jobs=...)`."""
    study = make_study(task, None, task.seed)
    train = partial(objective, task, task.load_space())
    study.optimize(train, n_trials=task.trials, n_jobs=task.at_once)


def search_in_processes(task: Task) -> None:
    """Search as in the tutorial on parallel optimization: one journal file, n processes."""
    with ProcessPoolExecutor(task.at_once, mp_context=get_context("spawn")) as pool:
        list(pool.map(work, [task] * task.at_once, range(task.at_once)))


def work(task: Task, number: int) -> None:
    """Run trials of the shared study until there are enough."""
    storage = JournalStorage(JournalFileBackend(str(Path(task.folder) / "journal.log")))
    study = make_study(task, storage, task.seed + number)
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    enough = MaxTrialsCallback(task.trials, states)
    study.optimize(partial(objective, task, task.load_space()), callbacks=[enough])


def search_with_syne_tune(task: Task) -> None:
    """Search with the local backend and ASHA, as Syne Tune's README does."""
    # By name: it is installed only where it is to be compared.
    syne_tune = import_module("syne_tune")
    baselines = import_module("syne_tune.optimizer.baselines")
    backend = import_module("syne_tune.backend")
    space = domains(task.load_space(), import_module("syne_tune.config_space"), excluded=0)
    syne_tune.Tuner(
        trial_backend=backend.LocalBackend(entry_point=__file__),
        scheduler=baselines.ASHA(
            config_space={**space, "task": task.file},
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
    ).run()


def train_for_syne_tune(arguments: Sequence[str]) -> None:
    """Train one trial, from the command line that Syne Tune's backend makes."""
    report = import_module("syne_tune").Reporter()
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    task = Task.read(given["--task"])
    space = task.load_space()
    texts = [f"{name}={given[f'--{name}']}" for name in (*space.parameters, *space.constants)]
    config = override(TrainConfig(), texts)
    for epoch, accuracy in enumerate(task.train(config), start=1):
        report(epoch=epoch, val_accuracy=accuracy)


SEARCHES: dict[str, Callable[[Task], None]] = {
    "ray": search_with_ray,
    "optuna_threads": search_in_threads,
    "optuna_processes": search_in_processes,
    "syne_tune": search_with_syne_tune,
}


if __name__ == "__main__":
    # Under its real name, by which workers import its functions.
    from tune_mnist.benchmarks import peer_systems

    if sys.argv[1].startswith("--"):
        peer_systems.train_for_syne_tune(sys.argv[1:])
    else:
        peer_systems.SEARCHES[sys.argv[1]](peer_systems.Task.read(sys.argv[2]))
