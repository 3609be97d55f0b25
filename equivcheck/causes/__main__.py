"""`python -m equivcheck.causes README.md` rewrites the table between the file's markers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from equivcheck.causes import CAUSES

BEGIN, END = "<!-- begin: causes -->", "<!-- end: causes -->"


def table() -> str:
    """Return the catalogue as a Markdown table."""
    rows = [f"| {c.code} | {c.name} | {c.summary} |" for c in CAUSES.values()]
    return "\n".join(["| code | name | what is seen |", "| --- | --- | --- |", *rows])


def updated(text: str) -> str:
    """Return the page with the table between its markers rewritten."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
