import inspect
import re
from pathlib import Path

import pytest

import tune_mnist
from tune_mnist import errors
from tune_mnist.errors import InvalidInputError, TuneMnistError, did_you_mean

ERRORS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, BaseException)
]
CORRECTABLE = {
    *("InvalidInputError", "ConfigError", "SearchSpaceError", "RunFolderError", "ClusterError"),
    "StateError",
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_has_the_one_base_its_exit_code_and_a_place_in_the_manual(
    error: type[TuneMnistError],
) -> None:
    assert issubclass(error, TuneMnistError)
    can_be_corrected = error.__name__ in CORRECTABLE
    assert error.exit_code == (2 if can_be_corrected else 1)
    assert issubclass(error, InvalidInputError) == can_be_corrected
    assert issubclass(error, ValueError) == can_be_corrected
    assert error.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("momentun", " (did you mean 'momentum'?)"), ("xyz", ""), ("", ""), ("lr", "")],
)
def test_a_near_miss_gets_a_hint(word: str, hint: str) -> None:
    assert did_you_mean(word, ("momentum", "nesterov")) == hint
    assert did_you_mean(word, ()) == ""


def test_the_manual_has_the_exit_codes() -> None:
    manual = (Path(tune_mnist.__file__).parent / "README.md").read_text()
    told = re.findall(r"^\| (\d+) \| (.+) \|$", manual, re.M)
    assert told == re.findall(r"^    (\d+) +(.+)$", errors.__doc__ or "", re.M)
    assert len(told) == 7
