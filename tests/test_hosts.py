"""A search over separate hosts, each with an address, a disk and without this package."""

import ctypes
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.drivers import Searches, history_of, searches_in, study_of
from support.hosts import Cluster, Host, network, ray_on
from support.scripted import Script

pytestmark = [pytest.mark.slow, pytest.mark.root]

EPOCHS = 4
TRIALS = {"first": 8, "second": 3}
CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class Story:
    """Two searches over hosts of which one joined, one was cut off and one was killed."""

    searches: Searches
    output: str  # of the first
    seconds_to_join: float  # until a trial on the host that joined had its first epoch


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with network(3) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(hosts: list[Host]) -> Iterator[Cluster]:
    with ray_on(hosts[0]) as cluster:
        cluster.add(hosts[1])
        yield cluster


@pytest.fixture(scope="module")
def story(
    hosts: list[Host], cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    head, cut_off, killed = hosts
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        scripts, drivers = {}, {}

        def start(run: str, *limit: object) -> None:
            notes = searches.notes / run
            notes.mkdir()
            held = dict.fromkeys(range(TRIALS[run]), (2,))
            scripts[run] = Script(seconds=0.0, notes=notes, held=held)
            drivers[run] = searches.start(
                *(run, "--trials", TRIALS[run], "--epochs", EPOCHS, "--grace-epochs", EPOCHS),
                *("--retries", 0, *limit),
                script=scripts[run],
                prepare=head.enter,
            )

        def wait_until_held(run: str, trials: int) -> None:
            drivers[run].wait_until(
                lambda: len(list((searches.notes / run).glob("held-*"))) >= trials
            )

        # One after the other: who comes first to free slots takes all that it may.
        start("second", "--max-concurrent", 1)
        wait_until_held("second", 1)
        start("first")
        wait_until_held("first", 3)  # both hosts are full
        cluster.add(killed)
        joined = time.monotonic()
        wait_until_held("first", 4)
        seconds_to_join = time.monotonic() - joined
        cut_off.cut_off()
        drivers["first"].wait_until(lambda: cut_off.address not in cluster.alive())
        drivers["first"].wait_until(lambda: retries_in(searches.folder("first")) > 0)
        killed.kill()
        for script in scripts.values():
            script.release()  # both, as trials that are held may have all the slots
        for driver in drivers.values():
            assert driver.wait() == 0, driver.output
        yield Story(searches, drivers["first"].output, seconds_to_join)


def retries_in(folder: Path) -> int:
    return sum(record.retries for record in history_of(folder).trials.values())


def test_a_host_that_joins_is_used_and_the_trials_of_lost_ones_are_resumed_elsewhere(
    story: Story, hosts: list[Host]
) -> None:
    assert story.seconds_to_join < 15
    assert f"2 nodes: {hosts[0].address} 2 trials, {hosts[1].address} 2 trials" in story.output
    # Although none may be retried: the loss of its host is no failure of a trial.
    assert retries_in(story.searches.folder("first")) >= 2
    for run, trials in TRIALS.items():
        folder = story.searches.folder(run)
        history = history_of(folder)  # which refuses rows that are doubled or out of order
        assert len(history.trials) == trials
        assert {(r.state, r.epochs) for r in history.trials.values()} == {("complete", EPOCHS)}
        study = study_of(folder)
        assert [trial.state for trial in study] == [TrialState.COMPLETE] * trials
        assert all(len(trial.intermediate_values) == EPOCHS for trial in study)


def test_a_machine_outside_is_told_how_to_reach_the_cluster(
    story: Story, cluster: Cluster, tmp_path: Path
) -> None:
    with searches_in(tmp_path, cluster.address) as searches:
        driver = searches.start("run", prepare=partial(hide, cluster.temp_dir))
        assert driver.wait(30) == 2
        assert f"no node of the Ray cluster at {cluster.address}" in driver.output
        assert "--address ray://" in driver.output


def hide(folder: str) -> None:
    """Have this process no longer see a folder, as if it were on another machine."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS):
        raise OSError("could not leave the mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
