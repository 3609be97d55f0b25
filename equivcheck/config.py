"""Every option in one table: its default, its check, and where its value came from.

The command line builds its flags from this table, `[tool.equivcheck]` takes the same names as
keys, and `EQUIVCHECK_<NAME>` as environment variables. Command line over environment over file
over default.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from equivcheck.case import DEVICES, RNGS, SPLITS, STRATEGIES
from equivcheck.causes import CAUSES
from equivcheck.errors import UsageError
from equivcheck.rows import parse as parse_rows
from equivcheck.rows import written

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTION = "tool.equivcheck"
PREFIX = "EQUIVCHECK_"


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: Key in the file; `--name` with hyphens on the command line.
        default: Value when nobody says anything.
        parse: Turns text or a TOML value into the value; a ValueError's text is what was expected.
        metavar: Placeholder in the help.
        help: One line of help.
    """

    name: str
    default: Any
    parse: Callable[[Any], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        """The option as typed on a command line."""
        return "--" + self.name.replace("_", "-")


# What torch takes as a seed, with room for those of further runs.
MOST: Final = 2**62


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        expected = f"a whole number of at least {least}"
        if isinstance(value, (bool, float)):
            raise ValueError(expected)  # noqa: TRY004 - one error type for every bad value
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise ValueError(expected) from None
        if not least <= number <= MOST:
            raise ValueError(expected if number < least else f"{expected}, at most {MOST}")
        return number

    return parse


def _whole_list(value: Any) -> tuple[int, ...]:
    items = value.split(",") if isinstance(value, str) else value
    items = [items] if isinstance(items, int) else items
    try:
        numbers = tuple(_whole(1)(item) for item in items)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers:
        raise ValueError("whole numbers of at least 1 with commas between them, as in 2,4")
    return tuple(dict.fromkeys(numbers))


def _choice(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed) + _did_you_mean(value, allowed))
        return str(value)

    return parse


def _choices(*allowed: str) -> Callable[[Any], str | tuple[str, ...]]:
    """Return what reads one of some words, or several with commas between them."""
    one = _choice(*allowed)

    def parse(value: Any) -> str | tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items:
            return one(value)
        found = tuple(dict.fromkeys(one(each) for each in items))
        return found[0] if len(found) == 1 else found

    return parse


def _codes(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError("codes of causes, as in EQ201")  # noqa: TRY004 - as above
    by_name = {cause.name: code for code, cause in CAUSES.items()}
    codes = []
    for item in items:
        stated = str(item).strip()
        code = by_name.get(stated.lower(), stated.upper())
        if code not in CAUSES:
            # One number is as near as another.
            known = () if code[2:].isdigit() else (*CAUSES, *by_name)
            meant = code if code.startswith("EQ") else stated.lower()
            raise ValueError(
                "a code or name that `equivcheck explain` lists" + _did_you_mean(meant, known)
            )
        codes.append(code)
    return tuple(dict.fromkeys(codes))


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < float("inf"):
        raise ValueError("seconds, more than 0")
    return seconds


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("some text")
    return value


def _rows(value: Any) -> str:
    try:
        return written(parse_rows(_text(value)))
    except UsageError as error:
        raise ValueError(error.expected) from None


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("accumulation_steps", (2, 4), _whole_list, "N,N", "micro-batches per cycle"),
        Option(
            "split", "even", _choices(*SPLITS), "HOW", "how a batch is cut: even, uneven, or both"
        ),
        Option("world_size", (1,), _whole_list, "N,N", "ranks, a process each"),
        Option("strategy", "none", _choice(*STRATEGIES), "NAME", "how ranks work together"),
        Option("device", "cpu", _choice(*DEVICES), "NAME", "cpu or cuda"),
        Option("precision", "native", _text, "NAME", "handed to a train that asks for it"),
        Option("train", None, _text, "FILE:ATTR", "put this training loop under the targets"),
        Option("expect", (), _codes, "CODE", "a cause that theory predicts; may be repeated"),
        Option("rows", None, _rows, "ROWS", "these rows of the batches alone, as in 0:0-4,1:2"),
        Option("optimizer_steps", 8, _whole(1), "N", "at most this many full batches"),
        Option("rng", "off", _choice(*RNGS), "HOW", "dropout: off, or masks keyed per-sample"),
        Option("seed", 0, _whole(0), "N", "seed of every run"),
        Option("jobs", 1, _whole(1), "N", "cases that run side by side, each in its own process"),
        Option("timeout", None, _seconds, "SECONDS", "longest time for one case"),
        Option("json", None, _text, "PATH", "write the result; - for stdout"),
        Option("html", None, _text, "PATH", "write a page that opens from disk"),
        Option("junit", None, _text, "PATH", "write JUnit XML"),
        Option("github", "auto", _choice("auto", "on", "off"), "WHEN", "annotations in a workflow"),
        Option("color", "auto", _choice("auto", "always", "never"), "WHEN", "colour of the text"),
    )
}


@dataclass(frozen=True)
class Settings:
    """Resolved options and where each of them came from."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def stated(self, name: str) -> bool:
        """Return whether somebody set this option."""
        return self.origins[name] != "default"

    def lines(self) -> list[str]:
        """Return one line per option: value and origin."""
        return [f"{n:<20} {_shown(v):<16} {self.origins[n]}" for n, v in self.values.items()]


def resolve(
    flags: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Settings:
    """Return every option's value: command line over environment over file over default.

    Args:
        flags: Options given on the command line; None means not given.
        environment: Variables to read, `os.environ` by default.
        folder: Where the search for pyproject.toml starts, the current folder by default.

    Raises:
        UsageError: A key is unknown (with the closest one) or a value is not allowed.
    """
    variables = os.environ if environment is None else environment
    values = {name: option.default for name, option in OPTIONS.items()}
    origins = dict.fromkeys(OPTIONS, "default")
    sources: list[tuple[Mapping[str, Any], Callable[[str], str]]] = []
    path = _nearest(folder or Path.cwd())
    if path is not None:
        sources.append((_table(path), lambda name: f"{path} [{SECTION}] {name}"))
    named = {
        k.removeprefix(PREFIX).lower(): v for k, v in variables.items() if k.startswith(PREFIX)
    }
    sources.append((named, lambda name: PREFIX + name.upper()))
    given = {name: value for name, value in flags.items() if value is not None}
    sources.append((given, lambda name: OPTIONS[name].flag))
    for source, origin in sources:
        for name, value in source.items():
            if name not in OPTIONS:
                raise _unknown(name, path if source is sources[0][0] else None)
            values[name] = _parsed(OPTIONS[name], value, origin(name))
            origins[name] = origin(name)
    return Settings(values, origins)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def _parsed(option: Option, value: Any, origin: str) -> Any:
    try:
        return option.parse(value)
    except ValueError as error:
        shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        raise UsageError(f"{origin} is {shown!r}", expected=str(error)) from None


def _unknown(name: str, path: Path | None) -> UsageError:
    where = f"{path} [{SECTION}]" if path else "environment"
    guess = closest(name, OPTIONS)

    def written(name: str) -> str:
        return name if path else PREFIX + name.upper()

    return UsageError(
        f"unknown setting {written(name)}",
        where=where,
        expected="one of " + ", ".join(map(written, OPTIONS)),
        fix=f"did you mean {written(guess)}?" if guess else None,
    )


def _nearest(folder: Path) -> Path | None:
    candidates = (place / "pyproject.toml" for place in (folder, *folder.parents))
    return next((path for path in candidates if path.is_file()), None)


def _table(path: Path) -> Mapping[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the configuration: {error}", where=str(path)) from None
    table = document.get("tool", {}).get("equivcheck", {})
    if not isinstance(table, dict):
        raise UsageError(f"[{SECTION}] is not a table", where=str(path))
    return table


def _did_you_mean(value: Any, known: Iterable[str]) -> str:
    guess = closest(str(value), known)
    return f"; did you mean {guess}?" if guess else ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
