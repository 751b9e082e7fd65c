"""Ways to damage a run's folder: every field of every file, and the files themselves."""

import json
import math
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

MISSING = object()
ODD: tuple[Any, ...] = (
    *(MISSING, None, True, False, -1, 0, 1, 2, 0.5, -0.5, 10**9, 10**19, 10**400, 1e300, 1e-300),
    *(math.inf, -math.inf, math.nan, "", "x", "nan", "1e5", "\x00", "é\n\x1b[2J", "x" * 200_000),
    *([], [1], [[]], {}, {"a": 1}, {"lr": math.nan}, "s3 ://", "../../x", "/dev/zero", "running"),
)
CELLS = (
    *("", "nan", "inf", "-inf", "1e300", "-1", "0", "0.5", "2", "1" * 20, "9" * 5000, "x", '"'),
    *("[1]", "None", "True", "\x00", "1,2", "1_0", " 1", "x" * 200_000, "é", "\udcff"),
)
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
YAMLS = (
    *("&a [*a]", "&a {asked: *a}", "asked: &a {epochs: *a}", f"a0: &a0 [x]\n{BOMB}", "[" * 3000),
    *("asked: {epochs: 1, epochs: 2}", "a: 2024-99-99", "!!python/name:os.system", "\ufeff"),
    *("asked: !!binary x", "? [a]\n: b", "a: 1\n---\nb: 2", "<<: *b", "&a {<<: *a}"),
    *("a: !!bool 7", "- 1"),
)


def damage(run: Path, outside: Path, draw: random.Random) -> str:
    """Damage one file of a run in one way, and return what was done."""
    path = draw.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    ways: list[Callable[[Path, random.Random], None]] = [_bytes, _lines]
    if path.suffix == ".yaml":
        ways += [_yaml] * 6 + [_other_yaml]
    elif path.suffix in (".jsonl", ".state"):
        ways += [_json_line] * 6
    elif path.suffix == ".csv":
        ways += [_cell] * 6
    way = draw.choice(ways)
    if draw.random() < 0.1:
        how = draw.choice(list(_instead(path, outside)))
        if path.is_file():
            path.unlink()
        how()
        return f"{path.relative_to(run)}: another kind of file"
    way(path, draw)
    return f"{path.relative_to(run)}: {way.__name__}"


def _instead(path: Path, outside: Path) -> Iterator[Callable[[], object]]:
    """Yield ways to have something else than a plain file at a path."""

    def bind() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(path.parent)  # the names of sockets are short
            server.bind(path.name)
            os.chdir(here)

    yield lambda: None
    yield path.mkdir
    yield bind
    yield lambda: os.mkfifo(path)
    for target in (outside / "file", outside, "nowhere", "/dev/zero", path.name):
        yield lambda target=target: path.symlink_to(target)  # type: ignore[misc]
    yield lambda: (path.parent / "link").symlink_to(outside)


def _bytes(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    place = draw.randrange(len(content) + 1)
    path.write_bytes(
        draw.choice(
            [
                content[:place],
                content[:place] + b"\x00" * draw.choice([1, 40, 5000]) + content[place:],
                content[:place] + draw.randbytes(8) + content[place + 8 :],
                b"",
                draw.randbytes(500),
                content + draw.choice([b"\xff", b"7", b"\n", b"{}\n", b"\r\n"]),
                content.replace(b"\n", b"\r\n"),
            ]
        )
    )


def _lines(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True) or [b"\n"]
    one, other = (draw.randrange(len(lines)) for _ in range(2))
    match draw.randrange(3):
        case 0:
            lines[one], lines[other] = lines[other], lines[one]
        case 1:
            del lines[one]
        case _:
            lines.insert(one, lines[other])
    path.write_bytes(b"".join(lines))


def _yaml(path: Path, draw: random.Random) -> None:
    try:
        content = _changed(yaml.safe_load(path.read_bytes()), draw)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    except (yaml.YAMLError, ValueError):  # too long a number, or no text
        _other_yaml(path, draw)


def _other_yaml(path: Path, draw: random.Random) -> None:
    odd = draw.choice(YAMLS)
    path.write_text(draw.choice([odd, f"{path.read_text()}\nextra: 1\n{odd}"]))


def _json_line(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().split(b"\n")
    place = 0 if path.suffix == ".state" else draw.randrange(len(lines) - 1)
    try:
        lines[place] = json.dumps(_changed(json.loads(lines[place]), draw)).encode()
    except ValueError:  # too long a number
        lines[place] = b'{"event": ' + b"9" * 5000 + b"}"
    path.write_bytes(b"\n".join(lines))


def _cell(path: Path, draw: random.Random) -> None:
    lines = path.read_text().split("\n")
    place = draw.randrange(len(lines) - 1)
    cells = lines[place].split(",")
    cells[draw.randrange(len(cells))] = draw.choice(CELLS)
    lines[place] = ",".join(cells)
    path.write_text("\n".join(lines), errors="surrogateescape")


def _changed(content: Any, draw: random.Random) -> Any:
    """Return a tree with an odd value at one of its nodes."""
    nodes = list(_nodes(content))
    if not nodes:
        return draw.choice(ODD[1:])
    holder, key = draw.choice(nodes)
    odd = draw.choice(ODD)
    if odd is MISSING:
        del holder[key]
    else:
        holder[key] = odd
    return content


def _nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of every value in a tree."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield content, key
        if isinstance(value, dict | list):
            yield from _nodes(value)
