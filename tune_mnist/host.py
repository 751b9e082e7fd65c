"""Where this machine lets a process keep things: a home, caches, scratch folders with sockets.

Containers, read-only installations and clusters lack some of what libraries take for granted. HOME
may be unset, missing or read-only, the user a number without a name, TMPDIR full or too long for a
socket's path. What is made here in a folder that others share is this user's alone (mode 700),
whatever the umask.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tune_mnist.errors import TuneMnistError

SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
BELOW_SCRATCH = 66  # bytes of them that Ray's own names take: its session's, its sockets'
LEAST_FREE = 100 << 20  # bytes: Ray's logs, and what shared memory has no room for
_PREFIX, _LOCK, _INSIDE = "tm-", "lock", "w"
REMOVAL = 2.0  # seconds for processes that are ending to stop writing


def settle() -> None:
    """Give the libraries of this process and its children a home and a cache, where they lack it.

    Ray asks for a home when it is imported, matplotlib warns where it can keep nothing.
    """
    with contextlib.suppress(TuneMnistError):  # they say themselves what they cannot do
        if home() is None:
            os.environ["HOME"] = str(cache_dir())
        own = os.environ.get("MPLCONFIGDIR")
        folders = [own] if own else [xdg("CONFIG", ".config"), xdg("CACHE", ".cache")]
        if not all(each and _is_writable(Path(each, "matplotlib")) for each in folders):
            os.environ["MPLCONFIGDIR"] = str(cache_dir() / "matplotlib")


def home() -> Path | None:
    """Return the user's home folder if there is one."""
    try:
        found = Path.home()
    except RuntimeError:  # HOME is unset and the user's number has no name
        return None
    return found if found.is_absolute() and os.path.isdir(found) else None  # noqa: PTH112


def xdg(kind: str, default: str) -> Path | None:
    """Return XDG_<kind>_HOME or what stands for it in the home folder, None without a home."""
    named = Path(os.environ.get(f"XDG_{kind}_HOME", ""))
    if named.is_absolute():  # else it is to be ignored, says the standard
        return named
    found = home()
    return found and found / default


def cache_dir(holding: str = "") -> Path:
    """Return this user's folder for what can be made again.

    That is `tune_mnist` in the cache folder, if it can be written or has the entry `holding`
    already; else a folder among the temporary ones. Raise TuneMnistError if there is none.
    """
    usual = xdg("CACHE", ".cache")
    found = usual and usual / "tune_mnist"
    if found and (_is_writable(found) or (holding and os.path.exists(found / holding))):  # noqa: PTH110
        return found
    for folder in temporary_folders():
        with contextlib.suppress(OSError):
            return _made_private(folder / f"tune_mnist-{os.geteuid()}")
    raise TuneMnistError(
        "there is no folder for caches that this user can write and others cannot: name one with "
        "XDG_CACHE_HOME"
    )


def temporary_folders() -> list[Path]:
    """Return the folders that may take temporary files, the one that the user named first."""
    named = (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR"))
    return [Path(each) for each in (*named, "/dev/shm") if each and Path(each).is_absolute()]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Provide a new folder for temporary files and Ray's sockets, and remove it at the end.

    What cannot be removed then, or belonged to a process that was killed, a later call removes.
    """
    outer, lock = _new_scratch()
    try:
        yield outer / _INSIDE
    finally:
        _remove(outer, REMOVAL)
        os.close(lock)


def _new_scratch() -> tuple[Path, int]:
    """Make a scratch folder in the first place that has room, and lock it."""
    reasons = []
    for folder in temporary_folders():
        try:
            _check_for_sockets(folder)
            outer = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            (outer / _INSIDE).mkdir()
            lock = _locked(outer)
            _remove_leftovers(folder)
        except OSError as error:
            reasons.append(f"{folder} ({error.strerror})")
        else:
            return outer, lock
    raise TuneMnistError(
        f"there is no folder for temporary files: {', '.join(reasons)}; make room there, or name "
        "one with TMPDIR"
    )


def _check_for_sockets(folder: Path) -> None:
    """Raise OSError unless a folder can have Ray's sockets below it and has room."""
    text = str(folder)
    longest = SOCKET_PATH - BELOW_SCRATCH - len(f"/{_PREFIX}12345678/{_INSIDE}")
    if not text.isascii() or any(map(str.isspace, text)) or len(text) > longest:
        raise OSError(0, "its path is too long, or not plain enough, for sockets")
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError(0, "full")


def _locked(outer: Path) -> int:
    """Lock a scratch folder for as long as this process lives, and return the lock's descriptor.

    Raise BlockingIOError if another process holds the lock.
    """
    lock = os.open(outer / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_leftovers(folder: Path) -> None:
    """Remove this user's scratch folders whose processes have died."""
    for outer in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if (outer / _LOCK).lstat().st_uid == os.geteuid() and not outer.is_symlink():
                lock = _locked(outer)
                _remove(outer, patience=0.0)
                os.close(lock)


def _remove(outer: Path, patience: float) -> None:
    """Remove a scratch folder into which processes that are ending may still write.

    The lock goes last: with it a later call finds what was left.
    """
    deadline = time.monotonic() + patience
    while True:
        shutil.rmtree(outer / _INSIDE, ignore_errors=True)
        if not (outer / _INSIDE).exists():
            shutil.rmtree(outer, ignore_errors=True)
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _is_writable(folder: Path) -> bool:
    """Return True if a folder can be written, or made in what exists above it."""
    while not os.path.exists(folder):  # noqa: PTH110 (Path's raises where looking is forbidden)
        folder = folder.parent
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)  # noqa: PTH112


def _made_private(folder: Path) -> Path:
    """Make a folder whose name others can guess, or raise OSError if it is not ours alone."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(0, "belongs to others", str(folder))
    return folder
