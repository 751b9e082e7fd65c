"""A Ray of one's own, and searches on a cluster whose machines do not have this package."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
from support.processes import environment, python

from tune_mnist.errors import ClusterError
from tune_mnist.tuning import cluster
from tune_mnist.tuning.cluster import connected

# What a Ray of one's own listens at, answers at and leaves behind.
SHOW = """
import json, os, socket, sys
import ray
import psutil  # Ray brings it
from tune_mnist.tuning.cluster import connected

def answers(address):
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect_ex(address) == 0

with connected(None) as scratch:
    ray.get(ray.remote(lambda: os.getpid()).remote())
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    listening = [
        socket.laddr
        for process in processes
        for socket in process.net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    ]
    others = [
        each.address
        for device in psutil.net_if_addrs().values()
        for each in device
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]
    found = {
        "hosts": sorted({each.ip.removeprefix("::ffff:") for each in listening}),
        "ports": len(listening),
        "open": [(ip, at.port) for ip in others for at in listening if answers((ip, at.port))],
        "minimal": any("--minimal" in argument for p in processes for argument in p.cmdline()),
        "mode": os.environ.get("RAY_AUTH_MODE"),
        "inside": str(scratch) in str(ray._private.worker._global_node.get_session_dir_path()),
        "private": scratch.parent.stat().st_mode & 0o077 == 0,
    }
print(json.dumps(found | {"left": scratch.exists(), "home": os.listdir(os.environ["HOME"])}))
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


def test_a_ray_of_ones_own_serves_this_user_on_this_machine_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """In a process of its own: Ray keeps what it has read. There is no web server to wait for."""
    shown = python("-c", SHOW, env=environment(HOME=tmp_path), check=True, umask=0)
    found = json.loads(shown.stdout)
    assert found.pop("ports") > 5
    assert (found.pop("hosts"), found.pop("mode")) == (["127.0.0.1"], "token")
    assert {name for name, holds in found.items() if holds} == {"minimal", "inside", "private"}


def test_a_machine_that_cannot_reach_itself_is_told_so_at_once() -> None:
    alone = ("unshare", "--user", "--map-root-user", "--net")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    code = "from tune_mnist.tuning.cluster import connected; connected(None).__enter__()"
    done = python("-c", code, prefix=alone)
    assert "ClusterError: Ray does not start on this machine: its loopback" in done.stderr


def test_whatever_keeps_ray_from_starting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Failed to start\nthe GCS") from OSError("no\nroom")

    monkeypatch.setattr(cluster, "_init", fail)
    with pytest.raises(ClusterError) as told, connected(None):
        pass
    assert str(told.value).startswith("Ray does not start on this machine: no room; --address")


@pytest.mark.slow
def test_a_process_can_start_one_ray_of_its_own_after_another() -> None:
    """As a search does that confirms its winners at its end."""
    code = "from tune_mnist.tuning.cluster import connected\n"
    code += "for _ in range(2):\n    with connected(None): pass\n"
    python("-c", code, check=True, timeout=120)
