"""Read a TOML file and remember where each key stands, so that an error can name its line.

`tomllib` gives values without positions; this adds the line of every table header and key that stands on a line of its
own. What is not found there (a key of an inline table) is reported at the nearest thing that was.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from maestro_agents.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER: Final = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_POSITION: Final = re.compile(r"\s*\((?:at line (\d+), column \d+|at end of document)\)\s*$")
_STRING_OR_COMMENT: Final = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*$')

Place = tuple[str | int, ...]
"""Where a value stands: ``("engine", 1, "launch", "port")``."""


@dataclass(frozen=True, kw_only=True)
class TomlFile:
    """A TOML file's content and the line of each of its keys."""

    path: Path
    content: Mapping[str, Any]
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest thing around it; 1 where there is nothing nearer than the file."""
        for n in range(len(place), 0, -1):
            if place[:n] in self.lines:
                return self.lines[place[:n]]
        return 1

    def error(self, place: Place, message: str) -> ConfigError:
        """A `ConfigError` of one line: ``fleet.toml:12: message``."""
        return ConfigError(f"{self.path}:{self.line(place)}: {message}")


def read_toml(path: Path) -> TomlFile:
    """Read a file; raise `ConfigError`, with the line, where it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        message = str(e)
        found = _POSITION.search(message)
        line = int(found[1]) if found and found[1] else max(1, len(text.splitlines()))
        raise ConfigError(f"{path}:{line}: not valid TOML: {_POSITION.sub('', message)}") from None
    return TomlFile(path=path, content=content, lines=_positions(text))


def _positions(text: str) -> dict[Place, int]:
    lines: dict[Place, int] = {}
    counts: dict[Place, int] = {}
    table: Place = ()
    depth = 0  # of brackets still open: a line inside a long array is no key
    closing = ""  # the quotes that would end a multi-line string
    for number, line in enumerate(text.splitlines(), start=1):
        if closing:
            if closing in line:
                closing = ""
            continue
        header = _HEADER.match(line) if depth == 0 else None
        if header:
            table = _place(_parts(header[2]), counts, new_element=header[1] == "[[")
            lines.setdefault(table, number)
            continue
        key = _KEY.match(line) if depth == 0 else None
        if key:
            parts = _parts(key[1])
            for n in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:n]), number)
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2:
                closing = quotes
        bare = _STRING_OR_COMMENT.sub("", line)
        depth = max(0, depth + bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}"))
    return lines


def _parts(dotted: str) -> list[str]:
    return [m[1] or m[2] or m[3] or "" for m in re.finditer(r"""([A-Za-z0-9_-]+)|"([^"]*)"|'([^']*)'""", dotted)]


def _place(parts: list[str], counts: dict[Place, int], *, new_element: bool) -> Place:
    """The place of a table header, where ``[a.b]`` under ``[[a]]`` belongs to the last ``a``."""
    place: Place = ()
    for n, part in enumerate(parts):
        place = (*place, part)
        if new_element and n == len(parts) - 1:
            counts[place] = counts.get(place, 0) + 1
        if place in counts:
            place = (*place, counts[place] - 1)
    return place
