"""Space files: where they lie and what YAML they hold."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tune_mnist.errors import SearchSpaceError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def spaces_folder() -> Path:
    """Return the project's folder of space files: in the package (wheel) or beside it (checkout).

    The package comes first: what lies beside an installed one belongs to somebody else.
    """
    packaged = _PACKAGE / "search_spaces"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "search_spaces"


def available_spaces() -> list[str]:
    """Return the names of the project's own spaces."""
    return sorted(path.stem for path in spaces_folder().glob("*.yaml"))


def find_space(name_or_path: str) -> Path:
    """Return the file of one of the project's own spaces, or the path of any other file.

    Raises:
        SearchSpaceError: no space has this name and no file lies at this path.
    """
    names = available_spaces()
    if name_or_path in names:
        return spaces_folder() / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    try:
        if name_or_path and path.exists():
            return path
    except OSError as error:  # a folder without permission, a name too long
        raise SearchSpaceError(
            f"{name_or_path}: cannot be read: {error.strerror}; give a readable YAML file"
        ) from error
    raise SearchSpaceError(
        f"search space {name_or_path!r}: no space has this name and no file lies at this path"
        f"{did_you_mean(path.stem, names)}; known are {', '.join(names)}, "
        "or give the path of a YAML file"
    )


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; a key given twice in one mapping is an error.

    Raises:
        SearchSpaceError: the file cannot be read, or is not YAML.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SearchSpaceError(
            f"{path}: cannot be read: {error.strerror}; give a readable YAML file"
        ) from error
    try:
        return yaml.load(content, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context
        raise SearchSpaceError(f"{path}: {place}not usable YAML: {problem}; correct it") from error
    except yaml.reader.ReaderError as error:
        raise SearchSpaceError(
            f"{path}: not YAML: {error.reason} at position {error.position}; save it as UTF-8 text"
        ) from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # PyYAML lets these through: a date such as 2024-99-99, `!!bool maybe`, endless nesting.
        raise SearchSpaceError(
            f"{path}: not usable YAML: {type(error).__name__}: {error}; correct it"
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader keeps the last of two equal keys; this one says that there are two."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, before merge keys (`<<`) are resolved: what they merge may be overridden.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node
