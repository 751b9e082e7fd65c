"""How searches begin, end and are resumed, each in a process of its own."""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from ray.cluster_utils import Cluster
from support.course import Course
from support.drivers import (
    Searches,
    act_at,
    history_of,
    outcome_of,
    replace,
    searches_in,
)
from support.reported import rich
from support.scripted import Script

from tune_mnist.cli import exit_code
from tune_mnist.errors import ConfigError, RunFolderError, SearchFailedError
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.tuning import launch, packing
from tune_mnist.tuning.launch import draw_report, search
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.settings import SearchSettings

pytest_plugins = ["support.ray_fixtures"]

SMALL = ("--trials", 4, "--epochs", 4)
ONE, TWO = ("--max-concurrent", 1), ("--max-concurrent", 2)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searches]:
    with searches_in(tmp_path_factory.mktemp("runs"), cluster.address) as searches:
        driver = searches.start("run", *SMALL)
        assert driver.wait() == 0, driver.output
        yield searches


@pytest.fixture
def held(searches: Searches) -> Script:
    """Trials of which the first waits for the test before its second epoch."""
    return Script(seconds=0.005, notes=searches.notes, held={0: (2,)})


def linger(mark: Path) -> None:
    """Make this process take forever over its end, unless it is ended at once."""

    def forever(*_: Any) -> None:
        mark.touch()
        signal.pause()
        raise RuntimeError("the second signal was not heeded")

    replace(History, "close_session", forever)


def test_a_second_signal_ends_a_search_at_once(searches: Searches, held: Script) -> None:
    mark = searches.path / "lingers"
    driver = searches.start("run", *SMALL, script=held, prepare=partial(linger, mark))
    driver.wait_until(lambda: held.is_held(0, 2))
    driver.send(signal.SIGTERM)
    driver.wait_until(mark.exists)
    time.sleep(0.2)  # those that come together are taken for one
    driver.send(signal.SIGTERM)
    assert driver.wait(60) == 128 + signal.SIGTERM
    assert history_of(searches.folder("run")).closed_as is None


def test_a_run_that_is_under_way_cannot_be_resumed(searches: Searches, held: Script) -> None:
    driver = searches.start("run", *SMALL, *TWO, script=held)
    driver.wait_until(lambda: held.is_held(0, 2))
    other = searches.resume("run")
    assert other.wait() == 2
    assert "in use" in other.output
    held.release()
    assert driver.wait() == 0, driver.output


@pytest.mark.slow
@pytest.mark.parametrize("on_one_ray", [True, False])
def test_two_searches_run_side_by_side(cluster: Cluster, tmp_path: Path, on_one_ray: bool) -> None:
    with searches_in(tmp_path, cluster.address if on_one_ray else None) as searches:
        drivers = [searches.start(name, *SMALL, *ONE) for name in ("one", "two")]
        assert [driver.wait() for driver in drivers] == [0, 0], drivers[0].output
        assert outcome_of(searches.folder("one")) == outcome_of(searches.folder("two"))


def test_a_finished_run_says_so_and_is_resumed_with_more_trials(finished: Searches) -> None:
    folder = finished.folder("run")
    before = outcome_of(folder)
    driver = finished.resume("run")
    assert driver.wait() == 0
    assert "all 4 trials are finished" in driver.output
    assert history_of(folder).sessions == 1

    driver = finished.resume("run", "--trials", 6)
    assert driver.wait() == 0, driver.output
    after = outcome_of(folder)
    assert len(after) == 6
    assert after[:4] == before


@pytest.mark.parametrize("begin", ["start", "resume"])
def test_a_trial_that_fits_nowhere_is_refused_at_once(finished: Searches, begin: str) -> None:
    run, trials = ("run", 9) if begin == "resume" else ("other", 4)
    driver = getattr(finished, begin)(run, "--trials", trials, "--cpus-per-trial", 64)
    assert driver.wait() == 2
    assert "no node can run a trial of 64 CPUs: there is 1 node of 2 CPUs" in driver.output
    assert len(driver.output.splitlines()) == 1
    assert history_of(finished.folder("run")).sessions <= 2
    assert not finished.folder("other").exists()


@pytest.mark.slow
def test_a_used_up_time_budget_says_so_and_can_be_raised(searches: Searches, held: Script) -> None:
    folder = searches.folder("run")
    driver = searches.start("run", *SMALL, *ONE, "--time-budget", "3s", script=held)
    assert driver.wait() == 0, driver.output
    history = history_of(folder)
    assert history.closed_as == "out of time"
    assert history.unfinished()
    assert history.elapsed >= 3
    driver = searches.resume("run")
    assert driver.wait() == 0
    assert "time budget" in driver.output
    held.release()
    driver = searches.resume("run", "--time-budget", "1h", script=held)
    assert driver.wait() == 0, driver.output
    assert len(history_of(folder).trials) == 4
    assert not history_of(folder).unfinished()


@pytest.mark.slow
def test_a_resume_says_what_has_changed_since(searches: Searches) -> None:
    space = searches.path / "mine.yaml"
    space.write_text("epochs: 4\nparameters:\n  lr: {low: 0.001, high: 0.1, log: true}\n")
    stop = partial(signal.raise_signal, signal.SIGTERM)
    prepare = partial(act_at, History, "add_epoch", 3, stop)
    driver = searches.start("run", "--trials", 2, space=space, prepare=prepare)
    assert driver.wait() == 128 + signal.SIGTERM, driver.output
    search = searches.folder("run") / "search.yaml"
    code = yaml.safe_load(search.read_text())["versions"]["code"]
    search.write_text(search.read_text().replace(code, "0123456789ab"))
    space.write_text(space.read_text().replace("high: 0.1", "high: 0.2"))
    driver = searches.resume("run")
    assert driver.wait() == 0, driver.output
    output = " ".join(driver.output.split())
    assert f"code was 0123456789ab, is now {code}" in output
    assert re.search(r"mine.yaml: parameters.lr.high was 0.1, is now 0.2", output)


def stop_before_the_first_trial() -> None:
    """Have this process take SIGTERM as soon as it has joined Ray."""
    replace(packing, "living_nodes", lambda: signal.raise_signal(signal.SIGTERM))


def test_sigterm_before_the_first_trial_has_its_exit_code_too(searches: Searches) -> None:
    driver = searches.start("run", prepare=stop_before_the_first_trial)
    assert driver.wait() == 128 + signal.SIGTERM


def fail_early() -> None:
    """Have this process run into a full disk as its session begins."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "epochs.csv")

    replace(History, "open_session", full)


def test_an_error_as_a_session_begins_is_one_line(searches: Searches) -> None:
    driver = searches.start("run", prepare=fail_early)
    assert driver.wait() == SearchFailedError.exit_code
    assert driver.output.startswith("error: cannot write to epochs.csv (No space left on device)")
    assert len(driver.output.splitlines()) == 1


def test_a_report_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rich(tmp_path).folder.path
    (folder / "report.html").mkdir()
    draw_report(folder, None)
    said = capsys.readouterr().out
    assert said.startswith("warning: the report could not be drawn (IsADirectoryError")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_search_confirms_its_winners_in_half_of_its_time_and_draws_its_report(
    searches: Searches,
) -> None:
    options = ("--trials", 4, "--epochs", 3, "--time-budget", "5m", "--confirm", "--report")
    driver = searches.start("ended", *options)
    assert driver.wait() == 0, driver.output
    folder = searches.folder("ended")
    assert yaml.safe_load((folder / "search.yaml").read_text())["asked"]["time_budget"] == 300
    said = " ".join(driver.output.split())
    assert "for at most 2 min 30 s" in said
    confirmed = "Over 5 fresh seeds on 1,000 training images"
    assert confirmed in said
    table = pd.read_csv(folder / "confirmed.csv")
    assert list(table["n"]) == [5] * 4
    assert list(table["images"]) == [1000] * 4
    page = folder / "report.html"
    assert driver.output.endswith(f"report: {page}\n")
    assert ", finished; " in page.read_text()
    assert confirmed in page.read_text()

    again = searches.resume("ended")
    assert again.wait() == 0, again.output
    said = " ".join(again.output.split())
    assert "all 4 trials are finished" in said
    assert confirmed in said
    more = searches.resume("ended", "--trials", 12, "--report")
    assert more.wait() == 0, more.output
    (kept,) = folder.glob("confirm-replaced-*")
    assert f"the earlier confirmation, with other winners, is kept in {kept}" in more.output
    pd.testing.assert_frame_equal(pd.read_csv(kept / "confirmed.csv"), table)
    assert list(pd.read_csv(folder / "confirmed.csv")["n"]) == [5] * 4
    assert more.output.endswith(f"report: {page}\n")


def finished_run(path: Path) -> RunFolder:
    """A search that has run to its end, without Ray."""
    course = Course(path, trials=2, epochs=2)
    course.run(until=2)
    course.experiment.close("finished")
    Plan.of(SearchSettings(space="sgd", trials=2, epochs=2)).save(course.folder)
    return course.folder


def everything_in(path: Path) -> dict[str, bytes]:
    """Return all files there but the lock's."""
    files = {file for file in path.rglob("*") if file.is_file() and file.name != ".lock"}
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def resume(folder: RunFolder, **settings: Any) -> int:
    """Resume a run that has nothing left to train: without Ray."""
    return search(SearchSettings(resume=folder.path, report=False, **settings))


@pytest.mark.parametrize(
    "asked",
    [
        "--resume runs/run --storage {}/runs",
        "--resume runs/run --storage link",
        "--resume runs/run --storage runs/run/x",
        "--resume run/run --storage .",  # the run lies in its copy
        "--resume file://{}/runs/run --results-dir runs",
        "--run new --results-dir runs --storage runs/new/x",
        "--run new --results-dir copies/new --storage copies",
    ],
)
def test_a_run_and_its_copy_are_never_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_runtime", None)  # it is refused before
    for path in ("runs", "run"):
        finished_run(tmp_path / path / "run")
    (tmp_path / "link").symlink_to("runs")
    before = everything_in(tmp_path)
    assert exit_code("search", SearchSettings, search, asked.format(tmp_path).split()) == 2
    assert "are one place, or one lies in the other" in capfd.readouterr().err
    assert everything_in(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "run", "link"}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("events.jsonl", b"{}\n"),
        ("epochs.csv", b"0,3\n"),
        ("search.yaml", b"asked: 3\n"),
    ],
)
def test_a_resume_that_is_refused_has_written_nothing(
    tmp_path: Path, file: str, damage: bytes
) -> None:
    folder = finished_run(tmp_path / "run")
    assert resume(folder, storage=str(tmp_path / "copies")) == 0
    with (folder.path / file).open("ab") as damaged:
        damaged.write(damage)
    before = everything_in(tmp_path)
    with pytest.raises(RunFolderError, match="damaged"):
        resume(folder, storage=str(tmp_path / "copies"))
    assert everything_in(tmp_path) == before


def test_a_place_that_only_a_run_names_is_sent_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder, there = finished_run(tmp_path / "run"), tmp_path / "elsewhere"
    folder.write_search(folder.read_search() | {"storage": there.as_uri()})
    before = everything_in(tmp_path)
    with pytest.raises(
        RunFolderError, match=f"add --storage '{there.as_uri()}'; to go on without"
    ):
        resume(folder)
    assert everything_in(tmp_path) == before

    assert resume(folder, storage=str(there)) == 0
    assert everything_in(there / "run") == {
        name: content
        for name, content in everything_in(folder.path).items()
        if not name.startswith(".")
    }
    shutil.rmtree(there)
    there.mkdir()
    with pytest.raises(RunFolderError, match="cannot use"):
        resume(folder)  # it is known now, and gone: that is not made anew
    (there / "run").mkdir()
    assert resume(folder) == 0
    assert (there / "run" / "epochs.csv").exists()


def test_what_a_resume_with_nothing_to_train_was_given_is_kept(tmp_path: Path) -> None:
    folder, copies = finished_run(tmp_path / "run"), tmp_path / "copies"
    assert resume(folder, storage=str(copies)) == 0
    assert Plan.load(folder).storage == copies.as_uri()
    copied = RunFolder(copies / "run")
    assert copied.read_search() == folder.read_search()
    copied.trials.unlink(missing_ok=True)
    folder.trials.write_text("new")
    assert resume(folder) == 0
    assert copied.trials.read_text() == "new"


def test_a_search_that_cannot_confirm_has_its_report_and_the_code_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn = finished_run(tmp_path / "run"), list[Path]()
    inner = RunFolder.create(folder.confirmation.path)
    inner.write_search({})
    monkeypatch.setattr(launch, "_runtime", lambda *_: nullcontext())
    monkeypatch.setattr(launch, "draw_report", lambda path, _: drawn.append(path))
    with inner.only_writer(), pytest.raises(RunFolderError, match="confirm is in use"):
        search(SearchSettings(resume=folder.path, confirm=True))
    assert drawn == [folder.path]


def test_a_space_whose_name_makes_none_for_a_run_is_refused(tmp_path: Path) -> None:
    space = tmp_path / f"{'n' * 245}.yaml"
    space.write_text("parameters: {lr: {low: 0.1, high: 0.2}}")
    with pytest.raises(ConfigError, match="--run must be a name of at most 255 bytes"):
        search(SearchSettings(space=str(space), results_dir=tmp_path / "results"))
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_search_that_found_nothing_to_confirm_ends_in_order(searches: Searches) -> None:
    driver = searches.start("alone", "--trials", 1, "--epochs", 2, "--confirm", "--report")
    assert driver.wait() == 0, driver.output
    assert driver.output.count("has nothing to confirm: no trial but the baseline") == 1
    assert "\nreport: " in driver.output
