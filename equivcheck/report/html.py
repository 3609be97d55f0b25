"""One page that opens from disk, for ever: no script, no request, every word escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from equivcheck.report import text, words

_STYLE = """\
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem .75rem .25rem 0;
border-bottom:1px solid #8886;vertical-align:top}pre{overflow-x:auto;padding:1rem;
border:1px solid #8886;border-radius:4px}.verdict{font-weight:700}"""


def render(result: Mapping[str, Any]) -> str:
    """Return the result as one self-contained HTML page."""
    title = f"equivcheck: {result['verdict']}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_safe(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{_safe(title)}</h1><p>{_safe(result.get('target', ''))}</p>",
        f"<p>{_safe(text.summary(result))}</p>",
        *_overview(result),
        *(part for case in result["cases"] for part in _case(case)),
        "<h2>Environment</h2>",
        *_table(("what", "value"), (result.get("environment") or {}).items()),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _overview(result: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Cases</h2>"
    rows = (
        (
            case["id"],
            case.get("target", ""),
            words.label(case),
            case["verdict"],
            ", ".join(words.codes(case)),
            words.margin(case),
        )
        for case in result["cases"]
    )
    yield from _table(("id", "target", "case", "verdict", "causes", "measured"), rows)


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section id="{_safe(case["id"])}">'
    yield f"<h2>{_safe(case['id'])} {_safe(words.label(case))}</h2>"
    if words.failed(case) or case.get("causes"):
        yield f"<pre>{_safe(text.block(case))}</pre>"
    else:
        yield f"<p>{_safe(words.headline(case))}</p>"
    compared = [
        (name.replace("_", " "), *(words.number(d.get(key)) for key in ("relative", "control")))
        for name, d in words.compared(case)
    ]
    if compared:
        yield from _table(("compared", "relative", "control"), compared)
    rows = words.worst_parameters(case, 100)
    if rows:
        names = ("name", "relative", "scale", "cosine")
        values = (
            (r["name"], words.number(r.get("relative")), *map(words.factor, _pair(r))) for r in rows
        )
        yield "<details><summary>Parameters, worst first</summary>"
        yield from _table(names, values)
        yield "</details>"
    yield "</section>"


def _pair(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return row.get("scale"), row.get("cosine")


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield "<table><thead><tr>"
    yield "".join(f'<th scope="col">{_safe(name)}</th>' for name in head)
    yield "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody></table>"


def _safe(value: object) -> str:
    return escape(text.printable(value), quote=True)
