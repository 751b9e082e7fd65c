import hashlib
from pathlib import Path

import numpy as np
import pytest
from support.processes import python

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.data import Mnist, choose_stratified, default_data_dir, load_mnist, split

# Of the 5,000 indices as little-endian 64-bit integers. A change here makes every val_* ever
# written incomparable with new ones.
HOLDOUT_SHA256 = "38b41b464756f7bbf71f6dc328d84a8444ce5233c7992d408babd9608fb6076e"


def test_mnist_is_what_was_published(mnist: Mnist) -> None:
    assert mnist.train_images.shape == (60_000, 28, 28)
    assert mnist.test_images.shape == (10_000, 28, 28)
    assert {array.dtype for array in vars(mnist).values()} == {np.dtype(np.uint8)}
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    # So that torch takes them without a copy.
    assert all(array.flags.writeable for array in vars(mnist).values())
    # The mean and deviation that everybody normalizes MNIST by.
    assert mnist.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert mnist.train_images.std() / 255 == pytest.approx(0.3081, abs=5e-5)


def test_torchvision_reads_the_same_from_the_same_folder(mnist: Mnist) -> None:
    from torchvision.datasets import MNIST

    theirs = MNIST(default_data_dir(), train=False)
    assert np.array_equal(theirs.data.numpy(), mnist.test_images)
    assert np.array_equal(theirs.targets.numpy(), mnist.test_labels)


def test_reading_the_files_imports_no_torch(mnist: Mnist) -> None:
    program = """
import sys
from tune_mnist.mnist.data import load_mnist, split
split(load_mnist(), holdout=True)
sys.exit(" ".join({"torch", "torchvision", "rich", "pandas"} & set(sys.modules)) or None)
"""
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_holdout_never_changes_and_has_the_classes_in_proportion(
    mnist: Mnist, small_mnist: Mnist
) -> None:
    chosen = choose_stratified(mnist.train_labels, 5_000)
    assert hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest() == HOLDOUT_SHA256
    held_out = split(mnist, holdout=True)
    assert np.array_equal(held_out.val_images, mnist.train_images[chosen])
    assert np.array_equal(held_out.val_labels, mnist.train_labels[chosen])
    counts = np.bincount(held_out.val_labels)
    assert counts.tolist() == [494, 562, 496, 511, 487, 452, 493, 522, 487, 496]
    assert np.abs(counts - np.bincount(mnist.train_labels) / 12).max() < 1
    assert len(split(small_mnist, holdout=True).val_labels) == 100  # of 1,200
    # With the training images it is all the images.
    assert len(held_out.train_images) == len(held_out.train_labels) == 55_000
    parts = np.concatenate([held_out.train_images, held_out.val_images])
    assert sorted(map(bytes, parts)) == sorted(map(bytes, mnist.train_images))


def test_without_a_holdout_all_images_train_in_their_own_order(mnist: Mnist) -> None:
    whole = split(mnist, holdout=False)
    assert np.array_equal(whole.train_images, mnist.train_images)
    assert np.array_equal(whole.train_labels, mnist.train_labels)
    assert whole.val_images.shape == (0, 28, 28)
    assert whole.val_labels.shape == (0,)
    for parts in (whole, split(mnist, holdout=True, images=100)):  # the test set is never touched
        assert np.array_equal(parts.test_images, mnist.test_images)
        assert np.array_equal(parts.test_labels, mnist.test_labels)


@pytest.mark.parametrize("images", [1, 10, 4_096, 55_000])
def test_fewer_images_leave_the_holdout_as_it_is(mnist: Mnist, images: int) -> None:
    few, again, full = (split(mnist, holdout=True, images=n) for n in (images, images, None))
    assert len(few.train_images) == len(few.train_labels) == images
    assert np.array_equal(few.train_images, again.train_images)
    assert np.array_equal(few.val_images, full.val_images)
    shares = np.bincount(few.train_labels, minlength=10) / images
    expected = np.bincount(full.train_labels) / 55_000
    assert np.abs(shares - expected).max() < 1 / images


@pytest.mark.parametrize(
    ("holdout", "images", "limit"),
    [(True, 55_001, "55,000"), (False, 60_001, "60,000"), (True, 0, "55,000"), (True, -1, "1 to")],
)
def test_a_number_of_images_that_cannot_be_is_refused(
    mnist: Mnist, holdout: bool, images: int, limit: str
) -> None:
    with pytest.raises(ConfigError, match=limit):
        split(mnist, holdout=holdout, images=images)


def test_the_data_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chosen, cache, expected in (
        (str(tmp_path / "chosen"), "", tmp_path / "chosen"),
        ("~/mnist", "", Path.home() / "mnist"),
        ("", str(tmp_path), tmp_path / "tune_mnist"),
        ("", "relative", Path.home() / ".cache" / "tune_mnist"),
    ):
        monkeypatch.setenv("TUNE_MNIST_DATA", chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert default_data_dir() == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_data_dir() == Path.home() / ".cache" / "tune_mnist"


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "data", Path("/proc/mnist")):
        with pytest.raises(ConfigError, match=f"^cannot write MNIST to {path}.*--data-dir.*$"):
            load_mnist(path)
