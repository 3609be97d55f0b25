"""JAX: gradients that `jax.grad` and its kin compute, and the steps that optax makes.

Three places of the user's own program are tapped, inside `jit`, `scan` and `cond` by ordered callbacks: the gradient
functions (`jax.grad`, `jax.value_and_grad`, those of flax nnx), what enters an optax optimizer (of `MultiSteps`, the
one inside it), and `optax.apply_updates`, where an update that is not all zeros is an optimizer step. A loop that
updates its parameters without optax is not seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental import io_callback
from torch import Tensor, nn

from equivcheck.bridges.mirror import Link, Mirror
from equivcheck.hooks.base import replace

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


@dataclass
class _Now:
    """The run that is under way, and where a trace of the user's code stands.

    Attributes:
        link: None between runs: what was compiled in one may be called in the next.
        depth: Taps that the code traced now lies in; only outermost ones are told.
        accumulated: A `MultiSteps` has told of the gradients of the optimizer inside it.
    """

    link: Link | None = None
    depth: int = 0
    accumulated: bool = False


NOW = _Now()


@contextmanager
def _inside(depth: int | None = None) -> Iterator[None]:
    before, NOW.depth = NOW.depth, NOW.depth + 1 if depth is None else depth
    try:
        yield
    finally:
        NOW.depth = before


# ---- tensors and trees ---------------------------------------------------------------------------


def to_torch(leaf: Any) -> Tensor:
    """Return an array as a tensor of its own."""
    array = np.array(leaf)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    plain = tensor.detach()
    plain = plain.float() if plain.dtype == torch.bfloat16 else plain
    return plain.numpy().astype(dtype)


def _name(path: Sequence[Any]) -> str:
    """Return the words of a path through a tree, joined by points; the wrapper of a flax variable is left out."""
    words = [
        str(next(iter(vars(each).values()))) if hasattr(each, "__dict__") else _word(each)
        for each in path
    ]
    return ".".join(words[:-1] if words[-1:] == ["value"] else words)


def _word(key: Any) -> str:
    return str(next((getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)), key))


def _named(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Return names and leaves of a tree, and how to build it again."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [_name(path) for path, _ in found], [leaf for _, leaf in found], structure


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _rounds(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def matched(names: Sequence[str], leaves: Sequence[Any], link: Link) -> list[str] | None:
    """Return the parameters that the leaves of a tree are, or belong to; None if it is another tree.

    By the end of their path and by shape; a loop may take gradients of a part of the model.
    """
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        if not _rounds(leaf):
            return None
        fitting = [
            own
            for own, parameter in link.parameters.items()
            if tuple(parameter.shape) == tuple(leaf.shape) and _same_end(own, name)
        ]
        if len(fitting) != 1:
            break
        found += fitting
    else:
        return found if found and len(set(found)) == len(found) else None
    own = list(link.parameters)
    if [tuple(p.shape) for p in link.parameters.values()] == [tuple(leaf.shape) for leaf in leaves]:
        return own
    return None


def _same_end(a: str, b: str) -> bool:
    if not a or not b:
        return a == b
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _ask(host: Callable[..., list[Tensor]], like: Sequence[Any], *leaves: Any) -> list[Any]:
    """Return what `host` makes of leaves, as arrays like `like`; inside a trace, when the program gets there."""
    dtypes = [leaf.dtype for leaf in like]

    def call(*values: Any) -> list[Any]:
        link = NOW.link
        if link is None:
            # Compiled in a run that is over, and called by other code.
            return [np.zeros(leaf.shape, leaf.dtype) for leaf in like]
        given = [to_torch(value) for value in values]
        return [
            _to_numpy(each, dtype) for each, dtype in zip(host(link, *given), dtypes, strict=True)
        ]

    if any(isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, *like)):
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in like]
        return list(io_callback(call, shapes, *leaves, ordered=True))
    return [jnp.asarray(each) for each in call(*leaves)]


# ---- the three taps ------------------------------------------------------------------------------


def current(tree: Any) -> Any:
    """Return the parameters that a tree holds as they are by now: the engine may have set them."""
    if NOW.link is None:
        return tree
    names, leaves, structure = _named(tree)
    own = matched(names, leaves, NOW.link)
    if own is None:
        return tree

    def host(link: Link, *values: Tensor) -> list[Tensor]:
        return list(link.current(dict(zip(own, values, strict=True))).values())

    return structure.unflatten(_ask(host, leaves, *leaves))


def told(loss: Any, gradients: Any) -> Any:
    """Tell of a gradient, and return it with the factor that the engine gives it."""
    assert NOW.link is not None
    names, leaves, structure = _named(gradients)
    own = matched(names, leaves, NOW.link)
    if own is None:
        return gradients  # Of something else: the input of an adversary, say.

    def host(link: Link, value: Tensor, *values: Tensor) -> list[Tensor]:
        return list(link.backward(value, dict(zip(own, values, strict=True))).values())

    return structure.unflatten(_ask(host, leaves, loss, *leaves))


def _differentiating(original: Any, *, with_value: bool) -> Any:
    """Wrap `jax.grad` or `jax.value_and_grad`."""

    @functools.wraps(original)
    def transform(
        fun: Callable[..., Any], argnums: Any = 0, has_aux: bool = False, **options: Any
    ) -> Any:
        both = _VALUE_AND_GRAD(fun, argnums, has_aux, **options)
        places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        @functools.wraps(fun)
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            if NOW.link is None or NOW.depth:
                return _told_or_not(both(*args, **kwargs), with_value, has_aux)
            given = list(args)
            for place in places:
                given[place] = current(given[place])
            with _inside():
                found, gradients = both(*given, **kwargs)
            gradients = told(found[0] if has_aux else found, gradients)
            return _told_or_not((found, gradients), with_value, has_aux)

        return evaluated

    return transform


_VALUE_AND_GRAD = jax.value_and_grad


def _told_or_not(result: tuple[Any, Any], with_value: bool, has_aux: bool) -> Any:
    """Return what `jax.value_and_grad` returned, as `jax.grad` does where it was that."""
    found, gradients = result
    if with_value:
        return found, gradients
    return (gradients, found[1]) if has_aux else gradients


def _updating(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `update` of an optax optimizer."""

    @functools.wraps(update)
    def watched(updates: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        if NOW.link is None or NOW.depth:
            return update(updates, state, *args, **kwargs)
        if args:
            args = (current(args[0]), *args[1:])
        elif kwargs.get("params") is not None:
            kwargs["params"] = current(kwargs["params"])
        state = _current_state(state)
        accumulated, NOW.accumulated = NOW.accumulated, False
        with _inside():
            made, following = update(updates, state, *args, **kwargs)
        inner, NOW.accumulated = NOW.accumulated, accumulated or NOW.accumulated
        if not inner:
            _enter(updates, following)
        return made, following

    return watched


def _state_leaves(state: Any) -> tuple[list[str], list[Any], Any]:
    names, leaves, structure = _named(state)
    return names, leaves, structure


def _current_state(state: Any) -> Any:
    names, leaves, structure = _state_leaves(state)
    if not names or not all(_is_array(leaf) for leaf in leaves):
        return state

    def host(link: Link, *values: Tensor) -> list[Tensor]:
        now = link.state({n: v.double() for n, v in zip(names, values, strict=True)})
        return [now[name] for name in names]

    return structure.unflatten(_ask(host, leaves, *leaves))


def _enter(updates: Any, following: Any) -> None:
    """Tell of the gradients that enter an optimizer, and of the state that it comes to."""
    assert NOW.link is not None
    names, leaves, _ = _named(updates)
    own = matched(names, leaves, NOW.link)
    if own is None:
        return
    entries, state, _ = _state_leaves(following)
    if not all(_is_array(leaf) for leaf in state):
        entries, state = [], []

    def host(link: Link, *values: Tensor) -> list[Tensor]:
        gradients, rest = values[: len(own)], values[len(own) :]
        link.entering(
            dict(zip(own, gradients, strict=True)),
            {n: v.double() for n, v in zip(entries, rest, strict=True)},
        )
        return []

    _ask(host, [], *leaves, *state)


def _accumulating(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `MultiSteps.update`: what steps is the optimizer inside it."""

    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _inside(0):
            found = original(self, *args, **kwargs)
        NOW.accumulated = True
        return found

    return update


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `optax.apply_updates`."""

    @functools.wraps(original)
    def apply_updates(params: Any, updates: Any) -> Any:
        if NOW.link is None or NOW.depth:
            return original(params, updates)
        names, leaves, structure = _named(params)
        own = matched(names, leaves, NOW.link)
        moves = jax.tree.leaves(updates)
        if own is None or len(moves) != len(leaves):
            return original(params, updates)

        def host(link: Link, *values: Tensor) -> list[Tensor]:
            given, by = values[: len(own)], values[len(own) :]
            if not any(bool(each.any()) for each in by):
                return list(given)  # MultiSteps gives zeros until the cycle is complete.
            now = link.current(dict(zip(own, given, strict=True)))
            wanted = {n: p + m.to(p.dtype) for (n, p), m in zip(now.items(), by, strict=True)}
            return list(link.step(wanted).values())

        return structure.unflatten(_ask(host, leaves, *leaves, *moves))

    return apply_updates


# ---- flax nnx, whose modules hold their own parameters ---------------------------------------------


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _module_differentiating(original: Any, *, with_value: bool) -> Any:
    """Wrap `nnx.grad` or `nnx.value_and_grad`."""

    @functools.wraps(original)
    def transform(*args: Any, argnums: Any = 0, has_aux: bool = False, **options: Any) -> Any:
        if not args:  # as a decorator with options
            return functools.partial(transform, argnums=argnums, has_aux=has_aux, **options)
        both = _nnx_value_and_grad(*args, argnums=argnums, has_aux=has_aux, **options)
        places = argnums if isinstance(argnums, tuple | list) else (argnums,)

        @functools.wraps(args[0])
        def evaluated(*given: Any, **kwargs: Any) -> Any:
            if NOW.link is None or NOW.depth:
                return _told_or_not(both(*given, **kwargs), with_value, has_aux)
            for place in places:
                if isinstance(place, int) and isinstance(given[place], _nnx().Module):
                    state = _nnx().state(given[place], _nnx().Param)
                    _nnx().update(given[place], current(state))
            with _inside():
                found, gradients = both(*given, **kwargs)
            gradients = told(found[0] if has_aux else found, gradients)
            return _told_or_not((found, gradients), with_value, has_aux)

        return evaluated

    return transform


_nnx_value_and_grad: Any = None


# ---- the bridge ------------------------------------------------------------------------------------


class JaxBridge:
    """A tree of parameters, or a module of flax nnx.

    Args:
        built: What the user's `build` returned.
    """

    def __init__(self, built: Any) -> None:
        self._built = built
        names, leaves, _ = _named(self._parameters())
        self.module: nn.Module = Mirror(
            {
                name: to_torch(leaf)
                for name, leaf in zip(names, leaves, strict=True)
                if _rounds(leaf)
            }
        )

    def _parameters(self) -> Any:
        if _nnx() is not None and isinstance(self._built, _nnx().Module):
            return _nnx().state(self._built, _nnx().Param)
        # A TrainState holds its optimizer's state, too.
        return self._built.params if hasattr(self._built, "apply_gradients") else self._built

    def model(self, *, promoted: bool) -> Any:
        """Return the model, its floating leaves cast to float64 if promoted."""
        if not promoted:
            return self._built
        jax.config.update("jax_enable_x64", True)

        def cast(leaf: Any) -> Any:
            return jnp.asarray(leaf, jnp.float64) if _rounds(leaf) else leaf

        if _nnx() is not None and isinstance(self._built, _nnx().Module):
            _nnx().update(self._built, jax.tree.map(cast, _nnx().state(self._built)))
            return self._built
        return jax.tree.map(cast, self._built)

    @contextmanager
    def watched(self, recorder: Recorder, *, promoted: bool) -> Iterator[None]:
        """Mirror what the run does."""
        del promoted
        NOW.link = Link(self.module, recorder)
        try:
            yield
        finally:
            self.settle()
            NOW.link = None

    def settle(self) -> None:
        """Wait for the callbacks of what was dispatched."""
        jax.effects_barrier()


def across(model: Any) -> JaxBridge | None:
    """Return a bridge for a tree of arrays or a module of flax nnx; None for anything else."""
    if isinstance(model, nn.Module):
        return None
    if _nnx() is not None and isinstance(model, _nnx().Module):
        return JaxBridge(model)
    leaves = jax.tree.leaves(model)
    return JaxBridge(model) if any(_rounds(leaf) for leaf in leaves) else None


def _canonical(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap optax's reading of dtypes: where all is float64, an accumulator asked for in float32 is, too."""

    @functools.wraps(original)
    def canonicalize_dtype(dtype: Any) -> Any:
        found = original(dtype)
        is_promoted = NOW.link is not None and _is_double(NOW.link.parameters)
        low = found is not None and jnp.issubdtype(found, jnp.floating)
        return jnp.dtype("float64") if is_promoted and low else found

    return canonicalize_dtype


def _is_double(parameters: Mapping[str, Tensor]) -> bool:
    return all(p.dtype == torch.float64 for p in parameters.values())


def install(stack: ExitStack) -> None:
    """Tap JAX, optax and flax, as far as they are loaded, until the stack is closed."""
    global _nnx_value_and_grad  # noqa: PLW0603 - the library's own, as it was found
    wide = jax.config.jax_enable_x64
    stack.callback(jax.config.update, "jax_enable_x64", wide)
    replace(stack, jax, "grad", _differentiating(jax.grad, with_value=False))
    replace(stack, jax, "value_and_grad", _differentiating(jax.value_and_grad, with_value=True))
    if (optax := sys.modules.get("optax")) is not None:
        base, utils = sys.modules["optax._src.base"], sys.modules["optax._src.utils"]
        new = base.GradientTransformation.__new__

        def made(cls: Any, init: Any, update: Any) -> Any:
            return new(cls, init, _updating(update))

        replace(stack, base.GradientTransformation, "__new__", made)
        replace(stack, optax.MultiSteps, "update", _accumulating(optax.MultiSteps.update))
        applying = _applying(optax.apply_updates)
        replace(stack, optax, "apply_updates", applying)
        replace(stack, sys.modules["optax._src.update"], "apply_updates", applying)
        replace(stack, utils, "canonicalize_dtype", _canonical(utils.canonicalize_dtype))
    if (nnx := _nnx()) is not None:
        _nnx_value_and_grad = nnx.value_and_grad
        replace(stack, nnx, "grad", _module_differentiating(nnx.grad, with_value=False))
        replace(
            stack,
            nnx,
            "value_and_grad",
            _module_differentiating(nnx.value_and_grad, with_value=True),
        )
