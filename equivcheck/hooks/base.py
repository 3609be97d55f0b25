"""What all hooks share: how they get into torch and out again, and small conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from equivcheck.parts import is_distributed

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder
    from equivcheck.recording import Recording

_MISSING = object()


class Hooks:
    """Watches one kind of call during one run.

    Attributes:
        recorder: Whose run it is.
        recording: What is noted of it.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.recording: Recording = recorder.recording

    def install(self, stack: ExitStack) -> None:
        """Put wrappers in place; the stack takes them out again."""

    def close(self) -> None:
        """Let go of what the run was watched with."""


def replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack is closed."""
    old = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    stack.callback(_put_back, owner, name, old)


def replace_inside(stack: ExitStack, function: Any, wrap: Callable[[Any], Any]) -> None:
    """Wrap what a function decorated by torch's `_no_grad` calls, until the stack is closed.

    The function stays the one that user code has imported by name, before anything of ours was in place.
    """
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cell = cells["func"]
    original, cell.cell_contents = cell.cell_contents, wrap(cell.cell_contents)
    stack.callback(setattr, cell, "cell_contents", original)


def _put_back(owner: Any, name: str, old: Any) -> None:
    if old is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, old)


@contextmanager
def quiet() -> Iterator[None]:
    """Compute for ourselves: no gradient, and none of the modes that the run is under."""
    with torch.no_grad(), _disable_current_modes():
        yield


def subclasses(base: type) -> Iterator[type]:
    """Return a class and all that derive from it, some of them twice."""
    yield base
    each: type
    for each in base.__subclasses__():
        yield from subclasses(each)


def each_of(parameters: Any) -> list[torch.Tensor]:
    """Return one parameter or many as a list."""
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def number(value: Any) -> float:
    """Return a number, or a tensor of one element, as a float."""
    if isinstance(value, torch.Tensor):
        # The norm of sharded gradients is itself still spread over the ranks.
        return float((value.full_tensor() if is_distributed(value) else value).item())  # type: ignore[attr-defined]
    return float(value)
