"""Reading and writing the files of a run's folder, which may come from anywhere.

Only plain files are opened there, never a pipe, a device or what a link leads to. What is read is
bounded, and checked against the types and limits of a dataclass's fields. Neither a reader nor a
later session sees half a file: whole files are written under a temporary name, then renamed; logs
grow by whole lines, and the next writer drops a line that a killed process left unfinished.
"""

import contextlib
import errno
import fcntl
import math
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tune_mnist.errors import RunFolderError, SearchFailedError, shown
from tune_mnist.mnist.config import LARGEST_YAML, Limits, TrainConfig, parse_yaml

Record = TypeVar("Record")
Count = Annotated[int, Limits(">= 0", "<= 1e9")]
Seconds = Annotated[float, Limits(">= 0", "<= 1e9")]

_LARGEST = 1 << 26  # bytes of a file that is read whole
_LONGEST_LOG = 1 << 30
_LONGEST_TEXT = 10_000  # characters
_FINITE = Limits(">= -1e300", "<= 1e300")
_FOR_READERS = 1.0  # seconds; a reader that looks whether a file is locked has it for an instant


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a plain file and return its descriptor; anything else is an OSError."""
    # Without O_NONBLOCK, a pipe would be waited for.
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))


def read_plain(path: Path, at_most: int = _LARGEST) -> bytes:
    """Return the content of a plain file, or raise OSError if there is none or it is larger."""
    with os.fdopen(open_plain(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > at_most:
            raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
        return file.read()


def is_locked(path: Path) -> bool:
    """Return True if a process holds the lock of a file; False also if that cannot be seen."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            # A shared lock, so that two readers at once do not take each other for a writer.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def in_use(folder: Path) -> RunFolderError:
    return RunFolderError(
        f"{folder} is in use: another search is writing to it; wait for it or stop it"
    )


def hold_lock(file: int, run: Path) -> None:
    """Lock an open file of a run until it is closed, or raise RunFolderError if another has it."""
    until = time.monotonic() + _FOR_READERS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise in_use(run) from None
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return None


def replace_file(
    path: Path, content: bytes | str, *, keep_as: Path | None = None, sync: bool = True
) -> None:
    """Write a whole file, or raise OSError and leave the old one untouched.

    Readers of `path` see the old content or the new, never half. A symbolic link is replaced, not
    followed. The old content is kept at `keep_as`. `sync` waits for the disk, so that a power cut
    cannot leave the file empty.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process with the same number
    try:
        with os.fdopen(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            path.replace(keep_as)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_output(path: Path, content: bytes | str) -> None:
    """Write a file that a user named: as `replace_file`, but where a link leads.

    Anything but a plain file, such as /dev/stdout, is written to in place.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        replace_file(path.resolve() if path.is_symlink() else path, content)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that `replace_file` left in killed processes.

    Only the folder's one writer may call this: another process may be about to rename its file.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # a leftover does no harm
            path.unlink()


class AppendLog:
    """A text file that grows by whole lines, for one writer.

    The operating system has each line before `append` returns, so a killed process loses none. A
    power cut can lose the last seconds unless `sync` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._size = -1  # of the finished lines, as last read or written; -1: of neither

    def read(self) -> list[bytes]:
        """Return the finished lines without their ends, none if there is no file."""
        try:
            content = read_plain(self.path, _LONGEST_LOG)
        except FileNotFoundError:
            content = b""
        lines = content.split(b"\n")
        self._size = len(content) - len(lines.pop())
        return lines

    def append(self, line: str) -> None:
        """Add a line; an OSError, such as a full disk, leaves the log without any of it.

        Raises SearchFailedError if the file is no longer as this writer left it, and
        RunFolderError if another process holds it.
        """
        if self._file is None:
            self._file = self._open()
        self._check_untouched(self._file)
        content = f"{line}\n".encode()
        written = 0
        try:
            while written < len(content):  # a nearly full disk takes a part, then reports it
                written += os.write(self._file, content[written:])
        except BaseException:
            # If this fails too, the next process to open the file cuts the line off.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self.close()
            raise
        self._size += written

    def sync(self) -> None:
        """Wait until all lines are on the disk, or raise OSError."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self) -> int:
        """Open and lock the file for appending, and cut off an unfinished last line."""
        file = open_plain(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            hold_lock(file, self.path.parent)
            content = read_plain(self.path, _LONGEST_LOG)
            finished = content.rfind(b"\n") + 1
            if finished < len(content):
                os.ftruncate(file, finished)
            if self._size < 0:
                self._size = finished
        except BaseException:
            os.close(file)
            raise
        return file

    def _check_untouched(self, file: int) -> None:
        """Raise SearchFailedError if another process wrote to the log, replaced or moved it."""
        ours = os.fstat(file)
        try:
            there = self.path.lstat()
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(ours, there) or ours.st_size != self._size:
            raise SearchFailedError(
                f"{self.path} is not as this search left it: another process has written to it, "
                "replaced it or moved it away; see that only one works there, then resume the run"
            )


def read_yaml(path: Path) -> Any:
    """Return what a YAML file in a run's folder holds, or raise OSError or ValueError."""
    return parse_yaml(read_plain(path, LARGEST_YAML))


def record_of(kind: type[Record], values: Any, name: str = "") -> Record:
    """Make a dataclass of values from a file, or raise ValueError if one does not fit its field.

    A field may be a record itself, a number (`Annotated` with its `Limits`), a text, ... Entries
    that the dataclass does not know are left out: a newer version may write more.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name or 'this'} must be a mapping, but got {shown(values)}")
    prefix = f"{name}." if name else ""
    found = {}
    for field, (read, needed) in _fields_of(kind).items():  # type: ignore[arg-type]
        if field in values:
            found[field] = read(values[field], prefix + field)
        elif needed:
            raise ValueError(f"{prefix}{field} is missing")
    return kind(**found)


_Reader = Callable[[Any, str], Any]  # of a value and its name: checked, and in its field's type


@cache
def _fields_of(kind: type) -> dict[str, tuple[_Reader, bool]]:
    """Return by field how its value is read, and whether there must be one."""
    types = get_type_hints(kind, include_extras=True)
    return {
        entry.name: (
            _reader(types[entry.name]),
            entry.default is MISSING and entry.default_factory is MISSING,
        )
        for entry in fields(kind)
    }


def _reader(annotation: Any) -> _Reader:
    limits: Limits | None = None
    if get_origin(annotation) is Annotated:
        annotation, limits = get_args(annotation)
    arguments = get_args(annotation)
    match get_origin(annotation) or annotation:
        case kind if kind in (Union, UnionType):
            return _optional(_reader(arguments[0]))
        case kind if kind is Literal:
            return _simple(lambda value: isinstance(value, str) and value in arguments)
        case kind if kind is tuple:
            return partial(_items, _reader(arguments[0]))
        case kind if kind in (int, float):
            return partial(_number, kind, limits or _FINITE)
        case kind if kind is str:
            return _simple(lambda value: isinstance(value, str) and len(value) <= _LONGEST_TEXT)
        case kind if kind is TrainConfig:
            return _config
        case kind if is_dataclass(kind):
            return partial(record_of, kind)  # type: ignore[arg-type]
        case kind:
            return _simple(lambda value: isinstance(value, kind))


def _optional(read: _Reader) -> _Reader:
    return lambda value, name: None if value is None else read(value, name)


def _simple(fits: Callable[[Any], bool]) -> _Reader:
    def read(value: Any, name: str) -> Any:
        if not fits(value):
            raise ValueError(f"{name} cannot be {shown(value)}")
        return value

    return read


def _config(values: Any, name: str) -> TrainConfig:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping, but got {shown(values)}")
    return TrainConfig.from_mapping(values)


def _items(read: _Reader, values: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, but got {shown(values)}")
    return tuple(read(value, f"{name}[{position}]") for position, value in enumerate(values))


def _number(kind: type[int] | type[float], limits: Limits, value: Any, name: str) -> float:
    if type(value) is not kind and type(value) is not int:  # a bool is none
        raise ValueError(f"{name} cannot be {shown(value)}")
    try:
        number = kind(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not limits.hold(number) or (number == math.inf != value):
        raise ValueError(f"{name} must be {limits}, but got {shown(value)}")
    return number
