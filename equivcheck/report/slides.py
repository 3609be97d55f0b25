"""The plots of a case as SVG files of their own, 960 by 540, for slides and papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from equivcheck.report import curves, panels, text, words
from equivcheck.report.scales import Decades

WIDTH, HEIGHT = 960, 540
LEFT, TOP, RIGHT, BOTTOM = 110, 130, 30, 80
FULL, FOUND, BAD, GOOD, QUIET, RULE, NOISE = (
    *("#14599c", "#b83c08", "#b0201f", "#1b6b3f", "#5a5f68", "#e3e0da", "#dfe3e8"),
)
LINES = (FOUND, "#6a3fb5", "#00707a", "#7d5200", QUIET, QUIET)
SHADES = ("#f2f0ec", "#fdeadb", "#fbd3b4", "#f6b384", "#ee9056", FOUND)

Plot = Callable[[Mapping[str, Any]], str | None]


def render(result: Mapping[str, Any], most: int = 20) -> dict[str, str]:
    """Return the SVG files of the failing cases, or of all if none fails, by file name."""
    cases = [case for case in result["cases"] if words.failed(case)] or list(result["cases"])
    found = {}
    for case in cases[:most]:
        for name, plot in PLOTS.items():
            drawn = plot(case)
            if drawn is not None:
                found[f"{case['id']}-{name}.svg"] = drawn
    return found


def start(case: Mapping[str, Any]) -> str | None:
    """Return the difference over optimizer steps on a log axis, with the noise."""
    panel = panels.start(case)
    if panel is None:
        return None
    axis, x = panel["axis"], panel["x"]
    body = [*_decades_up(axis)]
    if panel["noise"]:
        body.append(_path(curves.area(x, panel["noise"], axis), fill=NOISE, stroke=QUIET))
    if panel["allowed"]:
        body.append(_path(curves.path(x, panel["allowed"], axis), stroke=QUIET, dash="6 5"))
    for line, color in zip(
        reversed(panel["lines"]), reversed(LINES[: len(panel["lines"])]), strict=True
    ):
        body.append(_path(curves.path(x, line["values"], axis), stroke=color, width=3))
        if len(x) <= 40:
            body += [
                f'<circle cx="{_x(a)}" cy="{_y(b)}" r="5" fill="{color}"/>'
                for a, b in curves.points(x, line["values"], axis)
            ]
    body.append(_text(LEFT, HEIGHT - BOTTOM + 26, str(x[0]), "start"))
    body.append(_text(WIDTH - RIGHT, HEIGHT - BOTTOM + 26, str(x[-1]), "end"))
    names = [(line["name"], color) for line, color in zip(panel["lines"], LINES, strict=False)]
    body += _legend([*names, ("noise", NOISE)] if panel["noise"] else names)
    return _slide(case, panel["told"], body, "relative difference over optimizer_step")


def weights(case: Mapping[str, Any]) -> str | None:
    """Return the bars of theory against found, micro-batch by micro-batch."""
    panel = panels.weights(case)
    if panel is None:
        return None
    bars = [(row["rank"], bar) for row in panel["rows"] for bar in row["bars"]]
    slot = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    room = HEIGHT - TOP - BOTTOM
    body = []
    for i, (rank, bar) in enumerate(bars):
        left = LEFT + i * slot
        for j, (key, color) in enumerate((("theory", FULL), ("found", FOUND))):
            height = room * bar[f"{key}_size"] / 100
            x = left + slot * (0.12 + 0.39 * j)
            body.append(
                f'<rect x="{x:.1f}" y="{TOP + room - height:.1f}" width="{slot * 0.36:.1f}" '
                f'height="{max(height, 1):.1f}" fill="{color}"/>'
            )
            if len(bars) <= 10:
                body.append(
                    _text(
                        x + slot * 0.18,
                        TOP + room - height - 6,
                        words.factor(bar[key]),
                        "middle",
                        color,
                        14,
                    )
                )
        name = f"{rank}.{bar['micro_step']}" if panel["ranks"] > 1 else str(bar["micro_step"])
        if len(bars) <= 32:
            body.append(_text(left + slot / 2, HEIGHT - BOTTOM + 22, name, "middle"))
    body += _legend([("should count (full batch)", FULL), ("counts (accumulated)", FOUND)])
    return _slide(case, panel["told"], body, "weight of each micro-batch")


def proof(case: Mapping[str, Any]) -> str | None:
    """Return every cause's difference before and after it is put right."""
    proofs = [(c, c["proof"]) for c in panels.causes(case) if c["proof"]]
    if not proofs:
        return None
    axis = Decades.over([v for _, p in proofs for v in (p["before"], p["after"])])
    body = [*_decades_across(axis)]
    room = (HEIGHT - TOP - BOTTOM) / len(proofs)
    for i, (cause, p) in enumerate(proofs):
        y = TOP + room * (i + 0.5)
        a, b = _x(axis.place(p["after"])), _x(axis.place(p["before"]))
        body += [
            _text(
                LEFT,
                y - 24,
                f"{cause['code']} {cause['name']}: with {p['put_right']}",
                "start",
                "#1a1c20",
                17,
            ),
            f'<line x1="{a}" x2="{b}" y1="{y}" y2="{y}" stroke="{QUIET}" stroke-width="2"/>',
            f'<circle cx="{a}" cy="{y}" r="9" fill="#fff" stroke="{GOOD}" stroke-width="4"/>',
            f'<rect x="{b - 8}" y="{y - 8}" width="16" height="16" fill="{BAD}" transform="rotate(45 {b} {y})"/>',
            _text(b, y + 34, words.number(p["before"]), "middle", BAD),
            _text(a, y + 34, words.number(p["after"]), "middle", GOOD),
        ]
    body += _legend([("before", BAD), ("after", GOOD)])
    return _slide(
        case, words.because(proofs[0][0]), body, "relative difference, before and after the repair"
    )


def heatmap(case: Mapping[str, Any]) -> str | None:
    """Return the heatmap of modules over optimizer steps."""
    heat = panels.heatmap(case)
    if heat is None:
        return None
    rows = heat["rows"][:16]
    left = 290
    width = (WIDTH - left - RIGHT) / len(heat["steps"])
    height = min(34.0, (HEIGHT - TOP - BOTTOM) / len(rows))
    body = []
    for i, row in enumerate(rows):
        y = TOP + i * height
        body.append(
            _text(left - 12, y + height * 0.65, _cut(str(row["name"])), "end", "#1a1c20", 14)
        )
        body += [
            f'<rect x="{left + j * width:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{height - 1:.1f}" fill="{SHADES[cell["shade"]]}"/>'
            for j, cell in enumerate(row["cells"])
        ]
    # At most a dozen numbers fit beside one another.
    every = -(-len(heat["steps"]) // 12)
    body += [
        _text(left + (j + 0.5) * width, TOP + len(rows) * height + 18, str(step), "middle")
        for j, step in enumerate(heat["steps"])
        if j % every == 0
    ]
    body += _legend([("within the limit", SHADES[0]), ("up to 12 decades beyond it", SHADES[5])])
    panel = panels.parameters(case)
    return _slide(case, panel["told"] if panel else "", body, "modules over optimizer_step")


PLOTS: Mapping[str, Plot] = {"start": start, "weights": weights, "proof": proof, "heatmap": heatmap}


def _slide(case: Mapping[str, Any], told: str, body: Sequence[str], what: str) -> str:
    title = words.headline(case)
    size = 24 if len(title) <= 70 else 18
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label={quoteattr(text.printable(told))}>'
        ),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(30, 44, title[:100], "start", "#1a1c20", size, weight=600),
        *(_text(30, 74 + 20 * i, line, "start", QUIET, 15) for i, line in enumerate(_lines(told))),
        *body,
        _text(
            WIDTH - RIGHT, HEIGHT - 14, f"{what} · case {case['id']} · equivcheck", "end", QUIET, 12
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _cut(name: str, length: int = 32) -> str:
    """Return the end of a name, which tells modules apart."""
    return name if len(name) <= length else "…" + name[1 - length :]


def _lines(told: str) -> list[str]:
    found, line = [], ""
    for word in told.split():
        if len(line) + len(word) > 115:
            found.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return [*found, line][:2]


def _x(place: float) -> float:
    return round(LEFT + place / 100 * (WIDTH - LEFT - RIGHT), 1)


def _y(place: float) -> float:
    return round(HEIGHT - BOTTOM - place / 100 * (HEIGHT - TOP - BOTTOM), 1)


def _decades_up(axis: Decades) -> Iterator[str]:
    for place, label in axis.ticks():
        y = _y(place)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{RULE}"/>'
        yield _text(LEFT - 12, y + 5, label, "end")


def _decades_across(axis: Decades) -> Iterator[str]:
    for place, label in axis.ticks():
        x = _x(place)
        yield f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{RULE}"/>'
        yield _text(x, HEIGHT - BOTTOM + 20, label, "middle")


def _path(path: str, *, stroke: str, fill: str = "none", width: float = 1.5, dash: str = "") -> str:
    """Return a path of the square of 100 by 100, moved and stretched into the slide."""
    across, up = (WIDTH - LEFT - RIGHT) / 100, (HEIGHT - TOP - BOTTOM) / 100
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path d="{path}" transform="translate({LEFT} {TOP}) scale({across} {up})" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="{width}" vector-effect="non-scaling-stroke"{dashes}/>'
    )


def _legend(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    x = LEFT
    for name, color in entries:
        yield f'<rect x="{x}" y="{HEIGHT - 47}" width="16" height="8" fill="{color}"/>'
        yield _text(x + 22, HEIGHT - 38, name, "start")
        x += 44 + 8 * len(name)


def _text(
    x: float,
    y: float,
    said: str,
    anchor: str,
    color: str = QUIET,
    size: int = 14,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text.printable(said))}</text>'
    )
