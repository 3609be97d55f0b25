"""Markdown, for issues, pull requests and the step summary of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.report import text, words

LIMIT = 60_000  # bytes; GitHub cuts comments at 64 kB and drops summaries above 1 MiB


def render(result: Mapping[str, Any], headline: str | None = None) -> str:
    """Return verdict, one row per case, warnings, and the block of every finding, within `LIMIT`.

    Args:
        result: A result, or some of the cases of one.
        headline: What stands for the verdict, by default the result's own.
    """
    lines = [
        f"### equivcheck: {headline or words.interrupted(result) or result['verdict']}",
        "",
        "| case | id | verdict | causes | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        place = f"{case.get('target', '')} {words.label(case)}"
        cells = (place, case["id"], case["verdict"], ", ".join(words.codes(case)))
        lines.append("| " + " | ".join(map(_cell, (*cells, words.margin(case)))) + " |")
    page = _whole_lines("\n".join(lines) + "\n", LIMIT)
    if len(page.splitlines()) < len(lines):
        left = len(lines) - len(page.splitlines())
        page += f"\n{left} more cases in the result.\n"
    warned = [f"- {_cell(told)}" for told in text.warnings(result)]
    if warned:
        page += "\n" + "\n".join(warned[:20]) + "\n"
    if result.get("interrupted"):
        page += f"\n{text.UNFINISHED.capitalize()}.\n"
    for number, block in enumerate(text.blocks(filter(words.failed, result["cases"]))):
        more = f"\n```text\n{block.replace('```', '` ` `')}\n```\n"
        if len((page + more).encode()) > LIMIT:
            return f"{page}\nShortened after {number} findings.\n"
        page += more
    return f"{page}\n{text.summary(result)}\n"


def _whole_lines(page: str, most: int) -> str:
    """Return as many whole lines as fit into so many bytes."""
    if len(page.encode()) <= most:
        return page
    cut = page.encode()[:most].decode(errors="ignore")
    return cut[: cut.rindex("\n") + 1]


def _cell(value: object) -> str:
    shown = text.printable(value).replace("\n", " ")
    for character in "\\`*_|<>[]":
        shown = shown.replace(character, "\\" + character)
    return shown
