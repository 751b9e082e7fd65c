"""A Ray of one's own, and searches on a cluster whose machines do not have this package."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import ray
from support.drivers import Searches, epochs_in, history_of, replace, searches_in
from support.scripted import Script, train_little

from tune_mnist.errors import ClusterError
from tune_mnist.mnist.data import default_data_dir
from tune_mnist.tuning.cluster import connected

SHOW_AGENTS = """
import contextlib
from pathlib import Path
import ray
from tune_mnist.tuning.cluster import connected
with connected(None):
    session = ray.get_runtime_context().get_session_name()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            for argument in command.read_text().split("\\0"):
                if argument.startswith("--dashboard_agent_command=") and session in argument:
                    print(argument)
"""


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="must be 'auto', HOST:PORT"), connected(address):
        pass


def test_an_address_that_nothing_answers_at_is_refused_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        refused = pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}")
        with refused, connected(address):
            pass


def test_a_ray_of_ones_own_has_no_web_server_to_wait_for() -> None:
    # In a process of its own: Ray leaves its token in the environment of the one it starts in.
    asked = subprocess.run(
        [sys.executable, "-c", SHOW_AGENTS], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "--minimal" in asked.stdout.split()


# What this project has installed and workers need not have.
LACKING = (
    *("tune_mnist", "optuna", "numba", "llvmlite", "scipy", "torchvision", "PIL", "plotly"),
    *("matplotlib", "rich", "tqdm", "cyclopts", "sqlalchemy"),
)
PATIENCE = 60.0  # seconds that a head may take to start


@dataclass(frozen=True)
class Head:
    """A Ray head that asks for a token."""

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
        done = subprocess.run([python, "-c", f"import {name}"], cwd=folder, capture_output=True)
        assert b"ModuleNotFoundError" in done.stderr
    return python


@pytest.fixture(scope="module")
def head(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head whose workers have that interpreter."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789" * 4)
    head = Head(home, *free_ports(2))
    command = [
        *(bare_python, "-c", "from ray.scripts.scripts import main; main()"),
        *("start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"),
        "--disable-usage-stats",
        *(f"--port={head.port}", f"--ray-client-server-port={head.client_port}"),
        *("--node-ip-address=127.0.0.1", f"--object-store-memory={300 << 20}"),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="tm-ray-") as temp_dir,  # sockets need a short path
        (home / "log").open("w") as log,
    ):
        process = subprocess.Popen(
            [*map(str, command), f"--temp-dir={temp_dir}"],
            cwd=home,
            env={**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for_ports(process, head.port, head.client_port)
            yield head
        finally:
            process.terminate()  # which ends what it has started
            process.wait(PATIENCE)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


def wait_for_ports(process: subprocess.Popen[bytes], *ports: int) -> None:
    deadline = time.monotonic() + PATIENCE
    waiting = list(ports)
    while waiting:
        assert process.poll() is None, "the head has ended"
        assert time.monotonic() < deadline, f"nothing listens at port {waiting[0]}"
        try:
            socket.create_connection(("127.0.0.1", waiting[0]), timeout=1).close()
            waiting.pop(0)
        except OSError:
            time.sleep(0.1)


@pytest.fixture(params=["", "ray://"], ids=["on a node", "from outside"])
def there(request: pytest.FixtureRequest, head: Head, tmp_path: Path) -> Iterator[Searches]:
    """Searches on that head, by its port or through Ray Client."""
    with searches_in(tmp_path, head.address(request.param)) as searches:
        yield searches


def move(home: Path, **changes: str) -> None:
    """Make a folder this process's home and its own: Ray has workers look into ours for code."""
    os.environ |= {"TUNE_MNIST_DATA": str(default_data_dir()), "HOME": str(home)}
    os.chdir(home)
    for name, value in changes.items():
        replace(ray, name, value)


def test_trials_train_where_this_package_is_not_installed(there: Searches, head: Head) -> None:
    arguments = ("run", "--trials", 2, "--epochs", 2)
    driver = there.start(*arguments, script=train_little, prepare=partial(move, head.home))
    assert driver.wait() == 0, driver.output
    history = history_of(there.folder("run"))
    assert [record.state for record in history.trials.values()] == ["complete"] * 2
    assert (there.folder("run") / "best.pt").exists()


def test_a_search_from_outside_is_interrupted_and_resumed(head: Head, tmp_path: Path) -> None:
    where = {"prepare": partial(move, head.home), "script": Script(seconds=0.1)}
    with searches_in(tmp_path, head.address("ray://")) as searches:
        folder = searches.folder("run")
        driver = searches.start("run", "--trials", 4, **where)
        driver.wait_until(lambda: epochs_in(folder) > 3)
        driver.send(signal.SIGTERM)
        assert driver.wait() == 128 + signal.SIGTERM, driver.output
        driver = searches.resume("run", **where)
        assert driver.wait() == 0, driver.output
        history = history_of(folder)
        assert len(history.trials) == 4
        assert not history.unfinished()


def test_a_cluster_of_another_version_is_refused_with_both(there: Searches, head: Head) -> None:
    driver = there.start("run", prepare=partial(move, head.home, __version__="2.59.1"))
    assert driver.wait() == 2
    ours = ".".join(map(str, sys.version_info[:3]))
    expected = f"runs Ray {ray.__version__} on Python {ours}, this is Ray 2.59.1 on Python {ours}"
    assert expected in driver.output
    assert not there.folder("run").exists()


def test_without_its_token_a_cluster_is_refused_with_what_to_do(
    head: Head, tmp_path: Path
) -> None:
    with searches_in(tmp_path, head.address()) as searches:
        driver = searches.start("run", prepare=partial(move, tmp_path))
        assert driver.wait() == 2
        assert "asks for a token" in driver.output
        assert "~/.ray/auth_token" in driver.output
