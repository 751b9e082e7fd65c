"""Tune through Ray Client: the search in this process, its trials on a cluster elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.train._internal import storage


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
