"""What the rows of a suite become: subjects, and the cases that are run of them.

A row names its parts by address; each run executes them anew. `train` is the suite's, or the user's own.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equivcheck.case import Case, shares_of
from equivcheck.errors import TargetError, UsageError
from equivcheck.modules import Module, executed_again, module_at
from equivcheck.subject import (
    Code,
    Subject,
    arguments,
    asked_by,
    attribute_of,
    location_of,
    reading,
)
from equivcheck.suite import FULL, HORIZON, Part, Theory, Workload, bundled, read_suite, several


@dataclass(frozen=True)
class Planned:
    """A case of a suite, the subject to run it on, and what theory expects."""

    subject: Subject
    case: Case
    theory: Theory


def cases_of(
    target: str, values: Mapping[str, Any], stated: Callable[[str], bool]
) -> tuple[list[Planned], list[str]]:
    """Return the cases of a suite, and notes on the rows that are left out.

    Args:
        target: The suite.
        values: Options by name, checked.
        stated: Tells whether the user stated an option; only then does it take the place of what the rows say.

    Raises:
        UsageError: An option makes no sense for a suite, or a row cannot be planned.
    """
    for name, instead in (("expect", "the suite states what theory expects"), *_ROWS_OWN):
        if stated(name):
            raise UsageError(f"--{name} has no place in a run of {target}", because=instead)
    suite = read_suite(target)
    train = values.get("train")
    found: list[Planned] = []
    left: dict[str, list[str]] = {}
    too_small: dict[str, UsageError] = {}
    for row in suite.workloads.values():
        if train is not None and row.train is not None:
            left.setdefault("whose own loop is the point", []).append(row.name)
            continue
        subject = load_workload(target, row.name, train)
        code = subject.fresh()
        asked = asked_by(code.train)
        absent = [name for name in row.needs if asked is not None and name not in asked]
        if absent and train is not None:
            reason = f"for which train would have to ask for {', '.join(absent)}"
            left.setdefault(reason, []).append(row.name)
            continue
        # A wrong name is one mistake of the loop, and no case of it needs to run to find it.
        arguments(
            code.train, dict.fromkeys((*OFFERED, *code.offers)), train or f"{target} {row.name}"
        )
        planned, refused = _cases_of_row(target, row, subject, code, values, stated)
        found += planned
        too_small |= {row.name: refused} if refused is not None else {}
    if not found and too_small:
        raise next(iter(too_small.values()))
    notes = [
        f"{target}: {len(names)} workloads {reason} are left out under --train"
        for reason, names in left.items()
    ]
    notes += [
        f"{target}: cases of {name} are left out: {error.message}"
        for name, error in too_small.items()
    ]
    return found, notes


OFFERED = (
    *("model", "loader", "dataset", "accumulation_steps", "micro_batch_size", "optimizer_steps"),
    *("device", "precision", "strategy", "rank", "world_size"),
)
"""What every `train` may ask for; a row offers its objects besides."""
_ROWS_OWN = (("precision", "each workload states its own; -k precision=bf16 selects"),)


def _cases_of_row(
    target: str,
    row: Workload,
    subject: Subject,
    code: Code,
    values: Mapping[str, Any],
    stated: Callable[[str], bool],
) -> tuple[list[Planned], UsageError | None]:
    """Return the cases of a row, and why its batches do not hold more of them, if stated options ask for such."""
    from equivcheck.feed import read_batches  # noqa: PLC0415 - rows can be listed without torch
    from equivcheck.split import plan  # noqa: PLC0415

    def axis(name: str, own: Sequence[Any]) -> Sequence[Any]:
        return several(values[name]) if stated(name) else own

    steps = values["optimizer_steps"] if stated("optimizer_steps") else row.optimizer_steps
    data = read_batches(code.batches, steps)
    if row.train is None and values.get("train") is None and row.loss is None:
        _require_classes(target, row.name, data.batches[0])
    full = max(data.rows)
    found: list[Planned] = []
    seen: set[Any] = set()
    refused: UsageError | None = None
    batches_itself = (asked_by(code.train) or frozenset()) & {"dataset", "micro_batch_size"}
    for world_size, strategy, split, k in itertools.product(
        axis("world_size", row.world_sizes),
        axis("strategy", row.strategies),
        axis("split", row.splits),
        axis("accumulation_steps", row.accumulation_steps),
    ):
        case = Case(
            target=target,
            accumulation_steps=full // shares_of(world_size, strategy) if k == FULL else k,
            split=split,
            world_size=world_size,
            strategy=strategy,
            precision=row.precision or "native",
            seed=values.get("seed", 0),
            device=values.get("device", "cpu"),
            optimizer_steps=steps,
            workload=row.name,
            train=values.get("train"),
            rng=values["rng"] if stated("rng") else row.rng,
        )
        # With a sample in each micro-batch, or as many as rows allow, an uneven cut is the even one.
        try:
            cut = plan(
                data.rows,
                case.accumulation_steps,
                split,
                world_size,
                every_rank_all=case.shares < world_size,
            )
        except UsageError as error:
            # Options that are meant for a whole suite need not fit all of its rows.
            if not (stated("world_size") or stated("accumulation_steps")):
                raise
            refused = refused or error
            continue
        if batches_itself and (split != "even" or full % (case.shares * case.accumulation_steps)):
            continue  # A framework that batches by itself cannot be given uneven slices.
        point = (world_size, strategy, case.accumulation_steps, repr(cut))
        if point in seen:
            continue
        seen.add(point)
        found.append(Planned(subject, case, row.theory(case.as_dict(), full // case.shares)))
    return found, refused


def _require_classes(target: str, name: str, batch: Any) -> None:
    """Refuse batches that the standard loop and its loss cannot train on.

    Raises:
        UsageError: They are no dictionaries with inputs `x` and classes `y`.
    """
    if isinstance(batch, Mapping) and "x" in batch and "y" in batch:
        y = batch["y"]
        # Probabilities of several classes are floating as well: [N, C].
        if not getattr(y, "is_floating_point", bool)() or y.shape[1:].numel() > 1:
            return
        found = f"y of {y.dtype}, shape {list(y.shape)}"
    elif isinstance(batch, Mapping):
        found = "a dictionary of " + ", ".join(map(str, batch))
    else:
        found = type(batch).__name__
    raise UsageError(
        f"other-batches: batches of {name} do not fit the suite's standard loop",
        where=f"{target}, {found}",
        expected="dictionaries with inputs x [N, ...] and class numbers y [N], int64",
        because="a row without train is put under fixtures/suite_trainers/standard.py, and without loss under"
        " the cross-entropy of model(x) and y",
        fix="train=part(...) with a loop of your own, or loss=part(...)",
    )


# ---- running -----------------------------------------------------------------------------------


def load_workload(target: str, name: str, train: str | None = None) -> Subject:
    """Return the subject that a row of a suite stands for.

    Args:
        target: The suite.
        name: The workload.
        train: `FILE:ATTR`, a loop to take the place of the suite's.

    Raises:
        TargetError: There is no such row, or one of its parts is not there.
    """
    suite = read_suite(target)
    if name not in suite.workloads:
        raise TargetError(
            f"no-workload: {target} has no workload {name!r}",
            expected="one of " + ", ".join(suite.workloads),
        )
    row = suite.workloads[name]
    parts = {
        "build": row.build,
        "batches": row.batches,
        "loss": row.loss or _standard("losses.py:CrossEntropy"),
        "optimizer": row.optimizer or Part("torch.optim:SGD", {"lr": 0.1}),
        "train": row.train or _standard("suite_trainers/standard.py:train"),
    }
    if train is not None:
        parts["train"] = Part(train if ":" in train else f"{train}:train")
    if row.scheduler is not None:
        parts["scheduler"] = row.scheduler
    user = {"train"} if train is not None else set()
    places = {
        role: _place(each, None if role in user else suite.path.parent)
        for role, each in parts.items()
    }
    modules = {place: _module(place) for place, _ in places.values()}
    where = f"{target} {name}"

    def load() -> Code:
        found = dict(zip(modules, executed_again(list(modules.values())), strict=True))
        made = {}
        for role, (place, attribute) in places.items():
            function = attribute_of(found[place], attribute, parts[role].address)
            made[role] = _made(role, function, parts[role], target, name)
        offers = {
            "loss": made["loss"](),
            "optimizer": made["optimizer"],
            "scheduler": _scheduler(made.get("scheduler")),
            "max_norm": row.max_norm,
        }
        loop = _loop(made["train"], logs=row.logs)
        return Code(made["build"], reading(made["batches"], where), loop, None, offers)

    code = load()
    return Subject(target, repeatable=True, location=location_of(code.train), _load=load)


def _standard(address: str) -> Part:
    return Part(f"{bundled('fixtures')}/{address}")


def _place(each: Part, folder: Path | None) -> tuple[str, str]:
    """Return the module and the attribute of an address, files meant relative to the folder."""
    place, _, attribute = each.address.partition(":")
    if folder is not None and (place.endswith(".py") or "/" in place):
        place = str((folder / place).resolve())
    return place, attribute


def _module(place: str) -> Module:
    """Return the module of a part; a fixture of ours has a name that no package of the user's can have."""
    found = module_at(place)
    root, path = bundled("fixtures"), Path(place)
    if not path.is_relative_to(root):
        return found
    parts = path.relative_to(root.parent).with_suffix("").parts
    name = ".".join(("equivcheck._bundled", *parts))
    return replace(
        found,
        root=root,
        execute=functools.partial(importlib.import_module, name),
        importable=False,
    )


def _made(
    role: str, function: Callable[..., Any], each: Part, target: str, name: str
) -> functools.partial[Any]:
    """Return a part with its options.

    Raises:
        TargetError: It does not take them, or, called with nothing else, wants more.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not written in Python
        return functools.partial(function, **each.options)
    kinds = {parameter.kind for parameter in parameters.values()}
    taken = [
        n for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    unknown = [n for n in each.options if n not in taken]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        close = difflib.get_close_matches(unknown[0], taken, n=1)
        raise TargetError(
            f"bad-suite: {role} of {name} takes no option {unknown[0]!r}"[:100],
            where=f"{target}, {location_of(function)}",
            expected=f"options of {each.address}: {', '.join(taken) or 'none'}",
            fix=f"did you mean {close[0]}?" if close else None,
        )
    absent = [
        n
        for n in taken
        if parameters[n].default is inspect.Parameter.empty and n not in each.options
    ]
    if role in ("build", "batches", "loss") and absent:
        raise TargetError(
            f"bad-suite: {role} of {name} wants {', '.join(absent)}"[:100],
            where=f"{target}, {location_of(function)}",
            expected=f"part({each.address!r}, {absent[0]}=...)",
            because=f"{role} is called with its options and nothing else",
        )
    return functools.partial(function, **each.options)


def _scheduler(make: functools.partial[Any] | None) -> Callable[..., Any]:
    """Return what `train` gets as `scheduler`.

    The horizon of a schedule is counted in optimizer steps. A loop that states its own number of them shows whether it
    counts right; by default it is what the full batches make.
    """

    def scheduler(optimizer: Any, optimizer_steps: int | None = None) -> Any:
        if make is None:
            return None
        horizon = scheduler.optimizer_steps if optimizer_steps is None else optimizer_steps  # type: ignore[attr-defined]
        options = {k: horizon if v is HORIZON else v for k, v in make.keywords.items()}
        return make.func(optimizer, *make.args, **options)

    return scheduler


def _loop(train: functools.partial[Any], *, logs: bool) -> Callable[..., Any]:
    """Return the loop with its options, known by the name and place of the function that it is.

    What it returns is left out unless the row is about logging: only those judge that.
    """

    @functools.wraps(train.func)
    def loop(**given: Any) -> Any:
        returned = train(**given)
        if logs:
            return returned
        if hasattr(returned, "__next__"):
            for _ in returned:
                pass
        return None

    loop.__qualname__ = getattr(train.func, "__qualname__", type(train.func).__qualname__)
    loop.__signature__ = inspect.signature(train)  # type: ignore[attr-defined]
    return loop
