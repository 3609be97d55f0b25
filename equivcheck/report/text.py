"""The terminal's rendering: one line per finished case, a block per failing one, one summary."""

from __future__ import annotations

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from equivcheck.causes import name_of
from equivcheck.report import words
from equivcheck.result import case_exit_code, missing_causes

WIDTH = 80
_INDENT = 12  # "  evidence  "
_ALSO = 20  # lines for cases that share a block
_ALSO_WIDTHS = (12, 11, 8, 11)  # of the columns beside the label's
_STYLES = {0: "32", 1: "31;1", 3: "31;1", 4: "33", 70: "35;1"}

UNFINISHED = "what has not run is not judged; the same command with --resume runs the rest"

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


def blocks(
    cases: Iterable[Mapping[str, Any]], paint: Paint = plain, width: int = WIDTH
) -> list[str]:
    """Return a block for each finding: cases of one subject with the same verdict and causes share one."""
    alike: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for case in cases:
        alike.setdefault(_finding(case), []).append(case)
    return [block(first, paint, width, others) for first, *others in alike.values()]


def block(
    case: Mapping[str, Any],
    paint: Paint = plain,
    width: int = WIDTH,
    others: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return everything that a reader needs to act on one failing case.

    Args:
        case: What the block shows in full.
        paint: Colours the headline.
        width: Columns of what follows the headline; paths and commands stay whole, to be copied.
        others: Further cases with the same finding; each gets a line with its own numbers.
    """
    first, *rest = textwrap.wrap(printable(words.headline(case)), WIDTH) or [""]
    lines = [paint(first, _style(case)), *rest]
    for title, content in _rows(case, width, others):
        lines += _row(title, content, width)
    return "\n".join(lines)


def wrapped(error: str) -> str:
    """Return the block of an error with its lines folded to the screen; paths and commands stay whole."""
    message, *rest = printable(error).splitlines() or [""]
    lines = textwrap.wrap(message, WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    for line in rest:
        title, content = line[:_INDENT], line[_INDENT:]
        first, *more = _wrapped(content, WIDTH) or [""]
        lines += [title + first, *(" " * _INDENT + each for each in more)]
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> str:
    """Return the last line: counts per verdict, time, the smallest margin and detection power."""
    cases: Sequence[Mapping[str, Any]] = result["cases"]
    counts = Counter(case["verdict"] for case in cases)
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no case ended"
    told = f"{total} in {sum(case.get('seconds') or 0 for case in cases):.1f} s"
    if result.get("interrupted"):
        told = f"{words.interrupted(result)}; {told}"
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
    if result.get("interrupted"):
        said[UNFINISHED] = None
    for case in result["cases"]:
        if not words.failed(case):
            said.update(dict.fromkeys(case.get("notes") or ()))
    said.update(dict.fromkeys(f"warning {each}" for each in warnings(result)))
    fill = functools.partial(
        textwrap.fill, width=WIDTH, initial_indent="note  ", subsequent_indent=" " * 6
    )
    return ["\n" + fill(printable(remark)) for remark in said]


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Return each warning in a line: its code, where, what was measured, and the fix."""
    found = []
    for case in result["cases"]:
        place = f"{case.get('target', '')} {words.label(case)}"
        for each in case.get("warnings") or ():
            name = each.get("name") or name_of(each["code"])
            told = "; ".join(filter(None, [words.warning(each), words.fix(each)]))
            found.append(f"{each['code']} {name} ({place})" + (f": {told}" if told else ""))
    return found


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
    parts += ["\n" + each for each in blocks(filter(words.failed, cases), paint)]
    parts += [*remarks(result), "\n" + summary(result)]
    return "\n".join(parts)


def _finding(case: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what a block says of a case apart from its numbers: equal ones are one finding."""
    error = case.get("error") or {}
    return (
        *(case.get("target"), case.get("workload"), case["verdict"]),
        tuple((c["code"], c.get("status"), words.because(c), words.fix(c)) for c in _causes(case)),
        tuple(missing_causes(case)),
        *(case.get(key) for key in ("because", "fix")),
        *(error.get(key) for key in ("type", "message", "where", "because", "fix")),
    )


def _causes(case: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return case.get("causes") or ()


def _rows(
    case: Mapping[str, Any], width: int, others: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    causes = _causes(case)
    step = causes[0].get("optimizer_step") if causes else None
    where = f"case {case['id']}  {case.get('target', '')}  {words.label(case)}"
    yield "where", where + (f"  first at optimizer_step {step}" if step is not None else "")
    if others:
        yield "also", _also(others, width - _INDENT)
    if case["verdict"] == "error":
        yield from _error_rows(case.get("error") or {})
    else:
        yield from _finding_rows(case, width)
    for note in dict.fromkeys(note for each in (case, *others) for note in each.get("notes") or ()):
        yield "note", note
    again = case.get("replay", f"equivcheck replay {case['id']}")
    if again:  # none for a subject that only the program that made it has
        yield "replay", again
    if causes:
        yield "learn", f"equivcheck explain {causes[0]['code']}"


def _also(cases: Sequence[Mapping[str, Any]], width: int) -> str:
    """Return a line for each case that has the same finding: how far it is off, and how far when put right."""
    rows = [("case", "", "difference", "scale", "put right")]
    identity, *numbers = _ALSO_WIDTHS
    widths = (identity, width - sum(_ALSO_WIDTHS), *numbers)
    for case in cases[:_ALSO]:
        far = words.farthest(case)
        gradients = (case.get("divergence") or {}).get("gradients") or {}
        shown = far is not None and far[0] == "gradients"
        rows.append(
            (
                str(case["id"]),
                words.label(case),
                words.number(far[1]) if far is not None else "-",
                words.factor(gradients.get("scale")) if shown else "-",
                next((words.number(left) for left in _left(case)), "-"),
            )
        )
    # A column that says nothing is left out.
    kept = [i for i in range(5) if i < 2 or any(row[i] != "-" for row in rows[1:])]
    lines = [
        "".join(f"{_cut(row[i], widths[i] - 1):{'<>'[i > 1]}{widths[i]}}" for i in kept).rstrip()
        for row in rows
    ]
    more = len(cases) - _ALSO
    return "\n".join([*lines, *([f"{more} more in the result"] if more > 0 else [])])


def _left(case: Mapping[str, Any]) -> Iterator[float]:
    """Yield what is left of the difference with each cause put right."""
    for cause in _causes(case):
        done = (cause.get("evidence") or {}).get("intervention")
        if isinstance(done, Mapping) and done.get("relative_after") is not None:
            yield done["relative_after"]


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
        if case.get("findings") == [] and case["verdict"] != "inconclusive":
            yield "got", "the accumulated run agrees with the full batch"
        elif far is not None and far[0] != "gradients":
            yield "got", f"{far[0].replace('_', ' ')} {words.number(far[1])}; gradients agree"
        else:
            yield "got", f"gradients {got}, scale {scale}, cosine {cosine}"
    for title, shown in words.weights(case):
        yield "weights", f"{title:<12} {shown}" if title else shown
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
    for title in ("expected", "because", "fix"):
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
