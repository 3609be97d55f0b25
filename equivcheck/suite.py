"""Suites: tables of workloads, axes, and what theory expects at each point, with its source.

A suite is a Python file with a list `WORKLOADS`. A row names its parts by address, as targets are typed
(`../fixtures/models/mlp.py:MLP`, `torch.optim:SGD`; files are meant relative to the suite's own), so that every run can
execute them anew. `train` is the suite's, or the user's own under `--train`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from equivcheck.case import SPLITS, STRATEGIES, Case, shares_of
from equivcheck.causes import CAUSES
from equivcheck.errors import TargetError, UsageError
from equivcheck.modules import Module, executed_again, module_at
from equivcheck.result import EXIT_CODES
from equivcheck.subject import Code, Subject, attribute_of, location_of, reading

PREFIX = "suite:"
ALL = "all"
"""Every suite with a row that runs in one process."""
RANKS = "ranks"
"""The others: each of their cases starts processes that import torch, seconds against a fraction of one."""
FULL = "full"
"""As many micro-batches as a full batch has rows: one sample each."""


class _Horizon:
    def __repr__(self) -> str:
        return "HORIZON"


HORIZON = _Horizon()
"""In a scheduler's options: the number of optimizer steps that `train` makes."""


@dataclass(frozen=True)
class Part:
    """Something that a workload is made of: an address, and the options it is called with."""

    address: str
    options: Mapping[str, Any] = field(default_factory=dict)


def part(address: str, **options: Any) -> Part:
    """Return the part at an address, called with these options where it is used."""
    return Part(address, options)


def loop(path: str) -> dict[str, Part]:
    """Return the parts of a whole subject, whose own loop is the point of a row: `Workload(..., **loop(path))`."""
    return {name: Part(f"{path}:{name}") for name in ("build", "batches", "train")}


@dataclass(frozen=True)
class Theory:
    """What theory says of the cases of a workload that `when` describes.

    Attributes:
        verdict: One of the engine's verdicts, `equivalent` or `divergent` mostly.
        causes: Codes, all of them proved and no others.
        source: Where that is written, or the short reason why it must be so.
        when: Fields of the case with the value, or the values, that they must have; none of them
            means every case. `accumulation_steps` may be "full".
    """

    verdict: str
    causes: tuple[str, ...]
    source: str
    when: Mapping[str, Any] = field(default_factory=dict)

    def covers(self, case: Mapping[str, Any]) -> bool:
        """Return whether this is said of a case, given as its fields."""
        return all(case[name] in _several(value) for name, value in self.when.items())

    def as_dict(self) -> dict[str, Any]:
        """Return it as the result has it."""
        return {"verdict": self.verdict, "causes": list(self.causes), "source": self.source}


def equivalent(source: str, **when: Any) -> Theory:
    """Say that accumulating changes nothing but rounding."""
    return Theory("equivalent", (), source, when)


def divergent(*causes: str, source: str, **when: Any) -> Theory:
    """Say that the update is another one, by these causes and no others."""
    return Theory("divergent", causes, source, when)


def loses_precision(source: str, **when: Any) -> Theory:
    """Say that the function is the same, and that accumulating loses more than the working precision should."""
    return Theory("precision-loss", ("EQ401",), source, when)


def ends_in(verdict: str, source: str, *causes: str, **when: Any) -> Theory:
    """Say that the case has any other verdict: `error`, `inconclusive` or `invalid`."""
    return Theory(verdict, causes, source, when)


@dataclass(frozen=True)
class Workload:
    """One row of a suite: what is trained, at which points, and what theory expects there.

    What a row leaves at None, it says nothing about. What it sets is its point: a `train` of the user's that does not
    ask for it is not put under the row.

    Attributes:
        name: Unique in its suite.
        expect: What theory says; the first that covers a case counts.
        build: Makes the model.
        batches: Makes the full batches.
        loss: Makes the object that `train` gets as `loss`.
        optimizer: Called with the parameters.
        scheduler: Called with the optimizer; HORIZON among its options is filled in.
        max_norm: For clipping.
        precision: "native", "bf16" or "fp16".
        train: The loop that is this row's point; such a row is left out under `--train`.
        logs: Judge the losses that `train` returns.
        accumulation_steps: K of the cases; FULL is one sample in each micro-batch.
        splits: How full batches are cut.
        world_sizes: Ranks.
        strategies: How ranks work together.
        rng: "off", or "per-sample" to key what is random by the sample.
        optimizer_steps: At most so many full batches.
        claims: What the row bears witness to, as in C4.
    """

    name: str
    expect: Theory | Sequence[Theory]
    build: Part
    batches: Part
    loss: Part | None = None
    optimizer: Part | None = None
    scheduler: Part | None = None
    max_norm: float | None = None
    precision: str | None = None
    train: Part | None = None
    logs: bool = False
    accumulation_steps: tuple[int | str, ...] = (2, 4, 8, FULL)
    splits: tuple[str, ...] = SPLITS
    world_sizes: tuple[int, ...] = (1,)
    strategies: tuple[str, ...] = ("none",)
    rng: str = "off"
    optimizer_steps: int = 8
    claims: tuple[str, ...] = ()

    @property
    def theories(self) -> tuple[Theory, ...]:
        """What theory says, in the order in which it counts."""
        return (self.expect,) if isinstance(self.expect, Theory) else tuple(self.expect)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names that a `train` must ask for to be put under this row."""
        names = ("loss", "optimizer", "scheduler", "max_norm", "precision")
        return tuple(name for name in names if getattr(self, name) is not None)

    def theory(self, case: Mapping[str, Any], rows: int) -> Theory:
        """Return what theory expects of a case.

        Args:
            case: Fields of the case.
            rows: Samples of a full batch.

        Raises:
            UsageError: The row says nothing about this case.
        """
        steps = case["accumulation_steps"]
        named = {**case, "accumulation_steps": FULL if steps == rows else steps}
        for theory in self.theories:
            if theory.covers(case) or theory.covers(named):
                return theory
        raise UsageError(
            f"no-expectation: {self.name} expects nothing of K={steps} split={case['split']}",
            where=str(case["target"]),
            expected="a theory without `when` at the end of expect=",
        )


@dataclass(frozen=True)
class Suite:
    """A suite that was read.

    Attributes:
        target: As typed, or `suite:NAME`.
        path: The file.
        workloads: Its rows by name.
    """

    target: str
    path: Path
    workloads: Mapping[str, Workload]


# ---- finding and reading -----------------------------------------------------------------------


def bundled(folder: str) -> Path:
    """Return where suites or fixtures lie: inside the wheel, or beside the package in a clone."""
    here = Path(__file__).resolve().parent
    inside = here / "_bundled" / folder
    return inside if inside.is_dir() else here.parent / folder


def expanded(target: str) -> list[str]:
    """Return the targets that a folder or a group of suites stands for; any other is itself.

    Raises:
        TargetError: There is no such suite, or nothing to run in the folder.
    """
    if target.startswith(PREFIX):
        names = sorted(path.stem for path in _suite_files(bundled("suites")))
        name = target.removeprefix(PREFIX)
        if name in (ALL, RANKS):
            targets = [PREFIX + each for each in names]
            return [each for each in targets if _of_ranks(each) == (name == RANKS)]
        if name not in names:
            close = difflib.get_close_matches(name, [*names, ALL, RANKS], n=1)
            raise TargetError(
                f"no-suite: there is no suite {name!r}",
                expected="one of " + ", ".join([ALL, RANKS, *names]),
                fix=f"{PREFIX}{close[0]}" if close else None,
            )
        return [target]
    folder = Path(target)
    if not folder.is_dir():
        return [target]
    found = [str(path) for path in _python_files(folder)]
    if not found:
        raise TargetError(
            f"empty-folder: {target} has no suite and no subject",
            expected="Python files; those that begin with _ or test_, and conftest.py, do not count",
        )
    return found


def _of_ranks(target: str) -> bool:
    """Return whether every row of a suite starts several ranks."""
    return all(min(row.world_sizes) > 1 for row in read_suite(target).workloads.values())


def is_suite(target: object) -> bool:
    """Return whether a target is a suite; no code is executed to find out."""
    if not isinstance(target, str):
        return False
    if target.startswith(PREFIX):
        return True
    path = Path(target)
    return path.suffix == ".py" and path.is_file() and _is_suite_file(path)


def read_suite(target: str) -> Suite:
    """Read a suite and check its table.

    Raises:
        TargetError: It does not import, or its table is wrong; the row is named.
    """
    path = (
        bundled("suites") / f"{target.removeprefix(PREFIX)}.py"
        if target.startswith(PREFIX)
        else Path(target)
    ).resolve()
    return _read(target, path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(target: str, path: Path, _modified: int) -> Suite:
    [module] = executed_again([module_at(str(path), alone=True)])
    rows = getattr(module, "WORKLOADS", None)
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, Workload) for row in rows):
        raise _bad(target, "WORKLOADS is no list of Workload", "WORKLOADS = [Workload(...), ...]")
    if not rows:
        raise _bad(target, "WORKLOADS is empty", "at least one Workload")
    workloads: dict[str, Workload] = {}
    for row in rows:
        if row.name in workloads:
            raise _bad(target, f"two workloads are called {row.name!r}", "a name for each")
        _check(target, row)
        workloads[row.name] = row
    return Suite(target, path, workloads)


def _check(target: str, row: Workload) -> None:
    allowed: tuple[tuple[str, Iterable[Any], Iterable[Any]], ...] = (
        ("splits", row.splits, SPLITS),
        ("strategies", row.strategies, STRATEGIES),
        ("verdict", [each.verdict for each in row.theories], EXIT_CODES),
        ("causes", [code for each in row.theories for code in each.causes], CAUSES),
        ("when", [name for each in row.theories for name in each.when], _WHEN),
    )
    for name, values, known in allowed:
        for value in values:
            if value not in known:
                raise _bad(
                    target, f"{name} of {row.name} holds {value!r}", "one of " + ", ".join(known)
                )
    if any(not each.source for each in row.theories):
        raise _bad(target, f"an expectation of {row.name} has no source", "source=...")


_WHEN = ("accumulation_steps", "split", "world_size", "strategy", "precision", "rng")


def _bad(target: str, problem: str, expected: str) -> TargetError:
    return TargetError(f"bad-suite: {problem}"[:100], where=target, expected=expected)


def _python_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("*.py")
        if not path.name.startswith(("_", "test_")) and path.name != "conftest.py"
    )


def _suite_files(folder: Path) -> list[Path]:
    return [path for path in _python_files(folder) if _is_suite_file(path)]


def _is_suite_file(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"^WORKLOADS\b", text, re.MULTILINE) is not None


# ---- planning ----------------------------------------------------------------------------------


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
    for row in suite.workloads.values():
        if train is not None and row.train is not None:
            left.setdefault("whose own loop is the point", []).append(row.name)
            continue
        subject = load_workload(target, row.name, train)
        code = subject.fresh()
        asked = _asked(code)
        absent = [name for name in row.needs if asked is not None and name not in asked]
        if absent and train is not None:
            reason = f"for which train would have to ask for {', '.join(absent)}"
            left.setdefault(reason, []).append(row.name)
            continue
        found += _cases_of_row(target, row, subject, code, values, stated)
    notes = [
        f"{target}: {len(names)} workloads {reason} are left out under --train"
        for reason, names in left.items()
    ]
    return found, notes


_ROWS_OWN = (("precision", "each workload states its own; -k precision=bf16 selects"),)


def _asked(code: Code) -> set[str] | None:
    """Return the names that `train` asks for; None where it takes whatever there is."""
    parameters = inspect.signature(code.train).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters}


def _cases_of_row(
    target: str,
    row: Workload,
    subject: Subject,
    code: Code,
    values: Mapping[str, Any],
    stated: Callable[[str], bool],
) -> list[Planned]:
    from equivcheck.feed import read_batches  # noqa: PLC0415 - rows can be listed without torch
    from equivcheck.split import plan  # noqa: PLC0415

    def axis(name: str, own: Sequence[Any]) -> Sequence[Any]:
        return _several(values[name]) if stated(name) else own

    steps = values["optimizer_steps"] if stated("optimizer_steps") else row.optimizer_steps
    data = read_batches(code.batches, steps)
    full = max(data.rows)
    found: list[Planned] = []
    seen: set[Any] = set()
    batches_itself = (_asked(code) or set()) & {"dataset", "micro_batch_size"}
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
        cut = plan(
            data.rows,
            case.accumulation_steps,
            split,
            world_size,
            every_rank_all=case.shares < world_size,
        )
        if batches_itself and (split != "even" or full % (case.shares * case.accumulation_steps)):
            continue  # A framework that batches by itself cannot be given uneven slices.
        point = (world_size, strategy, case.accumulation_steps, repr(cut))
        if point in seen:
            continue
        seen.add(point)
        found.append(Planned(subject, case, row.theory(case.as_dict(), full // case.shares)))
    return found


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

    def load() -> Code:
        found = dict(zip(modules, executed_again(list(modules.values())), strict=True))
        made = {
            role: functools.partial(
                attribute_of(found[place], attribute, parts[role].address), **parts[role].options
            )
            for role, (place, attribute) in places.items()
        }
        offers = {
            "loss": made["loss"](),
            "optimizer": made["optimizer"],
            "scheduler": _scheduler(made.get("scheduler")),
            "max_norm": row.max_norm,
        }
        where = f"{target} {name}"
        loop = made["train"] if row.logs else _silent(made["train"])
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


def _silent(train: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loop without what it returns: only rows about logging judge that."""

    @functools.wraps(train)
    def silent(**given: Any) -> None:
        returned = train(**given)
        if hasattr(returned, "__next__"):
            for _ in returned:
                pass

    silent.__signature__ = inspect.signature(train)  # type: ignore[attr-defined]
    return silent


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
