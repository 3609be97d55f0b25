"""Say what a cause means, how it is found and proved, and how to fix it. Needs no torch."""

from __future__ import annotations

import argparse
import textwrap

from equivcheck.causes import CAUSES, LEGEND, Cause
from equivcheck.config import closest
from equivcheck.errors import UsageError

HELP = "explain a cause, or list them all"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    parser.add_argument("code", metavar="CODE", nargs="?", help="EQ103, or mean-of-means")


def execute(options: argparse.Namespace) -> int:
    """Print the catalogue or one entry of it."""
    if options.code is None:
        print("\n".join(f"{code}  {cause.name}" for code, cause in CAUSES.items()))
        print("\nequivcheck explain EQ103 says more")
    else:
        print(explained(_found(options.code)))
    return 0


def explained(cause: Cause) -> str:
    """Return everything that the catalogue knows about a cause, in 80 columns."""
    lines = [f"{cause.code} {cause.name}"]
    for title, content in (
        ("what", cause.summary),
        ("because", cause.because),
        ("detected", cause.detected),
        ("proved", cause.proved),
        ("fix", cause.fix),
    ):
        lines += textwrap.wrap(
            f"  {title:<9} {content}",
            80,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += ["", textwrap.indent(cause.mathematics, "    ")]
    lines += ["", textwrap.indent(LEGEND, "    ")]
    if cause.seen_in_the_wild:
        lines += ["", "  seen in", *(f"    {_link(issue)}" for issue in cause.seen_in_the_wild)]
    return "\n".join(lines)


def _link(issue: str) -> str:
    repository, _, number = issue.partition("#")
    return f"https://github.com/{repository}/issues/{number}"


def _found(word: str) -> Cause:
    names = {cause.name: cause for cause in CAUSES.values()}
    entries = {**CAUSES, **names}
    key = word.upper() if word.upper() in CAUSES else word.lower()
    if key not in entries:
        guess = closest(word.upper(), CAUSES) if word[:2].upper() == "EQ" else closest(key, names)
        raise UsageError(
            f"there is no cause {word!r}",
            expected="a code or a name; equivcheck explain lists them",
            fix=f"equivcheck explain {guess}" if guess else None,
        )
    return entries[key]
