"""Searches handed to a head's job server with `ray job submit`: stopped, resumed, refused."""

import os
import secrets
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from support.drivers import epochs_in, history_of, table_of
from support.heads import PATIENCE, RAY, free_ports, ray_head, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TRIALS, EPOCHS = 4, 60  # enough to be stopped in the middle


class JobServer:
    def __init__(self, port: int, environment: dict[str, str]) -> None:
        self._address, self._environment = f"http://127.0.0.1:{port}", environment
        headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
        self.client = JobSubmissionClient(self._address, headers=headers)

    def submit(self, name: str, *command: object, wait: bool) -> int:
        """Hand in a command together with the checkout and return the exit code."""
        options = ["--address", self._address, "--working-dir", ".", "--submission-id", name]
        options += [] if wait else ["--no-wait"]
        done = subprocess.run(
            [sys.executable, *RAY, "job", "submit", *options, "--", *map(str, command)],
            cwd=ROOT,
            env=os.environ | self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=PATIENCE,
        )
        return done.returncode

    def status(self, name: str) -> str:
        return str(self.client.get_job_status(name).value)


@pytest.fixture(scope="module")
def jobs() -> Iterator[JobServer]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    (port,) = free_ports(1)
    options = ("--port=0", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0")
    with ray_head(*options, ports=(port,), environment=environment):
        yield JobServer(port, environment)


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
            f"env PYTHONPATH=tests {sys.executable} -m support.scripted_search --no-report"
        ),
        "--space default --trials 500": f"{small} --grace-epochs {EPOCHS}",
    }.items():
        assert old in line
        line = line.replace(old, new)
    return shlex.split(line)


def test_a_job_is_stopped_in_order_and_the_same_job_again_resumes_its_search(
    jobs: JobServer, tmp_path: Path
) -> None:
    folder = tmp_path / "cpu"
    assert jobs.submit("first", *entrypoint(tmp_path), wait=False) == 0
    wait_until(lambda: epochs_in(folder) > 20 or jobs.status("first") == "FAILED")
    assert jobs.status("first") == "RUNNING", jobs.client.get_job_logs("first")
    jobs.client.stop_job("first")
    wait_until(lambda: jobs.status("first") == "STOPPED")
    assert history_of(folder).closed_as == "SIGTERM"
    assert f"--resume {folder}" in jobs.client.get_job_logs("first")
    assert 20 < epochs_in(folder) < TRIALS * EPOCHS

    assert jobs.submit("second", *entrypoint(tmp_path), wait=True) == 0
    assert jobs.status("second") == "SUCCEEDED"
    history = history_of(folder)  # which refuses rows that are doubled or out of order
    assert len(history.rows) == TRIALS * EPOCHS
    assert len(history.trials) == TRIALS
    assert {row["state"] for row in table_of(folder).values()} == {"complete"}
    log = jobs.client.get_job_logs("second")
    assert f"Trials: {TRIALS} complete" in log
    assert not control_characters(log)


def test_a_job_whose_search_cannot_start_fails_and_says_why(jobs: JobServer) -> None:
    command = (sys.executable, "-m", "tune_mnist.search", "--address", "auto", "--trails", 8)
    assert jobs.submit("mistyped", *command, wait=True) != 0
    assert jobs.status("mistyped") == "FAILED"
    assert jobs.client.get_job_info("mistyped").driver_exit_code == 2
    assert "Did you mean --trials?" in jobs.client.get_job_logs("mistyped")
