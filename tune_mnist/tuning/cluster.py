"""Ray: start one on this machine, or join a running one, for as long as it is needed."""

import contextlib
import json
import logging
import os
import queue
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import AuthenticationError

import tune_mnist
from tune_mnist.errors import ClusterError


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Start Ray on this machine, or join the cluster at `address`, for as long as it is needed.

    Raises:
        ClusterError: nothing answers at the address, or it is not a cluster one can join.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray prints 900 characters about every worker that dies, with log_to_driver or without: right
    # into a live view. What befell a trial is in its reason.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if address is None:
        _start()
    else:
        join(address)
    try:
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    # Nobody looks at this Ray's dashboard. Where it is not installed, a node starts no web server
    # for it, and does not wait a second for that; or five, for its one port, beside another Ray.
    with mock.patch(
        "ray._private.utils.get_dashboard_dependency_error", return_value=ImportError()
    ):
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


# MERGED-DOC tuning.joining: Joining a Ray cluster that is already there, from one of its nodes or
# from outside.

CONNECT_PATIENCE = 5.0  # seconds for a cluster's port to answer
ANSWER_PATIENCE = 10.0  # seconds for what is behind the port to answer as a Ray cluster does
CLIENT = "ray://"
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")


def join(address: str) -> None:
    """Connect this process to the cluster at an address, and have the package travel along.

    Args:
        address: `auto` or HOST:PORT on one of the cluster's nodes, ray://HOST:PORT from outside.

    Raises:
        ClusterError: nothing answers there, or it is not a cluster one can join.
    """
    with _quiet():
        try:
            if address == "auto":
                address = canonicalize_bootstrap_address_or_die("auto")
            _check_port(address)
            if address.startswith(CLIENT):
                _use_token()
            else:
                _check_this_is_a_node(address)
            _init(address)
        except ClusterError:
            raise
        except Exception as error:
            raise ClusterError(_why_not(address, error)) from error


def _init(address: str) -> None:
    for last in (False, True):
        try:
            ray.init(
                address=address,
                runtime_env=_runtime_env(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except ConnectionAbortedError as error:
            # A head that is busy may take longer over a client's own server than Ray waits.
            if last or "Starting Ray client server failed" not in str(error):
                raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's warnings off the terminal; what they lead to is said in one line."""
    stderr = os.dup(2)  # some come from C++
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(stderr, 2)
        os.close(stderr)


def _check_port(address: str) -> None:
    """Fail within seconds where nothing answers; Ray itself would try for minutes."""
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
    """See that Ray answers and runs on this machine as well; without, ray.init would abort."""
    if not any(os.path.exists(path) for path in _sockets(address)):  # noqa: PTH110
        host = address.rpartition(":")[0]
        raise ClusterError(
            f"this machine is no node of the Ray cluster at {address}: search on one of its nodes "
            f"(`ray job submit`), give --address {CLIENT}{host}:10001 (its Ray Client port), or "
            f"make this machine one with `ray start --address={address} --num-cpus=0`"
        )


def _sockets(address: str) -> list[str]:
    """Return where each living node's Ray listens, on that node's own disk."""
    try:
        client = _gcs_client(address)
    except AuthenticationError:
        # Ray looks for a token by itself only where the address is not given.
        _use_token()
        client = _gcs_client(address)
    nodes = client.get_all_node_info(timeout=ANSWER_PATIENCE).values()
    return [node.raylet_socket_name for node in nodes if node.state == node.ALIVE]


def _use_token() -> None:
    """Show the token that this machine has, if any, to the cluster."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _gcs_client(address: str) -> Any:
    """Connect to a head; by itself Ray waits 40 s for a port that answers in another language."""
    answer: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answer.put(ray._raylet.GcsClient(address=address))  # type: ignore[attr-defined]
        except Exception as error:
            answer.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        found = answer.get(timeout=ANSWER_PATIENCE)
    except queue.Empty:
        raise ClusterError(
            f"what listens at {address} does not answer as the head of a Ray cluster: give the "
            f"port that `ray start --head` names (6379), or {CLIENT}HOST:10001 for Ray Client"
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


def _runtime_env() -> dict[str, Any]:
    """Return what workers are given: this package, beside what a submitted job has already."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("py_modules", [])
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    package = Path(tune_mnist.__file__).parent
    return {"py_modules": [*given, str(package)], "excludes": ["**/__pycache__"]}


def _why_not(address: str, error: Exception) -> str:
    """Say why a cluster cannot be joined and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
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
