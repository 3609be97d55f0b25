"""What is done to gradients and parameters without a call, seen by comparing a few coordinates.

A gradient set to None by hand or divided in place, a parameter decayed between two backwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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


class Edits(Hooks):
    """Compares gradients and parameters before a backward with what the one before left.

    Attributes:
        stepped: Whether an optimizer has stepped since the last backward.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.stepped = False
        self._probe: dict[int, torch.Tensor] | None = None
        self._clip_probe: list[torch.Tensor] | None = None
        self._had_gradients = False
        self._weights_probe: list[torch.Tensor] | None = None
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
            self._clip_probe = [*self._gradient_probe().values()]

    def divided_by(self, scale: float) -> bool:
        """Return whether all gradients were divided by a loss scale, or by more, since the last backward."""
        if self._probe is None:
            return False
        with quiet():
            now = self._gradient_probe()
        if now.keys() != self._probe.keys():
            return False
        ratio, rest = _ratio([*self._probe.values()], [*now.values()])
        return 0.0 < ratio * scale <= 1.0 + PURE and ratio != 1.0 and rest < PURE

    def before_step(self) -> None:
        """Notice that gradients were multiplied since the last clip: by hand, since calls are known."""
        with quiet():
            now = [*self._gradient_probe().values()]
            if self._clip_probe is not None and len(now) == len(self._clip_probe):
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
            if self.stepped and any(bool(g.any()) for g in self._gradient_probe().values()):
                self.recorder.note("leftover")
            elif self._probe is not None and not self.stepped:
                now = self._gradient_probe()
                if (self._had_gradients and not now) or self._some_cleared(self._probe, now):
                    self.recorder.note("cleared")
                elif now and len(now) == len(self._probe):
                    self._note_edit([*self._probe.values()], [*now.values()])
            self._clip_probe = None
            weights = self._parameter_probe()
            if self._weights_probe is not None and not _same(weights, self._weights_probe):
                self.recorder.note("parameters_changed")

    def _note_edit(self, before: list[torch.Tensor], now: list[torch.Tensor]) -> None:
        if _same(before, now):
            return
        if not any(bool(each.any()) for each in now):
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

    def _along_weights(self, before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
        """Return the cosine between what was added to gradients and the weights themselves."""
        holders = [
            p
            for p in self.recorder.gradient_holders()
            if p.grad is not None and not p.grad.is_sparse
        ]
        added = torch.cat([b - a for a, b in zip(before, now, strict=True)]).double()
        weights = [plain(p.detach()).flatten()[:PROBE_ELEMENTS] for p in holders[: len(now)]]
        flat = torch.cat(weights).double() if weights else added.new_zeros(0)
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
        holders = self.recorder.gradient_holders()
        return next((p.grad for p in holders if p.grad is not None), None)

    @staticmethod
    def _some_cleared(before: dict[int, torch.Tensor], now: dict[int, torch.Tensor]) -> bool:
        """Return whether some gradients are gone, or zero, and all others are as they were."""
        kept = [i for i in before if i in now and torch.equal(before[i], now[i])]
        gone = [
            i
            for i in before
            if i not in kept and bool(before[i].any()) and (i not in now or not bool(now[i].any()))
        ]
        return bool(gone) and len(gone) + len(kept) == len(before)

    def _gradient_probe(self) -> dict[int, torch.Tensor]:
        """Return a few coordinates of the first gradients, by the number of their parameter."""
        found: dict[int, torch.Tensor] = {}
        for i, parameter in enumerate(self.recorder.gradient_holders()):
            if parameter.grad is not None and not parameter.grad.is_sparse:
                found[i] = plain(parameter.grad.detach()).flatten()[:PROBE_ELEMENTS].clone()
                if len(found) == PROBE_TENSORS:
                    break
        return found

    def _parameter_probe(self) -> list[torch.Tensor]:
        holders = self.recorder.gradient_holders()[:PROBE_TENSORS]
        return [plain(p.detach()).flatten()[:PROBE_ELEMENTS].clone() for p in holders]


def _ratio(before: list[torch.Tensor], now: list[torch.Tensor]) -> tuple[float, float]:
    """Return the factor between two probes, and the share of the second that it does not give."""
    if not before or _same(before, now):
        return 1.0, 0.0
    old, new = torch.cat(before).double(), torch.cat(now).double()
    size = float(old @ old)
    scale = float(old @ new) / size if size else 0.0
    return scale, float((new - scale * old).norm()) / (float(new.norm()) or 1.0)


def _shrunk(before: list[torch.Tensor], now: list[torch.Tensor]) -> bool:
    """Return whether every coordinate kept its sign and none grew, as a clip by hand of any kind leaves them."""
    return all(
        old.shape == new.shape
        and bool(((old * new >= 0) & (new.abs() <= old.abs() * (1 + PURE))).all())
        for old, new in zip(before, now, strict=True)
    )


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(a, b, strict=True)
    )
