"""Running a front door: from typed settings to an exit code.

A front door declares its arguments once, as a frozen dataclass whose fields carry their types,
defaults and help, and calls `run` with a function that takes an instance of it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, TypeVar

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from tune_mnist.errors import TuneMnistError

Settings = TypeVar("Settings")

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_OPTIONS = Group("Options")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what there is to say about the work so far."""


def run(
    name: str, settings_type: type[Settings], command: Callable[[Settings], int | None]
) -> NoReturn:
    """Make settings from the command line, run the command with them and exit.

    Exit codes: what the command returns (None is 0), a TuneMnistError's own, 2 for arguments
    that make no settings, 130 for Ctrl-C. All errors raised on purpose are one line on stderr.

    Args:
        name: the module's name within the package, as in `python -m tune_mnist.<name>`.
        settings_type: a dataclass, all of whose fields have defaults and are keyword-only; its
            docstring is the command's help, its fields' are the options'.
        command: the work itself.
    """
    sys.exit(exit_code(name, settings_type, command, sys.argv[1:]))


def tell(text: str) -> None:
    """Print to stdout at once: whoever follows a pipe or a file sees it as it happens."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def exit_code(
    name: str,
    settings_type: type[Settings],
    command: Callable[[Settings], int | None],
    arguments: Sequence[str],
) -> int:
    """Do all that `run` does but the exit itself."""
    try:
        code = _run(name, settings_type, command, arguments)
        sys.stdout.flush()  # what cannot be written shows here, not while Python shuts down
        return code
    except TuneMnistError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # as with `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(
    name: str,
    settings_type: type[Settings],
    command: Callable[[Settings], int | None],
    arguments: Sequence[str],
) -> int:
    app = App(
        name=f"python -m tune_mnist.{name}",
        help=settings_type.__doc__,
        version=version("tune_mnist"),
        group_parameters=_OPTIONS,
        group_commands=_OPTIONS,
        print_error=False,
        exit_on_error=False,
        verbose=False,
        result_action="return_value",
    )

    def call(settings: Any = settings_type()) -> int:  # noqa: B008 (frozen)
        return command(settings) or 0

    call.__annotations__["settings"] = Annotated[settings_type, Parameter(name="*")]
    app.default(call)
    try:
        bound_command, bound, _ = app.parse_args(list(arguments))
    except CycloptsError as error:
        _say(f"error: {_describe(error)} (--help lists the options)")
        return BAD_INPUT
    # --help and --version are commands of the library's own; they return None.
    code: int | None = bound_command(*bound.args, **bound.kwargs)
    return code or 0


def _describe(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument: {' '.join(error.unused_tokens or [])}"
    return str(error).rstrip(".")


def _say(message: str) -> None:
    """Print a message on one line of stderr, whatever line breaks it has."""
    sys.stdout.flush()
    sys.stderr.write(" ".join(message.split()) + "\n")
