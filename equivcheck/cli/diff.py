"""Say what changed between two results: fixed, broken, new and gone cases. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from equivcheck import result as results
from equivcheck.report import text, words

HELP = "compare two saved results"
_FACTOR = 10.0  # rounding moves a noise-level error by a few times between machines, not tenfold


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diff`."""
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")


def execute(options: argparse.Namespace) -> int:
    """Print one line per change; 1 if anything passes no longer, else 0."""
    old = {case["id"]: case for case in results.load(options.old)["cases"]}
    new = {case["id"]: case for case in results.load(options.new)["cases"]}
    changes = [
        (i, change(old.get(i), new.get(i))) for i in [*old, *(i for i in new if i not in old)]
    ]
    shown = [(i, what) for i, what in changes if what != "same"]
    for identity, what in shown:
        case = new.get(identity) or old[identity]
        place = text.printable(f"{case.get('target', '')}  {words.label(case)}")
        print(f"{what:<9} {identity}  {place}")
        before, after = (_told(cases.get(identity)) for cases in (old, new))
        print(f"  was     {before}\n  now     {after}")
    print(f"{len(shown)} changed, {len(changes) - len(shown)} same")
    return 1 if any(what == "broken" for _, what in shown) else 0


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Return new, gone, fixed, broken, changed (other verdict or causes), worse, better or same.

    A new case that fails is broken: nothing may fail unseen because it has no past.
    """
    if after is None:
        return "gone"
    if before is None:
        return "broken" if words.failed(after) else "new"
    if words.failed(before) != words.failed(after):
        return "broken" if words.failed(after) else "fixed"
    if (before["verdict"], words.codes(before)) != (after["verdict"], words.codes(after)):
        return "changed"
    old, new = words.farthest(before), words.farthest(after)
    if old and new and old[1] and new[1] and words.failed(after):
        ratio = new[1] / old[1]
        return "worse" if ratio > _FACTOR else "better" if ratio < 1 / _FACTOR else "same"
    return "same"


def _told(case: Mapping[str, Any] | None) -> str:
    if case is None:
        return "-"
    found = ",".join(words.codes(case))
    return " ".join(filter(None, [case["verdict"], found, words.margin(case)]))
