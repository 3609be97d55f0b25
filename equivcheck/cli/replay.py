"""Run one recorded case again, exactly, and say whether it is fixed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equivcheck import result as results
from equivcheck.api import job_of, outcomes
from equivcheck.cli.outputs import LATEST
from equivcheck.cli.screen import own_stdout, say
from equivcheck.errors import UsageError
from equivcheck.report import text, words

_SHOWN = 8  # cases that a message names
HELP = "run one recorded case again"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `replay`."""
    parser.add_argument("case_id", metavar="CASE_ID", help="an id, or the beginning of one")
    parser.add_argument(
        "--result", metavar="PATH", default=str(LATEST / "result.json"), help="where it is recorded"
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="longest time")


def execute(options: argparse.Namespace) -> int:
    """Print FIXED, STILL DIVERGENT, SAME or ERROR and return the case's own exit code."""
    before = _recorded(options.case_id, options.result)
    with own_stdout() as out:
        [now] = outcomes([job_of(before)], timeout=options.timeout)
        say(out, text.line(now))
        if words.failed(now):
            say(out, "\n" + text.block(now))
        say(out, f"\n{outcome(before, now)}  {now['id']}")
    return results.case_exit_code(now)


def outcome(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return one word for what became of a case, with the causes where they changed."""
    was, code = results.case_exit_code(before), results.case_exit_code(now)
    if code == 0:
        return "FIXED" if was else "SAME"
    if code in (3, 70):
        return "ERROR"
    if code == 4:
        return "SAME" if now["verdict"] == before["verdict"] else now["verdict"].upper()
    if was != 1:
        return "NOW DIVERGENT"
    old, new = words.codes(before), words.codes(now)
    changed = f" ({', '.join(old) or '-'} before, {', '.join(new) or '-'} now)"
    return "STILL DIVERGENT" + (changed if old != new else "")


def _recorded(prefix: str, path: str) -> Mapping[str, Any]:
    if not Path(path).exists():
        raise UsageError(
            f"there is no result at {path}",
            expected="the result of an earlier run in this folder",
            fix="equivcheck run TARGET, or --result PATH",
        )
    cases = results.load(path)["cases"]
    found = [case for case in cases if str(case["id"]).startswith(prefix.lower())]
    if len(found) != 1:
        known = found or cases
        some = [f"{case['id']} ({words.label(case)})" for case in known[:_SHOWN]]
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        later = path == str(LATEST / "result.json") and not found
        raise UsageError(
            f"{len(found) or 'no'} cases begin with {prefix!r}",
            where=path,
            expected=f"one of {', '.join(some)}{more}" if some else "a result with cases in it",
            because="every run writes its result there: a later one has replaced it"
            if later
            else None,
            fix="more digits of the id"
            if found
            else f"equivcheck replay {prefix} --result PATH, a file that run --json wrote",
        )
    case: Mapping[str, Any] = found[0]
    if "recordings" in case:
        raise UsageError(
            f"a-comparison: case {case['id']} compared two recordings; there is nothing to run again",
            where=path,
            fix=str(case.get("replay", "")) or None,
        )
    return case
