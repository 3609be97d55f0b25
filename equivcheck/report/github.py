"""What a GitHub workflow is told: annotations, one per cause, since only ten of a kind are shown; and its summary."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equivcheck.report import markdown, text, words

LIMIT = 10  # per kind and step; GitHub drops the rest without a word


def render(result: Mapping[str, Any]) -> str:
    """Return the workflow commands as text, one a line."""
    return "".join(command + "\n" for command in commands(result))


def is_wanted(setting: str) -> bool:
    """Return whether a workflow is to be told, given the option `github`: auto, on or off."""
    return setting == "on" or (setting == "auto" and os.environ.get("GITHUB_ACTIONS") == "true")


def append_summary(result: Mapping[str, Any]) -> None:
    """Append the result to the summary of the workflow's step, where there is one.

    Raises:
        OSError: The file that the workflow names cannot be written.
    """
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with Path(page).open("a", encoding="utf-8") as stream:
            stream.write(markdown.render(result))


def commands(result: Mapping[str, Any]) -> list[str]:
    """Return workflow commands, one per cause: its first case speaks for the others and counts them."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for case in filter(words.failed, result["cases"]):
        found.setdefault(next(iter(words.codes(case)), case["verdict"]), []).append(case)
    shown = []
    for first, *others in found.values():
        title = words.headline(first)
        if others:
            title += f" and {len(others)} more case{'s' if len(others) > 1 else ''}"
        properties = f"{_place(first)}title={_property(title)}"
        shown.append(f"::error {properties}::{_data(text.block(first))}")
    if len(shown) > LIMIT:
        left = len(shown) - LIMIT + 1
        shown = [*shown[: LIMIT - 1], f"::error title=equivcheck::{left} more causes in the log"]
    return [*shown, *_warnings(result)]


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """Return workflow commands for what a case is warned of, one per kind of warning."""
    found: dict[str, Mapping[str, Any]] = {}
    for case in result["cases"]:
        for each in case.get("warnings") or ():
            found.setdefault(each["code"], case)
    shown = []
    for code, case in found.items():
        [told, *_] = [t for t in text.warnings({"cases": [case]}) if t.startswith(code)]
        title, _, rest = told.partition(": ")
        shown.append(
            f"::warning {_place(case)}title={_property(text.printable(title))}::"
            f"{_data(text.printable(rest or title))}"
        )
    return shown[:LIMIT]


def _place(case: Mapping[str, Any]) -> str:
    error = case.get("error") or {}
    stated = (
        error.get("where"),
        case.get("location"),
        f"{str(case.get('target')).split(':')[0]}:1",
    )
    for place in stated:
        match = re.match(r"(.+\.py):(\d+)", str(place or ""))
        if match and Path(match[1]).is_file():
            return f"file={_property(_relative(match[1]))},line={match[2]},"
    return ""


def _relative(path: str) -> str:
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
