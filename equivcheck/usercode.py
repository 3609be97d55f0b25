"""The user's own code: which files it is in, and the error that is told when it raises, with its own frames only."""

from __future__ import annotations

import functools
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equivcheck.errors import StepError, TargetError

__all__ = [
    "import_failed",
    "is_library",
    "raised",
    "real_path",
    "user_traceback",
    "warnings_in_place",
]

_OURS = str(Path(__file__).resolve().parent)
_BUNDLED = f"{_OURS}/_bundled/"
_LIBRARIES = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")
)


# Some thousand modules are asked about before every run: resolving a path once is enough.
@functools.cache
def real_path(filename: str) -> str:
    """Return the resolved path of a file."""
    return str(Path(filename).resolve())


@functools.cache
def is_library(filename: str) -> bool:
    """Return whether a file belongs to Python, an installed package or equivcheck itself."""
    path = real_path(filename)
    if path.startswith(_BUNDLED):  # suites and fixtures inside the wheel are code under test
        return False
    return (
        path.startswith((*_LIBRARIES, _OURS)) or "site-packages" in path or filename.startswith("<")
    )


def import_failed(error: BaseException, place: str) -> TargetError:
    """Return the error of a file or module that does not import."""
    failure = TargetError(
        f"import-failed: {place} raised {type(error).__name__}: {error}"[:100],
        where=_innermost(error) or place,
        expected="a module that imports without an error",
        because="the file itself does not import; the traceback is its own",
        fix=f"python {place}" if place.endswith(".py") else f"python -m {place}",
    )
    failure.user_traceback = user_traceback(error)
    return failure


# What torch says where code asks for a GPU that is not there (torch/cuda/__init__.py).
_NO_GPU = ("Torch not compiled with CUDA", "Found no NVIDIA driver", "No CUDA GPUs are available")

# What torch says where a reduction multiplies, and the backend cannot (its ProcessGroupGloo.cpp).
_NO_FACTOR = "Cannot use ReduceOp.PREMUL_SUM"

# What torch says where a collective is called in a process that is no rank (its distributed_c10d.py).
_NO_GROUP = "Default process group has not been initialized"


def raised(name: str, error: BaseException, where: str) -> StepError:
    """Return the error of one of the user's functions that raised, with the user's frames only.

    Args:
        name: build, batches or train.
        error: What it raised.
        where: Role and micro-step, or the function.
    """
    said = str(error).splitlines()[0] if str(error) else ""
    expected, because, fix = _ran_by_itself(name, where)
    if isinstance(error, SystemExit):
        because = (
            f"{name} ends Python itself, which would end the check with whatever exit code it names"
        )
        fix = f"return from {name} instead of calling sys.exit()"
    elif any(each in str(error) for each in _NO_GPU):
        because = f"{name} asks for a GPU by name, and there is no CUDA device on this machine"
        fix = "def train(model, loader, accumulation_steps, device): with model.to(device), not .cuda()"
    elif _NO_GROUP in str(error) and where.startswith(_ALONE):
        because = "the full batch runs in one process, which has no process group"
        fix = "if world_size > 1: before what only ranks do; or if torch.distributed.is_initialized():"
    elif _NO_FACTOR in str(error):
        because = (
            "a divide factor of FSDP's is part of the reduction (PREMUL_SUM), which nccl has, and gloo, where ranks on "
            "a cpu meet, has not"
        )
        fix = (
            "model.set_force_sum_reduction_for_comms(True) divides outside of it; or --device cuda"
        )
    return StepError(
        f"{name}-raised: {type(error).__name__}: {said}"[:100].removesuffix(
            ": "
        ),  # An assertion may say nothing.
        where=where,
        expected=expected,
        because=because,
        fix=fix,
        user_traceback=user_traceback(error),
    )


def _ran_by_itself(name: str, where: str) -> tuple[str, str, str]:
    """Return what was expected, why a function raises, and what to try: by whether micro-batches have a part in it."""
    if name != "train":
        alone = f"call {name}() by itself: it is given nothing and needs nothing of equivcheck"
        return f"{name}() to return", f"{name} raises before any training begins", alone
    if where.startswith(_ACCUMULATED) and ", rank " in where:
        because = "the full_batch run, in one process, went through: the code does not take ranks or micro-batches"
        fix = "see where the traceback ends: a rank has a process group, a share of the rows, K micro-batches"
        return "train to end on every rank as in one process", because, fix
    if where.startswith(_ACCUMULATED):
        because = "the full_batch run went through: the code does not take these micro-batches"
        return "train to end with micro-batches as with full batches", because, _TRY_MICRO_BATCHES
    because = "the full_batch run itself raises: accumulation has no part in it"
    return "train to end", because, "train(build(), batches(), accumulation_steps=1) must end first"


# Roles of one process.
_ALONE = ("reference", "native_reference", "control", "pieces", "full_batch")
# Roles that run in micro-batches, once the full batch has gone through.
_ACCUMULATED = ("candidate", "native_candidate", "pieces")
_TRY_MICRO_BATCHES = "let train take as few rows as a micro-batch has, and as many micro-batches"


def _innermost(error: BaseException) -> str | None:
    """Return file and line of the user's innermost frame; where a file does not parse, the place that it names."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def user_traceback(error: BaseException) -> str:
    """Return the traceback of an exception with the user's frames only."""
    lines = ["Traceback (most recent call last):\n"]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_library(frame.filename)
    ]
    lines += traceback.format_list(frames)
    lines += traceback.format_exception_only(error)
    return "".join(lines)


@contextmanager
def warnings_in_place() -> Iterator[None]:
    """Show what the user's code is warned of at the user's own line, and once, however many roles come by it.

    A library warns at its caller's line (stacklevel 2), and where a call is watched that caller is a hook of ours.
    """
    show = warnings.showwarning
    said = set()

    def told(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        if _is_ours(filename):
            filename, lineno = _users_line() or (filename, lineno)
        key = str(message), category, filename, lineno
        if key not in said:
            said.add(key)
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = told
    try:
        yield
    finally:
        warnings.showwarning = show


def _is_ours(filename: str) -> bool:
    path = real_path(filename)
    return path.startswith(_OURS) and not path.startswith(_BUNDLED)


def _users_line() -> tuple[str, int] | None:
    """Return file and line of the innermost frame that is the user's."""
    for frame, line in traceback.walk_stack(None):
        if not is_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, line
    return None
