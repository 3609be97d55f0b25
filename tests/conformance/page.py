"""A page out of Markdown with headings, tables, lists and paragraphs: it needs no network and no script."""

from __future__ import annotations

import html
import re

STYLE = (
    ":root{color-scheme:light dark}body{font:14px/1.5 system-ui,sans-serif;max-width:80em;margin:2em auto;"
    "padding:0 1em}table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #8886;"
    "padding:2px 8px;text-align:left;vertical-align:top}"
)


def page(text: str) -> str:
    """Return the Markdown as a page."""
    parts: list[str] = []
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            if not line.startswith("| ---"):
                table.append(
                    [inline(cell.strip()) for cell in line.strip().strip("|").split(" | ")]
                )
            continue
        if table:
            parts.append(rendered(table))
            table = []
        level = len(line) - len(line.lstrip("#"))
        words = inline(line.lstrip("#- ").strip())
        if level:
            parts.append(f"<h{level}>{words}</h{level}>")
        elif words:
            parts.append(f"<p>{words}</p>")
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    wide = "<meta name=viewport content='width=device-width, initial-scale=1'>"
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{wide}<title>{title}</title>"
    return f"{head}<style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"


def inline(text: str) -> str:
    """Return escaped text with code and links."""
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', found)


def rendered(table: list[list[str]]) -> str:
    """Return a table, its first row the heading."""
    head, *body = table
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{top}</tr>{rows}</table>"
