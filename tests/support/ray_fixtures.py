"""One Ray for all tests that need one: a search that joins it starts in a second."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from support.drivers import Searches, searches_in


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node with two CPUs that only this process and its searches know."""
    with tempfile.TemporaryDirectory(prefix="tm-ray-") as temp_dir:  # sockets need a short path
        arguments = {
            "num_cpus": 2,
            "object_store_memory": 300 << 20,
            "include_dashboard": False,
            "temp_dir": temp_dir,
        }
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        try:
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def searches(cluster: Cluster, tmp_path: Path) -> Iterator[Searches]:
    with searches_in(tmp_path, cluster.address) as searches:
        yield searches
