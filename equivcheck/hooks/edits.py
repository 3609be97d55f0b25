"""What is done to gradients and parameters without a call, seen by comparing a few coordinates.

A gradient set to None by hand or divided in place, a parameter decayed between two backwards.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from equivcheck.hooks.base import Hooks, quiet
from equivcheck.parts import plain

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

# Coordinates looked at between two backwards: enough to see an edit of all gradients, too few to cost anything.
PROBE_TENSORS = 16
PROBE_ELEMENTS = 32
# A factor between two gradients: float32 leaves 1e-7 of it at the most, another operation than a product far more.
PURE: Final = 1e-6


@dataclass(frozen=True)
class _Probe:
    """A few coordinates of some tensors, as they were: one copy of all, since a copy of each costs as much every time.

    Attributes:
        numbers: Of the tensors, among all that there are.
        sizes: How many coordinates each has.
        values: All of them, [sum of the sizes].
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    values: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[tuple[int, torch.Tensor]]) -> _Probe:
        found = [plain(t.detach()).flatten()[:PROBE_ELEMENTS] for _, t in tensors]
        if len({each.device for each in found}) > 1:
            found = [each.cpu() for each in found]
        values = torch.cat(found) if found else torch.empty(0)
        return cls(tuple(number for number, _ in tensors), tuple(map(len, found)), values)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    @property
    def by_number(self) -> dict[int, torch.Tensor]:
        parts = torch.split(self.values, list(self.sizes))
        return dict(zip(self.numbers, parts, strict=True))

    def any(self) -> bool:
        """Return whether something is not zero."""
        return bool(self.values.any())

    def same(self, other: _Probe) -> bool:
        """Return whether all coordinates are the same ones; of any tensors, in order."""
        if self.sizes != other.sizes:
            return False
        # Where something is nan the fast way says no.
        return torch.equal(self.values, other.values) or torch.equal(
            torch.nan_to_num(self.values), torch.nan_to_num(other.values)
        )


class Edits(Hooks):
    """Compares gradients and parameters before a backward with what the one before left.

    Attributes:
        stepped: Whether an optimizer has stepped since the last backward.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.stepped = False
        self._probe: _Probe | None = None
        self._clip_probe: _Probe | None = None
        self._had_gradients = False
        self._weights_probe: _Probe | None = None
        self._held: Callable[[], torch.Tensor | None] = lambda: None

    def forget(self) -> None:
        """Expect other gradients: a call is about to change them, or has."""
        self._probe = self._clip_probe = None

    def zeroed(self) -> None:
        """Expect no gradients."""
        self._had_gradients = False
        self._probe = self._clip_probe = None

    def after_clip(self) -> None:
        """Remember gradients as a clip left them."""
        with quiet():
            self._clip_probe = self._gradient_probe()

    def divided_by(self, scale: float) -> bool:
        """Return whether all gradients were divided by a loss scale, or by more, since the last backward."""
        if self._probe is None:
            return False
        with quiet():
            now = self._gradient_probe()
        if now.numbers != self._probe.numbers or now.sizes != self._probe.sizes:
            return False
        ratio, rest = _ratio(self._probe, now)
        return 0.0 < ratio * scale <= 1.0 + PURE and ratio != 1.0 and rest < PURE

    def before_step(self) -> None:
        """Notice that gradients were multiplied since the last clip: by hand, since calls are known."""
        with quiet():
            if self._clip_probe is not None:
                now = self._gradient_probe()
                if now.sizes == self._clip_probe.sizes:
                    scale, rest = _ratio(self._clip_probe, now)
                    if scale != 1.0:
                        self.recorder.note("rescaled", scale=scale, rest=rest)
            self._clip_probe = None

    def after_step(self) -> None:
        """Expect other parameters."""
        self._weights_probe = None
        self.stepped = True

    def before_backward(self) -> None:
        """Notice what was done to gradients and parameters since the backward before, without a call."""
        with quiet():
            if self.stepped and self._gradient_probe().any():
                self.recorder.note("leftover")
            elif self._probe is not None and not self.stepped:
                now = self._gradient_probe()
                if (self._had_gradients and not now) or self._some_cleared(self._probe, now):
                    self.recorder.note("cleared")
                elif now and now.sizes == self._probe.sizes:
                    self._note_edit(self._probe, now)
            self._clip_probe = None
            if self._weights_probe is not None and not self._parameter_probe().same(
                self._weights_probe
            ):
                self.recorder.note("parameters_changed")

    def _note_edit(self, before: _Probe, now: _Probe) -> None:
        if before.same(now):
            return
        if not now.any():
            self.recorder.note("cleared")
            return
        scale, rest = _ratio(before, now)
        self.recorder.note(
            "edited",
            scale=scale,
            rest=rest,
            shrunk=_shrunk(before, now),
            along=self._along_weights(before, now),
        )

    def _along_weights(self, before: _Probe, now: _Probe) -> float:
        """Return the cosine between what was added to gradients and the weights themselves."""
        added = (now.values - before.values).double()
        flat = _Probe.of(list(self._with_gradients(len(now.numbers)))).values.double()
        size = float(added.norm() * flat.norm()) if flat.shape == added.shape else 0.0
        return abs(float(added @ flat)) / size if size else 0.0

    def after_backward(self) -> None:
        """Remember gradients and parameters as the backward left them."""
        self.stepped = False
        with quiet():
            self._probe = self._gradient_probe()
            self._had_gradients = bool(self._probe)
            self._weights_probe = self._parameter_probe()
        held = self._first_gradient()
        # Weakly: a gradient that is dropped must not stay in memory until the next backward.
        self._held = (lambda: None) if held is None else weakref.ref(held)

    def handed_over(self) -> bool:
        """Return whether the gradients of a step are not those that backwards accumulated: sums of the loop's own."""
        held = self._first_gradient()
        return held is not None and self._held() is not held

    def _first_gradient(self) -> torch.Tensor | None:
        holders = self.recorder.each_holder()
        return next((p.grad for p in holders if p.grad is not None), None)

    @staticmethod
    def _some_cleared(earlier: _Probe, later: _Probe) -> bool:
        """Return whether some gradients are gone, or zero, and all others are as they were."""
        if earlier.numbers == later.numbers and earlier.same(later):
            return False
        before, now = earlier.by_number, later.by_number
        kept = [i for i in before if i in now and torch.equal(before[i], now[i])]
        gone = [
            i
            for i in before
            if i not in kept and bool(before[i].any()) and (i not in now or not bool(now[i].any()))
        ]
        return bool(gone) and len(gone) + len(kept) == len(before)

    def _with_gradients(self, most: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first parameters that have a gradient, with their numbers."""
        holders = (
            (i, p)
            for i, p in enumerate(self.recorder.each_holder())
            if p.grad is not None and not p.grad.is_sparse
        )
        return itertools.islice(holders, most)

    def _gradient_probe(self) -> _Probe:
        """Return a few coordinates of the first gradients, by the number of their parameter."""
        found = ((i, p.grad) for i, p in self._with_gradients(PROBE_TENSORS))
        return _Probe.of([(i, gradient) for i, gradient in found if gradient is not None])

    def _parameter_probe(self) -> _Probe:
        holders = enumerate(self.recorder.each_holder())
        return _Probe.of(list(itertools.islice(holders, PROBE_TENSORS)))


def _ratio(before: _Probe, now: _Probe) -> tuple[float, float]:
    """Return the factor between two probes, and the share of the second that it does not give."""
    if not before or before.same(now):
        return 1.0, 0.0
    old, new = before.values.double(), now.values.double()
    size = float(old @ old)
    scale = float(old @ new) / size if size else 0.0
    return scale, float((new - scale * old).norm()) / (float(new.norm()) or 1.0)


def _shrunk(before: _Probe, now: _Probe) -> bool:
    """Return whether every coordinate kept its sign and none grew, as a clip by hand of any kind leaves them."""
    old, new = before.values, now.values
    return bool(((old * new >= 0) & (new.abs() <= old.abs() * (1 + PURE))).all())
