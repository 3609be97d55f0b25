"""One page that opens from disk, for ever: no request, complete without script, every word escaped.

The body is written here, by templates that escape by default. A script adds what paper cannot do: filter, sort,
zoom, copy. It is named by its hash in the page's own content policy, so that nothing else ever runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from equivcheck.causes import CAUSES, LEGEND, name_of
from equivcheck.report import curves, markdown, panels, text, words
from equivcheck.report.budget import LEVELS, MOST, USUAL, Reduced, reduce, size
from equivcheck.result import case_exit_code

if TYPE_CHECKING:
    from jinja2 import Environment

MARKS = {
    "equivalent": "✓",
    "expected": "◐",
    "divergent": "✕",
    "precision-loss": "▼",
    "inconclusive": "?",
    "invalid": "∅",
    "error": "!",
}
TITLES = {
    "start": "Where it starts",
    "weights": "The weights",
    "walk": "Micro-batch walk",
    "parameters": "Parameters",
    "precision": "Precision",
    "ranks": "Ranks",
    "control": "Control and noise",
}
# What a template may ask of an error or of a trial; older results have fewer keys.
_ERROR = dict.fromkeys(("type", "message", "where", "expected", "because", "fix", "traceback"))
_TRIAL = {"codes": (), "put_right": (), "relative": None, "within_noise": False}
_BREAKS = re.compile(r"[._](?=\w)")
_NUMBER = re.compile(r"\d[\d.]*e[+-]\d+|--\w[\w-]*(?: EQ\d+)?")
NAMED = 2  # causes in a title; more are counted
ROWS = 100  # of a table, before the script adds more


def render(result: Mapping[str, Any]) -> str:
    """Return the result as one self-contained page of at most 5 MB.

    The first level of detail that stays within 1.5 MB is taken, or else within 5 MB; the page says what it left
    out.
    """
    fitting = ""
    for level in LEVELS:
        reduced = reduce(result, level)
        data = embedded(_data(result, reduced))
        guess = size(reduced, data)
        if level is not LEVELS[-1] and guess > (2 * USUAL if not fitting else 1.2 * USUAL):
            continue
        page = _render(result, reduced, data)
        found = len(page.encode())
        if found <= USUAL:
            return page
        if found <= MOST and not fitting:
            fitting = page
    return fitting or page


def write(template: str, **values: Any) -> str:
    """Return a page made from a template, with the assets and the content policy that all pages share."""
    css, script = asset("page.css"), asset("page.js")
    plot = asset("uPlot.iife.min.js")
    scripts = [_early(), plot, script]
    policy = " ".join(f"'sha256-{_sha(each)}'" for each in scripts)
    return str(
        _templates()
        .get_template(template)
        .render(
            css=css + asset("uPlot.min.css"),
            early=_early(),
            plot=plot,
            script=script,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {policy}",
            **values,
        )
    )


def asset(name: str) -> str:
    """Return a file that stands beside the templates."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def embedded(value: Any) -> str:
    """Return JSON that can stand inside a script element: no `<`, so that nothing can end it."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def prose(value: str) -> Any:
    """Return text for a page whose numbers and options stay on one line: a browser breaks 1e-16 at its hyphen."""
    from markupsafe import Markup, escape  # noqa: PLC0415 - comes with the templates

    safe = str(escape(text.printable(value)))
    return Markup(_NUMBER.sub(r'<span class="nb">\g<0></span>', safe))  # noqa: S704 - escaped just above


def capital(value: str) -> str:
    """Return text that begins with a capital."""
    return value[:1].upper() + value[1:]


def breakable(value: str) -> Any:
    """Return a dotted name that a narrow page breaks after its dots and underscores, and may be copied whole."""
    from markupsafe import Markup, escape  # noqa: PLC0415 - comes with the templates

    safe = str(escape(text.printable(value)))
    return Markup(_BREAKS.sub(r"\g<0><wbr>", safe))  # noqa: S704 - escaped just above


def _early() -> str:
    """Return the script that sets the theme before the first paint."""
    return asset("theme.js")


def _sha(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")


def _render(result: Mapping[str, Any], reduced: Reduced, data: str) -> str:
    cases = reduced.result["cases"]
    detailed = set(reduced.detailed)
    sections = [_section(case) for case in cases if case["id"] in detailed]
    sections.sort(key=lambda section: not section["failed"])
    groups = _groups(result["cases"], detailed)
    first = next(
        (s for s in sections if words.failed(s["case"])), sections[0] if sections else None
    )
    return write(
        "page.html",
        result=reduced.result,
        title=title(result),
        mark=MARKS.get(result["verdict"], ""),
        counts=Counter(case["verdict"] for case in result["cases"]).most_common(),
        summary=text.summary(result),
        groups=groups,
        only_warned=all(group["status"] == "warning" for group in groups),
        matrix=_matrix(result["cases"][: len(cases)], detailed),
        sections=sections,
        first=first,
        single=len(result["cases"]) == 1,
        reduced=reduced.notes,
        remarks=_remarks(result),
        warned=[group for group in groups if group["status"] == "warning"],
        environment=list((result.get("environment") or {}).items()),
        data=data,
    )


def _data(result: Mapping[str, Any], reduced: Reduced) -> dict[str, Any]:
    """Return what the script needs: the numbers behind the charts, and the texts to copy."""
    detailed = set(reduced.detailed)
    return {
        "result": reduced.result,
        "reduced": bool(reduced.notes),
        "markdown": {
            case["id"]: markdown.render({**result, "cases": [case], "interrupted": False})
            for case in result["cases"]
            if case["id"] in detailed
        },
        "summary": markdown.render(
            {**result, "cases": _for_summary(result)}, words.interrupted(result)
        ),
    }


def _for_summary(result: Mapping[str, Any]) -> list[Any]:
    """Return the cases of the summary to copy: the failing ones first, as many as an issue holds."""
    return sorted(result["cases"], key=lambda case: not words.failed(case))[:50]


def title(result: Mapping[str, Any]) -> str:
    """Return the headline of the page: the case's own if one speaks for all, and first that cases are missing."""
    missing = words.interrupted(result)
    if not missing:
        return _title(result)
    return f"{missing}; {_title(result)}" if result["cases"] else missing


def _title(result: Mapping[str, Any]) -> str:
    cases = result["cases"]
    failing = [case for case in cases if words.failed(case)]
    if len(cases) == 1:
        return words.headline(cases[0])
    if not cases:
        return "Nothing ran"
    if not failing:
        those = f"these {len(cases)}" if result.get("interrupted") else f"All {len(cases)} cases"
        return f"{those} agree with the full batch"
    having = Counter(code for case in failing for code in words.codes(case)[:1])
    count, codes = having.total(), list(having)
    without = Counter(case["verdict"] for case in failing if not words.codes(case))
    told = ", ".join(f"{number} {verdict}" for verdict, number in without.items())
    more = f", {told}" if codes and told else ""
    if len(codes) > NAMED:
        return f"{len(codes)} causes in {count} of {len(cases)} cases{more}"
    if codes:
        named = " and ".join(f"{code} {name_of(code)}" for code in codes)
        return f"{named} in {count} of {len(cases)} cases{more}"
    return f"{len(failing)} of {len(cases)} cases: {failing[0]['verdict']}"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Return the notes; a warning has a card of its own."""
    plain = {
        **result,
        "cases": [{k: v for k, v in c.items() if k != "warnings"} for c in result["cases"]],
    }
    return [
        remark.removeprefix("\nnote  ").replace("\n      ", " ") for remark in text.remarks(plain)
    ][:50]


def _section(case: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "case": case,
        "label": words.label(case),
        "mark": MARKS.get(case["verdict"], ""),
        "failed": words.failed(case),
        "headline": words.headline(case),
        "ruler": panels.ruler(case),
        "causes": panels.causes(case),
        "panels": {
            name: curves.drawn(panel) if name == "start" else panel
            for name, panel in panels.of(case).items()
            if panel
        },
        "replay": case.get("replay", f"equivcheck replay {case['id']}"),
        "told": words.margin(case),
        "error": _ERROR | case["error"] if case.get("error") else None,
        "notes": list(case.get("notes") or ()),
        "expected": case.get("expected"),
        "because": case.get("because"),
        "fix": case.get("fix"),
        "trials": [_TRIAL | dict(each) for each in (case.get("interventions") or ())[:30]],
    }


def _groups(cases: Sequence[Mapping[str, Any]], detailed: set[str]) -> list[dict[str, Any]]:
    """Return the causes of all cases, each once, with the cases that have it; proved ones first."""
    found: dict[str, dict[str, Any]] = {}
    several = len({case.get("target") for case in cases}) > 1
    for case in cases:
        file = str(case.get("target", "")).rpartition("/")[2] if several else ""
        label = f"{file} {words.label(case)}".strip()
        for cause in (*panels.causes(case), *panels.warnings(case)):
            group = found.setdefault(cause["code"], {**cause, "cases": [], "of": case})
            if case["id"] in detailed and group["of"]["id"] not in detailed:
                group.update(cause, of=case)
            group["cases"].append({"id": case["id"], "label": label, "failed": words.failed(case)})
    certain = {"proved": 0, "warning": 2}
    order = sorted(
        found.values(), key=lambda g: (certain.get(g["status"], 1), -len(g["cases"]), g["code"])
    )
    for group in order:
        group["more"] = max(0, len(group["cases"]) - 40)
        group["cases"] = group["cases"][:40]
    return order


def _matrix(cases: Sequence[Mapping[str, Any]], detailed: set[str]) -> dict[str, Any]:
    """Return the cases as rows of workloads and columns of everything else."""
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    columns: dict[str, tuple[Any, ...]] = {}
    for case in cases:
        label = words.label(case)
        workload = str(case.get("workload") or "")
        column = label.removeprefix(workload).strip() if workload else label
        columns.setdefault(
            column,
            (
                case.get("world_size") or 1,
                str(case.get("strategy")),
                str(case.get("precision")),
                str(case.get("split")),
                case.get("accumulation_steps") or 0,
            ),
        )
        row = rows.setdefault((str(case.get("target", "")), workload), {})
        row.setdefault(column, []).append(_cell(case, detailed))
    ordered = sorted(columns, key=lambda name: (columns[name], name))
    return {
        "columns": ordered,
        "rows": [
            {"target": target, "workload": workload, "cells": [row.get(c, []) for c in ordered]}
            for (target, workload), row in rows.items()
        ],
        "count": len(cases),
        "numbers": len(cases) <= 400,
        "targets": len({target for target, _ in rows}) > 1,
    }


def _cell(case: Mapping[str, Any], detailed: set[str]) -> dict[str, Any]:
    codes = words.codes(case)
    far = words.farthest(case)
    return {
        "id": case["id"],
        "verdict": case["verdict"],
        "mark": MARKS.get(case["verdict"], ""),
        "code": ", ".join(codes[:2]) if case["verdict"] != "equivalent" else "",
        "word": "ok"
        if case["verdict"] == "equivalent" and case_exit_code(case) == 0
        else case["verdict"],
        "number": words.number(far[1]) if far is not None else "",
        "detailed": case["id"] in detailed,
        "failed": words.failed(case),
    }


@lru_cache(maxsize=1)
def _templates() -> Environment:
    # Loaded when a page is written, not when a command starts: it takes 40 ms.
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader  # noqa: PLC0415

    folder = resources.files(__package__).joinpath("templates")
    found = Environment(
        autoescape=True,
        loader=FileSystemLoader(str(folder)),
        undefined=ChainableUndefined,  # what an older result does not have is left empty
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            text.printable(value) if isinstance(value, str) and type(value) is str else value
        ),
    )
    found.filters.update(
        number=words.number,
        factor=words.factor,
        times=words.times,
        short=panels.short,
        event_words=panels.event_in_words,
        weights_line=words.weights_line,
        prose=prose,
        breakable=breakable,
        capital=capital,
        put_right=words.put_right,
    )
    found.globals.update(MARKS=MARKS, TITLES=TITLES, ROWS=ROWS, CAUSES=CAUSES, LEGEND=LEGEND)
    return found
