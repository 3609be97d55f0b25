"""Markdown, for issues, pull requests and the step summary of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.report import text, words

LIMIT = 60_000  # characters; GitHub cuts comments at 64 kB and drops summaries above 1 MiB


def render(result: Mapping[str, Any]) -> str:
    """Return verdict, one row per case, and the block of every failing case, within `LIMIT`."""
    lines = [
        f"### equivcheck: {result['verdict']}",
        "",
        "| case | id | verdict | causes | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        place = f"{case.get('target', '')} {words.label(case)}"
        cells = (place, case["id"], case["verdict"], ", ".join(words.codes(case)))
        lines.append("| " + " | ".join(map(_cell, (*cells, words.margin(case)))) + " |")
    page = "\n".join(lines) + "\n"
    for number, case in enumerate(filter(words.failed, result["cases"])):
        more = f"\n```text\n{text.block(case).replace('```', '` ` `')}\n```\n"
        if len(page) + len(more) > LIMIT:
            return f"{page[:LIMIT]}\nShortened after {number} failing cases.\n"
        page += more
    return f"{page}\n{text.summary(result)}\n"


def _cell(value: object) -> str:
    shown = text.printable(value).replace("\n", " ")
    for character in "\\`*_|<>[]":
        shown = shown.replace(character, "\\" + character)
    return shown
