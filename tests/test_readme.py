"""The READMEs: links lead somewhere, commands parse, and what they list is what there is."""

import re
import runpy
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tune_mnist import cli, supervise
from tune_mnist.runs.space import SearchSpace

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tune_mnist"
README = ROOT / "README.md"
PAGES = (
    README,
    *(ROOT / "results" / name for name in ("README.md", "bench/README.md")),
    *(PACKAGE / name for name in ("README.md", "deploy/README.md")),
    ROOT / "CHANGELOG.md",
)
DOORS = ("search", "train", "confirm", "report", "predict", "bench")
FIRST_LINE = (
    "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && "
    ".venv/bin/python -m tune_mnist.search --space quick --images 12000 --time-budget 5m"
)
SECOND_LINE = (
    "python3 -m venv .venv-tests && .venv-tests/bin/pip install -c constraints.txt -e '.[dev]' && "
    ".venv-tests/bin/python -m pytest"
)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """The code within a page's prose, a span over two lines on one."""
    return [" ".join(text.split()) for text in CODE.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    headings = (re.sub(r"[^\w\- ]", "", text.lower()) for text in HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in headings}


class Door(NamedTuple):
    """A front door that checks its arguments and does nothing."""

    exit_code: Callable[[Sequence[str]], int]
    parts: Sequence[str] = ()


@cache
def door(name: str) -> Door:
    """Run a front door up to the point where it would look at the command line."""
    found: list[Door] = []

    def run(name: str, settings_type: Any, _: Any) -> None:
        found.append(Door(partial(cli.exit_code, name, settings_type, lambda _: 0)))

    def run_one_of(name: str, text: str, commands: Mapping[str, cli.Command[Any]]) -> None:
        idle = {
            key: cli.Command(each.settings_type, lambda _: 0) for key, each in commands.items()
        }
        found.append(Door(partial(cli.exit_code_of_one, name, text, idle), tuple(idle)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervise, "watch", lambda _: None)
        patch.setattr(cli, "run", run)
        patch.setattr(cli, "run_one_of", run_one_of)
        runpy.run_module(f"tune_mnist.{name}", run_name="__main__")
    return found[0]


def commands_in(line: str) -> Iterator[tuple[str, list[str]]]:
    """The front doors that a shell's line calls, each with its arguments."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        # A command may itself be an argument, as of `ray exec`.
        words += shlex.split(word) if "-m tune_mnist." in word else [word]
    for place, word in enumerate(words):
        if word.startswith("tune_mnist.") and words[place - 1] == "-m":
            rest = takewhile(lambda each: each not in ("&&", "||", "|", ";"), words[place + 1 :])
            yield word.removeprefix("tune_mnist."), list(rest)


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The front doors that a page calls, in its fenced blocks and in its prose."""
    for block in fenced(page, "bash"):
        for line in block.splitlines():
            yield from commands_in(line)
    for span in spans(page):
        first, *rest = span.split()
        if rest and first in DOORS:
            yield first, rest
        else:
            yield from commands_in(span) if "-m tune_mnist." in span else ()


@pages
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_every_command_is_one_that_the_shell_and_its_front_door_take(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in fenced(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for name, arguments in commands_of(page):
        code = door(name).exit_code(arguments)
        assert code == 0, f"{name} {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_commands_of_every_front_door_are_found_and_a_mistake_would_be_seen() -> None:
    assert {name for page in PAGES for name, _ in commands_of(page)} == set(DOORS)
    for line in (
        "python -m tune_mnist.search --trails 50",
        "ray exec cluster.yaml 'python -m tune_mnist.search --address'",
        "python -m tune_mnist.bench steps",
        "true && .venv/bin/python -m tune_mnist.train --epochs few  # short",
    ):
        ((name, arguments),) = commands_in(line)
        assert door(name).exit_code(arguments) != 0, line


@pages
def test_every_option_in_the_prose_exists(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named = {span.split()[0].partition("=")[0] for span in spans(page) if span.startswith("--")}
    for name in DOORS[:-1] if named else ():
        door(name).exit_code(["--help"])
    for part in door("bench").parts if named else ():
        door("bench").exit_code([part, "--help"])
    assert named <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_the_space_file_is_one() -> None:
    (text,) = fenced(README, "yaml")
    assert SearchSpace.from_dict(yaml.safe_load(text), "readme", "README.md").start


def test_the_readme_is_short_and_has_the_two_lines_to_paste_word_for_word() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 140
    assert FIRST_LINE in lines
    # `.ci/run` runs the first line that ends so.
    assert next(line for line in lines if line.endswith("pytest")) == SECOND_LINE


def test_the_columns_that_are_explained_are_those_of_the_tables() -> None:
    said = set(spans(ROOT / "results" / "README.md"))
    for path in (ROOT / "results" / "confirmed").glob("*.csv"):
        for column in path.read_text().partition("\n")[0].split(","):
            general = re.sub("^config_.*", "config_NAME", column)
            general = re.sub("^(best|last)_val_accuracy$", r"\1_METRIC", general)
            general = general.replace("val_loss_at", "LOSS_at")
            assert {column, general} & said, f"{path.name}: {column}"


def test_the_map_names_every_module() -> None:
    (text, *_) = fenced(PACKAGE / "README.md", "")
    folders: list[str] = []
    named: set[str] = set()
    for line in text.splitlines()[1:]:
        names = re.split(r" {2,}", line.strip())[0].split()
        folders = folders[: (len(line) - len(line.lstrip())) // 2 - 1]
        named |= {"/".join((*folders, name)) for name in names if not name.endswith("/")}
        folders += [name.removesuffix("/") for name in names if name.endswith("/")]
    modules = {
        path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
    }
    assert named == {
        name
        for name in modules
        if not name.startswith("benchmarks/") and not name.endswith("__init__")
    }
