"""Check training code from Python: the same experiment as the command line's."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equivcheck import result as results
from equivcheck.case import Case
from equivcheck.config import OPTIONS
from equivcheck.errors import (
    DivergenceError,
    EquivcheckError,
    InconclusiveError,
    InternalError,
    StepError,
    UsageError,
)
from equivcheck.report import text

DEFAULT_ACCUMULATION_STEPS: tuple[int, ...] = OPTIONS["accumulation_steps"].default
_RAISED: dict[int, type[EquivcheckError]] = {
    70: InternalError,
    3: StepError,
    4: InconclusiveError,
    5: UsageError,
}


@dataclass(frozen=True)
class Result:
    """What a run found; a thin view on the result JSON.

    Attributes:
        data: The result as `equivcheck run --json` writes it.
    """

    data: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """Verdict of the whole run."""
        return str(self.data["verdict"])

    @property
    def cases(self) -> Sequence[Mapping[str, Any]]:
        """The finished cases."""
        return self.data["cases"]  # type: ignore[no-any-return]

    @property
    def exit_code(self) -> int:
        """What the command line would return."""
        return results.exit_code(self.cases, interrupted=bool(self.data.get("interrupted")))

    @property
    def worst(self) -> Mapping[str, Any] | None:
        """The case that decides the verdict, the largest divergence first; None without a case."""

        def pressing(case: Mapping[str, Any]) -> tuple[int, float]:
            gradients = (case.get("divergence") or {}).get("gradients") or {}
            rank = results.PRIORITY.index(results.case_exit_code(case))
            return -rank, gradients.get("relative") or 0.0

        return max(self.cases, key=pressing, default=None)

    def to_json(self) -> str:
        """Return the result JSON."""
        return results.to_json(self.data)


def load_result(path: str) -> Result:
    """Read a result that `equivcheck run --json` wrote.

    Raises:
        UsageError: There is no such result in the file.
    """
    return Result(results.load(path))


def measure(
    target: object,
    *,
    accumulation_steps: Iterable[int] | int | None = None,
    split: str = "even",
    expect: Iterable[str] = (),
    train: str | None = None,
    precision: str = "native",
    device: str = "cpu",
    optimizer_steps: int = 8,
    seed: int = 0,
    timeout: float | None = None,
) -> Result:
    """Run the experiment and return what was found; a divergence is data, not an exception.

    Args:
        target: `train_step.py`, `pkg.mod:Subject`, or an object with build, batches and train.
        accumulation_steps: One or several K; by default 2 and 4 where the batch allows them.
        split: "even" or "uneven" micro-batches.
        expect: Codes of causes that theory predicts for this subject.
        train: Another training loop to put under the target, `FILE:ATTR`.
        precision: Handed to a `train` that asks for it.
        device: "cpu" or "cuda".
        optimizer_steps: Upper bound on full batches.
        seed: Seed of every run.
        timeout: Longest time for one case in seconds.

    Raises:
        UsageError: An argument, or the target, is wrong.
    """
    given = {
        "accumulation_steps": accumulation_steps,
        "split": split,
        "expect": tuple([expect] if isinstance(expect, str) else expect),
        "precision": precision,
        "device": device,
        "optimizer_steps": optimizer_steps,
        "seed": seed,
        "timeout": timeout,
    }
    if not (accumulation_steps is None or isinstance(accumulation_steps, int)):
        given["accumulation_steps"] = tuple(accumulation_steps)
    values = {name: _checked(name, value) for name, value in given.items()}
    values["train"] = train
    jobs, notes = plan([target], values, explicit=accumulation_steps is not None)
    cases = list(outcomes(jobs, expect=values["expect"], timeout=values["timeout"]))
    named = target if isinstance(target, str) else getattr(jobs[0].subject, "target", "")
    return Result(results.assemble(cases, target=str(named), notes=notes))


def check(
    target: object,
    *,
    accumulation_steps: Iterable[int] | int | None = None,
    split: str = "even",
    expect: Iterable[str] = (),
    train: str | None = None,
    precision: str = "native",
    device: str = "cpu",
    optimizer_steps: int = 8,
    seed: int = 0,
    timeout: float | None = None,
) -> Result:
    """Raise unless accumulating gives the update of the full batch; arguments as for `measure`.

    Raises:
        DivergenceError: It does not, or a declared cause is missing; the message is the report.
        StepError: The code under test raised, or took too long.
        InconclusiveError: The experiment cannot decide.
        UsageError: An argument, or the target, is wrong, or nothing was left to run.
    """
    __tracebackhide__ = True
    found = measure(
        target,
        accumulation_steps=accumulation_steps,
        split=split,
        expect=expect,
        train=train,
        precision=precision,
        device=device,
        optimizer_steps=optimizer_steps,
        seed=seed,
        timeout=timeout,
    )
    if found.exit_code == 0:
        return found
    deciding = [c for c in found.cases if results.case_exit_code(c) == found.exit_code]
    message = "\n\n".join(text.block(case) for case in deciding) or "nothing was left to run"
    if found.exit_code == 1:
        raise DivergenceError(message)
    raise _RAISED[found.exit_code](message)


@dataclass(frozen=True)
class Job:
    """A case with the subject to run it on."""

    subject: Any
    case: Case
    train: str | None = None


def plan(
    targets: Iterable[object], values: Mapping[str, Any], *, explicit: bool
) -> tuple[list[Job], list[str]]:
    """Return what would run, and notes on what would not; runs nothing of the experiment.

    Args:
        targets: What to load.
        values: Options by name, checked.
        explicit: Whether the user asked for these accumulation steps; only then is a K that does
            not fit an error.

    Raises:
        UsageError: A target cannot be loaded or planned.
    """
    from equivcheck.decide import plan_cases  # noqa: PLC0415 - torch is loaded only to run
    from equivcheck.execute import process_state  # noqa: PLC0415
    from equivcheck.subject import load_subject  # noqa: PLC0415

    fields = ("split", "precision", "device", "optimizer_steps", "seed")
    jobs: list[Job] = []
    notes: list[str] = []
    for target in targets:
        with process_state():
            subject = load_subject(target, values.get("train"))
            cases, remarks = plan_cases(
                subject,
                list(values.get("accumulation_steps") or DEFAULT_ACCUMULATION_STEPS),
                explicit=explicit,
                **{name: values[name] for name in fields if name in values},
            )
        jobs += [Job(subject, case, values.get("train")) for case in cases]
        notes += remarks
    return jobs, notes


def outcomes(
    jobs: Iterable[Job],
    *,
    expect: tuple[str, ...] = (),
    timeout: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the jobs in order and yield each finished case, complete enough to be replayed.

    A fault of our own becomes a case with the verdict `error` and exit code 70, so that it does
    not cost the other cases.
    """
    from equivcheck.decide import run_case  # noqa: PLC0415 - torch is loaded only to run

    for job in jobs:
        outcome: Mapping[str, Any]
        try:
            outcome = run_case(
                job.subject,
                job.case,
                expect=expect,
                timeout=timeout,
                progress=progress or (lambda _: None),
            )
        except EquivcheckError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours
            outcome = {"verdict": "error", "error": _crash(error)}
        yield {
            "id": job.case.id,
            **job.case.as_dict(),
            **results.finite(outcome),
            "expect": list(expect),
            "train": job.train,
        }


def _crash(error: Exception) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "where": None,
        "exit_code": InternalError.exit_code,
    }


def _checked(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return OPTIONS[name].parse(value)
    except ValueError as error:
        raise UsageError(f"{name} is {value!r}", expected=str(error)) from None
