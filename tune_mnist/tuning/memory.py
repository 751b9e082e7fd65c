"""What Ray does where memory runs out, in a form that Tune survives."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

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
