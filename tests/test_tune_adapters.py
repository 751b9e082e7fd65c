"""What happens to trials that fail or hang, as Tune's callbacks report it."""

import math
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import RayActorError, RayTaskError
from support.course import Course
from support.epochs import epoch_metrics

from tune_mnist.errors import SearchFailedError, StateError
from tune_mnist.tuning.ray_patches import OUT_OF_MEMORY
from tune_mnist.tuning.tune_adapters import (
    MAX_LOSSES,
    NODE_LOST,
    ExperimentScheduler,
    ExperimentSearcher,
    SearchOverError,
    Supervisor,
    describe,
    number_of,
)


class Watched:
    """A search without Tune: its trials are what the callbacks see of them."""

    def __init__(self, path: Path, *, retries: int = 1, hang_timeout: float = math.inf) -> None:
        self.course = Course(path / "run")
        self.error_file = path / "error.txt"
        self.experiment = self.course.experiment
        self.supervisor = Supervisor(self.experiment, retries=retries, hang_timeout=hang_timeout)
        self.searcher = ExperimentSearcher(self.experiment, lambda: 2, self.supervisor.stop_all)
        self.scheduler = ExperimentScheduler(self.experiment)

    def start(self, ray_id: str = "ray") -> Any:
        """Begin the trial that the searcher suggests."""
        assignment = self.searcher.suggest(ray_id)
        trial: Any = Trial(ray_id, config=assignment, error_file=str(self.error_file))
        self.supervisor.on_trial_start(0, [], trial)
        return trial

    def fail(self, trial: Any, error: str = "why") -> None:
        self.error_file.write_text(error)
        self.supervisor.on_trial_error(0, [], trial)

    def report(self, trial: Any, accuracy: float = 0.9) -> str:
        """Report a trial's next epoch, as Tune does: the scheduler first."""
        epoch = self.course.history.trials[number_of(trial)].epochs + 1
        metrics = epoch_metrics(epoch, accuracy)
        result = {"metrics": metrics, "state": f"after {epoch}".encode(), "model": None}
        decision = self.scheduler.on_trial_result(None, trial, result)
        self.supervisor.on_trial_result(0, [], trial, result)
        assert "state" not in result  # Tune would keep it
        return decision


@dataclass(eq=False)
class Trial:
    """What the adapters see of one of Tune's trials; like those, it is a key by identity."""

    trial_id: str
    config: Any
    error_file: str
    pickled_error_file: str | None = None
    temporary_state: Any = field(default_factory=lambda: SimpleNamespace(ray_actor=None))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_trial_that_fails_is_suggested_again_before_anything_new(watched: Watched) -> None:
    first = watched.start()
    watched.start("beside")
    assert watched.searcher.suggest("x") is None  # there is room for two
    watched.report(first)
    watched.fail(first, "the worker\ndied")
    assert len(watched.experiment.running) == 1
    again = watched.start("other")
    assert number_of(again) == number_of(first)
    assert again.config["assignment"].state == b"after 1"
    record = watched.course.history.trials[0]
    assert (record.state, record.retries, record.reason) == ("running", 1, "the worker died")
    assert record.ray_id == "other"


def test_a_trial_that_fails_too_often_without_an_epoch_is_given_up(watched: Watched) -> None:
    for _ in range(4):
        trial = watched.start()
        watched.report(trial)
        watched.fail(trial)
    record = watched.course.history.trials[0]
    assert (record.state, record.epochs) == ("running", 4)  # an epoch forgives earlier failures
    watched.fail(watched.start(), "always")
    assert (record.state, record.retries, record.reason) == ("failed", 4, "always")
    assert number_of(watched.start()) == 1


def test_a_lost_node_is_not_a_failure_of_its_trial(watched: Watched) -> None:
    for _ in range(MAX_LOSSES):
        watched.fail(watched.start(), f"{NODE_LOST} (10.0.0.7)")
    record = watched.course.history.trials[0]
    assert (record.state, record.retries) == ("running", MAX_LOSSES)
    watched.fail(watched.start(), "its own")
    assert record.state == "running"
    watched.fail(watched.start(), f"{NODE_LOST} (10.0.0.7)")
    assert (record.state, record.reason) == ("failed", f"{NODE_LOST} (10.0.0.7)")


def test_the_last_running_trial_may_still_fail_and_be_suggested_again(watched: Watched) -> None:
    watched.experiment.rules = replace(watched.course.rules, trials=1)
    trial = watched.start()
    assert watched.searcher.suggest("x") is None
    watched.fail(trial)
    assert number_of(watched.start()) == 0


def test_a_trial_that_hangs_is_given_up_at_once(tmp_path: Path) -> None:
    watched = Watched(tmp_path, retries=5, hang_timeout=-1.0)
    trial = watched.start()
    watched.supervisor.on_step_end(0, [])
    watched.supervisor.on_trial_error(0, [], trial)
    record = watched.course.history.trials[0]
    assert record.state == "failed"
    assert "taken to hang" in record.reason


@pytest.mark.parametrize("trials", [2, 20])
def test_a_search_whose_every_trial_fails_at_once_is_given_up_and_resumed(
    tmp_path: Path, trials: int
) -> None:
    watched = Watched(tmp_path, retries=0)
    watched.experiment.rules = replace(watched.course.rules, trials=trials)
    tried = list(range(min(trials, 3)))
    for _ in tried:
        watched.fail(watched.start(), "no module named nothing")
    assert isinstance(watched.experiment.broken, SearchFailedError)
    assert "no module named nothing" in str(watched.experiment.broken)
    with pytest.raises(SearchOverError):
        watched.supervisor.on_step_end(0, [])
    assert watched.searcher.suggest("x") == "FINISHED"
    course = watched.course
    for _ in range(2):  # killed once, with all but the first still to be tried again
        course.again()
        assert course.start() == 0
        course.epoch(0, 0.9)
    assert [course.start() for _ in tried[1:]] == tried[1:]
    course.experiment.fail(1, "its own fault")
    course.again()
    assert course.history.trials[1].state == "failed"


def test_a_state_that_its_worker_refuses_ends_the_search_and_is_kept(watched: Watched) -> None:
    trial = watched.start()
    watched.report(trial)
    cause = StateError("the saved state is damaged")
    error = RayTaskError("run_trial", "traceback", cause)  # type: ignore[no-untyped-call]
    trial.pickled_error_file = str(watched.error_file.with_suffix(".pkl"))
    Path(trial.pickled_error_file).write_bytes(pickle.dumps(error))
    watched.supervisor.on_trial_error(0, [], trial)
    assert isinstance(watched.experiment.broken, SearchFailedError)
    assert "trial 0 cannot be resumed: the saved state is damaged" in str(
        watched.experiment.broken
    )
    record = watched.course.history.trials[0]
    assert record.state == "running"
    assert watched.course.checkpoints.load(record) is not None


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["checkpoints.save", "history.end_trial"])
def test_a_report_or_an_end_that_cannot_be_written_ends_the_search_not_the_trial(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    trial = watched.start()
    part, method = broken.split(".")
    monkeypatch.setattr(getattr(watched.course, part), method, Mock(side_effect=FULL))
    assert (watched.report(trial) == "NOOP") == (method == "save")
    watched.supervisor.on_trial_complete(0, [], trial)
    with watched.experiment.ending_on_error():
        raise ValueError("a consequence")
    assert watched.experiment.broken is FULL  # the first error
    assert watched.supervisor.stop_all()


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (
            RayActorError(
                error_msg="It died. Worker exit detail: End of file.\n Some common causes include:"
            ),
            "the worker died: End of file.",
        ),
        (RayActorError(error_msg=OUT_OF_MEMORY), OUT_OF_MEMORY),
        (
            RayActorError(error_msg="It died.\n\tip: 10.0.0.7\nbecause its node has died. Node"),
            "its node was lost (10.0.0.7)",
        ),
        (ValueError("a\nb"), "a b"),
    ],
)
def test_errors_are_described_in_one_short_line(error: Exception, described: str) -> None:
    assert describe(error) == described
