"""Optuna alone: in threads of one process, or in processes that share a storage.

The second argument says which: `threads` or `processes`.
"""

import multiprocessing
import sys
from pathlib import Path

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from tune_mnist.benchmarks.peer_task import REDUCTION_FACTOR, Task, note_epoch, suggest


def objective(task: Task, trial: optuna.Trial) -> float:
    """Train one trial."""
    from tune_mnist.benchmarks.peer_training import train_textbook

    searched, constants = task.searched()
    values = {**constants, **dict(suggest(searched, trial))}
    accuracy = 0.0
    for epoch, accuracy in enumerate(train_textbook(task, values), start=1):
        note_epoch(task.folder, trial.number, accuracy)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def pruner() -> SuccessiveHalvingPruner:
    """Build the pruner that is Optuna's ASHA."""
    return SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION_FACTOR)


def search_in_threads(task: Task) -> None:
    """As `study.optimize(n_jobs=...)`."""
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=task.seed),
        pruner=pruner(),
    )
    study.optimize(lambda trial: objective(task, trial), n_trials=task.trials, n_jobs=task.at_once)


def search_in_processes(task: Task) -> None:
    """As in the tutorial on parallel optimization: one study in a journal file, n processes."""
    context = multiprocessing.get_context("spawn")
    create(task)
    processes = [context.Process(target=work, args=(task, i)) for i in range(task.at_once)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            sys.exit(1)


def storage(task: Task) -> JournalStorage:
    """Open the file that the processes share."""
    return JournalStorage(JournalFileBackend(str(Path(task.folder) / "journal.log")))


def create(task: Task) -> None:
    """Make the study."""
    optuna.create_study(study_name="peer", storage=storage(task), direction="maximize")


def work(task: Task, number: int) -> None:
    """Run trials of the study until there are enough."""
    study = optuna.load_study(
        study_name="peer",
        storage=storage(task),
        sampler=optuna.samplers.TPESampler(seed=task.seed + number),
        pruner=pruner(),
    )
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    enough = MaxTrialsCallback(task.trials, states=states)
    study.optimize(lambda trial: objective(task, trial), callbacks=[enough])


if __name__ == "__main__":
    from tune_mnist.benchmarks import peer_optuna

    given = Task.read(sys.argv[1])
    if sys.argv[2] == "threads":
        peer_optuna.search_in_threads(given)
    else:
        peer_optuna.search_in_processes(given)
