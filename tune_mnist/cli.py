"""Running a front door: from typed settings to an exit code.

A front door declares its options once, as a frozen dataclass whose fields carry their types,
defaults, limits and help, and calls `run` with a function that takes an instance of it.
Exit codes: what the command returns (None is 0), a TuneMnistError's own, 2 for arguments that
make no settings, 128 + its number for a signal. Every error raised on purpose is one line on
stderr, and what libraries print there is dropped.
"""

import io
import logging
import math
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import get_annotations
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TextIO, TypeVar

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from tune_mnist import __version__, supervise
from tune_mnist.errors import ConfigError, OutputError, TuneMnistError, shown
from tune_mnist.host import settle
from tune_mnist.locations import masked, output_path, user_path
from tune_mnist.supervise import stops

Settings = TypeVar("Settings")

_OPTIONS = Group("Options")
_LONGEST = 4096  # bytes of an argument: a path's
_LONGEST_ECHO = 300  # characters


@dataclass(frozen=True)
class Limit:
    """A rule for the number that an option is given, in words and as a test."""

    rule: str
    holds: Callable[[float], bool]

    @classmethod
    def at_least(cls, least: int) -> "Limit":
        return cls(f"at least {least}", lambda value: least <= value < math.inf)

    @classmethod
    def at_most(cls, most: int) -> "Limit":
        return cls(f"at most {most}", lambda value: value <= most)

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless an option's number holds, or each of several."""
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not self.holds(number):
                raise ConfigError(f"{flag(name)} must be {self.rule}, but got {_shown(number)}")


AT_LEAST_0, AT_LEAST_1 = Limit.at_least(0), Limit.at_least(1)
# For every number that has a limit at all, seeds too; inf, where it is allowed, is no limit.
_ANY_NUMBER = Limit("at most 1e30", lambda value: value <= 1e30 or value == math.inf)


@dataclass(frozen=True)
class Options:
    """Options whose limits are checked when they are made: outside them is a ConfigError."""

    def __post_init__(self) -> None:
        # A subclass may declare an option's resolved type; the limits stay.
        for declaring in type(self).__mro__:
            for name, annotation in get_annotations(declaring).items():
                found = getattr(annotation, "__metadata__", ())
                limits = [each for each in found if isinstance(each, Limit)]
                for limit in (*limits, _ANY_NUMBER) if limits else ():
                    limit.check(name, getattr(self, name))


def _shown(number: float) -> str:
    text = str(number) if isinstance(number, int) else f"{number:g}"
    return text if len(text) <= 24 else f"a number of {len(text)} digits"


def flag(name: str) -> str:
    """Return a setting's name on the command line."""
    return "--" + name.replace("_", "-")


def read_by(read: Callable[[str], Any], **more: Any) -> Parameter:
    """Return how an option's one word is read."""
    return Parameter(converter=lambda _, tokens: read(tokens[0].value), n_tokens=1, **more)


# What an option is that takes a path, and one whose file is written.
UserPath = Annotated[Path, read_by(user_path)]
OutputPath = Annotated[Path, read_by(output_path)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about the work so far."""


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """Something a front door does, and the settings that it takes."""

    settings_type: type[Settings]
    call: Callable[[Settings], int | None]


def run(
    name: str, settings_type: type[Settings], command: Callable[[Settings], int | None]
) -> NoReturn:
    """Make settings from the command line of `python -m tune_mnist.<name>`, run and exit.

    All fields of the settings, a dataclass, have defaults; its docstring is the command's help.
    """
    _exit(lambda: exit_code(name, settings_type, command, sys.argv[1:]))


def exit_code(
    name: str,
    settings_type: type[Settings],
    command: Callable[[Settings], int | None],
    arguments: Sequence[str],
) -> int:
    """Do what `run` does, but return the exit code."""
    app = _app(name, settings_type.__doc__)
    app.default(_entry(Command(settings_type, command)))
    return _exit_code(app, arguments)


def run_one_of(name: str, about: str, commands: Mapping[str, Command[Any]]) -> NoReturn:
    """Do what `run` does, with the command that the first argument names."""
    _exit(lambda: exit_code_of_one(name, about, commands, sys.argv[1:]))


def exit_code_of_one(
    name: str, about: str, commands: Mapping[str, Command[Any]], arguments: Sequence[str]
) -> int:
    """Do what `run_one_of` does, but return the exit code."""
    app = _app(name, about)
    for command_name, command in commands.items():
        app.command(
            _entry(command), name=command_name, help=command.settings_type.__doc__, group="Parts"
        )
    return _exit_code(app, arguments)


def tell(text: str) -> None:
    """Print to stdout at once: whoever follows a pipe or a file sees it as it happens."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def outlive_output() -> None:
    """From here on, drop what cannot be printed: the work counts, not who watches it."""
    global _outlives
    _outlives = True


def _app(name: str, about: str | None) -> App:
    return App(
        name=f"python -m tune_mnist.{name}",
        help=about,
        version=__version__,
        group_parameters=_OPTIONS,
        group_commands=_OPTIONS,
        print_error=False,
        exit_on_error=False,
        verbose=False,
        result_action="return_value",
    )


def _entry(command: Command[Any]) -> Callable[..., int]:
    """Make the function whose arguments the library fills from the command line."""

    def call(settings: Any = command.settings_type()) -> int:  # noqa: B008 (frozen)
        return command.call(settings) or 0

    call.__annotations__["settings"] = Annotated[command.settings_type, Parameter(name="*")]
    return call


def _exit_code(app: App, arguments: Sequence[str]) -> int:
    settle()
    try:
        _check_lengths(arguments)
        command, bound, _ = app.parse_args(list(arguments))
        # --help and --version are commands of the library's own; they return None.
        code: int | None = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()  # what cannot be written shows here, not while Python shuts down
        return code or 0
    except CycloptsError as error:
        what = str(error).rstrip(".")
        if isinstance(error, UnusedCliTokensError):
            what = f"unexpected argument: {' '.join(error.unused_tokens or [])}"
        if len(what) > _LONGEST_ECHO:
            what = f"{what[:_LONGEST_ECHO]}..."
        _print_error(f"error: {what} (--help lists the options)")
        return 2
    except TuneMnistError as error:
        _print_error(f"error: {error}" if str(error) else "")
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        _print_error(str(interrupt) or "interrupted")
        return 128 + (stops.first or signal.SIGINT)  # as in shells


def _check_lengths(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that no message could show."""
    for argument in arguments:
        if (length := len(os.fsencode(argument))) > _LONGEST:
            raise ConfigError(
                f"an argument has {length:,} bytes, where {_LONGEST:,} are the most: "
                f"{shown(argument)}"
            )


def _print_error(message: str) -> None:
    """Print a message on one line of stderr, whatever line breaks it has."""
    if message:
        sys.stdout.flush()
        sys.stderr.write(masked(" ".join(message.split())) + "\n")


def _exit(do: Callable[[], int]) -> NoReturn:
    """Do what a front door does and exit with the code that it returns; a bug's is 1."""
    supervise.begin()
    _take_streams()
    if not os.environ.get("OMP_NUM_THREADS", "1").strip():
        del os.environ["OMP_NUM_THREADS"]  # as if unset, or Ray would not set it for its workers
    code = 1
    try:
        code = do()
    finally:
        supervise.has_ended(code)
    sys.exit(code)


_outlives = False


class _Output(io.FileIO):
    """What a standard stream writes to: once it cannot, nothing."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # someone had this terminal or pipe not block
            return written
        except OSError as error:
            # Interpreters write their buffers once more at their end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 1:  # of what stderr loses, nobody can be told
                _lose_output(error)
            return len(data)


def _lose_output(error: OSError) -> None:
    """Raise OutputError for what cannot be printed, or say that the work goes on without."""
    if not _outlives:
        raise OutputError.of(error)
    sys.stderr.write(f"warning: stdout is lost ({error.strerror}); the work goes on without it\n")


def _take_streams() -> None:
    """Have stdout and stderr take any text, and survive what they are connected to.

    What libraries print is not for the reader of ours: their logs and warnings go nowhere, nor
    does what C code writes to stderr. `python -X dev -m tune_mnist.<name>` shows all of it.
    """
    terminal = 2
    if not (sys._xoptions or sys.warnoptions):
        terminal = supervise.last_words = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        logging.getLogger().addHandler(logging.NullHandler())
        warnings.showwarning = _show_warning
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, terminal)


def _stream(before: TextIO | None, descriptor: int) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(before, "line_buffering", True),
        write_through=getattr(before, "write_through", False),
    )


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object
) -> None:
    """Print a warning of this package on one line, and none of others."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        _print_error(f"warning: {message}")
