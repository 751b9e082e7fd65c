"""A search without Ray: a test reports its epochs, and resumes it from its files."""

from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from support.epochs import epoch_metrics
from support.scripted import curve, model_of
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.space import load_space
from tune_mnist.tuning.experiment import Experiment, Rules
from tune_mnist.tuning.study import Study
from tune_mnist.tuning.study_file import StudyFile


def new_rules(space: str = "sgd", **options: Any) -> Rules:
    """The rules of a search: up to 20 trials of at most 9 epochs unless told."""
    return Rules(space=load_space(space), **{"trials": 20, "epochs": 9, **options})


class Course:
    """A search that a test starts in a folder, or resumes from what lies there.

    Each of its epochs takes a second.
    """

    def __init__(self, path: Path, *, has_file: bool = False, **rules: Any) -> None:
        self.path, self._has_file = path, has_file
        self.rules = new_rules(**{"startup_trials": 5, **rules})
        self.now = 0.0
        if not path.exists():
            RunFolder.create(path)
        self.history = History(RunFolder(path))
        self.again()

    def again(self) -> None:
        """Resume from the files, as after a kill."""
        self.history.close()
        self.folder = RunFolder(self.path)
        self.history = History.load(self.folder)
        try:
            self.history.reopen_hopeless()
            self.history.open_session({})
        except BaseException:
            self.history.close()  # as the end of a process does
            raise
        file = StudyFile(self.folder.study, self.rules.metric) if self._has_file else None
        self.study = Study(self.rules, file)
        self.checkpoints = Checkpoints(self.folder)
        self.experiment = Experiment(
            self.rules, self.history, self.study, self.checkpoints, clock=lambda: self.now
        )

    def start(self) -> int:
        number = self.experiment.next_trial("ray").number
        assert self.history.trials[number].state == "running"
        return number

    def epoch(self, number: int, val: float, test: float | None = None, **values: Any) -> bool:
        """Report a trial's next epoch and return whether it is told to stop."""
        epoch = self.history.trials[number].epochs + 1
        metrics = epoch_metrics(epoch, val, test, **values)
        self.now += 1
        model = model_of(number, epoch)
        return self.experiment.report(number, metrics, f"after {epoch}".encode(), model)

    def trial(self, *accuracies: float) -> int:
        number = self.start()
        for accuracy in accuracies:
            if self.epoch(number, accuracy):
                self.experiment.finish(number)
                return number
        raise AssertionError(f"trial {number} was not told to stop")

    def run(self, until: int) -> None:
        """Run trials on the scripted curve, one at a time, until so many have been started."""
        experiment, history = self.experiment, self.history
        while experiment.has_next and (len(history.trials) < until or history.unfinished()):
            number = experiment.next_trial("ray").number
            record = history.trials[number]
            while not self.epoch(number, curve(record.config, record.epochs + 1)):
                pass
            experiment.finish(number)

    def optuna(self, number: int) -> FrozenTrial:
        return self.study.trials()[number]
