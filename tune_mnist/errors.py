"""Every error that tune_mnist raises on purpose, and the exit codes of its commands.

    TuneMnistError              exit code 1
    ├── DataUnavailableError    no source has MNIST
    ├── OutputError             stdout cannot be written
    ├── SearchFailedError       the search cannot continue (disk full, every trial failed, ...)
    └── InvalidInputError       exit code 2: what the user asked for cannot be done
        ├── ConfigError         a training configuration or argument
        │   └── StateError      a saved state: damaged, or of another run or version
        ├── SearchSpaceError    a search-space file
        ├── RunFolderError      a run's folder: exists, is missing, damaged or in use
        └── ClusterError        a Ray cluster: unreachable, or without the asked resources

A front door catches the base class once, prints the message on one line and exits with
`exit_code`. Any other exception is a bug and keeps its traceback.

    0      done, or out of time
    1      failed: the disk is full, every trial failed, MNIST cannot be downloaded, ...
    2      wrong input: an option, a space file, a run's folder, a cluster
    129    SIGHUP: the terminal was closed
    130    SIGINT: Ctrl-C
    141    SIGPIPE: nobody reads the output any more
    143    SIGTERM
"""

import errno
import signal
from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any


class TuneMnistError(Exception):
    """Base of all errors raised on purpose; its message says what, where and what to do."""

    exit_code = 1


class DataUnavailableError(TuneMnistError):
    """No source has MNIST."""


class OutputError(TuneMnistError):
    """What stdout is connected to takes no more."""

    @classmethod
    def of(cls, error: OSError) -> "OutputError":
        """Describe what was lost; a reader who has left, as of `| head`, needs no word."""
        if error.errno != errno.EPIPE:
            return cls(f"cannot write to stdout ({error.strerror})")
        silent = cls()
        silent.exit_code = 128 + signal.SIGPIPE
        return silent


class SearchFailedError(TuneMnistError):
    """The search cannot continue; what it has finished is in the run's folder."""


class InvalidInputError(TuneMnistError, ValueError):
    """What the user asked for cannot be done."""

    exit_code = 2


class ConfigError(InvalidInputError):
    """A training configuration or a command's argument is not usable."""


class StateError(ConfigError):
    """A saved state is damaged, or belongs to another run or version."""


class SearchSpaceError(InvalidInputError):
    """A search-space file is not usable."""


class RunFolderError(InvalidInputError):
    """A run's folder exists already, is missing, is damaged or is in use."""


class ClusterError(InvalidInputError):
    """A Ray cluster cannot be reached or lacks the asked resources."""


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """Return the repr of a value that comes from outside, cut where it is long or deep."""
    return _SHORT.repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'momentum'?)"` for a near miss, else an empty string."""
    matches = get_close_matches(word, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def root_cause(error: BaseException) -> BaseException:
    """Return the first of the errors that led to one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def named(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
