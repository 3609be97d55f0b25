"""Take what couples rows out of both runs, and find where rows are coupled.

*Freeze* normalizes both runs with the statistics of the full batch, held constant. *Fingerprint*
compares what every module puts out for a row in the full batch and alone in its micro-batch.
*Statistics* predicts running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from equivcheck.interventions import Intervention
from equivcheck.noise import UNIT_ROUNDOFF, floor
from equivcheck.split import tensors_in

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from equivcheck.feed import Key
    from equivcheck.recorder import Recorder


# Runs in which a row's company differs, and nothing else.
_COMPARED: Final = frozenset({"reference", "pieces", "candidate"})


class _PerCycle(Intervention):
    """Counts calls since a cycle began."""

    both = True

    def __init__(self, cycles: Mapping[Key, int]) -> None:
        self._cycles = cycles
        self._cycle = -1
        self._ordinal = 0

    def _enter(self, recorder: Recorder) -> int:
        keys = recorder.usage.current_keys()
        cycle = self._cycles.get(keys[0], -1) if keys else -1
        if cycle != self._cycle:
            self._cycle, self._ordinal = cycle, 0
        self._ordinal += 1
        return self._ordinal - 1


class Freeze(_PerCycle):
    """Normalize with the statistics of the full batch, in both runs.

    Running statistics stay as they are.

    Attributes:
        used: Whether any normalization was frozen.
    """

    name = "freeze"

    def __init__(self, cycles: Mapping[Key, int]) -> None:
        super().__init__(cycles)
        self.used = False
        self._learned: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        learn = recorder.recording.role == "reference"
        pairing = recorder.pairing()
        self._cycle, self._ordinal = -1, 0
        batch, instance = torch.batch_norm, torch.instance_norm

        def frozen(
            input: torch.Tensor,  # noqa: A002 - torch's own name
            weight: Any,
            bias: Any,
            mean: Any,
            var: Any,
            training: bool,
            momentum: float,
            eps: float,
            cudnn: bool,
        ) -> torch.Tensor:
            if not training:
                return batch(input, weight, bias, mean, var, training, momentum, eps, cudnn)
            self.used = True
            ordinal = self._enter(recorder)
            if learn:
                dims = [d for d in range(input.dim()) if d != 1]
                value = input.detach()
                taken = (value.mean(dims), value.var(dims, unbiased=False))
                self._learned.setdefault((pairing, self._cycle), []).append(taken)
            else:
                known = self._learned.get((pairing, self._cycle), [])
                if not known:
                    return batch(input, weight, bias, mean, var, training, momentum, eps, cudnn)
                first, second = known[ordinal % len(known)]
                taken = first.to(input.device), second.to(input.device)
            return batch(input, weight, bias, *taken, False, momentum, eps, cudnn)

        def alone(
            input: torch.Tensor,  # noqa: A002 - torch's own name
            weight: Any,
            bias: Any,
            mean: Any,
            var: Any,
            use_input_stats: bool,
            momentum: float,
            eps: float,
            cudnn: bool,
        ) -> torch.Tensor:
            # Instances do not interact; only the running statistics are kept from advancing.
            if not use_input_stats:
                return instance(
                    input, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn
                )
            self.used = True
            return instance(input, weight, bias, None, None, True, momentum, eps, cudnn)

        torch.batch_norm, torch.instance_norm = frozen, alone  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.batch_norm, torch.instance_norm = batch, instance

    def before_step(self, recorder: Recorder, _optimizer: Optimizer) -> None:
        for module in recorder.model.modules():
            counter = getattr(module, "num_batches_tracked", None)
            if isinstance(module, _NormBase) and isinstance(counter, torch.Tensor):
                counter.zero_()


class Statistics(Intervention):
    """Predicts running statistics from the inputs of every normalization, and compares.

    Attributes:
        as_predicted: Whether every running statistic followed its own micro-batches.
    """

    name = "watch statistics"

    def __init__(self) -> None:
        self.as_predicted = True

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        batch = torch.batch_norm

        def watched(
            input: torch.Tensor,  # noqa: A002 - torch's own name
            weight: Any,
            bias: Any,
            mean: Any,
            var: Any,
            training: bool,
            momentum: float,
            eps: float,
            cudnn: bool,
        ) -> torch.Tensor:
            if not training or mean is None:
                return batch(input, weight, bias, mean, var, training, momentum, eps, cudnn)
            dims = [d for d in range(input.dim()) if d != 1]
            with torch.no_grad():
                wanted = (
                    mean + momentum * (input.mean(dims) - mean),
                    var + momentum * (input.var(dims) - var),
                )
            result = batch(input, weight, bias, mean, var, training, momentum, eps, cudnn)
            limit = floor(input.numel(), UNIT_ROUNDOFF[mean.dtype])
            for expected, now in zip(wanted, (mean, var), strict=True):
                if float((expected - now).norm()) > limit * (
                    float(expected.norm()) + float(input.detach().abs().max())
                ):
                    self.as_predicted = False
            return result

        torch.batch_norm = watched  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.batch_norm = batch

    def gathered(self) -> bool:
        return self.as_predicted

    def take_back(self, by_rank: Sequence[Any]) -> None:
        self.as_predicted = self.as_predicted and all(by_rank)


@dataclass(frozen=True)
class Seen:
    """One call of a module, as one row saw it.

    Attributes:
        order: Place among all calls.
        output: [2] sum and norm of the row's output.
        given: The same of every tensor that was passed in; empty where none has rows.
        weights: Norm of every parameter of the module.
    """

    order: int
    output: torch.Tensor
    given: torch.Tensor
    weights: torch.Tensor

    def as_given(self, other: Seen, limit: float) -> bool:
        """Return whether the other call was given the same for this row, and had the same parameters."""
        return all(
            a.shape != b.shape or _apart(a, b) <= limit
            for a, b in ((self.given, other.given), (self.weights, other.weights))
        )


def _by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return [rows, 2] sum and norm of what belongs to each row."""
    values = tensor.detach().double().reshape(rows, -1)
    return torch.stack([values.sum(1), values.norm(dim=1)], dim=1)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    size = float(a.norm()) or 1.0
    return float((a - b).norm()) / size


class Fingerprint(_PerCycle):
    """Notes, for every module, a number per row of its output: in the full batch, and in its micro-batch."""

    name = "fingerprint"

    def __init__(self, cycles: Mapping[Key, int]) -> None:
        super().__init__(cycles)
        self._full: dict[tuple[str, int, Key, int], Seen] = {}
        self._alone: dict[tuple[str, int, Key, int], Seen] = {}
        self._calls: dict[str, int] = {}
        self._order = 0

    def before_fetch(self, recorder: Recorder) -> None:
        if recorder.recording.role in _COMPARED:
            self._calls = {}

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        handles = []
        kept = self._full if recorder.recording.role == "reference" else self._alone
        if recorder.recording.role in _COMPARED:
            for name, module in recorder.model.named_modules():
                handles.append(module.register_forward_hook(self._hook(recorder, name, kept)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, recorder: Recorder, name: str, kept: dict[Any, Any]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = next((t for t in tensors_in(output) if t.is_floating_point()), None)
            keys = recorder.usage.current_keys()
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            self._order += 1
            if tensor is None or not keys or not tensor.dim() or tensor.shape[0] % len(keys):
                return
            if tensor.layout != torch.strided:
                return  # Of a sparse tensor (a graph, say) no row is looked at.
            with torch.no_grad():
                values = _by_row(tensor, len(keys))
                taken = [
                    t
                    for t in tensors_in(inputs)
                    if t.dim() and not t.shape[0] % len(keys) and t.layout == torch.strided
                ]
                given = [_by_row(t, len(keys)) for t in taken]
                weights = torch.stack(
                    [p.detach().double().norm() for p in module.parameters()] or [torch.zeros(())]
                )
            width = tensor.numel() // len(keys)
            for i, key in enumerate(keys):
                entered = torch.cat([each[i] for each in given]) if given else torch.zeros(0)
                kept[name, call, key, width] = Seen(self._order, values[i], entered, weights)

        return hook

    def moved(self, limit: float) -> bool:
        """Return whether parameters are others where a micro-batch was alone: nothing is then told of rows."""
        return any(
            other.weights.shape == seen.weights.shape
            and _apart(seen.weights, other.weights) > limit
            for key, seen in self._full.items()
            if (other := self._alone.get(key)) is not None
        )

    def first_difference(self, limit: float) -> tuple[str | None, float]:
        """Return the first module, in order of calls, whose output for a row differs, and by how much.

        Only where what it was given for that row, and its parameters, are the same: rows that were mixed before they
        entered the model, or parameters that have moved on, are not that module's doing.

        Args:
            limit: Relative difference that rounding may make.
        """
        worst: dict[tuple[int, str], float] = {}
        for key, seen in self._full.items():
            other = self._alone.get(key)
            if other is None or not seen.as_given(other, limit):
                continue
            relative = _apart(seen.output, other.output)
            if relative > limit:
                place = seen.order, key[0]
                worst[place] = max(worst.get(place, 0.0), relative)
        if not worst:
            return None, 0.0
        first = min(worst)
        return first[1] or "(the model itself)", worst[first]
