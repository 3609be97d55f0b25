"""Zeros that a loop writes into sums of its own, which no call on a gradient shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equivcheck.interventions.base import Intervention

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

_ZEROS: Final = frozenset({"zero_", "_foreach_zero_", "zeros_like", "zeros", "new_zeros"})


class Zeroing(Intervention):
    """Notes zeros of the size of a parameter, or of all, that are written inside a cycle. Changes nothing.

    Attributes:
        inside: Counts of backwards after which they were written.
        late: The same of those between the last backward of a cycle and the step: sums that are begun then.
    """

    name = "watch zeros"

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.late: list[int] = []

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        with _Watch(self, recorder):
            yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, owner: Zeroing, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner, self._recorder = owner, recorder
        sizes = recorder.sizes().values()
        self._sizes = {*sizes, sum(sizes)}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        recorder = self._recorder
        place = recorder.place()
        if (
            func._schema.name.removeprefix("aten::") in _ZEROS
            and place is not None
            and not recorder.edits.stepped
        ):
            written = args[0] if func._schema.is_mutable else result
            first = written[0] if isinstance(written, (list, tuple)) and written else written
            # Autograd writes zeros of its own while a backward runs.
            backward = torch._C._current_graph_task_id() != -1  # no public way to ask
            if isinstance(first, torch.Tensor) and first.numel() in self._sizes and not backward:
                kept = self._owner.late if place.last else self._owner.inside
                kept.append(recorder.backwards)
        return result
