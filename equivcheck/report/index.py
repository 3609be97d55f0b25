"""A page of links to the pages of a folder: one card per result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.causes import CAUSES
from equivcheck.report import html

REST = "Correct loops, and several subjects on one page"
FAMILIES = {
    "0": "Unexplained",
    "1": "Weights of the loss",
    "2": "Samples that act on one another",
    "3": "The cycle",
    "4": "Precision and loss scaling",
    "5": "Ranks",
    "6": "Code that does not repeat itself",
    "7": "The log",
}


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the index of some results.

    Args:
        results: Result by the name of its page; the name starts with the cause that it shows.
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for file, result in results.items():
        stem = file.split(".")[0]
        code, _, more = stem.partition("-")
        cause = CAUSES.get(code)
        families.setdefault(FAMILIES.get(code[2:3], REST), []).append(
            {
                "file": file,
                "code": code if cause else "",
                "name": " ".join(filter(None, [cause.name, more and f"({more})"]))
                if cause
                else stem.replace("-", ", "),
                "summary": cause.summary if cause else "",
                "verdict": result["verdict"],
                "headline": _number(code, html.title(result)),
            }
        )
    return html.write("index.html", families=list(families.items()))


def _number(code: str, headline: str) -> str:
    """Return what a headline says after the code and name, which stand above it already."""
    told = headline.split(": ", 1)[-1] if headline.startswith(code) else headline
    return html.capital(told.split(" (accumulation_steps=")[0])
