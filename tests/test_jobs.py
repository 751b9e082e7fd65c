"""Searches handed to a head's job server with `ray job submit`: stopped, resumed, refused."""

import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from support.drivers import epochs_in, history_of, table_of

ROOT = Path(__file__).parents[1]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PATIENCE = 120.0  # seconds that anything may take
TRIALS, EPOCHS = 4, 60  # enough to be stopped in the middle


class Head:
    """A head node with a job server, which needs a token, and a client of its."""

    def __init__(self, folder: str) -> None:
        port, token = free_port(), secrets.token_hex(32)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
        }
        options = {
            "port": 0,
            "dashboard-port": port,
            "dashboard-agent-listen-port": 0,
            "num-cpus": 2,
            "object-store-memory": 300 << 20,
            "temp-dir": folder,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", "--disable-usage-stats", *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: answers(port), self._process)
        self.address = f"http://127.0.0.1:{port}"
        self.client = JobSubmissionClient(
            self.address, headers={"Authorization": f"Bearer {token}"}
        )

    def submit(self, name: str, *command: object, wait: bool) -> int:
        """Hand in a command together with the checkout; returns the exit code."""
        where = ("--address", self.address, "--working-dir", ".", "--submission-id", name)
        done = subprocess.run(
            [*RAY, "job", "submit", *where, *(() if wait else ("--no-wait",)), "--"]
            + [str(each) for each in command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=PATIENCE,
        )
        return done.returncode

    def status(self, name: str) -> str:
        """Return what has become of a job."""
        return str(self.client.get_job_status(name).value)

    def close(self) -> None:
        """End the head."""
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with two CPUs, started as people do."""
    with tempfile.TemporaryDirectory(prefix="tm-ray-") as folder:  # sockets need a short path
        head = Head(folder)
        try:
            yield head
        finally:
            head.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            pytest.fail("waited in vain")
        time.sleep(0.1)


def control_characters(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) == "Cc"} - {"\n", "\t"}


def entrypoint(results: Path) -> list[str]:
    """The RayJob's command, word for word but for where results go and how small the search is."""
    _, job = yaml.safe_load_all((ROOT / "tune_mnist/deploy/rayjob-cpu.yaml").read_text())
    line: str = job["spec"]["entrypoint"]
    small = f"--space sgd --images 1000 --trials {TRIALS} --epochs {EPOCHS}"
    for old, new in {
        "/results": str(results),
        "python -m tune_mnist.search": (
            f"PYTHONPATH=tests {sys.executable} -m support.scripted_search --no-report"
        ),
        "--space default --trials 500": f"{small} --grace-epochs {EPOCHS}",
    }.items():
        assert old in line
        line = line.replace(old, new)
    return shlex.split(line)


def test_a_job_is_stopped_in_order_and_the_same_again_goes_on_with_its_search(
    head: Head, tmp_path: Path
) -> None:
    folder = tmp_path / "cpu"
    assert head.submit("first", *entrypoint(tmp_path), wait=False) == 0
    wait_until(lambda: epochs_in(folder) > 20 or head.status("first") == "FAILED")
    assert head.status("first") == "RUNNING", head.client.get_job_logs("first")
    head.client.stop_job("first")
    wait_until(lambda: head.status("first") == "STOPPED")
    assert history_of(folder).closed_as == "SIGTERM"
    assert f"--resume {folder}" in head.client.get_job_logs("first")
    assert 20 < epochs_in(folder) < TRIALS * EPOCHS

    assert head.submit("second", *entrypoint(tmp_path), wait=True) == 0
    assert head.status("second") == "SUCCEEDED"
    rows = [(record.number, row.epoch) for record, row in history_of(folder).rows]
    assert len(rows) == TRIALS * EPOCHS
    assert set(rows) == {(t, e) for t in range(TRIALS) for e in range(1, EPOCHS + 1)}
    assert {row["state"] for row in table_of(folder).values()} == {"complete"}
    log = head.client.get_job_logs("second")
    assert f"Trials: {TRIALS} complete" in log
    assert not control_characters(log)


def test_a_job_whose_search_cannot_start_fails_and_says_why(head: Head) -> None:
    command = (sys.executable, "-m", "tune_mnist.search", "--address", "auto", "--trails", 8)
    assert head.submit("mistyped", *command, wait=True) != 0
    assert head.status("mistyped") == "FAILED"
    assert head.client.get_job_info("mistyped").driver_exit_code == 2
    assert "Did you mean --trials?" in head.client.get_job_logs("mistyped")
