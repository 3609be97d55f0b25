"""Every backward that makes gradients for a step: `backward()`, `autograd.grad` and `torch.func.grad`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from equivcheck import addends
from equivcheck.hooks.base import Hooks, number, replace
from equivcheck.hooks.functions import named, scaled_tree
from equivcheck.hooks.roots import reduction_of, scalar_of, scaled, value_of
from equivcheck.recording import Backward

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Backwards(Hooks):
    """Watches the autograd engine, in both modules that hold it.

    Attributes:
        repeated: Where a closure that is evaluated again stands among the backwards; None outside of one.
        evaluated: Per backward of this evaluation of a closure, the loss it started from and its factor.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.repeated: int | None = None
        self.evaluated: list[tuple[float, float]] = []
        self._depth = 0

    def install(self, stack: ExitStack) -> None:
        engine = torch.autograd.graph._engine_run_backward
        for module in (torch.autograd, torch.autograd.graph):
            replace(stack, module, "_engine_run_backward", self._watched(engine))

    @property
    def count(self) -> int:
        """Root backwards that have run, or begun.

        A closure that an optimizer evaluates again goes through the same micro-steps again: it is counted from where
        its first evaluation began.
        """
        return len(self.recording.backwards) if self.repeated is None else self.repeated

    @property
    def is_running(self) -> bool:
        """Whether a root backward is under way."""
        return self._depth > 0

    def _watched(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(engine)
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            accumulate = kwargs.get("accumulate_grad", False)
            if self._depth or self.recorder.is_paused or not self._is_root(accumulate, args):
                return engine(outputs, *args, **kwargs)
            self._depth += 1
            try:
                return self._root_backward(engine, list(outputs), args, kwargs)
            finally:
                self._depth -= 1

        return run_backward

    def _is_root(self, accumulate: bool, args: tuple[Any, ...]) -> bool:
        """Tell a backward that makes gradients for a step from one that computes a term of the loss."""
        if accumulate:
            return True
        create_graph, inputs = bool(args[2]), args[3]
        return not create_graph and any(id(each) in self.recorder.names for each in inputs or ())

    def _continues_another(self, outputs: list[Any]) -> bool:
        """Return whether a rank goes on with another's backward: a stage of a pipeline that holds no loss.

        The gradient that it starts from carries whatever the loss was multiplied with.
        """
        return self.recorder.cut and all(
            isinstance(each, torch.Tensor) and each.numel() > 1 for each in outputs
        )

    def of_function(
        self, compute: Callable[[], Any], names: list[str | None], *, has_aux: bool
    ) -> Any:
        """Run what makes gradients of the model's parameters at once, and return them with the value.

        Args:
            compute: Returns gradients in any nesting and the value, or the value and what comes with it.
            names: Which parameter each gradient is of, in the order of leaves.
            has_aux: Something comes with the value.
        """
        self._depth += 1
        try:
            gradients, value = compute()
        finally:
            self._depth -= 1
        self.recorder.edits.before_backward()
        loss = number(value[0] if has_aux else value)
        record = Backward(
            self.count,
            len(self.recording.fetched),
            loss,
            1.0,
            "grad",
            owner=self.recorder.usage.used_last,
            at=time.time_ns(),
        )
        self.recording.backwards.append(record)
        factor = 1.0
        for each in self.recorder.interventions:
            factor *= each.root_factor(self.recorder)
        if factor != 1.0:
            gradients = scaled_tree(gradients, factor)
            record.loss *= factor
        self.recorder.note("backward", loss=record.loss, loss_scale=1.0)
        self.recorder.clips.snapshots.clear()
        with ExitStack() as around:
            for each in self.recorder.interventions:
                around.enter_context(each.around_backward(self.recorder, ()))
            leaves = self.recorder.leaves()
            of_parameters = dict(named(gradients, names))
            inputs = [leaves[name] for name in of_parameters]
            self.recorder.observer.returned(self.recorder, inputs, list(of_parameters.values()))
        self.recorder.edits.after_backward()
        for each in self.recorder.interventions:
            each.after_backward(self.recorder)
        return gradients, value

    def _root_backward(
        self,
        engine: Callable[..., Any],
        outputs: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.recorder.edits.before_backward()
        loss, root = value_of(outputs, args[0])
        record = Backward(
            self.count,
            len(self.recording.fetched),
            loss / self.recorder.scaling.loss_scale,
            self.recorder.scaling.loss_scale,
            root,
            scalar_of(outputs),
            self.recorder.usage.used_last,
            time.time_ns(),
            addends.count(outputs[0]),
            reduction_of(outputs),
            adds=bool(kwargs.get("accumulate_grad", False)),
        )
        repeated = self.repeated is not None
        if self.repeated is None:
            self.recording.backwards.append(record)
        else:
            self.repeated = min(self.repeated + 1, len(self.recording.backwards))
        factor = 1.0
        place = self.recorder.place()
        is_inner = place is not None and place.inner
        if not is_inner and not self._continues_another(outputs):
            for each in self.recorder.interventions:
                factor *= each.root_factor(self.recorder)
        self.evaluated.append((loss, factor))
        if factor != 1.0:
            args = (scaled(args[0], outputs, factor), *args[1:])
            record.loss *= factor
        self.recorder.note(
            "repeat" if repeated else "backward", loss=record.loss, loss_scale=record.loss_scale
        )
        self.recorder.clips.snapshots.clear()
        with ExitStack() as around:
            for each in self.recorder.interventions:
                around.enter_context(each.around_backward(self.recorder, outputs))
            if repeated:
                result = engine(tuple(outputs), *args, **kwargs)
            elif kwargs.get("accumulate_grad", False):
                with self.recorder.observer.contributions(self.recorder):
                    result = engine(tuple(outputs), *args, **kwargs)
            else:
                result = engine(tuple(outputs), *args, **kwargs)
                self.recorder.observer.returned(self.recorder, args[3], result)
        self.recorder.edits.after_backward()
        for each in self.recorder.interventions:
            each.after_backward(self.recorder)
        return result
