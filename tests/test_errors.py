import inspect

import pytest

from tune_mnist import errors
from tune_mnist.errors import (
    ClusterError,
    ConfigError,
    DataUnavailableError,
    InvalidInputError,
    RunFolderError,
    SearchFailedError,
    SearchSpaceError,
    TuneMnistError,
    did_you_mean,
)


def test_every_error_is_caught_by_the_one_base() -> None:
    found = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, BaseException)
    ]
    assert len(found) > 5
    assert all(issubclass(error, TuneMnistError) for error in found)


@pytest.mark.parametrize("error", [ConfigError, SearchSpaceError, RunFolderError, ClusterError])
def test_what_the_user_can_correct_exits_with_2_and_is_a_value_error(
    error: type[TuneMnistError],
) -> None:
    assert error.exit_code == 2
    assert issubclass(error, InvalidInputError)
    assert issubclass(error, ValueError)


@pytest.mark.parametrize("error", [TuneMnistError, DataUnavailableError, SearchFailedError])
def test_other_errors_exit_with_1(error: type[TuneMnistError]) -> None:
    assert error.exit_code == 1
    assert not issubclass(error, ValueError)


def test_the_tree_in_the_manual_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, TuneMnistError):
            assert name in errors.__doc__


@pytest.mark.parametrize(
    ("word", "hint"),
    [("momentun", " (did you mean 'momentum'?)"), ("xyz", ""), ("", ""), ("lr", "")],
)
def test_a_near_miss_gets_a_hint(word: str, hint: str) -> None:
    assert did_you_mean(word, ("momentum", "nesterov")) == hint
    assert did_you_mean(word, ()) == ""
