"""Suites: tables of workloads, axes, and what theory expects at each point, with its source.

A suite is a Python file with a list `WORKLOADS`. A row names its parts by address, as targets are typed
(`../fixtures/models/mlp.py:MLP`, `torch.optim:SGD`; files are meant relative to the suite's own), so that every run can
execute them anew. `train` is the suite's, or the user's own under `--train`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equivcheck.case import RNGS, SPLITS, STRATEGIES
from equivcheck.causes import CAUSES
from equivcheck.errors import TargetError, UsageError
from equivcheck.modules import executed_again, module_at
from equivcheck.result import EXIT_CODES

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


def several(value: Any) -> tuple[Any, ...]:
    """Return the values of an axis that may be stated as one."""
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)


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
        return all(case[name] in several(value) for name, value in self.when.items())

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
    if rows is None:
        holding = [name for name, value in vars(module).items() if _has_rows(value)]
        fix = f"rename {holding[0]} to WORKLOADS" if holding else None
        raise _bad(target, "there is no WORKLOADS", "WORKLOADS = [Workload(...), ...]", fix)
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


def _has_rows(value: object) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(each, Workload) for each in value)


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
                raise _wrong(target, f"{name} of {row.name} holds {value!r}", value, known)
    for theory in row.theories:
        for name, wanted in theory.when.items():
            for value in several(wanted):
                _check_condition(target, row, name, value)
    if any(not each.source for each in row.theories):
        raise _bad(target, f"an expectation of {row.name} has no source", "source=...")


_WHEN = ("accumulation_steps", "split", "world_size", "strategy", "precision", "rng")
_WORDS = {"split": SPLITS, "strategy": STRATEGIES, "rng": RNGS}
_PRECISIONS = ("native", "bf16", "fp16")


def _check_condition(target: str, row: Workload, name: str, value: Any) -> None:
    """Refuse a condition of a theory that no case can ever meet.

    Raises:
        TargetError: The value is none that the field of a case can have.
    """
    problem = f"an expectation of {row.name} is for {name}={value!r}"
    if name in ("accumulation_steps", "world_size"):
        is_full = name == "accumulation_steps" and value == FULL
        if not is_full and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            expected = "a whole number of at least 1"
            if name == "accumulation_steps":
                expected += f", or {FULL!r}"
            raise _bad(target, problem, expected)
        return
    known = _WORDS.get(name, (*_PRECISIONS, *([row.precision] if row.precision else ())))
    if value not in known:
        raise _wrong(target, problem, value, known)


def _wrong(target: str, problem: str, value: Any, known: Iterable[Any]) -> TargetError:
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(str(value), names, n=1)
    fix = f"did you mean {close[0]!r}?" if close else None
    return _bad(target, problem, "one of " + ", ".join(names), fix)


def _bad(target: str, problem: str, expected: str, fix: str | None = None) -> TargetError:
    return TargetError(f"bad-suite: {problem}"[:100], where=target, expected=expected, fix=fix)


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
    if re.search(r"^WORKLOADS\b", text, re.MULTILINE):
        return True
    # Rows under another name are a slip of the pen; a subject has a build.
    has_rows = re.search(r"^from equivcheck\.suite import\b", text, re.MULTILINE)
    is_subject = re.search(r"^(def|class) |^build\b", text, re.MULTILINE)
    return has_rows is not None and is_subject is None
