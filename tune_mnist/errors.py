"""Every error that tune_mnist raises on purpose.

    TuneMnistError              exit code 1
    ├── DataUnavailableError    no source has MNIST
    ├── SearchFailedError       the search cannot continue (disk full, every trial failed, ...)
    └── InvalidInputError       exit code 2: what the user asked for cannot be done
        ├── ConfigError         a training configuration or argument
        ├── SearchSpaceError    a search-space file
        ├── RunFolderError      a run's folder: exists, is missing, damaged or in use
        └── ClusterError        a Ray cluster: unreachable, or without the asked resources

A front door catches the base class once, prints the message on one line and exits with
`exit_code`. Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TuneMnistError(Exception):
    """Base of all errors raised on purpose; its message says what, where and what to do."""

    exit_code = 1


class DataUnavailableError(TuneMnistError):
    """No source has MNIST."""


class SearchFailedError(TuneMnistError):
    """The search cannot continue; what it has finished is in the run's folder."""


class InvalidInputError(TuneMnistError, ValueError):
    """What the user asked for cannot be done."""

    exit_code = 2


class ConfigError(InvalidInputError):
    """A training configuration or a command's argument is not usable."""


class SearchSpaceError(InvalidInputError):
    """A search-space file is not usable."""


class RunFolderError(InvalidInputError):
    """A run's folder exists already, is missing, is damaged or is in use."""


class ClusterError(InvalidInputError):
    """A Ray cluster cannot be reached or lacks the asked resources."""


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
