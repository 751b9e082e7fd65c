"""Searches on a cluster that is there already, whose machines do not have this package."""

import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray
from support.drivers import Searches, history_of, replace, searches_in
from support.heads import free_ports, ray_head
from support.scripted import Script, train_little

from tune_mnist.mnist.data import default_data_dir

pytestmark = pytest.mark.slow

# What this project has installed and workers need not have.
LACKING = (
    *("tune_mnist", "optuna", "numba", "llvmlite", "scipy", "torchvision", "PIL", "plotly"),
    *("matplotlib", "rich", "tqdm", "cyclopts", "sqlalchemy"),
)
DATA = ("--data-dir", default_data_dir())


@dataclass(frozen=True)
class Head:
    home: Path  # where the token is
    port: int
    client_port: int

    def address(self, protocol: str = "") -> str:
        return f"{protocol}127.0.0.1:{self.client_port if protocol else self.port}"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with what workers need, and nothing else of what is installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("platlib", vars=variables))
    for installed in {sysconfig.get_path(name) for name in ("purelib", "platlib")}:
        for entry in Path(installed).iterdir():
            if not any(name.lower() in entry.name.lower() for name in LACKING):
                (site / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    for name in ("tune_mnist", "optuna"):
        command = [str(python), "-c", f"import {name}"]
        done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": ""}, capture_output=True)
        assert b"ModuleNotFoundError" in done.stderr
    return python


@pytest.fixture(scope="module")
def head(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789" * 4)
    head = Head(home, *free_ports(2))
    options = (
        *(f"--port={head.port}", f"--ray-client-server-port={head.client_port}"),
        *("--include-dashboard=false", "--node-ip-address=127.0.0.1"),
    )
    environment = {"HOME": str(home), "RAY_AUTH_MODE": "token", "PYTHONPATH": ""}
    ports = (head.port, head.client_port)
    with ray_head(*options, ports=ports, environment=environment, python=bare_python):
        yield head


@pytest.fixture(params=["", "ray://"], ids=["on a node", "from outside"])
def there(request: pytest.FixtureRequest, head: Head, tmp_path: Path) -> Iterator[Searches]:
    """Searches on that head, by its port or through Ray Client."""
    with searches_in(tmp_path, head.address(request.param)) as searches:
        yield searches


def move(home: Path, **changes: str) -> None:
    """Make a folder this process's home and its own: Ray has workers look into ours for code."""
    os.environ["HOME"] = str(home)
    os.chdir(home)
    for name, value in changes.items():
        replace(ray, name, value)


def test_trials_train_where_this_package_is_not_installed(there: Searches, head: Head) -> None:
    driver = there.start(
        *("run", "--trials", 2, "--epochs", 2, *DATA),
        script=train_little,
        prepare=partial(move, head.home),
    )
    assert driver.wait() == 0, driver.output
    history = history_of(there.folder("run"))
    assert [record.state for record in history.trials.values()] == ["complete"] * 2
    assert (there.folder("run") / "best.pt").exists()


def test_a_search_from_outside_is_interrupted_and_resumed(head: Head, tmp_path: Path) -> None:
    with searches_in(tmp_path, head.address("ray://")) as searches:
        script = Script(seconds=0.01, notes=searches.notes, held={0: (3,)})
        settings = {"script": script, "prepare": partial(move, head.home)}
        driver = searches.start("run", "--trials", 4, "--epochs", 4, *DATA, **settings)
        driver.wait_until(lambda: script.is_held(0, 3))
        driver.send(signal.SIGTERM)
        assert driver.wait() == 128 + signal.SIGTERM, driver.output
        script.release()
        driver = searches.resume("run", *DATA, **settings)
        assert driver.wait() == 0, driver.output
        history = history_of(searches.folder("run"))
        assert len(history.trials) == 4
        assert not history.unfinished()


def test_a_cluster_of_another_version_is_refused_with_both(there: Searches, head: Head) -> None:
    driver = there.start("run", *DATA, prepare=partial(move, head.home, __version__="2.59.1"))
    assert driver.wait() == 2
    ours = ".".join(map(str, sys.version_info[:3]))
    expected = f"runs Ray {ray.__version__} on Python {ours}, this is Ray 2.59.1 on Python {ours}"
    assert expected in driver.output
    assert not there.folder("run").exists()


def test_a_cluster_that_asks_for_a_token_says_so(head: Head, tmp_path: Path) -> None:
    with searches_in(tmp_path, head.address()) as searches:
        driver = searches.start("run", *DATA, prepare=partial(move, tmp_path))
        assert driver.wait() == 2
        assert "asks for a token" in driver.output
        assert "~/.ray/auth_token" in driver.output
