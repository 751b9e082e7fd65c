"""Start a Ray on this machine, or join a running one from one of its nodes or from outside."""

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

import tune_mnist
from tune_mnist.errors import ClusterError, one_line, root_cause
from tune_mnist.host import scratch
from tune_mnist.tuning import ray_patches

CONNECT_PATIENCE = 5.0  # seconds for a cluster's port to answer
ANSWER_PATIENCE = 10.0  # seconds for what is behind the port to answer as a Ray cluster does
CLIENT = "ray://"
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Path]:
    """Start Ray on this machine, or join the cluster at `address`, for as long as it is needed.

    The address is `auto` or HOST:PORT on one of the cluster's nodes, ray://HOST:PORT from outside.
    Yields a scratch folder. Raises ClusterError if Ray does not start, nothing answers there, or
    that cluster cannot be joined.
    """
    ray_patches.silence_dying_workers()
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is said in one line
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        with ray_patches.signals_left_to_us():
            if address is None:
                options = stack.enter_context(ray_patches.for_this_user_only(folder))
                stack.callback(ray.shutdown)
                _start(options)
            else:
                stack.callback(ray.shutdown)
                _join(address)
        yield folder


def _start(options: dict[str, Any]) -> None:
    """Start Ray on this machine, or raise ClusterError."""
    _check_loopback()
    try:
        with ray_patches.without_dashboard():
            _init(address="local", include_dashboard=False, **options)
    except Exception as error:
        raise ClusterError(
            f"Ray does not start on this machine: {one_line(root_cause(error))}; "
            "--address HOST:PORT uses a Ray that runs already"
        ) from error


def _check_loopback() -> None:
    """Fail at once where this machine cannot reach itself; Ray itself tries for minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=CONNECT_PATIENCE).close()
    except OSError as error:
        raise ClusterError(
            f"Ray does not start on this machine: its loopback device does not work ({error}); "
            "`ip link set lo up` starts it"
        ) from error


def _join(address: str) -> None:
    """Connect this process to a cluster, or raise ClusterError."""
    try:
        if address == "auto":
            address = ray_patches.address_of_this_node()
        _check_port(address)
        if address.startswith(CLIENT):
            ray_patches.use_token()
        else:
            _check_this_is_a_node(address)
        _join_with_package(address)
    except ClusterError:
        raise
    except Exception as error:
        raise ClusterError(_why_not(address, error)) from error


def _join_with_package(address: str) -> None:
    """Connect this process to a cluster whose workers are given this package."""
    runtime_env = ray_patches.runtime_env_with(Path(tune_mnist.__file__).parent)
    try:
        _init(address=address, runtime_env=runtime_env)
    except ConnectionAbortedError as error:
        if "Starting Ray client server failed" not in str(error):
            raise
        # Once more: a busy head may take longer to start a client's own server than Ray waits.
        _init(address=address, runtime_env=runtime_env)


def _init(**options: Any) -> None:
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)


def _check_port(address: str) -> None:
    """Fail within seconds if nothing answers; Ray itself tries for minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"--address must be 'auto', HOST:PORT or ray://HOST:PORT, got {address}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): "
            "start one with `ray start --head`, or leave --address out to run on this machine"
        ) from error


def _check_this_is_a_node(address: str) -> None:
    """Check that Ray answers and runs on this machine as well; else `ray.init` would abort."""
    try:
        client = _head_client(address)
    except AuthenticationError:
        ray_patches.use_token()
        client = _head_client(address)
    nodes = client.get_all_node_info(timeout=ANSWER_PATIENCE).values()
    # Each node's Ray listens at a path on that node's own disk.
    sockets = [node.raylet_socket_name for node in nodes if node.state == node.ALIVE]
    if not any(map(os.path.exists, sockets)):
        host = address.rpartition(":")[0]
        raise ClusterError(
            f"this machine is no node of the Ray cluster at {address}: search on one of its nodes "
            f"(`ray job submit`), give --address {CLIENT}{host}:10001 (its Ray Client port), or "
            f"make this machine one with `ray start --address={address} --num-cpus=0`"
        )


def _head_client(address: str) -> Any:
    """Connect to a head; Ray itself waits 40 s for a port that answers in another language."""
    client: Future[Any] = Future()

    def connect() -> None:
        try:
            client.set_result(ray_patches.head_client(address))
        except Exception as error:
            client.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    wait([client], ANSWER_PATIENCE)
    if not client.done():
        raise ClusterError(
            f"what listens at {address} does not answer as the head of a Ray cluster: give the "
            f"port that `ray start --head` names (6379), or {CLIENT}HOST:10001 for Ray Client"
        )
    return client.result()


def _why_not(address: str, error: Exception) -> str:
    """Return why a cluster cannot be joined and what to do."""
    cause = root_cause(error)
    reason = " ".join(str(cause).split())
    if "Version mismatch" in reason:
        (its_ray, its_python), (our_ray, our_python) = _VERSIONS.findall(reason)
        return (
            f"the Ray cluster at {address} runs Ray {its_ray} on Python {its_python}, this is "
            f"Ray {our_ray} on Python {our_python}: both must be the same; search with the "
            "cluster's versions, or start it with these"
        )
    if isinstance(cause, AuthenticationError):
        return (
            f"the Ray cluster at {address} asks for a token that this machine does not have: copy "
            "~/.ray/auth_token from its head to the same place here, or set RAY_AUTH_TOKEN"
        )
    if address.startswith(CLIENT) and "timeout" in reason:
        return (
            f"{address} does not answer as Ray Client does: give the head's Ray Client port "
            "(10001), and copy ~/.ray/auth_token from the head if it asks for a token"
        )
    return f"cannot join the Ray cluster at {address}: {reason[:300]}"
