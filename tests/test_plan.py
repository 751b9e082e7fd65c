import math
import shutil
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.disks import as_nobody
from support.epochs import epoch_row
from support.processes import environment, python

import tune_mnist
from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.runs.space import available_spaces
from tune_mnist.tuning.plan import DEFAULT_TRIALS, Plan, compare, machine, versions
from tune_mnist.tuning.settings import SearchSettings

RESULTS = Path(tune_mnist.__file__).parents[1] / "results"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


SETTINGS = [
    *(SearchSettings(space=name) for name in available_spaces()),
    SearchSettings(
        metric="test_accuracy",
        trials=3,
        epochs=7,
        time_budget=1e-5,
        images=6000,
        grace_epochs=2,
        reduction_factor=2.7182818284590455,
        startup_trials=0,
        no_start=True,
        seed=2**70,
        precision="tf32",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.space)
def test_a_plan_is_read_as_it_was_written(folder: RunFolder, settings: SearchSettings) -> None:
    plan = Plan.of(settings)
    plan.save(folder)
    assert Plan.load(folder) == plan
    history = History(folder)
    assert plan.differences(folder, history) == []
    history.asked = {k: v for k, v in plan.rules.lasting.items() if k != "no_start"}
    assert plan.differences(folder, history) == []  # an earlier version had no such option


def test_what_was_not_asked_comes_from_the_space_and_the_defaults() -> None:
    rules = Plan.of(SearchSettings(space="quick")).rules
    assert (rules.epochs, rules.trials, rules.images) == (5, DEFAULT_TRIALS, None)
    assert rules.time_limit == math.inf


def test_search_yaml_can_be_read_by_a_person(folder: RunFolder) -> None:
    Plan.of(SearchSettings(trials=3, time_budget=math.inf)).save(folder)
    data = yaml.safe_load(folder.search.read_text())
    assert data["asked"]["trials"] == 3
    assert data["asked"]["time_budget"] is None
    assert data["space"]["parameters"]["lr"] == {"low": 0.001, "high": 0.15, "log": True}
    assert data["versions"] == versions()
    assert data["machine"] == machine()
    assert "!!" not in folder.search.read_text()


def test_a_resume_raises_what_it_is_given_and_keeps_the_rest() -> None:
    plan = Plan.of(SearchSettings(trials=3, time_budget=60.0, seed=4, precision="tf32"))
    resume = Path("run")
    more = plan.changed_by(SearchSettings(resume=resume, trials=30))
    assert (more.rules.trials, more.rules.time_budget, more.rules.seed) == (30, 60.0, 4)
    longer = plan.changed_by(SearchSettings(resume=resume, time_budget=90.0))
    assert (longer.rules.trials, longer.rules.time_budget) == (3, 90.0)
    assert plan.changed_by(SearchSettings(resume=resume)) == plan
    on_a_cpu = plan.changed_by(SearchSettings(resume=resume, precision="float32"))
    assert on_a_cpu == replace(plan, precision="float32")


@pytest.mark.parametrize("run", sorted(RESULTS.glob("*/search.yaml")), ids=str)
def test_the_plan_of_an_older_run_is_read_and_written_alike(run: Path, folder: RunFolder) -> None:
    plan, before = Plan.load(RunFolder(run.parent)), yaml.safe_load(run.read_text())
    plan.save(folder)
    after = folder.read_search()
    assert after["asked"] == {**before["asked"], "no_start": False}
    assert after["space"] == before["space"]


MISSING = object()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The search.yaml of a new run."""
    folder = RunFolder.create(tmp_path_factory.mktemp("sound") / "run")
    Plan.of(SearchSettings()).save(folder)
    return folder.search.read_text()


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("asked", MISSING, "asked is missing"),
        ("space", MISSING, "must be a mapping with the key parameters, but got None"),
        ("space_name", 7, "space_name cannot be 7"),
        ("asked.seed", MISSING, "asked.seed is missing"),
        ("versions", [1], "versions cannot be [1]"),
        ("asked", [1], "asked must be a mapping, but got [1]"),
        ("asked.pruner", "x", "asked.pruner is not known to this version"),
        ("asked.trials", "3", "asked.trials cannot be '3'"),
        ("asked.trials", 0, "--trials must be at least 1, but got 0"),
        ("asked.epochs", None, "asked.epochs cannot be None"),
        ("asked.epochs", 10**9, "asked.epochs must be >= 1 and <= 1000"),
        ("asked.metric", "accuracy", "asked.metric cannot be 'accuracy'"),
        ("asked.reduction_factor", math.nan, "asked.reduction_factor must be"),
        ("asked.time_budget", -1, "asked.time_budget must be >= 0"),
        ("asked.time_budget", 0, "--time-budget must be above 0 seconds"),
        ("precision", "fp8", "precision cannot be 'fp8'"),
        ("confirm", "yes", "confirm cannot be 'yes'"),
        ("storage", "ftp://here", "storage of the kind ftp:// is not known"),
        ("storage", "s3://b/f?secret_key=S", "must not hold a secret"),
        ("space", None, "must be a mapping"),
        ("space.parameters.lr.low", "a", "parameters.lr"),
    ],
)
def test_a_damaged_plan_is_one_line_that_names_the_file_and_what_is_wrong(
    folder: RunFolder, sound: str, entry: str, value: Any, reason: str
) -> None:
    folder.search.write_text(sound)
    data = folder.read_search()
    *parents, key = entry.split(".")
    mapping = reduce(getitem, parents, data)
    if value is MISSING:
        del mapping[key]
    else:
        mapping[key] = value
    folder.write_search(data)
    with pytest.raises(RunFolderError) as caught:
        Plan.load(folder)
    assert str(caught.value).startswith(f"{folder.search} is damaged (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_of_code_or_libraries_is_named(folder: RunFolder) -> None:
    plan = Plan.of(SearchSettings())
    plan.save(folder)
    data = folder.read_search()
    then = data["versions"]
    now = dict(then)
    then |= {"torch": "2.0.0", "code": "0123456789ab", "jax": "0.4"}
    del then["ray"]
    folder.write_search(data)
    assert plan.differences(folder, History(folder)) == [
        f"code was 0123456789ab, is now {now['code']}",
        "jax was 0.4, is now None",
        f"ray was None, is now {now['ray']}",
        f"torch was 2.0.0, is now {now['torch']}",
    ]


def test_a_changed_space_file_is_noticed_from_any_folder(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    space = Path("my space.yaml")
    space.write_text("parameters:\n  lr: {low: 0.001, high: 0.1}\n")
    Plan.of(SearchSettings(space=str(space))).save(folder)
    space.write_text("parameters:\n  lr: {low: 0.001, high: 0.2}\n  dropout: 0.1\n")
    monkeypatch.chdir(tmp_path)
    assert Plan.load(folder).differences(folder, History(folder)) == [
        f"{tmp_path}/here/my space.yaml: parameters.dropout was None, is now 0.1",
        f"{tmp_path}/here/my space.yaml: parameters.lr.high was 0.1, is now 0.2",
    ]
    (tmp_path / "here" / space).write_text("parameters: 7")
    (difference,) = Plan.load(folder).differences(folder, History(folder))
    assert "can no longer be used" in difference
    (tmp_path / "here").chmod(0)
    with as_nobody(folder.search):
        (difference,) = Plan.load(folder).differences(folder, History(folder))
    assert "can no longer be used: " in difference
    assert "Permission denied" in difference
    (tmp_path / "here").chmod(0o755)
    (tmp_path / "here" / space).unlink()  # what is gone has not changed
    assert Plan.load(folder).differences(folder, History(folder)) == []


def test_settings_changed_by_hand_are_told_or_refused(folder: RunFolder) -> None:
    plan = Plan.of(SearchSettings())
    history = History(folder)
    history.open_session({"asked": plan.rules.lasting})
    plan.save(folder)
    assert Plan.load(folder).differences(folder, History.load(folder)) == []
    history.start_trial(TrialRecord(0, TrainConfig(), 0, "baseline"), 0.0)
    history.add_epoch(epoch_row(0, 1, 0.5))
    sound = folder.search.read_text()
    folder.search.write_text(sound.replace("seed: 0", "seed: 7"))
    plan, history = Plan.load(folder), History.load(folder)
    plan.check_comparable(folder, history)
    assert [line.partition(": ")[2] for line in plan.differences(folder, history)] == [
        "seed was 0, is now 7",
    ]
    changes: dict[str, Any] = {"images": 600, "epochs": 3, "metric": "test_accuracy"}
    for name, now in changes.items():
        changed = replace(plan, rules=replace(plan.rules, **{name: now}))
        with pytest.raises(RunFolderError, match=f"{name} was .*, is now {now}: they could not"):
            changed.check_comparable(folder, history)
        changed.check_comparable(folder, History(folder))  # nothing is trained yet


def test_every_difference_of_nested_mappings_is_named() -> None:
    then = {"a": 1, "b": {"c": [1], "d": {"e": 2}}, "f": None}
    now = {"a": 1, "b": {"c": [2], "d": 3}, "g": 4}
    assert compare(then, now) == [
        "b.c was [1], is now [2]",
        "b.d was {'e': 2}, is now 3",
        "g was None, is now 4",
    ]
    assert compare(now, now) == []


def test_the_same_code_has_the_same_digest_wherever_it_is_installed(tmp_path: Path) -> None:
    source = Path(tune_mnist.__file__).parent
    installed = tmp_path / "site-packages" / "tune_mnist"
    shutil.copytree(source, installed)

    def digest() -> str:
        code = (
            "import tune_mnist; from tune_mnist.tuning.plan import versions;"
            "print(tune_mnist.__file__, versions()['code'])"
        )
        variables = environment(PYTHONPATH=installed.parent)
        done = python("-c", code, check=True, cwd=tmp_path, env=variables)
        file, found = done.stdout.split()
        assert file == str(installed / "__init__.py")
        return found

    assert digest() == versions()["code"]
    with (installed / "mnist" / "net.py").open("a") as file:
        file.write("\n")
    assert digest() != versions()["code"]
