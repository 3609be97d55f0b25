"""Check training code from Python: the same experiment as the command line's."""

from __future__ import annotations

import inspect
import itertools
import os
import shlex
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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


class Found(dict[str, Any]):
    """One case of a result, with the numbers of its gradients at hand.

    Attributes, each None where nothing was compared: `scale`, `relative`, `cosine`; and `cause`, the first code.
    """

    def _gradients(self, name: str) -> float | None:
        number: float | None = ((self.get("divergence") or {}).get("gradients") or {}).get(name)
        return number

    @property
    def scale(self) -> float | None:
        """Least-squares factor of the accumulated gradients; 1.0 is right."""
        return self._gradients("scale")

    @property
    def relative(self) -> float | None:
        """Relative error of the accumulated gradients."""
        return self._gradients("relative")

    @property
    def cosine(self) -> float | None:
        """Cosine between the two gradients; 1.0 is the same direction."""
        return self._gradients("cosine")

    @property
    def cause(self) -> str | None:
        """Code of the first cause."""
        return next((str(cause["code"]) for cause in self.get("causes") or ()), None)


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
    def worst(self) -> Found | None:
        """The case that decides the verdict, the largest divergence first; None without a case."""

        def pressing(case: Mapping[str, Any]) -> tuple[int, float]:
            gradients = (case.get("divergence") or {}).get("gradients") or {}
            rank = results.PRIORITY.index(results.case_exit_code(case))
            return -rank, gradients.get("relative") or 0.0

        case = max(self.cases, key=pressing, default=None)
        return None if case is None else Found(case)

    def to_json(self) -> str:
        """Return the result JSON."""
        return results.to_json(self.data)


def load_result(path: str) -> Result:
    """Read a result that `equivcheck run --json` wrote.

    Raises:
        UsageError: There is no such result in the file.
    """
    return Result(results.load(path))


Functions = Callable[..., Any]
Batches = Callable[[], Any] | list[Any] | tuple[Any, ...]
# What may be given several values, each of which makes cases of its own.
AXES = ("split", "strategy", "precision")


def measure(
    target: object = None,
    *,
    build: Functions | None = None,
    batches: Batches | None = None,
    train: Functions | str | None = None,
    objective: Functions | None = None,
    accumulation_steps: Iterable[int] | int | None = None,
    split: Iterable[str] | str = "even",
    world_size: Iterable[int] | int = 1,
    strategy: Iterable[str] | str = "none",
    expect: Iterable[str] | str = (),
    precision: Iterable[str] | str = "native",
    device: str = "cpu",
    optimizer_steps: int = 8,
    rows: str | None = None,
    rng: str = "off",
    seed: int = 0,
    timeout: float | None = None,
) -> Result:
    """Run the experiment and return what was found; a divergence is data, not an exception.

    Args:
        target: `train_step.py`, `pkg.mod:Subject`, or a module or object with build, batches and train.
        build: Returns a fresh model; in place of the target's own, as the next three.
        batches: Returns the full batches, one per optimizer step; or the batches themselves, in a list.
        train: The training loop, a function or `FILE:ATTR`.
        objective: The loss that a full batch ought to have.
        accumulation_steps: One or several K; by default 2 and 4 where the batch allows them.
        split: "even" or "uneven" micro-batches, or both.
        world_size: One or several numbers of ranks.
        strategy: How several ranks work together.
        expect: Codes of causes that theory predicts for this subject.
        precision: Handed to a `train` that asks for it.
        device: "cpu" or "cuda".
        optimizer_steps: Upper bound on full batches.
        rows: Which rows of which batches alone are used, as in `0:0-4,1:2`; by default all.
        rng: What becomes of dropout: "off", or masks keyed "per-sample".
        seed: Seed of every run.
        timeout: Longest time for one case in seconds.

    Raises:
        UsageError: An argument, or the target, is wrong.
    """
    subject = subject_of(target, build=build, batches=batches, train=train, objective=objective)
    jobs, notes, named = scenario(
        subject,
        train=train if isinstance(train, str) else None,
        accumulation_steps=accumulation_steps,
        split=split,
        world_size=world_size,
        strategy=strategy,
        expect=expect,
        precision=precision,
        device=device,
        optimizer_steps=optimizer_steps,
        rows=rows,
        rng=rng,
        seed=seed,
        timeout=timeout,
    )
    from equivcheck.ranks.team import kept  # noqa: PLC0415 - torch is loaded only to run
    from equivcheck.usercode import warnings_in_place  # noqa: PLC0415 - only where code runs

    with kept(), warnings_in_place():
        cases = list(outcomes(jobs, timeout=named["timeout"]))
    return Result(results.assemble(cases, target=name_of(target, jobs), notes=notes))


def check(
    target: object = None,
    *,
    build: Functions | None = None,
    batches: Batches | None = None,
    train: Functions | str | None = None,
    objective: Functions | None = None,
    accumulation_steps: Iterable[int] | int | None = None,
    split: Iterable[str] | str = "even",
    world_size: Iterable[int] | int = 1,
    strategy: Iterable[str] | str = "none",
    expect: Iterable[str] | str = (),
    precision: Iterable[str] | str = "native",
    device: str = "cpu",
    optimizer_steps: int = 8,
    rows: str | None = None,
    rng: str = "off",
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
        build=build,
        batches=batches,
        train=train,
        objective=objective,
        accumulation_steps=accumulation_steps,
        split=split,
        world_size=world_size,
        strategy=strategy,
        expect=expect,
        precision=precision,
        device=device,
        optimizer_steps=optimizer_steps,
        rows=rows,
        rng=rng,
        seed=seed,
        timeout=timeout,
    )
    raise_unless_equivalent(found)
    return found


# Columns that pytest puts before every line of an error: "E" and the indentation of the line that raised.
_MARGIN = 8


def raise_unless_equivalent(found: Result) -> None:
    """Raise the error that a result stands for, with the blocks of the deciding cases as its message.

    Raises:
        DivergenceError: The exit code is 1; the error carries the result.
        EquivcheckError: Another kind, for every other code but 0.
    """
    __tracebackhide__ = True
    code = found.exit_code
    if code == 0:
        return
    deciding = [case for case in found.cases if results.case_exit_code(case) == code]
    blocks = text.blocks(deciding, width=text.WIDTH - _MARGIN)
    message = "\n\n".join(blocks) or "nothing was left to run"
    if code == 1:
        raise DivergenceError(message, found)
    raise _RAISED[code](message)


SUBJECT = (
    "a file, a module or an object with build, batches and train; or build=, batches= and train="
)


def without_our_frames(error: EquivcheckError) -> EquivcheckError:
    """Return an error of ours without its traceback, and what it was raised from with the user's own frames alone."""
    from equivcheck.usercode import is_library  # noqa: PLC0415 - only where something is wrong

    cause = error.__cause__
    if cause is not None:
        steps = []
        step = cause.__traceback__
        while step is not None:
            if not is_library(step.tb_frame.f_code.co_filename):
                steps.append(step)
            step = step.tb_next
        own: types.TracebackType | None = None
        for each in reversed(steps):
            own = types.TracebackType(own, each.tb_frame, each.tb_lasti, each.tb_lineno)
        cause.__traceback__ = own
    error.__traceback__ = None
    return error


def subject_of(
    target: object = None,
    *,
    build: Functions | None = None,
    batches: Batches | None = None,
    train: Functions | str | None = None,
    objective: Functions | None = None,
    name: str | None = None,
) -> object:
    """Return what `plan` takes as a target: the target itself, or parts of one.

    Args:
        target: As for `measure`.
        build: As for `measure`.
        batches: As for `measure`.
        train: As for `measure`; text is no part, but an option of the plan.
        objective: As for `measure`.
        name: What a subject that is no text is called in the result.

    Raises:
        UsageError: The target is a function, which has no parts.
    """
    loop = None if isinstance(train, str) else train
    if inspect.isroutine(target) and not hasattr(target, "build"):
        called = getattr(target, "__name__", type(target).__name__)
        raise UsageError(
            f"no-subject: the target is the function {called}, without a model and batches",
            expected=SUBJECT,
            fix=f"build=..., batches=..., train={called}",
        )
    is_whole = all(part is None for part in (build, batches, loop, objective))
    if target is not None and is_whole and (isinstance(target, str) or name is None):
        return target
    from equivcheck.subject import Parts  # noqa: PLC0415 - not where nothing is checked

    return Parts(target, build, batches, loop, objective, name)


def name_of(target: object, jobs: Sequence[Job]) -> str:
    """Return what a result calls its target."""
    return target if isinstance(target, str) else jobs[0].case.target if jobs else str(target or "")


def scenario(
    subject: object, *, train: str | None = None, **given: Any
) -> tuple[list[Job], list[str], dict[str, Any]]:
    """Return jobs, notes and checked options for one subject, every combination of its axes.

    Args:
        subject: A target as `plan` takes it.
        train: `FILE:ATTR` of another training loop.
        given: Options by name; those in `AXES` may have several values.

    Raises:
        UsageError: An option, or the subject, is wrong.
    """
    explicit = given.get("accumulation_steps") is not None
    axes = {name: _several(given.pop(name)) for name in AXES if name in given}
    values = {name: checked(name, value) for name, value in given.items()}
    values["train"] = train
    require_device(values.get("device", OPTIONS["device"].default))
    jobs: list[Job] = []
    notes: list[str] = []
    for point in itertools.product(*axes.values()):
        chosen = {n: checked(n, v) for n, v in zip(axes, point, strict=True)}
        options = {**values, **chosen}

        def stated(name: str, options: Mapping[str, Any] = options) -> bool:
            return options.get(name) not in (None, OPTIONS[name].default)

        planned, remarks = plan([subject], options, explicit=explicit, stated=stated)
        jobs += planned
        notes += [remark for remark in remarks if remark not in notes]
    return jobs, notes, values


@dataclass(frozen=True)
class Job:
    """A case with the subject to run it on.

    Attributes:
        subject: Code under test.
        case: The point of the matrix.
        expect: Causes that the user, or theory, declares.
        theory: What a suite expects, as the result has it; None for other subjects.
    """

    subject: Any
    case: Case
    expect: tuple[str, ...] = ()
    theory: Mapping[str, Any] | None = None


def plan(
    targets: Sequence[object],
    values: Mapping[str, Any],
    *,
    explicit: bool,
    stated: Callable[[str], bool] = lambda _: False,
) -> tuple[list[Job], list[str]]:
    """Return what would run, and notes on what would not; runs nothing of the experiment.

    Args:
        targets: What to load; suites and folders are expanded.
        values: Options by name, checked.
        explicit: Whether the user asked for these accumulation steps; only then is a K that does
            not fit an error.
        stated: Whether the user stated an option; only then does it overrule a suite's own axes.

    Raises:
        UsageError: A target cannot be loaded or planned.
    """
    jobs: list[Job] = []
    notes: list[str] = []
    splits = values.get("split")
    if isinstance(splits, tuple):
        for split in splits:
            more, remarks = plan(
                targets, {**values, "split": split}, explicit=explicit, stated=stated
            )
            jobs += more
            notes += [remark for remark in remarks if remark not in notes]
        return jobs, notes
    from equivcheck.decide import plan_cases  # noqa: PLC0415 - torch is loaded only to run
    from equivcheck.execute import process_state  # noqa: PLC0415
    from equivcheck.subject import load_subject  # noqa: PLC0415
    from equivcheck.suite import expanded, is_suite  # noqa: PLC0415
    from equivcheck.workload import cases_of  # noqa: PLC0415

    fields = (
        *("split", "strategy", "precision", "device", "optimizer_steps", "rows", "seed"),
        *("train", "rng"),
    )
    for target in [
        each
        for given in targets
        for each in (expanded(given) if isinstance(given, str) else [given])
    ]:
        if hasattr(target, "experiment"):  # command lines: what they run is known when they have
            named = {n: values[n] for n in ("seed", "device", "optimizer_steps") if n in values}
            point = Case(str(target), accumulation_steps=1, **named)
            jobs.append(Job(target, point, tuple(values.get("expect") or ())))
            continue
        with process_state():
            if is_suite(target):
                planned, remarks = cases_of(str(target), values, stated)
                jobs += [
                    Job(each.subject, each.case, each.theory.causes, each.theory.as_dict())
                    for each in planned
                ]
            else:
                subject = load_subject(target, values.get("train"))
                cases, remarks = plan_cases(
                    subject,
                    list(values.get("accumulation_steps") or DEFAULT_ACCUMULATION_STEPS),
                    explicit=explicit,
                    world_sizes=list(values.get("world_size") or OPTIONS["world_size"].default),
                    **{name: values[name] for name in fields if name in values},
                )
                expect = tuple(values.get("expect") or ())
                jobs += [Job(subject, case, expect) for case in cases]
                remarks += [*_unasked(subject, values), *_one_rank(subject, values)]
                remarks += _nothing_accumulated(cases)
        notes += remarks
    return jobs, notes


def _unasked(subject: Any, values: Mapping[str, Any]) -> list[str]:
    """Return a note on each option that is there to be handed to `train`, was stated, and is not asked for."""
    if subject.asks is None:
        return []
    return [
        f"{OPTIONS[name].flag} {values[name]} changes nothing: train of {subject.target} does not ask for {name}"
        for name in ("precision", "device")
        if values.get(name, OPTIONS[name].default) != OPTIONS[name].default
        and name not in subject.asks
    ]


def _nothing_accumulated(cases: Sequence[Case]) -> list[str]:
    """Return a note where a loop is compared with itself."""
    alone = any(case.accumulation_steps == case.world_size == 1 for case in cases)
    return ["K=1: nothing is accumulated, the full batch is compared with itself"] * alone


def _one_rank(subject: Any, values: Mapping[str, Any]) -> list[str]:
    """Return a note where ranks are to work together in a way that is stated, and no case has more than one."""
    strategy = values.get("strategy", OPTIONS["strategy"].default)
    world_sizes = values.get("world_size") or OPTIONS["world_size"].default
    if strategy == OPTIONS["strategy"].default or max(world_sizes) > 1:
        return []
    what = f"{OPTIONS['strategy'].flag} {strategy} with one rank"
    more = f"{OPTIONS['world_size'].flag} 2 starts two"
    return [f"{what}: nothing between ranks of {subject.target} was checked; {more}"]


def require_device(device: str) -> None:
    """Refuse a device that this machine does not have, before anything runs.

    Raises:
        UsageError: It is `cuda`, and there is none.
    """
    if device != "cuda":
        return
    import torch  # noqa: PLC0415 - loaded only to run

    if not torch.cuda.is_available():
        raise UsageError(
            f"no-gpu: {OPTIONS['device'].flag} cuda, and torch {torch.__version__} finds no CUDA device here",
            expected="a CUDA device, and a torch that is built for it",
            because="what is stated as checked on a GPU has to run on one",
            fix=f"{OPTIONS['device'].flag} cpu, or equivcheck doctor",
        )


def job_of(case: Mapping[str, Any]) -> Job:
    """Return the job that a recorded case was the outcome of; its code is loaded again.

    Raises:
        UsageError: The target, or the workload, is not there any more.
    """
    from equivcheck.scripts.target import script_of  # noqa: PLC0415 - loaded only to run
    from equivcheck.subject import load_subject  # noqa: PLC0415
    from equivcheck.workload import load_workload  # noqa: PLC0415

    point = Case.from_dict(case)
    require_device(point.device)
    script = script_of(case)
    if script is not None:
        point = replace(point, accumulation_steps=1, world_size=1)
        return Job(script, point, tuple(case.get("expect") or ()))
    subject = (
        load_subject(point.target, point.train)
        if point.workload is None
        else load_workload(point.target, point.workload, point.train)
    )
    return Job(subject, point, tuple(case.get("expect") or ()), case.get("theory"))


def outcomes(
    jobs: Iterable[Job],
    *,
    timeout: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the jobs in order and yield each finished case, complete enough to be replayed.

    A fault of our own becomes a case with the verdict `error` and exit code 70, so that it does
    not cost the other cases; neither does a workload of a suite that cannot be run.
    """
    from equivcheck.decide import run_case  # noqa: PLC0415 - torch is loaded only to run

    for job in jobs:
        outcome: Mapping[str, Any]
        try:
            outcome = run_case(
                job.subject,
                job.case,
                expect=job.expect,
                timeout=timeout,
                progress=progress or (lambda _: None),
            )
        except EquivcheckError as error:
            if job.theory is None:
                raise
            outcome = {"verdict": "error", "headline": error.message, "error": _crash(error, 3)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours
            said = f"{type(error).__name__}: {error}"
            outcome = {"verdict": "error", "headline": said, "error": _crash(error)}
        yield finished(job, outcome)


def finished(job: Job, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Return an outcome as the result has it: with its job, and held against theory."""
    case = {
        "id": job.case.id,
        **job.case.as_dict(),
        **results.finite(outcome),
        "expect": list(job.expect),
        **_replay(job),
    }
    if job.theory is not None:
        case["suite"] = job.case.target
        results.hold_against_theory(case, job.theory)
    return case


def process_ended(job: Job, starts: int, how: str = "") -> dict[str, Any]:
    """Return the case of a job during which the process that ran it ended, every time it was begun.

    Args:
        job: The case.
        starts: How often it was begun.
        how: With which exit code or signal the process ended last, if that is known.
    """
    told = f" with {how}" if how else ""
    message = f"process-ended: Python ended{told} in this case, {starts} times"
    error = {
        "type": "ProcessEnded",
        "message": message,
        "where": None,
        "exit_code": StepError.exit_code,
        "because": "the code under test ends Python, or crashes in compiled code, and no verdict outlives that",
        "fix": "no os._exit in train, nor in what it calls; of a crash the stack is printed",
    }
    return finished(job, {"verdict": "error", "headline": message, "error": error})


def _replay(job: Job) -> dict[str, str | None]:
    """Return how to run a case again that no command line can: the test that made its subject."""
    if getattr(job.subject, "repeatable", True):
        return {}
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    return {"replay": f"pytest {shlex.quote(test)}" if test else None}


def _crash(error: Exception, exit_code: int = InternalError.exit_code) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "where": None,
        "exit_code": exit_code,
    }


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, int)) else list(value)


def checked(name: str, value: Any) -> Any:
    """Return the value of an option, parsed.

    Raises:
        UsageError: It is not allowed; the message says what is.
    """
    several = name in ("accumulation_steps", "world_size")
    if several and isinstance(value, Iterable) and not isinstance(value, str):
        value = tuple(value)
    if name == "expect" and not isinstance(value, str):
        value = tuple(value or ())
    if value is None:
        return None
    try:
        return OPTIONS[name].parse(value)
    except ValueError as error:
        shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        expected = _IN_PYTHON.get(name, str(error))
        raise UsageError(f"{name} is {shown!r}", expected=expected) from None


# In Python several values are a list; text with commas is for command lines.
_NUMBERS = "a whole number of at least 1, or several in a list, as in [2, 4]"
_IN_PYTHON = {
    "accumulation_steps": _NUMBERS,
    "world_size": _NUMBERS,
    "expect": "a code that `equivcheck explain` lists, as in ['EQ201']",
}
