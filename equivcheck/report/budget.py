"""How much of a result a page carries: decided when it is written, never in the browser."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equivcheck.report import words

# Bytes of a page. A megabyte and a half still opens at once from an artifact store; above 5 MB browsers stutter.
USUAL: Final = 1_500_000
MOST: Final = 5_000_000

# What the list of cases needs, for the filter and the case's own line, where it is not the usual value.
_CORE: Final = (
    *("id", "workload", "accumulation_steps", "split", "world_size", "strategy", "precision"),
    *("seed", "device", "verdict", "expect"),
)
_USUALLY: Final = {
    "split": "even",
    "world_size": 1,
    "strategy": "none",
    "precision": "native",
    "seed": 0,
    "device": "cpu",
    "expect": [],
}
# Bytes that a section of a page takes besides its data, and a cell of the matrix; measured on the examples.
_SECTION: Final = 45_000
_CELL: Final = 130
_SHELL: Final = 110_000


@dataclass(frozen=True)
class Level:
    """How much is kept.

    Attributes:
        sections: Failing cases with a section of their own.
        passing: Other cases with one, where all fit.
        rows: Parameters of a table.
        points: Points of a line.
        lines: Whether the worst parameters keep their number at every step; the cells say it coarsely.
        cells: Whether the cells of all parameters are kept.
        events: Events of each timeline.
        matrix: Cases in the matrix.
    """

    sections: int
    passing: int
    rows: int
    points: int
    lines: bool
    cells: bool
    events: int
    matrix: int


LEVELS: Final = (
    Level(60, 24, 2000, 512, lines=True, cells=True, events=800, matrix=20_000),
    Level(40, 8, 2000, 256, lines=False, cells=True, events=400, matrix=20_000),
    Level(20, 2, 500, 256, lines=False, cells=False, events=200, matrix=20_000),
    Level(8, 1, 200, 128, lines=False, cells=False, events=100, matrix=10_000),
    Level(2, 1, 100, 64, lines=False, cells=False, events=60, matrix=4_000),
)


@dataclass(frozen=True)
class Reduced:
    """A result that fits.

    Attributes:
        result: The result, its cases cut down.
        detailed: Ids of the cases with a section.
        notes: What was left out, in sentences.
    """

    result: dict[str, Any]
    detailed: Sequence[str]
    notes: list[str]


def reduce(result: Mapping[str, Any], level: Level) -> Reduced:
    """Return what a page of this level carries of a result."""
    cases = list(result["cases"])
    failing = [case for case in cases if words.failed(case)]
    others = [case for case in cases if not words.failed(case)]
    shown = failing[: level.sections]
    notes = []
    if len(failing) > len(shown):
        notes.append(f"{len(failing) - len(shown)} of {len(failing)} failing cases have no section")
    if len(others) <= level.passing:
        shown = [case for case in cases if case in others or case in shown]
    elif others:
        notes.append(f"{len(others)} cases that agree are in the table of cases only")
    detailed = {case["id"] for case in shown}
    kept = []
    for case in cases[: level.matrix]:
        if case["id"] in detailed:
            kept.append(_cut(case, level, notes))
        else:
            kept.append(_core(case))
    if len(cases) > level.matrix:
        notes.append(
            f"{len(cases) - level.matrix} of {len(cases)} cases are in the result file only"
        )
    return Reduced({**result, "cases": kept}, list(detailed), list(dict.fromkeys(notes)))


def size(reduced: Reduced, data: str) -> int:
    """Return about how many bytes a page of this will have, to spare writing it in vain."""
    cells = len(reduced.result["cases"])
    return _SHELL + len(data) + _SECTION * len(reduced.detailed) + _CELL * cells


def _core(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case's line: what tells it from others, its verdict, its number."""
    kept = {
        key: case[key]
        for key in _CORE
        if key in case and case[key] is not None and case[key] != _USUALLY.get(key)
    }
    if words.failed(case) or case.get("causes"):
        kept["headline"] = words.headline(case)
        kept["causes"] = [
            {key: cause[key] for key in ("code", "name", "status") if key in cause}
            for cause in case.get("causes") or ()
        ]
    if case.get("error"):
        kept["error"] = {key: case["error"].get(key) for key in ("type", "message", "exit_code")}
    far = words.farthest(case)
    if far is not None:
        name, relative = far
        noise = ((case.get("divergence") or {}).get(name) or {}).get("control")
        kept["divergence"] = {name: {"relative": _three(relative), "control": _three(noise)}}
    return kept


def _three(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _cut(case: Mapping[str, Any], level: Level, notes: list[str]) -> dict[str, Any]:
    kept = dict(case)
    rows = kept.get("per_parameter") or ()
    if len(rows) > level.rows:
        notes.append(f"of {len(rows)} parameters the worst {level.rows} are in the table")
        kept["per_parameter"] = rows[: level.rows]
    if kept.get("parameters_by_step") and not level.lines:
        notes.append("the numbers of single parameters at every step are left out")
        del kept["parameters_by_step"]
    if kept.get("cells") and not level.cells:
        notes.append("the differences of all parameters at all steps are left out")
        del kept["cells"]
    for name in ("steps", "modules", "parameters_by_step"):
        if kept.get(name):
            kept[name] = _thinned(kept[name], level.points, notes)
    rates = (kept.get("divergence") or {}).get("learning_rates")
    if rates and len(rates.get("full_batch") or ()) > level.points:
        short = {
            key: value[: level.points] if isinstance(value, list) else value
            for key, value in rates.items()
        }
        kept["divergence"] = {**kept["divergence"], "learning_rates": short}
    if kept.get("timelines"):
        kept["timelines"] = _shorter(kept["timelines"], level.events, notes)
    if len(kept.get("timeline") or ()) > level.events:
        kept["timeline"] = kept["timeline"][: level.events]
    return kept


def _thinned(series: Mapping[str, Any], points: int, notes: list[str]) -> dict[str, Any]:
    """Keep of every run of steps the one whose numbers are farthest off."""
    x = series["optimizer_step"]
    if len(x) <= points:
        return dict(series)
    notes.append(f"of {len(x)} optimizer steps the {points} with the largest differences are drawn")
    ranked = _sizes(series, len(x))
    edges = [round(i * len(x) / points) for i in range(points + 1)]
    wanted = [
        max(range(a, b), key=ranked.__getitem__) for a, b in itertools.pairwise(edges) if b > a
    ]

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pick(item) for key, item in value.items()}
        if isinstance(value, list) and len(value) == len(x) and not _of_mappings(value):
            return [value[i] for i in wanted]
        if isinstance(value, list) and _of_mappings(value):
            return [pick(item) for item in value]
        return value

    found: dict[str, Any] = pick(series)
    return found


def _of_mappings(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping)


def _sizes(series: Mapping[str, Any], count: int) -> list[float]:
    found = [0.0] * count
    rows = [series.get("gradients") or {}, *(series.get("rows") or ())]
    for row in rows:
        for key in ("relative", "multiple"):
            values = row.get(key) or ()
            for i, value in enumerate(values[:count]):
                found[i] = max(found[i], value or 0.0)
    return found


def _shorter(timelines: Mapping[str, Any], events: int, notes: list[str]) -> dict[str, Any]:
    found = dict(timelines)
    for role in ("full_batch", "accumulated"):
        both = timelines.get(role) or {}
        if len(both.get("events") or ()) > events:
            cut = len(both["events"]) - events
            found[role] = {
                "events": both["events"][:events],
                "left_out": both.get("left_out", 0) + cut,
            }
            notes.append("timelines are cut at their end")
    return found
