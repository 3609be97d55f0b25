"""The loop's own copies of the weights: when it moves them, and what a cycle starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from equivcheck.interventions.base import Intervention
from equivcheck.parts import part_like, plain
from equivcheck.shadow import shadow_weights

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder
    from equivcheck.recording import Recording

# Coordinates of a copy that tell whether it moved.
FEW: Final = 32
# A move that is not all towards the weights is no average.
REST: Final = 1e-9


class Copies(Intervention):
    """Notes after how many backwards the loop moved its copies of the weights. Changes nothing.

    Attributes:
        moved: Those counts, in order.
        shares: For each, which part of the way to the weights the copies went; None if not all went one part of it.
    """

    name = "watch copies"

    def __init__(self) -> None:
        self.moved: list[int] = []
        self.shares: list[float | None] = []
        self._last: dict[str, torch.Tensor] = {}

    def before_fetch(self, recorder: Recorder) -> None:
        self._look(recorder, recorder.backwards)

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        self._look(recorder, recorder.backwards - 1)
        yield

    def finish(self, recorder: Recorder) -> None:
        self._look(recorder, recorder.backwards, ended=True)

    def _look(self, recorder: Recorder, count: int, *, ended: bool = False) -> None:
        with recorder.paused(), torch.no_grad():
            found = shadow_weights(recorder, ended=ended)
            now = {name: _few(tensor) for name, tensor in found.items()}
            weights = {name: _few(p) for name, p in _weights(recorder).items()}
        last, self._last = self._last, now
        if any(name in last and not torch.equal(last[name], each) for name, each in now.items()):
            self.moved.append(count)
            self.shares.append(_share(last, now, weights))


def _few(tensor: torch.Tensor) -> torch.Tensor:
    return plain(tensor).flatten()[:FEW].clone()


def _weights(recorder: Recorder) -> dict[str, torch.Tensor]:
    """Return the weights as this process holds them; those of a rank may be shards."""
    held = recorder.holdings.held() if recorder.holdings is not None else []
    return {part.name: part.holder for part in held} or recorder.parameters()


def _set(tensor: torch.Tensor, name: str, whole: torch.Tensor | None) -> None:
    """Give a copy of the weights, or this rank's part of it, the values of the full batch's."""
    part = part_like(tensor, name, tuple(whole.shape)) if whole is not None else None
    if part is not None and whole is not None:
        plain(tensor).copy_(part.cut(whole))


def _share(
    last: dict[str, torch.Tensor], now: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> float | None:
    """Return the part of the way to the weights that all copies went; None where they did not."""
    moves, ways = [], []
    for name, each in now.items():
        weight = next((w for key, w in weights.items() if name.endswith(f".{key}")), None)
        if weight is None or name not in last or weight.shape != each.shape:
            return None
        moves.append((each - last[name]).double())
        ways.append((weight - last[name]).double())
    move, way = torch.cat(moves), torch.cat(ways)
    length = float(way @ way)
    share = float(move @ way) / length if length else 0.0
    return share if float((move - share * way).norm()) <= REST * float(move.norm()) else None


class Begin(Intervention):
    """Start every micro-batch from the parameters, and the loop's copies of them, that the full batch starts with.

    Args:
        reference: The full-batch run.
    """

    name = "state at the start of the cycle"

    def __init__(self, reference: Recording) -> None:
        self._reference = reference

    def before_fetch(self, recorder: Recorder) -> None:
        place = recorder.place()
        kept = self._reference.kept
        if place is None:
            return
        cycle = place.cycle + place.last
        before = kept[cycle - 1] if cycle else self._reference.initial
        if before is None or not 0 <= cycle < len(kept):
            return
        shadows = kept[cycle].shadows
        with recorder.paused(), torch.no_grad():
            parameters = recorder.parameters()
            for name, tensor in (before.after | before.begins).items():
                if name in parameters and parameters[name].shape == tensor.shape:
                    parameters[name].detach().copy_(tensor)
            for name, tensor in shadow_weights(recorder).items():
                _set(tensor, name, shadows.get(name))

    def finish(self, recorder: Recorder) -> None:
        """Leave at the end what the full batch leaves: there is no cycle more to start."""
        kept = self._reference.kept
        with torch.no_grad():
            for name, tensor in shadow_weights(recorder, ended=True).items():
                _set(tensor, name, kept[-1].shadows.get(name) if kept else None)
