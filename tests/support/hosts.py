"""Separate hosts on one machine: network namespaces with addresses and disks of their own."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.exceptions import RpcError

import tune_mnist
from support.heads import PATIENCE, RAY, wait_until

CLONE_NEWNET = 0x40000000
# Ray finds a host that is cut off within ten seconds instead of half a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# Its own folders for Ray, and this package hidden: what runs there has only what it is sent.
OWN_DISK = """
mkdir -p /tmp/ray
for folder in /tmp/ray "$0" "$1"; do mount -t tmpfs tmpfs "$folder" || exit; done
shift; cd /; exec "$@"
"""


@dataclass(frozen=True)
class Host:
    name: str  # of its network namespace
    address: str

    def start_ray(self, *arguments: str, hidden: str | None = None) -> subprocess.Popen[bytes]:
        """Begin a Ray node here; with a folder to hide from it, on a disk of its own."""
        command = [
            *(sys.executable, *RAY, "start", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *(f"--node-ip-address={self.address}", f"--object-store-memory={200 << 20}"),
            *arguments,
        ]
        if hidden is not None:
            package = str(Path(tune_mnist.__file__).parent)
            command = ["sh", "-c", OWN_DISK, package, hidden, *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env={**os.environ, **QUICK, "RAY_AUTH_MODE": "disabled"},
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def cut_off(self) -> None:
        """Take it off the network; what runs there keeps running."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def kill(self) -> None:
        """End all that runs here as a power cut does."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def enter(self) -> None:
        """Move this process to this host."""
        with open(f"/run/netns/{self.name}") as namespace:  # noqa: PTH123
            if ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(f"could not enter {self.name}")


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Provide so many hosts that reach each other, and end all that runs on them.

    Where that is not permitted, the test is skipped.
    """
    mark = f"tm{os.getpid() % 100_000}"  # names of interfaces are short
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    hosts = [Host(f"{mark}-{n}", f"{subnet}.{n}") for n in range(1, count + 1)]
    try:
        try:
            ip("link", "add", mark, "type", "bridge")
            ip("address", "add", f"{subnet}.254/24", "dev", mark)  # this machine's own
            ip("link", "set", mark, "up")
            for n, host in enumerate(hosts):
                _connect(host, mark, f"{mark}v{n}")
        except (OSError, RuntimeError) as error:
            pytest.skip(f"needs root and iproute2 to make network namespaces: {error}")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(OSError, RuntimeError):
                host.kill()
                ip("netns", "delete", host.name)
        with contextlib.suppress(OSError, RuntimeError):
            ip("link", "delete", mark)


def _connect(host: Host, bridge: str, cable: str) -> None:
    ip("netns", "add", host.name)
    ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    ip("link", "set", cable, "master", bridge, "up")
    ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        ip("-n", host.name, "link", "set", interface, "up")


class Cluster:
    """Ray on hosts, the first of which is the head.

    The head has this machine's disk, so that searches that run there can be followed.
    """

    def __init__(self, head: Host, temp_dir: str) -> None:
        self.head, self.address, self.temp_dir = head, f"{head.address}:6379", temp_dir
        self._processes = [
            head.start_ray(
                *("--head", "--port=6379", "--include-dashboard=false"),
                f"--temp-dir={temp_dir}",
            )
        ]

    def add(self, *hosts: Host) -> None:
        self._wait_for([self.head])  # who comes before it is up gives up
        self._processes += [
            host.start_ray(f"--address={self.address}", hidden=self.temp_dir) for host in hosts
        ]
        self._wait_for(hosts)

    def _wait_for(self, hosts: Sequence[Host]) -> None:
        wait_until(lambda: {host.address for host in hosts} <= self.alive(), *self._processes)

    def alive(self) -> set[str]:
        """Return the addresses of the hosts that are alive as far as the head knows."""
        with contextlib.suppress(OSError, RpcError):
            socket.create_connection((self.head.address, 6379), timeout=1).close()
            client = ray._raylet.GcsClient(address=self.address)  # type: ignore[attr-defined]
            nodes = client.get_all_node_info(timeout=PATIENCE).values()
            return {node.node_manager_address for node in nodes if node.state == node.ALIVE}
        return set()


@contextlib.contextmanager
def ray_on(head: Host) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="tm-ray-", ignore_cleanup_errors=True) as temp_dir:
        cluster = Cluster(head, temp_dir)
        try:
            yield cluster
        finally:
            head.kill()
