"""What Ray does where memory runs out, in a form that Tune survives."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train._internal import storage

OUT_OF_MEMORY = "out of memory: Ray ended the worker; fewer trials at a time need less"


@contextlib.contextmanager
def memory_kills_survived() -> Iterator[None]:
    """Have Tune take a worker that Ray ended to save the machine for one that died.

    Tune 2.60 knows the errors of actors and of tasks only: one trial out of memory would end the
    whole search with `RuntimeError: Caught unexpected exception`.
    """
    manager: Any = RayActorManager
    original = manager._actor_task_failed

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=OUT_OF_MEMORY)
        original(self, tracked_actor_task=tracked_actor_task, exception=exception)

    manager._actor_task_failed = failed
    try:
        yield
    finally:
        manager._actor_task_failed = original


# MERGED-DOC tuning.client: Tune through Ray Client: the search in this process, its trials on a
# cluster elsewhere.


@contextlib.contextmanager
def staging_in(folder: str) -> Iterator[None]:
    """Have Tune keep its own files of this process in a folder.

    It would keep them with Ray's on this machine, where Ray Client has none; to get around that
    Tune would run the search on the cluster's head, and what it finds would end up there.
    """
    module: Any = storage
    original = module._get_ray_train_session_dir
    module._get_ray_train_session_dir = lambda: folder
    try:
        yield
    finally:
        module._get_ray_train_session_dir = original
