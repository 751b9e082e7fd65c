"""What can befall a search's trials, machines and disk, each for real, and what comes of it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from support.drivers import (
    Driver,
    Searches,
    epochs_in,
    history_of,
    notes_of,
    replace,
    searches_in,
    study_of,
    table_of,
)
from support.scripted import Script

from tune_mnist.tuning import study_file as mirror
from tune_mnist.tuning.ray_patches import OUT_OF_MEMORY

pytest_plugins = ["support.ray_fixtures"]

EPOCHS = 4
NO_STOPPING = ("--epochs", EPOCHS, "--grace-epochs", EPOCHS)


@pytest.fixture(scope="module")
def suffered(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searches]:
    """A search in which everything befell its trials that can."""
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        notes = searches.path / "notes"
        notes.mkdir()
        script = Script(
            seconds=0.005,
            notes=notes,
            killed_after=(8,),
            killed_once={1: (2, 3)},
            killed={2: (2,)},
            raising={3: (1,)},
            hanging={4: (2,)},
            allocating={5: (3,)},
            memory=600 << 20,
            diverging={6: (1,), 7: (3,)},
        )
        driver = searches.start(
            "suffered",
            *("--trials", 10, "--max-concurrent", 2, "--retries", 1, "--hang-timeout", "8s"),
            *NO_STOPPING,
            script=script,
        )
        assert driver.wait() == 0, driver.output
        yield searches


def test_a_trial_whose_worker_is_killed_goes_on_from_its_last_epoch(suffered: Searches) -> None:
    record = history_of(suffered.folder("suffered")).trials[1]
    assert (record.state, record.epochs, record.retries) == ("complete", EPOCHS, 2)
    trained = notes_of(suffered.path / "notes")
    assert [trained[f"1 {epoch}"] for epoch in range(1, EPOCHS + 1)] == [1] * EPOCHS
    assert len(history_of(suffered.folder("suffered")).trials) == 10


def test_a_trial_whose_worker_always_dies_is_given_up_with_its_last_error(
    suffered: Searches,
) -> None:
    row = table_of(suffered.folder("suffered"))[2]
    assert (row["state"], row["retries"], row["epochs"]) == ("failed", "1", "1")
    assert "the worker died" in row["reason"]
    assert "\n" not in row["reason"]


def test_a_trial_that_raises_is_given_up_with_its_last_error(suffered: Searches) -> None:
    row = table_of(suffered.folder("suffered"))[3]
    assert (row["state"], row["epochs"]) == ("failed", "0")
    assert row["reason"] == "RuntimeError: no luck in epoch 1"


def test_a_trial_that_hangs_is_given_up(suffered: Searches) -> None:
    row = table_of(suffered.folder("suffered"))[4]
    assert (row["state"], row["epochs"], row["retries"]) == ("failed", "1", "0")
    assert row["reason"] == "no report for 8 s: taken to hang and ended"


def test_a_trial_that_runs_out_of_memory_is_given_up(suffered: Searches) -> None:
    row = table_of(suffered.folder("suffered"))[5]
    assert (row["state"], row["epochs"]) == ("failed", "2")
    assert row["reason"].startswith("MemoryError")


def test_a_trial_that_diverges_ends_there(suffered: Searches) -> None:
    table = table_of(suffered.folder("suffered"))
    assert [table[n]["state"] for n in (6, 7)] == ["diverged", "diverged"]
    assert [table[n]["epochs"] for n in (6, 7)] == ["1", "3"]
    assert "step 7 of epoch 3" in table[7]["reason"]


def test_a_worker_that_dies_between_two_trials_costs_none(suffered: Searches) -> None:
    history = history_of(suffered.folder("suffered"))
    failed = [record.number for record in history.trials.values() if record.state == "failed"]
    assert failed == [2, 3, 4, 5]
    assert history.trials[9].epochs == EPOCHS


def test_nothing_of_rays_own_is_printed(suffered: Searches) -> None:
    output = (suffered.path / "output-0.txt").read_text()
    assert "raylet" not in output
    assert "Traceback" not in output


def test_study_and_tables_tell_the_same_story(suffered: Searches) -> None:
    folder = suffered.folder("suffered")
    table = table_of(folder)
    states = {
        "complete": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "diverged": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    for trial in study_of(folder):
        row = table[trial.number]
        expected = TrialState.FAIL if trial.number == 6 else states[row["state"]]
        assert trial.state == expected
        assert trial.user_attrs["state"] == row["state"]
        assert trial.user_attrs["ray_trial_id"] == row["ray_id"]
    assert len(study_of(folder)) == len(table) == 10


def leave_little_memory() -> None:
    """Have the Ray that this process starts end workers once 1.5 GB more are in use than now."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    threshold = f"{(total - free + 1.5 * 2**20) / total:.4f}"
    os.environ.update(RAY_memory_usage_threshold=threshold, RAY_memory_monitor_refresh_ms="100")


def test_a_trial_that_ray_ends_for_its_memory_is_given_up_and_the_search_goes_on(
    tmp_path: Path,
) -> None:
    facts = Path("/proc/meminfo").read_text()
    if int(facts.partition("MemAvailable:")[2].split()[0]) < 4 << 20:
        pytest.skip("needs 4 GB of free memory")
    with searches_in(tmp_path, address=None) as searches:
        driver = searches.start(
            *("run", "--trials", 3, "--max-concurrent", 1, "--retries", 1, *NO_STOPPING),
            script=Script(seconds=0.005, allocating={1: (2,)}),
            prepare=leave_little_memory,
        )
        assert driver.wait() == 0, driver.output
        row = table_of(searches.folder("run"))[1]
        assert (row["state"], row["epochs"], row["reason"]) == ("failed", "1", OUT_OF_MEMORY)
        assert "Traceback" not in driver.output


def test_trials_of_a_killed_node_go_on_on_the_node_that_is_left(
    cluster: Cluster, searches: Searches
) -> None:
    node = cluster.add_node(num_cpus=2)
    try:
        notes = searches.path / "notes"
        notes.mkdir()
        driver = searches.start(
            *("run", "--trials", 6, "--epochs", 20, "--grace-epochs", 20),
            script=Script(seconds=0.15, notes=notes),
        )
        folder = searches.folder("run")
        driver.wait_until(
            lambda: (
                epochs_in(folder) > 8
                and sum(r.epochs > 0 for r in history_of(folder).unfinished()) == 4
            )
        )
        node.kill_raylet()
        assert driver.wait() == 0, driver.output
    finally:
        cluster.remove_node(node, allow_graceful=False)
    history = history_of(folder)
    assert {record.state for record in history.trials.values()} == {"complete"}
    assert sum(record.retries for record in history.trials.values()) >= 1
    assert notes_of(notes).total() - len(history.rows) <= 2


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    """Mount a file system for as long as it is needed, or skip the test."""
    command = ["mount", *arguments, str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_full_disk_ends_a_search_that_goes_on_once_there_is_room(
    cluster: Cluster, tmp_path: Path
) -> None:
    with (
        mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", at=tmp_path),
        searches_in(tmp_path, cluster.address) as searches,
    ):
        script = Script(seconds=0.02, state_size=100_000)
        driver = searches.start(
            "run", "--trials", 12, "--max-concurrent", 2, script=script, prepare=hurry
        )
        folder = searches.folder("run")
        driver.wait_until(lambda: epochs_in(folder) > 5)
        filler = tmp_path / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        check_it_ends_in_order(driver, folder, "No space left on device")
        finished = history_of(folder).rows
        filler.unlink()
        driver = searches.resume("run", "--max-concurrent", 2, script=script)
        assert driver.wait() == 0, driver.output
        check_it_is_whole(folder, trials=12)
        assert [row for _, row in history_of(folder).rows][: len(finished)] == [
            row for _, row in finished
        ]


def test_a_folder_gone_read_only_ends_a_search_that_goes_on_later(searches: Searches) -> None:
    driver = searches.start(
        *("run", "--trials", 12, "--max-concurrent", 2),
        script=Script(seconds=0.02),
        prepare=hurry,
    )
    folder = searches.folder("run")
    driver.wait_until(lambda: epochs_in(folder) > 5)
    with mounted("--bind", str(folder), at=folder):
        # A second mount over the first: that one is in use and would refuse to become so.
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        check_it_ends_in_order(driver, folder, "Read-only file system")
    driver = searches.resume("run", "--max-concurrent", 2)
    assert driver.wait() == 0, driver.output
    check_it_is_whole(folder, trials=12)


def hurry() -> None:
    """Have this process wait no longer than tests do for a study.db that cannot be written."""
    replace(mirror, "CLOSING_PATIENCE", 2.0)


def check_it_ends_in_order(driver: Driver, folder: Path, reason: str) -> None:
    assert driver.wait() == 1, driver.output
    last = driver.output.splitlines()[-1]
    assert last.startswith("error: cannot write to")
    assert reason in last
    assert f"--resume {folder}" in last
    assert "Traceback" not in driver.output
    assert history_of(folder).rows


def check_it_is_whole(folder: Path, trials: int) -> None:
    history = history_of(folder)
    assert len(history.trials) == trials
    assert not history.unfinished()
    assert {trial.state for trial in study_of(folder)} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(study_of(folder)) == trials
    assert set(table_of(folder)) == set(range(trials))
