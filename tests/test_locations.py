"""What users' paths and URIs mean, which of them are one place, and what is shown of them."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.disks import mount

import tune_mnist
from tune_mnist.benchmarks import settings as benchmarks
from tune_mnist.cli import exit_code
from tune_mnist.errors import ConfigError, InvalidInputError
from tune_mnist.locations import (
    check_run_name,
    is_remembered,
    masked,
    overlap,
    remember_storage,
    storage_uri,
    tracking_uri,
    user_path,
)
from tune_mnist.mnist.data import default_data_dir
from tune_mnist.predict import PredictSettings
from tune_mnist.report import ReportSettings
from tune_mnist.runs.space import load_space
from tune_mnist.train import TrainSettings
from tune_mnist.tuning.settings import ConfirmSettings, SearchSettings

SECRET = "S3kr1t"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("~", "{home}"),
        ("~/x y", "{home}/x y"),
        ("~root/x", "{root}/x"),
        ("./~/x", "~/x"),
        ("a/~", "a/~"),
        ("../x", "../x"),
        ("file:///a%20b/c", "/a b/c"),
    ],
)
def test_a_path_is_what_a_shell_makes_of_it(home: Path, text: str, meant: str) -> None:
    root = os.path.expanduser("~root")  # noqa: PTH111
    assert user_path(text) == Path(meant.format(home=home, root=root))


@pytest.mark.parametrize(
    "text", ["", "a\0b", "~nobody-of-this-name/x", "s3://bucket/x", "s3:/bucket/x", "http://h/x"]
)
def test_what_is_no_path_is_refused(text: str) -> None:
    for read in (user_path, load_space, tune_mnist.load):
        with pytest.raises(InvalidInputError) as caught:
            read(text)
        assert "\n" not in str(caught.value)


SETTINGS = [
    *(SearchSettings, ConfirmSettings, TrainSettings, ReportSettings, PredictSettings),
    *(found for name, found in vars(benchmarks).items() if name.endswith("Settings")),
]


@pytest.mark.parametrize(
    ("door", "option"),
    [
        (settings, entry.name)
        for settings in SETTINGS
        for entry in fields(settings)
        if "Path" in str(entry.type)
    ],
)
def test_every_option_that_takes_a_path_expands_it(home: Path, door: type, option: str) -> None:
    made: list[Any] = []
    argument = f"--{option.replace('_', '-')}=~/x"
    assert exit_code("door", door, made.append, [argument]) == 0
    assert getattr(made[0], option) in (home / "x", (home / "x",))


@pytest.mark.parametrize("file", ["search.yaml", "events.jsonl", "epochs.csv"])
@pytest.mark.parametrize(
    ("door", "option"), [(ReportSettings, "--output"), (TrainSettings, "--save")]
)
def test_no_output_is_written_over_what_a_run_cannot_do_without(
    tmp_path: Path, file: str, door: type, option: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / file)
    for name in (file, "link"):
        assert exit_code("door", door, lambda _: None, [option, str(tmp_path / name)]) == 0
    (tmp_path / "search.yaml").touch()
    for name in (file, "link"):
        assert exit_code("door", door, lambda _: None, [option, str(tmp_path / name)]) == 2


def test_other_places_of_paths_expand_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_MNIST_DATA", "~/data")
    assert default_data_dir() == home / "data"
    (home / "mine.yaml").write_text("parameters: {lr: {low: 0.1, high: 0.2}}")
    assert load_space("~/mine.yaml").source == str(home / "mine.yaml")
    assert storage_uri("~/copies") == f"file://{home}/copies"
    assert tracking_uri("~/runs") == str(home / "runs")
    assert tracking_uri("databricks") == "databricks"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a/b", "must be a plain name, without folders, but got 'a/b'"),
        ("a/", "must be a plain name, without folders"),
        ("", "must be a plain name, without folders"),
        ("..", "must be a plain name, without folders"),
        (
            "n" * 300,
            "must be a name of at most 255 bytes, but got one of 300: nnnnnnnnnnnnnnnnnnnn...",
        ),
        ("ä" * 128, "must be a name of at most 255 bytes, but got one of 256"),
        ("a\0b", r"must be a name of printable characters, but got 'a\x00b'"),
        ("a\nb", r"must be a name of printable characters, but got 'a\nb'"),
        ("a\x1b[31m", r"must be a name of printable characters, but got 'a\x1b[31m'"),
        ("a\udcff", r"must be a name of printable characters, but got 'a\udcff'"),
    ],
)
def test_a_run_name_that_cannot_be_one_is_at_fault_itself(name: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SearchSettings(run=name)
    assert str(caught.value).startswith(f"--run {rule}")


def test_a_run_name_may_be_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "ä" * 127, "a b", "-", ".a"):
        check_run_name(name)
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3a://bucket/runs", "s3a:// is not known (did you mean 's3'?): use s3://, gs://"),
        ("s3:/bucket/runs", "is no path"),
        ("s3:///runs", "names no bucket: s3://BUCKET/FOLDER"),
        (f"s3://key:{SECRET}@bucket/runs", "must not hold a secret"),
        (f"s3://key:{SECRET}/{SECRET}@bucket/runs", "must not hold a secret"),
        (f"s3://key:{SECRET}/{SECRET}", "must not hold a secret"),
        (f"s3://{SECRET}@bucket/runs", "must not hold a secret"),
        (f"s3://b/f?access_key=A&secret_key={SECRET}", "must not hold a secret"),
        (f"s3://b/f?session_token={SECRET}", "must not hold a secret"),
        (f"s3://b/f?X-Amz-Signature={SECRET}", "must not hold a secret"),
        (f"s3://b/f?{SECRET}", "must not hold a secret"),
        (f"s3://b/f?endpoint_override=u:{SECRET}@host", "must not hold a secret"),
        (f"s3://b/f#{SECRET}", "write # as %23"),
        ("s3://b/f?regoin=x", "(did you mean 'region'?)"),
        ("s3://[b/f", "is no URI"),
        (f"gs://b/f?access_token={SECRET}", "must not hold a secret"),
        (f"abfs://account:{SECRET}@host/f", "must not hold a secret"),
        (f"abfs://c@host/f?client_secret={SECRET}", "must not hold a secret"),
        (f"abfs://c@host/f?sig={SECRET}", "must not hold a secret"),
        ("file:///f?x=1", "is not among none"),
        ("file://host/f", "must be a whole path: file:///FOLDER"),
        ("file://~/f", "must be a whole path: file:///FOLDER"),
        ("file:///~/f", "must be a whole path: file:///FOLDER"),
        ("", "a path was expected"),
    ],
)
def test_storage_that_cannot_be_meant_is_refused_and_no_secret_is_shown(
    text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for option in ("--storage", "--resume"):
        if option == "--resume" and "://" not in text:
            continue  # a folder
        assert exit_code("search", SearchSettings, lambda _: None, [f"{option}={text}"]) == 2
        said = "".join(capfd.readouterr())
        assert message in said
        assert SECRET not in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "s3://b/f?region=x&endpoint_override=127.0.0.1:9000&scheme=http",
        "s3://b/me@home",
        "gs://anonymous@b/f",
        "abfs://container@account.dfs.core.windows.net/f?enable_tls=true",
    ],
)
def test_storage_is_taken_as_it_is_named(text: str) -> None:
    assert storage_uri(text) == masked(text) == text
    assert storage_uri(text.replace("/f", "/f/")) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"http://user:{SECRET}@host", "MLFLOW_TRACKING_USERNAME"),
        (f"https://{SECRET}@host:5000", "MLFLOW_TRACKING_TOKEN"),
        (f"http://host?token={SECRET}", "MLFLOW_TRACKING_TOKEN"),
        ("sqlite:///~/mlflow.db", "write the home folder in full"),
        ("file:///~/mlruns", "write the home folder in full"),
    ],
)
def test_an_mlflow_uri_holds_no_secret(
    text: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("search", SearchSettings, lambda _: None, ["--mlflow", text]) == 2
    said = capfd.readouterr().err
    assert message in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no URI: a@b?c=d", "no URI: a@b?c=d"),
        (f"at postgresql://me:{SECRET}@h/db?sslmode=x: no", "at postgresql://***@h/db?***"),
        (f"http://{SECRET}@h/x", "http://***@h/x"),
        (f"http://u:{SECRET}#{SECRET}@h/x", "http://***@h/x"),
        (f"s3://b/f?region=x&secret_key={SECRET}", "s3://b/f?region=x&***"),
        (
            f"storage: s3://A:{SECRET}/x@b/f\nconfirm: false",
            "storage: s3://***@b/f\nconfirm: false",
        ),
        ("abfs://c@a/f", "abfs://c@a/f"),
    ],
)
def test_what_is_shown_of_a_uri_is_no_secret(text: str, shown: str) -> None:
    assert masked(text).startswith(shown)
    assert SECRET not in masked(text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("run", "run", True),
        ("run", "./here/../run/", True),
        ("run", "run/x/y", True),
        ("here/run", "here", True),
        ("run", "runs", False),
        ("run", "here/run", False),
        ("link", "run", True),  # to it
        ("run", "link/x", True),
        ("to-none/x", "none/x", True),  # of which neither exists
        ("none/x", "none/y", False),
        ("circle", "run", False),
    ],
)
def test_one_place_is_known_by_all_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str, same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "here"):
        Path(folder).mkdir()
    for link, target in (("link", "run"), ("to-none", "none"), ("circle", "circle")):
        Path(link).symlink_to(target)
    for name in (Path(other), tmp_path / other):
        assert overlap(Path(one), name) == overlap(name, Path(one)) == same


def test_one_place_is_known_through_mounts(tmp_path: Path) -> None:
    for folder in ("run", "there"):
        (tmp_path / folder).mkdir()
    with mount("--bind", str(tmp_path / "run"), at=tmp_path / "there"):
        assert overlap(tmp_path / "run", tmp_path / "there" / "x")


@pytest.mark.parametrize(
    ("variables", "user", "remembers"),
    [
        ({}, 0, True),
        ({"XDG_STATE_HOME": "{}/state"}, 0, True),
        ({"HOME": "/proc/nowhere"}, 0, False),
        ({}, 1, False),  # it is another's home
    ],
)
def test_a_storage_is_remembered_for_its_user(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    user: int,
    remembers: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + user)
    assert not is_remembered("s3://b/f")
    for _ in range(2):
        remember_storage("s3://b/f")
    assert is_remembered("s3://b/f") == remembers
    assert not is_remembered("s3://b")
    assert {path.stat().st_mode & 0o777 for path in home.rglob("storages")} <= {0o600}
