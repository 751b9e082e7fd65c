"""Ray: start one on this machine, or join a running one, for as long as it is needed."""

import contextlib
import logging
import os
from collections.abc import Iterator
from unittest import mock

import ray

from tune_mnist.tuning.joining import join


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
