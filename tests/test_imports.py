"""The package's layers, read from its source: imports point one way."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support.processes import python

import tune_mnist

PACKAGE = Path(tune_mnist.__file__).parent
ROOMS = ("mnist", "runs", "reporting", "tuning", "benchmarks")  # each may use those before it
# In that order, of use to everything else.
LEAVES = ("errors", "supervise", "host", "locations", "cli")
FILES = {
    ".".join(("tune_mnist", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DOORS = {
    name for name in FILES if name.count(".") == 1 and name.split(".")[1] not in (*ROOMS, *LEAVES)
}


def statements(nodes: list[ast.stmt], at_start_only: bool) -> Iterator[ast.stmt]:
    """All statements, or only those that run when the module is imported."""
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if at_start_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, block, []), at_start_only)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, at_start_only)


def imports(name: str, at_start_only: bool = False) -> set[str]:
    """The modules that a module of the package imports, its own by their full names."""
    found: set[str] = set()
    for node in statements(ast.parse(FILES[name].read_text()).body, at_start_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            module = str(node.module)
            submodules = {f"{module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules if module in FILES and submodules else {module}
    return found


def own_imports(name: str, at_start_only: bool = False) -> set[str]:
    """Without itself: a module that runs as __main__ may import itself by name."""
    return {module for module in imports(name, at_start_only) if module in FILES} - {name}


def level(name: str) -> int:
    """How high a module stands; it may import what stands lower."""
    place = [*name.split("."), ""][1]
    if name == "tune_mnist":
        return -1  # importing any module imports it
    if place in LEAVES:
        return LEAVES.index(place)
    return len(LEAVES) + (ROOMS.index(place) if place in ROOMS else len(ROOMS))


def room(name: str) -> str | None:
    place = [*name.split("."), ""][1]
    return place if place in ROOMS else None


def with_all_they_import(names: set[str]) -> set[str]:
    reached: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= own_imports(name, at_start_only=True) - reached
    return reached


def test_there_is_something_to_look_at() -> None:
    assert {"tune_mnist.search", "tune_mnist.train"} <= DOORS
    assert {"tune_mnist.errors", "tune_mnist.mnist.net", "tune_mnist.tuning.study"} <= FILES.keys()
    assert "tune_mnist.tuning.launch" in own_imports("tune_mnist.search")


def test_the_package_itself_imports_nothing_before_it_is_asked_to() -> None:
    """But for what a front door needs before anything else."""
    for name in with_all_they_import({"tune_mnist"}):
        assert name in ("tune_mnist", "tune_mnist.supervise")
        assert brought(name, at_start_only=True) - {"tune_mnist"} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"tune_mnist"}))
def test_imports_point_one_way(name: str) -> None:
    """Front doors, benchmarks, then the rooms, then the leaves; no door imports another."""
    for imported in own_imports(name):
        beside = room(name) is not None and room(name) == room(imported)
        assert beside or level(imported) < level(name), f"{name} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: own_imports(name) for name in FILES}).prepare()  # or it names them


def test_a_file_has_one_subject_that_fits_on_a_few_screens() -> None:
    for name, path in FILES.items():
        assert name.rpartition(".")[2] not in ("utils", "util", "common", "helpers", "misc")
        assert len(path.read_text().splitlines()) < 460, name


def brought(name: str, at_start_only: bool = False) -> set[str]:
    return {module.partition(".")[0] for module in imports(name, at_start_only)}


@pytest.mark.parametrize(
    ("place", "packages", "at_start_only"),
    [
        ("mnist", {"ray", "optuna", "pandas"}, False),
        ("runs", {"torch", "torchvision", "ray", "plotly"}, False),
        ("reporting", {"torch", "torchvision", "ray"}, True),  # pictures of mistakes need torch
    ],
)
def test_a_room_does_without(place: str, packages: set[str], at_start_only: bool) -> None:
    inside = {name for name in FILES if room(name) == place}
    for name in with_all_they_import(inside):
        found = brought(name, at_start_only or name not in inside) & packages
        assert not found, f"{name} imports {sorted(found)}"


def test_a_search_starts_without_torch_and_what_else_takes_seconds_to_import() -> None:
    """Workers need torch, the driver does not; nor do Ray and Optuna bring any of these along."""
    code = "import sys, tune_mnist.search; print(sorted(sys.modules.keys() & {*sys.argv[1:]}))"
    heavy = ("torch", "torchvision", "sqlalchemy", "matplotlib", "plotly")
    assert python("-c", code, *heavy, check=True).stdout == "[]\n"


def test_what_is_imported_is_declared() -> None:
    with (PACKAGE.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    optional = project.get("optional-dependencies", {}).values()
    declared = {
        normal(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        for requirement in (
            *project["dependencies"],
            *(line for part in optional for line in part),
        )
    }
    distributions = packages_distributions()
    for name in FILES:
        for module in brought(name):
            if module in sys.stdlib_module_names or module in ("tune_mnist", "__future__"):
                continue
            brought_by = {normal(found) for found in distributions.get(module, [module])}
            assert brought_by & declared, f"{name} imports {module}, which is not declared"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
