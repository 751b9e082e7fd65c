"""Every private name of Ray that this package uses, and every variable that steers Ray's inside.

All were read and tried in the versions in `CHECKED`. A test insists on one of these versions, and
that no other file mentions such a name. Each one says what goes wrong without it.
"""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution.resources.placement_group import PlacementGroupAcquiredResources
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train._internal import storage
from ray.tune.experiment import Trial

CHECKED = ("2.60.0",)

DRIVER_ENVIRONMENT = {
    # Tune's own bookkeeping would write every result a second time, and take snapshots of what
    # the run's folder holds already.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # else 1; the searcher knows when there is room
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the session has its own
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's display
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune retries by itself
}
# A worker that takes longer to let go of one trial is lost to the next, and Tune tells nobody: its
# own 2 s are little on a crowded machine.
WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "120"}
# For `tune.run`, which with Ray Client otherwise moves the search, and its results, to the head.
IN_THIS_PROCESS: dict[str, Any] = {"_remote": False}
# For a `Cluster`'s head, which otherwise starts a worker for each CPU as soon as a driver joins.
NO_WORKERS_AHEAD = {"_system_config": {"prestart_worker_first_driver": False}}

_LOOPBACK_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nodes are at 127.0.0.1 and listen only there
    "no_grpc_proxy": "127.0.0.1",  # which no proxy reaches, if RAY_grpc_enable_http_proxy is on
}
_STORE = 300 << 20  # bytes of an object store outside of shared memory: MNIST, states on their way

OUT_OF_MEMORY = "out of memory: Ray ended the worker; fewer trials at a time need less"


def without_dashboard() -> contextlib.AbstractContextManager[Any]:
    """Have a Ray that is started meanwhile start no web server on its nodes, as if it lacked one.

    It would wait 1 s for it, or 5 s for its one port if another Ray runs on the machine.
    """
    name = "ray._private.utils.get_dashboard_dependency_error"
    return mock.patch(name, return_value=ImportError())


# One for all Rays that this process starts: its C++ part reads a token once.
_TOKEN = secrets.token_hex(32)


@contextlib.contextmanager
def for_this_user_only(scratch: Path) -> Iterator[dict[str, Any]]:
    """Keep a Ray that is started meanwhile on this machine, to this user and in this folder.

    Otherwise all its ports are open to the network, its files lie in a folder that every user can
    write, and it writes the token that it asks for into the home folder, which may be read-only.
    Yields the options for `ray.init`.
    """
    variables = _LOOPBACK_ENVIRONMENT | {"TMPDIR": str(scratch)}
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        variables["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN", _TOKEN)
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False),
    ):
        os.environ.pop("RAY_REDIS_ADDRESS", None)  # of a cluster; if it is dead, Ray aborts
        yield {"_temp_dir": str(scratch), **_store_options(scratch)}


def _store_options(scratch: Path) -> dict[str, Any]:
    """Return where the object store lies, where Ray would fail to find that out."""
    if os.access("/dev/shm", os.R_OK | os.W_OK | os.X_OK):
        return {}  # if it is too small, Ray itself takes its temporary folder
    return {"_plasma_directory": str(scratch), "object_store_memory": _STORE}


@contextlib.contextmanager
def signals_left_to_us() -> Iterator[None]:
    """Have a Ray that is started or joined meanwhile leave signals to this process.

    It would end this process at SIGTERM in its own way. And its processes would die of a signal to
    this one's group, as `timeout` and a terminal that closes send it, and take this process along
    before it has ended in order. Where Linux does not end them with this one, Ray needs the group.
    """
    with mock.patch("ray._private.utils.set_sigterm_handler"):
        if sys.platform != "linux":
            yield
            return
        popen = partial(services.ConsolePopen, start_new_session=True)
        with mock.patch.object(services, "ConsolePopen", popen):
            yield


def silence_dying_workers() -> None:
    """Keep Ray from printing 900 characters for each worker that dies, whatever it was told."""
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def address_of_this_node() -> str:
    """Return the HOST:PORT that `auto` means; raise ConnectionError unless one cluster is here."""
    return str(canonicalize_bootstrap_address_or_die("auto"))


def use_token() -> None:
    """Show this machine's token, if any, to a cluster that refuses us without one."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def head_client(address: str) -> Any:
    """Connect to the head of a cluster; `get_all_node_info` of the result returns the nodes.

    They are asked for first: where this machine is none of them, `ray.init` aborts the process.
    """
    return ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]


def runtime_env_with(package: Path) -> dict[str, Any]:
    """Return a runtime environment with a package, beside the modules of a submitted job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("py_modules", [])
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # else Ray refuses to have both
    return {"py_modules": [*given, str(package)], "excludes": ["**/__pycache__"]}


def staging_in(folder: str) -> contextlib.AbstractContextManager[Any]:
    """Have Tune keep this process's files in a folder; with Ray Client, the default is missing."""
    return mock.patch.object(storage, "_get_ray_train_session_dir", lambda: folder)


def memory_kills_survived() -> contextlib.AbstractContextManager[Any]:
    """Have Tune treat a worker that Ray ended to save the machine's memory as one that died.

    Tune expects errors of actors and of tasks only; at any other it ends the whole search with
    `RuntimeError: Caught unexpected exception`.
    """
    original = RayActorManager._actor_task_failed

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=OUT_OF_MEMORY)
        original(self, tracked_actor_task=tracked_actor_task, exception=exception)

    return mock.patch.object(RayActorManager, "_actor_task_failed", failed)


def callbacks_not_counted() -> contextlib.AbstractContextManager[Any]:
    """Have Tune not count its own callbacks among ours.

    To know them it imports all of MLflow, where that is installed: a second of CPU time a start.
    """
    return mock.patch("ray.air._internal.usage.tag_callbacks")


def actor_of(trial: Trial) -> Any:
    """Return the handle of a trial's worker, to end one that hangs; None if it has none."""
    return trial.temporary_state.ray_actor


def actors_replaced(stand_in: Any) -> contextlib.AbstractContextManager[Any]:
    """Have Tune start its trials' actors by `stand_in.remote(…)`."""
    owner, where_an_actor_is_placed = PlacementGroupAcquiredResources, "_annotate_remote_entity"
    return mock.patch.object(owner, where_an_actor_is_placed, lambda *_, **__: stand_in)
