"""What the fixture hands to a test: a callable that checks, and `measure`, which never raises for a divergence."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from equivcheck import api
from equivcheck import result as results
from equivcheck.config import OPTIONS, closest
from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.plugin import facts
from equivcheck.usercode import warnings_in_place

if TYPE_CHECKING:
    from equivcheck.plugin.session import Session

PARTS = ("build", "batches", "train", "objective")
# What a check can be told, by the fixture's call and by the marker alike.
KEYWORDS = tuple(
    name for name in inspect.signature(api.measure).parameters if name not in ("target", *PARTS)
)


class Checker:
    """The fixture `equivcheck` of one test."""

    def __init__(self, item: pytest.Item, session: Session) -> None:
        self._item = item
        self._session = session
        self._subjects = 0
        self._calls = 0

    def close(self) -> None:
        """Note a test that took the fixture and never called it."""
        if not self._calls:
            self._item.user_properties.append((facts.UNUSED, "no check"))

    def __call__(
        self,
        target: object = None,
        *,
        build: Callable[..., Any] | None = None,
        batches: api.Batches | None = None,
        train: Callable[..., Any] | str | None = None,
        objective: Callable[..., Any] | None = None,
        **options: Any,
    ) -> api.Result:
        """Fail the test unless accumulating gives the update of the full batch.

        Args:
            target: A path, a module or its name, or an object with build, batches and train.
            build: In place of the target's own, as the next three.
            batches: A function, or the full batches in a list.
            train: A function, or `FILE:ATTR`.
            objective: The loss that a full batch ought to have.
            options: As for `equivcheck.measure`; over those of the marker, over those of the file.

        Raises:
            DivergenceError: It does not, or a declared cause is missing.
            EquivcheckError: The code under test raised, nothing can be decided, or the call is wrong.
        """
        __tracebackhide__ = True
        found = self.measure(
            target, build=build, batches=batches, train=train, objective=objective, **options
        )
        api.raise_unless_equivalent(found)
        return found

    check = __call__

    def measure(
        self,
        target: object = None,
        *,
        build: Callable[..., Any] | None = None,
        batches: api.Batches | None = None,
        train: Callable[..., Any] | str | None = None,
        objective: Callable[..., Any] | None = None,
        **options: Any,
    ) -> api.Result:
        """Return what was found, for the test's own assertions; arguments as for the call.

        Raises:
            UsageError: An argument, or the target, is wrong.
        """
        __tracebackhide__ = True
        self._calls += 1
        try:
            return self._measured(
                self._located(target),
                {"build": build, "batches": batches, "train": train, "objective": objective},
                options,
            )
        except EquivcheckError as error:
            # The reader sees the own test, and of what its code raised that code.
            raise api.without_our_frames(error)  # noqa: B904 - it is the same error

    def _measured(
        self, target: object, parts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> api.Result:
        given = self._options(options)
        stated = given.pop("train")
        loop = stated if parts["train"] is None else parts["train"]
        if target is None and all(part is None for part in parts.values()):
            raise UsageError("no-subject: the call names nothing to check", expected=api.SUBJECT)
        subject = api.subject_of(target, **{**parts, "train": loop}, name=self._name())
        jobs, notes, values = api.scenario(
            subject, train=loop if isinstance(loop, str) else None, **given
        )
        jobs, left_out = self._session.allowed(jobs)
        with warnings_in_place():
            cases = [self._run(job, values) for job in jobs]
        found = api.Result(
            results.assemble(cases, target=api.name_of(target, jobs), notes=[*notes, *left_out])
        )
        self._session.note(self._item, found)
        return found

    def _run(self, job: api.Job, values: Mapping[str, Any]) -> dict[str, Any]:
        with self._session.ranks(job.case.world_size):
            [case] = api.outcomes([job], timeout=values["timeout"])
        case["test"] = self._item.nodeid
        case["replay"] = (
            f"pytest {shlex.quote(self._item.nodeid)} --equivcheck-replay {job.case.id}"
        )
        return case

    def _name(self) -> str:
        """Return what a subject without a name is called: the test, and a number from its second on."""
        self._subjects += 1
        more = f" #{self._subjects}" if self._subjects > 1 else ""
        return self._item.nodeid + more

    def _located(self, target: object) -> object:
        """Return a path as it is, or beside the test file where it only exists there."""
        text = os.fspath(target) if isinstance(target, os.PathLike) else target
        if not isinstance(text, str):
            return target
        place, colon, attribute = text.partition(":")
        beside = Path(self._item.path).parent / place
        if place.endswith(".py") and not Path(place).exists() and beside.exists():
            return f"{beside}{colon}{attribute}"
        return text

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options by name: the call's over the marker's over the settings'."""
        settings = self._session.settings
        chosen = {name: settings[name] for name in (*KEYWORDS, "train") if name in OPTIONS}
        if not settings.stated("accumulation_steps"):
            chosen["accumulation_steps"] = None
        for marker in reversed(list(self._item.iter_markers("equivcheck"))):
            chosen.update(marker.kwargs)
        refuse_unknown(given, f"the call in {self._item.nodeid}")
        chosen.update(given)
        return chosen


def refuse_unknown(given: Mapping[str, Any], where: str) -> None:
    """Refuse a keyword that is no option of a check.

    Raises:
        UsageError: With the closest option, and where the mistake is.
    """
    for name in given:
        if name not in KEYWORDS:
            guess = closest(name, KEYWORDS)
            raise UsageError(
                f"unknown keyword {name!r} of equivcheck",
                where=where,
                expected="one of " + ", ".join(KEYWORDS),
                fix=f"did you mean {guess}?" if guess else None,
            )


def refuse_marker(item: pytest.Item, marker: pytest.Mark, *, asks: bool) -> None:
    """Refuse a marker that says nothing, or something wrong.

    Args:
        item: The test that it is on.
        marker: One of its markers of ours.
        asks: Whether the test takes the fixture.

    Raises:
        UsageError: A keyword is unknown, a value is not allowed, or the test takes no fixture.
    """
    if marker.args:
        raise UsageError(
            f"the marker equivcheck has {marker.args[0]!r} without a keyword",
            where=item.nodeid,
            expected="keywords, as in accumulation_steps=4",
        )
    refuse_unknown({n: v for n, v in marker.kwargs.items() if n != "train"}, item.nodeid)
    for name, value in marker.kwargs.items():
        several = name in api.AXES and isinstance(value, (list, tuple))
        for each in value if several else [value]:
            try:
                api.checked(name, each)
            except UsageError as error:
                error.where = item.nodeid
                raise
    fixtures = getattr(item, "fixturenames", ())
    # A marker of a module or class is for those of its tests that are checks.
    if marker in getattr(item, "own_markers", ()) and not asks and "request" not in fixtures:
        raise UsageError(
            "the marker equivcheck is on a test that does not take the fixture",
            where=item.nodeid,
            because="nothing would be checked, and the test would pass",
            fix=f"def {getattr(item, 'originalname', item.name)}(equivcheck): ...",
        )
