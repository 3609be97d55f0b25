"""Keras 3 on its torch backend: torch makes the gradients, and Keras' own optimizers, which are none of torch's, step.

The update that a Keras optimizer makes at the end of a cycle becomes a step of a mirror of it. On another backend
nothing would be seen: it is refused.
"""

from __future__ import annotations

import collections
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from equivcheck.bridges.mirror import Driven
from equivcheck.errors import UsageError
from equivcheck.hooks.base import number, quiet, replace, subclasses

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class _Watch:
    """The run that is under way: a mirror of every Keras optimizer that has stepped in it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.mirrors: dict[int, tuple[Any, Driven]] = {}
        self.unclipped: list[Tensor] | None = None
        self.is_stepping = False

    def mirror(self, optimizer: Any, variables: list[Any]) -> Driven:
        """Return the mirror of a Keras optimizer; its state is Keras' own tensors, so that what is set in it is set."""
        if id(optimizer) not in self.mirrors:
            every = getattr(optimizer, "_trainable_variables", None) or variables
            made = Driven([each.value for each in every])
            made.param_groups[0]["lr"] = 0.0
            for path, tensor in _state(optimizer):
                owner = next((v for v in every if _belongs(path, tensor, v)), every[0])
                made.state[owner.value][_without(path, owner)] = tensor
            self.mirrors[id(optimizer)] = (optimizer, made)
        return self.mirrors[id(optimizer)][1]


NOW: list[_Watch] = []


def _state(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield moments and the like; not the counters, the rate, or what is accumulated within a cycle."""
    accumulated = {id(each) for each in getattr(optimizer, "_accumulated_gradients", None) or ()}
    for variable in optimizer.variables:
        tensor = variable.value
        if id(variable) not in accumulated and tensor.is_floating_point() and tensor.dim():
            yield variable.path, tensor


def _belongs(path: str, tensor: Tensor, variable: Any) -> bool:
    return tensor.shape == variable.value.shape and variable.path.replace("/", "_") in path


def _without(path: str, variable: Any) -> str:
    return path.rpartition("/")[2].replace(variable.path.replace("/", "_"), "").strip("_")


def _stepping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the place where a Keras optimizer updates, once a cycle is complete."""

    @functools.wraps(original)
    def _backend_update_step(
        self: Any, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        watch = NOW[-1] if NOW else None
        if watch is None or watch.is_stepping:
            original(self, grads, trainable_variables, learning_rate)
            return
        mirror = watch.mirror(self, trainable_variables)
        mirror.param_groups[0]["lr"] = number(learning_rate)
        unclipped, watch.unclipped = watch.unclipped, None
        with quiet():
            for index, (variable, gradient) in enumerate(
                zip(trainable_variables, grads, strict=True)
            ):
                parameter = variable.value
                parameter.grad = gradient.detach().to(parameter.dtype)
                if unclipped is not None:
                    watch.recorder.clips.snapshots[id(parameter)] = (unclipped[index].detach(), 1.0)
        mirror.body = lambda: original(self, grads, trainable_variables, learning_rate)
        watch.is_stepping = True
        try:
            mirror.step()
        finally:
            watch.is_stepping = False

    return _backend_update_step


def _clipping(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _clip_gradients(self: Any, grads: Any) -> Any:
        clipped = original(self, grads)
        if NOW and clipped is not grads:
            NOW[-1].unclipped = list(grads)
        return clipped

    return _clip_gradients


class KerasBridge:
    """A model of Keras, which is a module of torch itself.

    Args:
        model: What the user's `build` returned.
    """

    def __init__(self, model: Any) -> None:
        self.module: nn.Module = model

    def model(self, *, promoted: bool) -> Any:
        """Return the model; torch's promotion has cast it."""
        del promoted
        for layer in self.module._flatten_layers():  # type: ignore[operator] # Keras' own way through a model
            if "Dropout" in type(layer).__name__ and hasattr(layer, "rate"):
                layer.rate = 0.0
        return self.module

    @contextmanager
    def watched(self, recorder: Recorder, *, promoted: bool) -> Iterator[None]:
        """Mirror what the run does."""
        del promoted
        watch = _Watch(recorder)
        NOW.append(watch)
        try:
            yield
        finally:
            NOW.remove(watch)

    def settle(self) -> None:
        """Nothing runs late here."""


def across(model: Any) -> KerasBridge | None:
    """Return a bridge for a model of Keras; None for anything else.

    Raises:
        UsageError: Keras computes with another library than torch.
    """
    keras = sys.modules["keras"]
    if not isinstance(model, keras.Model):
        return None
    if keras.backend.backend() != "torch":
        raise UsageError(
            f"keras-backend: this model of Keras computes with {keras.backend.backend()}",
            expected="KERAS_BACKEND=torch",
            because="gradients are seen where torch makes them",
            fix='os.environ["KERAS_BACKEND"] = "torch", before keras is imported',
        )
    return KerasBridge(model)


def install(stack: ExitStack) -> None:
    """Tap the optimizers of Keras until the stack is closed, and let it count its names anew."""
    state = sys.modules["keras.src.backend.common.global_state"]
    names = state.get_global_attribute("object_name_uids")
    state.set_global_attribute("object_name_uids", collections.defaultdict(int))
    stack.callback(state.set_global_attribute, "object_name_uids", names)
    if sys.modules["keras"].backend.backend() == "torch":
        # Keras imports it when the first optimizer is made; from then on it is the one that updates.
        importlib.import_module("keras.src.backend.torch.optimizers.torch_parallel_optimizer")
    base = sys.modules["keras.src.optimizers.base_optimizer"].BaseOptimizer
    classes: list[Any] = list(dict.fromkeys(subclasses(base)))
    for each in classes:
        if "_backend_update_step" in vars(each):
            replace(stack, each, "_backend_update_step", _stepping(each._backend_update_step))
        if "_clip_gradients" in vars(each):
            replace(stack, each, "_clip_gradients", _clipping(each._clip_gradients))
