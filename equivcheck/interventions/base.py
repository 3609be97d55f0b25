"""What can be put right: the hooks that every intervention may use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    import torch

    from equivcheck.recorder import Recorder


class Intervention:
    """Puts nothing right; the base of those that do.

    Attributes:
        both: The reference is run with it too (couplings, the tail).
        controls_steps: Optimizer steps may be left out, so every step method is wrapped.
        shorter: The last full batch is left out of the run.
        length: What `len(loader)` is to say in the accumulated run, if not the truth.
        restored: Micro-steps, by cycle, that the run is given with their true weight.
    """

    name = "nothing"
    both = False
    controls_steps = False
    shorter = False
    length: int | None = None
    restored: Mapping[int, Collection[int]] = MappingProxyType({})

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        """Surround the run."""
        yield

    def before_fetch(self, recorder: Recorder) -> None:
        """Act before a micro-batch is handed out."""

    def root_factor(self, _recorder: Recorder) -> float:
        """Return the factor for the root gradient of the backward that begins."""
        return 1.0

    @contextmanager
    def around_backward(self, _recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        """Surround one root backward."""
        yield

    def after_backward(self, recorder: Recorder) -> None:
        """Act after a root backward."""

    def allows(self, _kind: str, _recorder: Recorder) -> bool:
        """Return whether a call is carried out."""
        return True

    def left_out(self, kind: str, call: Callable[[], object]) -> None:
        """Hear of a call that was not carried out."""

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        """Act before an optimizer step is looked at."""

    def after_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        """Act when an optimizer step has been made and looked at."""

    def scheduler_steps(self, _recorder: Recorder) -> int:
        """Return how often a scheduler step is carried out."""
        return 1

    def scheduler_arguments(
        self, _ordinal: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that a scheduler is made with."""
        return args, kwargs

    def finish(self, recorder: Recorder) -> None:
        """Act when `train` has returned."""

    def before_clip(self, recorder: Recorder, parameters: Sequence[torch.Tensor]) -> None:
        """Act before a clip looks at the gradients of some parameters."""

    def clip_norm(self, _recorder: Recorder, total_norm: Any) -> Any:
        """Return the norm that a clip by norm is to use."""
        return total_norm

    def clip_maximum(self, _recorder: Recorder, max_norm: Any) -> Any:
        """Return the norm that a clip by norm is to leave at most."""
        return max_norm

    def gathered(self) -> Any:
        """Return what a run in a rank process taught this object, to be taken back."""
        return None

    def take_back(self, by_rank: Sequence[Any]) -> None:
        """Learn what the same intervention gathered on each rank."""
