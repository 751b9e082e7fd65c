"""What can happen to a search's driver, trials, machines and disk, each for real."""

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from support.disks import mount, mounted
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

from tune_mnist.host import LEAST_FREE
from tune_mnist.runs.history import History
from tune_mnist.tuning import study_file
from tune_mnist.tuning.ray_patches import OUT_OF_MEMORY

pytest_plugins = ["support.ray_fixtures"]
pytestmark = pytest.mark.slow

EPOCHS = 4
NO_STOPPING = ("--epochs", EPOCHS, "--grace-epochs", EPOCHS)
TWO = ("--max-concurrent", 2)


@pytest.fixture(scope="module")
def suffered(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searches]:
    """A search whose trials had every fault there is."""
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        script = Script(
            seconds=0.005,
            notes=searches.notes,
            killed_after=(8,),
            killed_once={1: (2, 3)},
            killed={2: (2,)},
            raising={3: (1,)},
            hanging={4: (2,)},
            allocating={5: (3,)},
            memory=600 << 20,
            diverging={6: (1,), 7: (3,)},
        )
        options = ("--trials", 10, "--retries", 1, "--hang-timeout", "8s", *TWO, *NO_STOPPING)
        driver = searches.start("suffered", *options, script=script)
        assert driver.wait() == 0, driver.output
        yield searches


def test_a_trial_whose_worker_is_killed_is_resumed_from_its_last_epoch(suffered: Searches) -> None:
    history = history_of(suffered.folder("suffered"))
    record = history.trials[1]
    assert (record.state, record.epochs, record.retries) == ("complete", EPOCHS, 2)
    trained = notes_of(suffered.notes)
    assert [trained[f"1 {epoch}"] for epoch in range(1, EPOCHS + 1)] == [1] * EPOCHS
    assert len(history.trials) == 10


@pytest.mark.parametrize(
    ("trial", "state", "epochs", "retries", "reason"),
    [
        (2, "failed", 1, 1, "the worker died"),
        (3, "failed", 0, 1, "RuntimeError: no luck in epoch 1"),
        (4, "failed", 1, 0, "no report for 8 s: taken to hang and ended"),
        (5, "failed", 2, 1, "MemoryError"),
        (6, "diverged", 1, 0, "step 7 of epoch 1"),
        (7, "diverged", 3, 0, "step 7 of epoch 3"),
    ],
)
def test_a_trial_ends_with_its_last_error(
    suffered: Searches, trial: int, state: str, epochs: int, retries: int, reason: str
) -> None:
    row = table_of(suffered.folder("suffered"))[trial]
    assert (row["state"], row["epochs"], row["retries"]) == (state, str(epochs), str(retries))
    assert reason in row["reason"]
    assert "\n" not in row["reason"]


def test_study_tables_and_output_tell_the_same_story(suffered: Searches) -> None:
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
    # A worker that dies between two trials, as after the eighth, costs none.
    assert [table[number]["state"] for number in (0, 8, 9)] == ["complete"] * 3
    output = (suffered.path / "output-0.txt").read_text()
    assert "raylet" not in output  # nothing of Ray's own
    assert "Traceback" not in output


def memory(*names: str) -> list[int]:
    """Return facts about this machine's memory, kB."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return [int(facts[name].split()[0]) for name in names]


def leave_little_memory() -> None:
    """Have the Ray that this process starts end workers once 1.5 GB more are in use than now."""
    total, free = memory("MemTotal", "MemAvailable")
    threshold = f"{(total - free + 1.5 * 2**20) / total:.4f}"
    os.environ.update(RAY_memory_usage_threshold=threshold, RAY_memory_monitor_refresh_ms="100")


def test_a_trial_that_ray_ends_for_its_memory_has_failed_and_the_search_continues(
    tmp_path: Path,
) -> None:
    if memory("MemAvailable")[0] < 4 << 20:
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


def test_trials_of_a_killed_node_are_resumed_on_the_node_that_is_left(
    cluster: Cluster, searches: Searches
) -> None:
    node = cluster.add_node(num_cpus=2)
    try:
        script = Script(seconds=0.0, notes=searches.notes, held=dict.fromkeys(range(4), (3,)))
        driver = searches.start("run", "--trials", 6, *NO_STOPPING, script=script)
        driver.wait_until(lambda: all(script.is_held(number, 3) for number in range(4)))
        node.kill_raylet()
        script.release()
        assert driver.wait() == 0, driver.output
    finally:
        cluster.remove_node(node, allow_graceful=False)
    history = history_of(searches.folder("run"))
    records = history.trials.values()
    assert {record.state for record in records} == {"complete"}
    assert sum(record.retries for record in records) >= 1
    assert notes_of(searches.notes).total() - len(history.rows) <= 2


@pytest.mark.root
def test_a_full_disk_ends_a_search_that_is_resumed_once_there_is_room(
    cluster: Cluster, tmp_path: Path
) -> None:
    with (
        mounted(tmp_path / "disk", "size=4m") as disk,
        searches_in(disk, cluster.address) as searches,
    ):
        driver = search_to_be_stopped(searches, state_size=100_000)
        filler = fill(disk)
        check_it_is_ended_and_resumed(searches, driver, "No space left on device", filler.unlink)


def keep_temporary_files_in(folder: Path) -> None:
    os.environ["TMPDIR"] = str(folder)


def fill(disk: Path) -> Path:
    """Leave no room on a disk and return the file that took it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.root
def test_a_worker_that_dies_while_temporary_files_have_no_room_ends_the_search_in_one_line(
    cluster: Cluster, tmp_path: Path
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="full-") as short,  # enough for sockets
        mounted(Path(short) / "disk", f"size={LEAST_FREE + (2 << 20)}") as disk,
        searches_in(tmp_path, cluster.address) as searches,
    ):
        script = Script(seconds=0.02, notes=searches.notes, held={1: (2,)}, killed={1: (3,)})
        prepare = partial(keep_temporary_files_in, disk)
        driver = searches.start("run", "--trials", 6, *TWO, script=script, prepare=prepare)
        driver.wait_until(lambda: script.is_held(1, 2))
        fill(disk)
        script.release()
        assert driver.wait() == 1
    last = driver.output.splitlines()[-1]
    assert last.startswith("error: Ray Tune cannot continue (OSError: [Errno 28] No space left")
    assert f"--resume {searches.folder('run')}" in last
    assert "Traceback" not in driver.output
    assert history_of(searches.folder("run")).unfinished()


@pytest.mark.root
def test_a_folder_gone_read_only_ends_a_search_that_is_resumed_later(searches: Searches) -> None:
    driver, folder = search_to_be_stopped(searches), searches.folder("run")
    with contextlib.ExitStack() as mounts:
        mounts.enter_context(mount("--bind", str(folder), at=folder))
        # A second mount over the first: that one is in use and would refuse to become so.
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        check_it_is_ended_and_resumed(searches, driver, "Read-only file system", mounts.close)


def hurry() -> None:
    """Have this process wait no longer than tests do for a study.db that cannot be written."""
    replace(study_file, "CLOSING_PATIENCE", 2.0)


def check_it_is_ended_and_resumed(
    searches: Searches, driver: Driver, reason: str, mend: Callable[[], object]
) -> None:
    """See that a search of 12 trials ends in order, and is whole once it can be resumed."""
    assert driver.wait() == 1, driver.output
    folder = searches.folder("run")
    last = driver.output.splitlines()[-1]
    assert last.startswith("error: cannot write to")
    assert reason in last
    assert f"--resume {folder}" in last
    assert "Traceback" not in driver.output
    before = [row.line() for _, row in history_of(folder).rows]
    assert before
    mend()
    driver = searches.resume("run", *TWO)
    assert driver.wait() == 0, driver.output
    after = check_it_is_whole(folder, trials=12).rows
    assert [row.line() for _, row in after][: len(before)] == before


def search_to_be_stopped(searches: Searches, state_size: int = 0) -> Driver:
    """Begin a search of 12 trials and wait for its first epochs."""
    script = Script(seconds=0.02, state_size=state_size)
    driver = searches.start("run", "--trials", 12, *TWO, script=script, prepare=hurry)
    driver.wait_until(lambda: epochs_in(searches.folder("run")) > 5)
    return driver


def check_it_is_whole(folder: Path, trials: int) -> History:
    history = history_of(folder)  # which refuses rows that are doubled or out of order
    assert len(history.trials) == trials
    assert not history.unfinished()
    assert {trial.state for trial in study_of(folder)} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(study_of(folder)) == trials
    assert set(table_of(folder)) == set(range(trials))
    return history


def test_two_trials_at_a_time_killed_at_random_moments_lose_and_repeat_nothing(
    searches: Searches,
) -> None:
    kills, trials, at_once = 7, 25, 2
    generator, moments = random.Random(2), list[tuple[int, float]]()
    script, folder = Script(seconds=0.005, notes=searches.notes), searches.folder("killed")
    limit, events = ("--max-concurrent", at_once), folder / "events.jsonl"
    driver = searches.start("killed", "--trials", trials, *limit, script=script)
    for killed in range(kills):
        driver.wait_until(  # for its session
            lambda: events.exists() and events.read_bytes().count(b'"session"') > killed  # noqa: B023
        )
        # Counted in time, as while it begins, or in epochs.
        more = generator.choice([0, 0, generator.randint(1, 25)])
        moments.append((more, generator.uniform(0, 0.02 if more else 1.0)))
        goal = epochs_in(folder) + more
        driver.wait_until(lambda: epochs_in(folder) >= goal)  # noqa: B023
        time.sleep(moments[-1][1])
        assert driver.is_alive, ("it had finished before", moments)
        driver.kill()
        driver = searches.resume("killed", *limit, script=script)
    assert driver.wait() == 0, (moments, driver.output)
    history = check_it_is_whole(folder, trials)
    trained = notes_of(searches.notes)
    assert {f"{record.number} {row.epoch}" for record, row in history.rows} == set(trained)
    assert trained.total() - len(history.rows) <= kills * at_once  # only what was under way
