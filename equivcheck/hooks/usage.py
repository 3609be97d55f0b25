"""Which micro-batch is in use: a loop may fetch further ones before it is done with one.

A micro-batch is known by the storage of its tensors, which is its own. Where a loop copies what it is given, backwards
and micro-batches pair up in order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from equivcheck.hooks.base import Hooks
from equivcheck.split import tensors_in

if TYPE_CHECKING:
    from equivcheck.feed import Key
    from equivcheck.recorder import Recorder


class Usage(Hooks):
    """Follows every micro-batch from the loader into a forward, and to the step that it counts for.

    Attributes:
        prefetches: Whether the loop fetches ahead of what it uses; None where that is to be found out.
        in_order: The full-batch run uses its batches in the order in which it fetched them.
        boundaries: Micro-batches used up at each step, where another run of this loop has shown them.
        by_sample: Whether the loop has taken single samples, so that its micro-batches are not known.
        on_use: Called with the samples of a micro-batch that a forward begins to use.
        used_last: The micro-batch that a forward used last; -1 where that is unknown.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.prefetches: bool | None = None
        self.in_order = False
        self.boundaries: list[list[int]] = []
        self.by_sample: Callable[[], bool] = lambda: False
        self.on_use: Callable[[list[Key]], None] = lambda _: None
        self.used_last = -1
        self._served: dict[int, tuple[StorageWeakRef, int]] = {}
        self._consumed: dict[str, int] = {}
        self._uses_taken: dict[str, int] = {}

    def close(self) -> None:
        self._served.clear()

    def served(self, batch: Any) -> None:
        """Remember the storage of a micro-batch that was just handed out: it is its own."""
        for tensor in tensors_in(batch):
            storage = tensor.untyped_storage()
            self._served[storage.data_ptr()] = (
                StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                len(self.recording.fetched) - 1,
            )

    @contextmanager
    def watching_use(self) -> Iterator[None]:
        """See which micro-batch each forward takes: a loop may have fetched further ones already."""
        every = nn.modules.module.register_module_forward_pre_hook(lambda _, args: self._use(args))
        whole = self.recorder.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._use((args, kwargs)), with_kwargs=True
        )
        try:
            with warnings.catch_warnings():
                # A compiled module runs eagerly here; that its hooks fire once more does no harm.
                warnings.filterwarnings("ignore", message=".*there are global hooks on modules")
                yield
        finally:
            every.remove()
            whole.remove()

    def _use(self, values: Any) -> None:
        for tensor in tensors_in(values):
            try:
                known = self._served.get(tensor.untyped_storage().data_ptr())
            except (RuntimeError, NotImplementedError):  # No storage: sparse, functorch, meta.
                continue
            if known is None or known[0].expired():  # type: ignore[no-untyped-call]
                continue
            if known[1] != self.used_last:
                self.used_last = known[1]
                self.recording.uses.append(known[1])
                self.on_use(self.recording.fetched[known[1]])
            return

    def current_keys(self) -> list[Key]:
        """Return the samples of the micro-batch that was used last, or fetched last where that is unknown."""
        if not self.recording.fetched:
            return []
        if self.used_last < 0 and self.prefetches:
            return self.recording.fetched[
                min(self.recorder.backwards, len(self.recording.fetched) - 1)
            ]
        return self.recording.fetched[self.used_last]

    def forget(self) -> None:
        """Forget what was handed out so far: it was copied, and comes again from the copy."""
        self.unused()

    def unused(self) -> bool:
        """Forget what was handed out before the first backward, and return whether there was none."""
        if self.recording.backwards:
            return False
        self.recording.fetched.clear()
        self.recording.uses.clear()
        self.recording.timeline = [e for e in self.recording.timeline if e.kind != "fetch"]
        self._consumed.clear()
        self._uses_taken.clear()
        self._served.clear()
        self.used_last = -1
        return True

    def take(self, key: str) -> list[int]:
        """Return the micro-batches that an optimizer used up since its previous step.

        All that were handed out, unless the loop fetches ahead, as the full-batch run shows: then those that a forward
        took.
        """
        start, end = self._consumed.get(key, 0), len(self.recording.fetched)
        index = len(self.recording.boundaries)
        if self.boundaries:
            return self.boundaries[index] if index < len(self.boundaries) else []
        used = list(dict.fromkeys(self.recording.uses[self._uses_taken.get(key, 0) :]))
        if self.prefetches is not False and not self.recording.uses and not self.by_sample():
            # Nothing is known of the use: the loop copies what it is given. If more was handed out than backwards
            # were made, they pair up in order.
            count = self.recorder.backwards - self.recorder.steps.first_backward(key)
            if self.prefetches or self.recording.prefetched or 0 < count < end - start:
                self.recording.prefetched = max(self.recording.prefetched, end - start - count)
                self._consumed[key] = min(start + count, end)
                return list(range(start, self._consumed[key]))
        if self.prefetches is not False and used:
            handed = list(range(start, end))
            if self.prefetches or self.recording.prefetched or set(used) < set(handed):
                self.recording.prefetched = max(self.recording.prefetched, end - len(used))
                self._uses_taken[key] = len(self.recording.uses)
                if self.in_order and used[-1] >= start:
                    # The full batch uses all in order: what is passed over here was skipped, and belongs here.
                    self._consumed[key] = used[-1] + 1
                    return list(range(start, used[-1] + 1))
                return used
        self._consumed[key] = end
        self._uses_taken[key] = len(self.recording.uses)
        return list(range(start, end))
