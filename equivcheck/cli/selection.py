"""`-k EXPR`: words joined by and, or, not and parentheses, matched within a case's description."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from equivcheck.case import Case
from equivcheck.errors import UsageError

_SHOWN = 8  # cases that a note names
Match = Callable[[str], bool]
T = TypeVar("T")


def description(case: Case) -> str:
    """Return what `-k` searches: the id, the label and every field as `name=value`."""
    fields = " ".join(f"{name}={value}" for name, value in case.as_dict().items())
    return f"{case.id} {case.label} {fields}"


def selected(case: Case, match: Match | None) -> bool:
    """Return whether the expression takes this case."""
    return match is None or match(description(case).lower())


def unmatched(cases: list[Case], expression: str | None) -> str:
    """Return the note on an expression that takes none of the cases, with what there is."""
    more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
    known = ", ".join(case.label for case in cases[:_SHOWN])
    return f"-k {expression} matches none of: {known}{more}"


def shard_of(jobs: list[T], shard: str | None) -> list[T]:
    """Return the I-th of N parts of the jobs, every N-th of them, so that each part has its share of every suite.

    Raises:
        UsageError: The shard is not of the form I/N with 1 <= I <= N.
    """
    if shard is None:
        return jobs
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard is {shard!r}", expected="I/N with 1 <= I <= N, as in 2/5")
    return jobs[int(number) - 1 :: int(count)]


def compiled(expression: str | None) -> Match | None:
    """Return a test for the expression; None takes everything.

    Raises:
        UsageError: The expression does not parse.
    """
    if expression is None:
        return None
    words = re.findall(r"[()]|[^\s()]+", expression.lower())

    def failure(problem: str) -> UsageError:
        return UsageError(
            f"-k {expression!r}: {problem}",
            expected="words joined by and, or, not and parentheses",
        )

    def either() -> Match:
        left = both()
        while words and words[0] == "or":
            words.pop(0)
            left = _join(any, left, both())
        return left

    def both() -> Match:
        left = one()
        while words and words[0] == "and":
            words.pop(0)
            left = _join(all, left, one())
        return left

    def one() -> Match:
        if not words or words[0] in ("and", "or", ")"):
            raise failure(
                f"a word is missing before {words[0]!r}" if words else "a word is missing"
            )
        word = words.pop(0)
        if word == "not":
            inverted = one()
            return lambda text: not inverted(text)
        if word == "(":
            inner = either()
            if not words or words.pop(0) != ")":
                raise failure("a parenthesis is not closed")
            return inner
        return lambda text: word in text

    match = either()
    if words:
        raise failure(f"and, or are missing before {words[0]!r}")
    return match


def _join(how: Callable[[list[bool]], bool], left: Match, right: Match) -> Match:
    return lambda text: how([left(text), right(text)])
