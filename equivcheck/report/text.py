"""The terminal's rendering: one line per finished case, a block per failing one, one summary."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from equivcheck.causes import name_of
from equivcheck.report import words
from equivcheck.result import case_exit_code, missing_causes

WIDTH = 80
_INDENT = 12  # "  evidence  "
_STYLES = {0: "32", 1: "31;1", 3: "31;1", 4: "33", 70: "35;1"}

Paint = Callable[[str, str], str]


def plain(text: str, _style: str) -> str:
    """Return the text as it is: no colour."""
    return text


def ansi(text: str, style: str) -> str:
    """Return the text in colour; the words stay the same, so nothing is lost without it."""
    return f"\x1b[{style}m{text}\x1b[0m"


def printable(text: object) -> str:
    """Return text without control characters, so that no name can drive the terminal."""
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in said)


def header(result_environment: Mapping[str, Any], seed: int) -> str:
    """Return the line that says what ran."""
    facts = [f"{name} {result_environment.get(name)}" for name in ("equivcheck", "torch", "python")]
    return "  ".join([*facts, f"seed {seed}"])


def line(case: Mapping[str, Any], paint: Paint = plain) -> str:
    """Return a finished case in one line of at most 80 columns: verdict and margin."""
    verdict = words.SHOUTED.get(case["verdict"], case["verdict"])
    left = f"  {_cut(words.label(case), 20):<20} "
    found = words.codes(case)
    told = words.margin(case)
    if case["verdict"] == "error":
        told = words.headline(case)
    elif missing_causes(case) and not found:
        told = f"declared {', '.join(missing_causes(case))} not found"
    elif found:
        more = f"+{len(found) - 1}" if len(found) > 1 else ""
        told = f"{found[0]}{more}  {told}"
    rest = _cut(printable(told), WIDTH - len(left) - 15)
    return f"{left}{paint(f'{verdict:<15}', _style(case))}{rest}".rstrip()


def block(case: Mapping[str, Any], paint: Paint = plain, width: int = WIDTH) -> str:
    """Return everything that a reader needs to act on one failing case.

    Args:
        case: A case of a result.
        paint: Colours the headline.
        width: Columns; paths and commands stay whole, to be copied.
    """
    first, *rest = textwrap.wrap(printable(words.headline(case)), width) or [""]
    lines = [paint(first, _style(case)), *rest]
    for title, content in _rows(case, width):
        lines += _row(title, content, width)
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> str:
    """Return the last line: counts per verdict, time, the smallest margin and detection power."""
    cases: Sequence[Mapping[str, Any]] = result["cases"]
    counts = Counter(case["verdict"] for case in cases)
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing ran"
    told = f"{total} in {sum(case.get('seconds') or 0 for case in cases):.1f} s"
    if result.get("interrupted"):
        told = f"interrupted: {told}"
    # A case that theory wants undecided has seen nothing, so its power says nothing of the run.
    powers = [
        c["detection_power"]
        for c in cases
        if c.get("detection_power") is not None
        and (c.get("theory") or {}).get("found") not in ("inconclusive", "invalid", "error")
    ]
    if powers and not any(map(words.failed, cases)):
        told += f"; a relative fault of {words.number(max(powers))} would have been seen"
    return textwrap.fill(told, WIDTH)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Return notes and warnings, each once; a failing case's notes are in its block."""
    said: dict[str, None] = dict.fromkeys(result.get("notes") or ())
    for case in result["cases"]:
        place = f"{case.get('target', '')} {words.label(case)}"
        if not words.failed(case):
            said.update(dict.fromkeys(case.get("notes") or ()))
        for warning in case.get("warnings") or ():
            name = warning.get("name") or name_of(warning["code"])
            said[f"warning {warning['code']} {name} ({place})"] = None
    fill = functools.partial(
        textwrap.fill, width=WIDTH, initial_indent="note  ", subsequent_indent=" " * 6
    )
    return ["\n" + fill(printable(remark)) for remark in said]


def render(result: Mapping[str, Any], paint: Paint = plain) -> str:
    """Return a whole saved result as text."""
    cases = result["cases"]
    seed = cases[0].get("seed", 0) if cases else 0
    parts = [header(result.get("environment") or {}, seed)]
    previous = None
    lines = []
    for case in cases:
        if case.get("target") != previous:
            previous = case.get("target")
            lines += ["", printable(previous)]
        lines.append(line(case, paint))
    parts.append("\n".join(lines))
    parts += ["\n" + block(case, paint) for case in cases if words.failed(case)]
    parts += [*remarks(result), "\n" + summary(result)]
    return "\n".join(parts)


def _rows(case: Mapping[str, Any], width: int) -> Iterator[tuple[str, str]]:
    causes = case.get("causes") or ()
    step = causes[0].get("optimizer_step") if causes else None
    where = f"case {case['id']}  {case.get('target', '')}  {words.label(case)}"
    yield "where", where + (f"  first at optimizer_step {step}" if step is not None else "")
    if case["verdict"] == "error":
        yield from _error_rows(case.get("error") or {})
    else:
        yield from _finding_rows(case, width)
    for note in case.get("notes") or ():
        yield "note", note
    again = case.get("replay", f"equivcheck replay {case['id']}")
    if again:  # none for a subject that only the program that made it has
        yield "replay", again
    if causes:
        yield "learn", f"equivcheck explain {causes[0]['code']}"


def _error_rows(error: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if error.get("where"):
        yield "at", str(error["where"])
    message = "\n".join(str(error.get("message", "")).splitlines()[1:])
    if message.strip():
        yield "message", message
    for title in ("expected", "because", "fix"):
        if error.get(title):
            yield title, str(error[title])
    if error.get("exit_code") == 70:
        yield "because", "this is a fault of equivcheck, not of your code"
        yield "traceback", "in the result JSON; report it with equivcheck doctor's output"
    elif error.get("traceback"):
        yield "traceback", error["traceback"].rstrip()


def _finding_rows(case: Mapping[str, Any], width: int) -> Iterator[tuple[str, str]]:
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    if gradients.get("relative") is not None:
        noise = words.number(gradients.get("control"))
        scale, cosine = (words.factor(gradients.get(name)) for name in ("scale", "cosine"))
        yield "expected", f"a relative error within noise (the control measures {noise})"
        got = words.number(gradients["relative"])
        far = words.farthest(case)
        if case.get("findings") == []:
            yield "got", "the accumulated run agrees with the full batch"
        elif far is not None and far[0] != "gradients":
            yield "got", f"{far[0].replace('_', ' ')} {words.number(far[1])}; gradients agree"
        else:
            yield "got", f"gradients {got}, scale {scale}, cosine {cosine}"
    for title, shown in words.weights(case):
        yield "weights", f"{title:<12} {shown}"
    for position, cause in enumerate(case.get("causes") or ()):
        if position:
            name = cause.get("name") or name_of(cause["code"])
            yield "and", f"{cause['code']} {name}"
        status = "" if cause.get("status") == "proved" else f" ({cause.get('status')})"
        if words.because(cause):
            yield "because", words.because(cause) + status
        for statement in words.evidence(case, cause):
            yield "evidence", statement
        if words.fix(cause):
            yield "fix", words.fix(cause)
    for title in ("because", "fix"):
        if case.get(title):
            yield title, str(case[title])
    absent = missing_causes(case)
    if absent:
        yield "declared", f"{', '.join(absent)}, not found"
    rows = words.worst_parameters(case, 5)
    if case["verdict"] in ("divergent", "precision-loss") and rows:
        room = min(36, width - _INDENT - 3 * 9)
        table = [f"{'worst parameters':<{room}}{'relative':>9}{'scale':>9}{'cosine':>9}"]
        for row in rows:
            scale, cosine = words.factor(row.get("scale")), words.factor(row.get("cosine"))
            name = _cut(str(row["name"]), room - 1)
            table.append(
                f"{name:<{room}}{words.number(row.get('relative')):>9}{scale:>9}{cosine:>9}"
            )
        more = len(case["per_parameter"]) - len(rows)
        yield "gradients", "\n".join(table) + (f"\n{more} more in the result" if more > 0 else "")


def _row(title: str, content: str, width: int) -> list[str]:
    lines: list[str] = []
    for piece in printable(content).splitlines() or [""]:
        body = [piece] if len(piece) <= width - _INDENT else _wrapped(piece, width)
        lines += body
    first, *rest = lines
    return [f"  {title:<9} {first}".rstrip(), *((" " * _INDENT + text).rstrip() for text in rest)]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width - _INDENT,
        break_long_words=False,  # a path or command stays one word, to be copied
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _style(case: Mapping[str, Any]) -> str:
    return _STYLES.get(case_exit_code(case), "31;1")
