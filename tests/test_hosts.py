"""A search over separate hosts, each with an address, a disk and without this package."""

import csv
import ctypes
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.drivers import Driver, Searches, epochs_in, history_of, searches_in, study_of
from support.hosts import Cluster, Host, network, ray_on
from support.scripted import Script

EPOCHS, TRIALS, SECOND_TRIALS = 12, 26, 5
CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class Story:
    """Two searches over hosts of which one joined, one was cut off and one was killed."""

    searches: Searches
    output: str  # of the first
    seconds_to_join: float  # until the first epoch of a trial on the host that joined


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
        folder, other = searches.folder("first"), searches.folder("second")

        def start(run: str, trials: int, *limit: object) -> Driver:
            return searches.start(
                *(run, "--trials", trials, "--epochs", EPOCHS, "--grace-epochs", EPOCHS),
                *("--retries", 0, *limit),
                script=Script(seconds=1.0),
                prepare=head.enter,
            )

        # One after the other: who comes first to free slots takes all that it may.
        second = start("second", SECOND_TRIALS, "--max-concurrent", 1)
        second.wait_until(lambda: trials_with_epochs(other) > 0)
        first = start("first", TRIALS)
        # Both hosts are full; one more trial at a time is one on the host that joins.
        first.wait_until(lambda: trials_with_epochs(folder) == 3)
        cluster.add(killed)
        joined = time.monotonic()
        first.wait_until(lambda: trials_with_epochs(folder) > 3)
        seconds_to_join = time.monotonic() - joined
        cut_off.cut_off()
        first.wait_until(lambda: cut_off.address not in cluster.alive())
        epochs = epochs_in(folder)
        first.wait_until(lambda: epochs_in(folder) >= epochs + 4)
        killed.kill()
        codes = [driver.wait() for driver in (first, second)]
        assert codes == [0, 0], first.output + second.output
        yield Story(searches, first.output, seconds_to_join)


def trials_with_epochs(folder: Path) -> int:
    """Count the running trials that have finished an epoch."""
    if not epochs_in(folder):
        return 0
    return sum(record.epochs > 0 for record in history_of(folder).unfinished())


def test_a_host_that_joins_is_used_within_seconds(story: Story) -> None:
    assert story.seconds_to_join < 15


@pytest.mark.parametrize(("run", "trials"), [("first", TRIALS), ("second", SECOND_TRIALS)])
def test_nothing_is_lost_and_nothing_doubled(story: Story, run: str, trials: int) -> None:
    folder = story.searches.folder(run)
    with (folder / "epochs.csv").open() as file:
        rows = Counter((int(row["trial"]), int(row["epoch"])) for row in csv.DictReader(file))
    assert rows == {(n, epoch): 1 for n in range(trials) for epoch in range(1, EPOCHS + 1)}
    history = history_of(folder)
    assert {record.state for record in history.trials.values()} == {"complete"}
    study = study_of(folder)
    assert [trial.state for trial in study] == [TrialState.COMPLETE] * trials
    assert all(len(trial.intermediate_values) == EPOCHS for trial in study)


def test_trials_of_lost_hosts_went_on_elsewhere(story: Story) -> None:
    """Without a retry: that a host is lost is no failure of the trial's."""
    records = history_of(story.searches.folder("first")).trials.values()
    assert sum(record.retries for record in records) >= 2


def test_the_plan_says_how_many_trials_run_where(story: Story, hosts: list[Host]) -> None:
    head, other = hosts[:2]
    assert f"2 nodes: {head.address} 2 trials, {other.address} 2 trials" in story.output


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
