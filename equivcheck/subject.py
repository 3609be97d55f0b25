"""Turn a target, as a user types it, into a subject that can be started anew for every run.

A target is a file (`train_step.py`), a dotted module (`pkg.mod`), either with an attribute behind a colon, or an
object. A file or module is *executed again* by each call of `Subject.fresh`, together with what it imported from its
own folder, so that counters, scalers and optimizers at module level cannot leak from one run into the next.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from equivcheck.errors import EquivcheckError, TargetError, UsageError
from equivcheck.modules import FORM, executed_again, module_at
from equivcheck.usercode import raised

REQUIRED = ("build", "batches", "train")
# What each is called with.
CALLED_WITH = {"build": "", "batches": "", "train": "model, loader, accumulation_steps"}


@dataclass(frozen=True)
class Code:
    """The user's functions as one run sees them."""

    build: Callable[[], Any]
    batches: Callable[[], Any]
    train: Callable[..., Any]
    objective: Callable[[Any, Any], Any] | None
    offers: Mapping[str, object] = field(default_factory=dict)
    """What `train` may ask for besides the names that every subject has: a suite's objects."""


@dataclass(frozen=True)
class Subject:
    """Code under test, and how to start it anew.

    Attributes:
        target: What the user typed, or the object's qualified name.
        repeatable: True when every `fresh` executes the code again; False for objects, whose state
            may survive from run to run.
        location: `file:line` of `train`.
        asks: What `train` names as its arguments; None where it takes whatever there is, or cannot be read.
    """

    target: str
    repeatable: bool
    location: str
    _load: Callable[[], Code]
    asks: frozenset[str] | None = None

    @property
    def trained_nothing(self) -> tuple[str, str]:
        """Why no backward may have been seen, and what to do then."""
        return (
            "train returned before its first backward; nothing was compared",
            "train for one optimizer step at least",
        )

    def fresh(self) -> Code:
        """Return the code, executed again where that is possible."""
        return self._load()


@dataclass(frozen=True)
class Parts:
    """A subject given in parts: functions and closures, alone or in place of a target's own.

    Attributes:
        target: Whatever has the parts not given here; None if nothing has.
        build, train, objective: As in a subject.
        batches: The same, or the full batches themselves in a list.
        name: What the subject is called in results; by default the name of `train`.
    """

    target: object = None
    build: Callable[[], Any] | None = None
    batches: Callable[[], Any] | list[Any] | tuple[Any, ...] | None = None
    train: Callable[..., Any] | None = None
    objective: Callable[[Any, Any], Any] | None = None
    name: str | None = None

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return the parts that are given, by name.

        Raises:
            UsageError: One of them is not a function.
        """
        found: dict[str, Callable[..., Any]] = {}
        for name in (*REQUIRED, "objective"):
            value = getattr(self, name)
            if name == "batches" and isinstance(value, (list, tuple)):
                value = functools.partial(list, value)
            if value is None:
                continue
            if not callable(value) or (name == "build" and hasattr(value, "state_dict")):
                raise UsageError(
                    f"not-a-function: {name}= is {type(value).__name__}",
                    expected=f"a function {name}({'' if name in REQUIRED[:2] else 'model, ...'})",
                    because="every run starts with a model of its own"
                    if name == "build"
                    else "every run calls it anew",
                    fix=f"{name}=lambda: ..." if name in REQUIRED[:2] else f"{name}=my_{name}",
                )
            found[name] = value
        return found


def load_subject(target: object, train: str | None = None) -> Subject:
    """Return the subject that a target names.

    Args:
        target: Text in one of the forms of `FORM`, a path, an object with `build`, `batches` and `train`, or `Parts`.
        train: A target whose `train` replaces the subject's own.

    Raises:
        TargetError: The form is bad, nothing is there, the user's module does not import (its own
            traceback is in the message), or an attribute is missing (the closest name is offered).
    """
    parts = target if isinstance(target, Parts) else Parts(target)
    given = parts.functions()
    source = _source(parts.target) if parts.target is not None else _nowhere(given)
    name = parts.name or source.target
    trainer = None if train is None else _trainer(train)

    def load() -> Code:
        holder = source.load()

        def found(part: str) -> Any:
            return given[part] if part in given else _attribute(holder, part, source.target)

        build, batches = found("build"), found("batches")
        loop = found("train") if trainer is None else trainer()
        _require_no_arguments("build", build, name)
        _require_no_arguments("batches", batches, name)
        objective = given.get("objective", getattr(holder, "objective", None))
        return Code(build, reading(batches, name), loop, objective)

    code = load()
    return Subject(
        name, source.repeatable and not given, location_of(code.train), load, asked_by(code.train)
    )


def _nowhere(given: Mapping[str, Callable[..., Any]]) -> _Source:
    """Return the source of a subject that is given in parts alone."""
    absent = [name for name in REQUIRED if name not in given]
    if absent:
        raise UsageError(
            f"no-subject: there is no target, and no {' and no '.join(f'{n}=' for n in absent)}",
            expected="a target, or build=, batches= and train=",
        )
    train = inspect.unwrap(given["train"])
    name = getattr(train, "__qualname__", type(train).__qualname__)
    module = getattr(train, "__module__", None)
    return _Source(f"{module}:{name}" if module else name, repeatable=False, load=SimpleNamespace)


def reading(batches: Callable[[], Any], target: str) -> Callable[[], Any]:
    """Let what `batches` raises, when called or while it is read, be told as the user's error."""

    def read(iterator: Iterator[Any]) -> Iterator[Any]:
        with _told("batches", target):
            yield from iterator

    @functools.wraps(batches)
    def call() -> Any:
        with _told("batches", target):
            found = batches()
            # Only an iterator runs code of the user's while it is read.
            return read(found) if isinstance(found, Iterator) else found

    return call


@contextmanager
def _told(name: str, target: str) -> Iterator[None]:
    try:
        yield
    except EquivcheckError:
        raise
    except (Exception, SystemExit) as error:
        raise raised(name, error, f"{name}() of {target}") from error


@dataclass(frozen=True)
class _Source:
    target: str
    repeatable: bool
    load: Callable[[], object]


def _source(target: object) -> _Source:
    if isinstance(target, os.PathLike):
        target = os.fspath(target)
    if isinstance(target, ModuleType):
        # As it is, with what a test may have replaced in it; its name, to be executed again, is text.
        return _Source(target.__name__, repeatable=False, load=lambda: target)
    if not isinstance(target, str):
        name = getattr(target, "__qualname__", None) or type(target).__qualname__
        return _Source(str(name), repeatable=False, load=lambda: _instance(target))
    place, _, attribute = target.partition(":")
    if not place or ":" in attribute or (target.endswith(":")):
        raise TargetError(
            f"bad-target: {target!r} names no file or module",
            expected=FORM,
            fix="equivcheck run train_step.py",
        )
    module = module_at(place)

    def load() -> object:
        [found] = executed_again([module])
        return _instance(attribute_of(found, attribute, target))

    return _Source(target, repeatable=True, load=load)


def attribute_of(holder: object, path: str, target: str) -> Any:
    """Return what a dotted path names inside a module; the module itself for an empty path.

    Raises:
        TargetError: It is not there; the closest name is offered.
    """
    for part in path.split(".") if path else ():
        holder = _attribute(holder, part, target)
    return holder


def _instance(holder: object) -> object:
    if inspect.isclass(holder):
        return holder()
    return holder


def _trainer(target: str) -> Callable[[], Callable[..., Any]]:
    place, _, attribute = target.partition(":")
    module = module_at(place)

    def load() -> Callable[..., Any]:
        [found] = executed_again([module])
        return attribute_of(found, attribute or "train", target)  # type: ignore[no-any-return]

    return load


def _attribute(holder: object, name: str, target: str) -> Any:
    value = getattr(holder, name, None)
    if value is not None:
        if name in REQUIRED and not callable(value):
            raise TargetError(
                f"not-callable: {name} of {target} is {type(value).__name__}, not a function",
                where=target,
                expected=f"def {name}(...)",
                because="every run calls it anew, so that none starts with what another left",
                fix=f"def {name}({CALLED_WITH[name]}): ...",
            )
        return value
    names = (
        [each for each in vars(holder) if not each.startswith("_")]
        if hasattr(holder, "__dict__")
        else []
    )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"def {name}(...): ..."
    own = [
        each
        for each in names
        if getattr(getattr(holder, each, None), "__module__", None)
        == getattr(holder, "__name__", 0)
    ]
    raise TargetError(
        f"attribute-missing: {target} has no {name!r}",
        where=getattr(holder, "__file__", None) or target,
        expected="build(), batches() and train(model, loader, ...)",
        because=f"it defines {', '.join(own or names) or 'nothing'}",
        fix=hint,
    )


def _require_no_arguments(name: str, function: Callable[..., Any], target: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    needed = [
        each.name
        for each in signature.parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(
            f"unexpected-argument: {name} of {target} wants {', '.join(needed)}",
            where=location_of(function),
            expected=f"{name}() without arguments",
            because=f"{name} is called once per run, with nothing: only train is told something",
            fix=f"give {', '.join(needed)} a default",
        )


def arguments(
    function: Callable[..., Any], offers: Mapping[str, object], target: str
) -> dict[str, object]:
    """Return the keyword arguments that `train` names, out of those on offer.

    Raises:
        UsageError: A name without a default is not on offer; the message lists those that are.
    """
    wanted: dict[str, object] = {}
    unknown: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            wanted.update(offers)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(
                f"positional-argument: train of {target} takes {parameter.name!r} by position only",
                where=location_of(function),
                expected="arguments that can be given by name",
                because="train is given what it names, as a test is given its fixtures",
                fix=f"take the / after {parameter.name} out of the signature",
            )
        elif parameter.name in offers:
            wanted[parameter.name] = offers[parameter.name]
        elif parameter.default is parameter.empty:
            unknown.append(parameter.name)
    if unknown:
        close = _meant(unknown[0], offers)
        named = ", ".join(map(repr, unknown))
        raise UsageError(
            f"unknown-argument: train of {target} asks for {named}",
            where=location_of(function),
            expected=f"any of {', '.join(sorted(offers))}",
            because="train names what it wants; another name has to bring a value of its own",
            fix=f"did you mean {close}?" if close else f"give {unknown[0]} a default",
        )
    return wanted


# What frameworks call what is offered, by a part of the name.
_SYNONYMS: Final = {
    "accum": "accumulation_steps",
    "batch_size": "micro_batch_size",
    "loader": "loader",
    "data": "loader",
    "net": "model",
    "num_steps": "optimizer_steps",
    "local_rank": "rank",
}


def _meant(name: str, offers: Mapping[str, object]) -> str | None:
    """Return what was probably meant by the name of an argument."""
    close = difflib.get_close_matches(name, offers, n=1)
    if close:
        return close[0]
    found = (meant for part, meant in _SYNONYMS.items() if part in name.lower())
    return next((each for each in found if each in offers), None)


def asked_by(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of a function's arguments; None where it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters)


def location_of(function: Callable[..., Any]) -> str:
    """Return `file:line` of a function, or its name where it has no code of its own."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return getattr(function, "__qualname__", repr(function))
    return f"{_shown(code.co_filename)}:{code.co_firstlineno}"


def _shown(filename: str) -> str:
    try:
        return str(Path(filename).resolve().relative_to(Path.cwd()))
    except ValueError:
        return filename
