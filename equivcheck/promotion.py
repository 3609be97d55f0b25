"""Run unmodified training code in float64, whatever precision it asks for.

`promoted` is a dispatch mode below autograd and autocast: autocast, `.to(bfloat16)`, `.float()`,
`GradScaler` and low-precision buffers stay in the user's code and compute in float64. Autocast
leaves float64 operands alone by itself, so what reaches the mode is mostly casts and factories.

What promotion cannot keep, so that a promoted run is judged together with the native runs:

- *An alias becomes a copy*: `p.grad.float().div_(K)` changes `p.grad` where it is float32 already.
  Here the call names another dtype than float64 and copies, as it would for a bfloat16 gradient.
- *A copy becomes an alias*: `x.to(y.dtype)` copies from bfloat16 to float32, and is `x` itself
  where both were promoted.
- A dtype that the code asserts, views as bits or asks `torch.finfo` about is float64.
- Low precision from before the mode (a module-level buffer) stays as it is, since others may alias
  it: it is read in float64, and writes to it round and are named in `Promotion.lowered`. Checks
  above the dispatcher see it: `nn.LSTM` refuses a float32 input beside float64 weights.
- `torch.from_numpy` of a float32 array becomes a copy, which no longer shares its memory.
- Constants are what the code made them: `torch.tensor(0.1, dtype=torch.float32)` is off by 1.5e-9.
- float64 does not overflow: a float16 step that natively is skipped is not skipped here.
- Draws: an explicit `dtype=torch.float64` is taken for `dtype=x.dtype` of a promoted `x`, and a
  promoted bfloat16 tensor is filled with numbers of the working dtype.
- Other threads are not promoted; the autograd engine's cpu backward runs on the calling thread.
"""

# torch's dispatch modes and schemas have no public names for what is needed here.
# ruff: noqa: SLF001

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _python_dispatch

from equivcheck.casting import PROMOTED, REAL_OF, in_dtype, is_inexact, low_dtype, up

__all__ = ["Promotion", "promoted"]

_FALLBACKS = (torch.float32, torch.bfloat16, torch.float16)  # highest precision first
_NO_KERNEL = re.compile(r"Double|double|[Ff]loat|[Dd]type|[Tt]ype|BFloat16|bf16|Half")
# Writes that need no arithmetic go to a low-precision tensor itself.
_DIRECT_WRITES = {"copy_", "fill_", "zero_", "resize_", "resize_as_", "set_"}
# Random operators that have overloads without a generator argument.
_DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
# Random operators whose result moves with their operands: drawing in low precision rounds it.
_SMOOTH_DRAWS = {"_standard_gamma", "_sample_dirichlet"}


@dataclasses.dataclass(frozen=True)
class _Operator:
    """What the schema says about an operator, looked up once."""

    name: str  # "aten._grouped_mm.default"
    base: str  # "_grouped_mm"
    overload: str
    names: tuple[str, ...]  # of the arguments
    written: frozenset[int | str]  # positions and names of the operands that it writes
    view: bool
    random: bool
    reshapes: bool  # writes sizes and strides, no numbers
    foreign: bool  # collectives write operands that their schemas do not mark
    special: Callable[[_Call], Any] | None


@functools.cache
def _operator(func: Any) -> _Operator:
    namespace, base = func._schema.name.split("::")
    arguments = func._schema.arguments
    written: set[int | str] = set()
    aliased = False
    # native_batch_norm updates the running statistics without saying so in its schema.
    updates_statistics = "batch_norm" in base and "backward" not in base
    for position, argument in enumerate(arguments):
        alias = argument.alias_info
        hidden = updates_statistics and argument.name in {"running_mean", "running_var"}
        if hidden or (alias is not None and alias.is_write):
            written |= {position, argument.name}
        elif alias is not None:
            aliased = True
    aten = namespace == "aten"
    generator = any("Generator" in str(argument.type) for argument in arguments)
    return _Operator(
        name=str(func),
        base=base,
        overload=func._schema.overload_name,
        names=tuple(argument.name for argument in arguments),
        written=frozenset(written),
        view=aliased and not written,
        random=generator or (aten and base in _DRAWS),
        reshapes=torch.Tag.inplace_view in func.tags,
        foreign=namespace == "c10d",
        special=_SPECIAL.get(base) if aten else None,
    )


@dataclasses.dataclass(slots=True)
class _Call:
    """One call of an operator under the mode."""

    mode: Promotion
    func: Any
    operator: _Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    working_dtype: torch.dtype  # the default dtype of the unpromoted code
    is_rounded: bool = False  # what was written in low precision is not what was computed

    def given(self, name: str, default: Any = None) -> Any:
        """Return the argument `name`, by position or keyword."""
        position = self.operator.names.index(name)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def promote(self, keep: frozenset[Any] = frozenset()) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the operands in float64, except the written ones and those in `keep`."""
        left = self.operator.written | keep
        return (
            tuple(v if i in left else up(v) for i, v in enumerate(self.args)),
            {name: v if name in left else up(v) for name, v in self.kwargs.items()},
        )

    def compute(self) -> Any:
        """Run in float64, or in the highest precision that has a kernel."""
        operator, route = self.operator, self.mode._routes.get(self.func)
        if route is not None:
            return self.through(route)
        low = operator.written and low_dtype(
            [v for i, v in enumerate(self.args) if i in operator.written]
            + [v for name, v in self.kwargs.items() if name in operator.written]
        )
        args, kwargs = self.promote()
        if low and (operator.reshapes or operator.base in _DIRECT_WRITES):
            written = self.func(*args, **kwargs)
            if operator.base in {"copy_", "fill_"} and not _holds(written, args[1]):
                self.mode.lowered[f"in-place write to {low}"] = low
            return written
        if low:
            result = self.through(torch.float64)
            if self.is_rounded:
                self.mode.lowered[f"in-place write to {low}"] = low
            return result
        try:
            return up(self.func(*args, **kwargs))
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if not _NO_KERNEL.search(str(error)):
                raise
            for dtype in _FALLBACKS:
                try:
                    result = self.through(dtype)
                except (NotImplementedError, RuntimeError, ValueError):
                    continue
                self.mode._routes[self.func] = self.mode.lowered[operator.name] = dtype
                return result
            raise

    def through(self, dtype: torch.dtype) -> Any:
        """Run on operands in `dtype`, copy back what was written, and cast the result up."""
        pending: list[tuple[Tensor, Tensor]] = []
        written = self.operator.written
        args = [
            in_dtype(v, dtype, pending if i in written else None) for i, v in enumerate(self.args)
        ]
        kwargs = {
            name: in_dtype(v, dtype, pending if name in written else None)
            for name, v in self.kwargs.items()
        }
        result = self.func(*args, **kwargs)
        originals = {id(temporary): original for original, temporary in pending}
        for original, temporary in pending:
            if original.shape != temporary.shape:  # an out= operand
                original.resize_(temporary.shape)
            if original is not temporary:
                original.copy_(temporary)
                self.is_rounded = self.is_rounded or not _holds(original, temporary)

        def back(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)([back(item) for item in value])
            return originals[id(value)] if id(value) in originals else up(value)

        return back(result)

    def draw_dtype(self) -> torch.dtype:
        """Return the dtype in which the unpromoted code would have drawn."""
        values = [*self.args, *self.kwargs.values()]
        named = [v for v in values if isinstance(v, torch.dtype) and is_inexact(v)]
        low = [v.dtype for v in values if isinstance(v, Tensor) and v.dtype in PROMOTED]
        dtype = (named + low + [self.working_dtype])[0]
        return REAL_OF.get(dtype, dtype) if dtype in PROMOTED else self.working_dtype

    def draw(self) -> Any:
        """Draw as the unpromoted code would: a seed gives the same numbers and generator state."""
        dtype = self.draw_dtype()
        if self.operator.base in {"rand", "randn", "normal"} and "dtype" in self.operator.names:
            call = dataclasses.replace(self, kwargs={"dtype": dtype, **self.kwargs})
            return call.through(dtype)
        if self.operator.base in _SMOOTH_DRAWS:
            self.mode.lowered[self.operator.name] = dtype
        return self.through(dtype)


def _holds(written: Tensor, value: Any) -> bool:
    """Return whether a low-precision tensor is exactly what was written to it, as an optimizer's count of steps is."""
    plain = (Tensor, torch.nn.Parameter)
    if type(written) not in plain or written.is_meta:
        return False
    if isinstance(value, Tensor) and type(value) not in plain:
        return False
    return bool((up(written) == value).all())


class Promotion(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute every floating operator in float64; enter it through `promoted`.

    Attributes:
        lowered: Operators that could not be computed in float64 -> the dtype they computed in, and
            writes to low-precision tensors from outside that rounded ("in-place write to torch.bfloat16").
        working_dtype: The dtype in which code that names none draws random numbers.
        asked: Low dtypes that the code named, as in a cast to bfloat16.
    """

    supports_higher_order_operators = True

    def __init__(self, working_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.working_dtype = working_dtype
        self.lowered: dict[str, torch.dtype] = {}
        self.asked: set[torch.dtype] = set()
        self._routes: dict[Any, torch.dtype] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func` in float64."""
        kwargs = kwargs or {}
        if kwargs and (dtype := kwargs.get("dtype")) in PROMOTED:
            self.asked.add(dtype)
        if not isinstance(func, torch._ops.OpOverload):  # higher-order, such as flex_attention
            return up(func(*self._entering(up(args)), **self._entering(up(kwargs))))
        operator = _operator(func)
        subclass = bool(types) and any(_dispatches(kind) for kind in types)
        if subclass and any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)  # shape inference, whose own mode lies below this one
        if operator.foreign or (operator.view and operator.special is None):
            return NotImplemented if subclass else func(*args, **kwargs)
        default = torch.get_default_dtype()
        working_dtype = default if default in PROMOTED else self.working_dtype
        call = _Call(self, func, operator, args, kwargs, working_dtype)
        if subclass:
            return self._subclass(call)
        if default is torch.float64:
            return self._run(call)
        # The user's code has set it; integers divided by integers must not be float32 for that.
        torch.set_default_dtype(torch.float64)
        try:
            return self._run(call)
        finally:
            torch.set_default_dtype(default)

    def _run(self, call: _Call) -> Any:
        if call.operator.special is not None:
            return call.operator.special(call)
        return call.draw() if call.operator.random else call.compute()

    def _entering(self, value: Any) -> Any:
        """Return `value` with functions in any nesting run under the mode: branches and bodies."""
        if isinstance(value, (list, tuple)):
            return type(value)([self._entering(item) for item in value])
        if isinstance(value, dict):
            return {key: self._entering(item) for key, item in value.items()}
        if not callable(value):
            return value

        def under_the_mode(*args: Any, **kwargs: Any) -> Any:
            with self:
                return value(*args, **kwargs)

        return under_the_mode

    def _subclass(self, call: _Call) -> Any:
        """Name float64 to a tensor subclass, whose handler comes back with plain tensors."""
        args, kwargs = call.promote()
        before, after = [*call.args, *call.kwargs.values()], [*args, *kwargs.values()]
        if call.operator.view or all(a is b for a, b in zip(before, after, strict=True)):
            return NotImplemented
        with self:
            return call.func(*args, **kwargs)


def _dispatches(kind: Any) -> bool:
    disabled = torch._C._disabled_torch_dispatch_impl
    return bool(kind.__torch_dispatch__ is not disabled)


# Operators that the mode computes by itself, or calls in another way. Each has a test.


def _normal(call: _Call) -> Any:
    """torch.normal with tensors: a standard normal draw, scaled and moved in float64."""
    mean, std = call.given("mean"), call.given("std", 1.0)
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    if not tensors or call.operator.overload.endswith("out"):
        return call.draw()
    shape = (mean + std).shape if len(tensors) == 2 else tensors[0].shape
    draw = torch.empty(shape, dtype=call.draw_dtype(), device=tensors[0].device)
    draw.normal_(generator=call.kwargs.get("generator"))
    return up(mean) + up(std) * draw.double()


def _native_dropout(call: _Call) -> Any:
    """Dropout: the mask of the working dtype, the product in float64."""
    operand, probability, train = call.args
    if train is False or call.operator.overload:
        return call.compute()
    _, mask = call.func(operand.to(call.draw_dtype()), probability, train)
    return up(operand) * mask * (0.0 if probability == 1 else 1 / (1 - probability)), mask


def _rrelu(call: _Call) -> Any:
    """Randomised leaky ReLU: the slopes of the working dtype, the product in float64."""
    operand, noise = call.args[:2]
    if not call.given("training", default=False):
        return call.compute()
    if operand.dtype in PROMOTED or call.operator.overload:
        return call.draw()
    dataclasses.replace(call, args=(operand.clone(), *call.args[1:])).draw()  # fills `noise`
    return operand.mul_(noise) if call.operator.base.endswith("_") else operand * noise


def _unscale(call: _Call) -> None:
    """Unscale gradients, which torch does with float32 scalars only.

    Source: aten/src/ATen/native/cuda/AmpKernels.cu: found_inf becomes 1 where a gradient is not
    finite (and never 0 again), and a scale of exactly 1 leaves the gradients untouched.
    """
    gradients, found_inf, inverse_scale = call.args
    factor = float(inverse_scale)
    for gradient in gradients:
        if not bool(torch.isfinite(gradient).all()):
            found_inf.fill_(1.0)
        if factor != 1.0:
            gradient.mul_(factor)


def _update_scale(call: _Call) -> Any:
    """Update a loss scale, which torch does with float32 scalars only.

    Source: aten/src/ATen/native/cuda/AmpKernels.cu: the product is formed in double and stored in
    float32; growth that float32 cannot hold is not applied, but the tracker starts again.
    """
    scale, growth_tracker, found_inf, growth, backoff, interval = call.args
    successful = 0 if float(found_inf) else int(growth_tracker) + 1
    if float(found_inf) or successful == interval:
        with np.errstate(over="ignore"):
            new_scale = np.float32(float(scale) * (backoff if float(found_inf) else growth))
        if float(found_inf) or np.isfinite(new_scale):
            scale.fill_(float(new_scale))
        successful = 0
    growth_tracker.fill_(successful)
    return scale


def _fused_step(call: _Call) -> Any:
    """Run a fused optimizer, which reads its scalars (and on cuda its step counts) as float32."""
    if low_dtype(call.args[:1]):
        return call.compute()
    scalars = {"grad_scale", "found_inf"} | ({"state_steps"} if call.args[0][0].is_cuda else set())
    keep = frozenset({*scalars, *(call.operator.names.index(name) for name in scalars)})
    args, kwargs = call.promote(keep)
    args = tuple(in_dtype(v, torch.float32, None) if i in keep else v for i, v in enumerate(args))
    for name in scalars & kwargs.keys():
        kwargs[name] = in_dtype(kwargs[name], torch.float32, None)
    return call.func(*args, **kwargs)


def _scaled_mm(call: _Call) -> Any:
    """Multiply scaled matrices, which torch does with float8 operands only."""
    left, right, left_scale, right_scale = (up(value) for value in call.args[:4])
    left_scales, right_scales = (left.shape[0], 1), (1, right.shape[1])
    tensorwise = left_scale.numel() == right_scale.numel() == 1
    rowwise = (left_scale.shape, right_scale.shape) == (left_scales, right_scales)
    if not (tensorwise or rowwise) or call.given("scale_result") is not None:
        return call.compute()  # block scales have no float64 meaning without their layout
    product = (left @ right) * (left_scale * right_scale)
    bias = call.given("bias")
    return product if bias is None else product + up(bias)


def _empty(call: _Call) -> Any:
    """Leave `torch.empty(0, dtype=...)` alone: torch.load and deepcopy put a storage into it."""
    size = list(call.given("size"))
    if size == [0] or (size == [] and call.operator.base == "new_empty"):
        return call.func(*call.args, **call.kwargs)
    return call.compute()


def _view(call: _Call) -> Any:
    """x.view(dtype): the bits of integers stay what they are, and float64 stays float64."""
    promote = call.operator.overload == "dtype" and call.args[0].dtype is torch.float64
    return call.func(*(up(call.args) if promote else call.args), **call.kwargs)


_SPECIAL: dict[str, Callable[[_Call], Any]] = {
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "_amp_update_scale_": _update_scale,
    "_fused_adagrad_": _fused_step,
    "_fused_adam_": _fused_step,
    "_fused_adamw_": _fused_step,
    "_fused_sgd_": _fused_step,
    "_scaled_mm": _scaled_mm,
    "empty": _empty,
    # torch.tensor(..., dtype=torch.float32): an alias by its schema, fresh by its meaning.
    "lift_fresh": lambda call: up(call.func(*call.args)),
    "native_dropout": _native_dropout,
    "new_empty": _empty,
    "normal": _normal,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_": _rrelu,
    "view": _view,
}


@contextmanager
def promoted(working_dtype: torch.dtype = torch.float32) -> Iterator[Promotion]:
    """Compute in float64 within the block, whatever precision the code in it names.

    Args:
        working_dtype: The dtype in which that code would have drawn random numbers where it names
            none.

    Yields:
        The active `Promotion`, whose `lowered` names what could not be computed in float64.

    Notes:
        The default dtype is float64 and compiled code runs eagerly. Both, and the stack of dispatch
        modes, are put back at the end, whatever the block left behind.
    """
    default = torch.get_default_dtype()
    depth = torch._C._len_torch_dispatch_stack()
    mode = Promotion(working_dtype)
    try:
        with torch.compiler.set_stance("force_eager"):
            torch.set_default_dtype(torch.float64)
            mode.__enter__()  # type: ignore[no-untyped-call]
            yield mode
    finally:
        while torch._C._len_torch_dispatch_stack() > depth:
            top = _python_dispatch._get_current_dispatch_mode()
            assert top is not None
            top.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(default)
