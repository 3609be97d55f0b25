"""Run unmodified training code in float64, whatever precision it asks for.

`promoted` is a dispatch mode below autograd and autocast: autocast, `.to(bfloat16)`, `.float()`,
`GradScaler` and low-precision buffers stay in the user's code and compute in float64. Autocast leaves
float64 operands alone by itself, so almost everything that reaches the mode is a cast or a factory.

What promotion cannot keep, so that whoever judges a promoted run also looks at the native runs:

- *An alias becomes a copy*: `p.grad.float().div_(K)` changes `p.grad` where it is float32 already; here
  the same call names another dtype than float64 and copies, as it would for a bfloat16 gradient.
- *A copy becomes an alias*: `x.to(y.dtype)` copies from bfloat16 to float32, and is `x` itself where
  both were promoted.
- A dtype that the code asserts, stores as bits (`view(torch.int16)`) or asks `torch.finfo` about is float64.
- Low precision that exists before the mode (a module-level buffer) stays where it is, since others may
  alias it: it is read in float64, and what is written to it is rounded and named in `Promotion.lowered`.
- Constants are what the code made them: `torch.tensor(0.1, dtype=torch.float32)` is 1.5e-9 from 0.1.
- Nothing overflows: a float16 run that would skip a step does not skip it here.
- A draw with an explicit `dtype=torch.float64` is taken for `dtype=x.dtype` and drawn in the working
  dtype; draws of a bfloat16 tensor that was promoted, too.
- Operators on other threads than the one that entered the mode are not promoted (the autograd engine
  carries the mode with it on the cpu).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _python_dispatch

__all__ = ["Promotion", "promote_module", "promote_tree", "promoted"]

# Every floating dtype below float64 and what it becomes; float4_e2m1fn_x2 packs two numbers into one
# element and has no conversion.
_PROMOTED: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.float8_e4m3fn: torch.float64,
    torch.float8_e5m2: torch.float64,
    torch.float8_e4m3fnuz: torch.float64,
    torch.float8_e5m2fnuz: torch.float64,
    torch.float8_e8m0fnu: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_COMPLEX_OF = {
    torch.float64: torch.complex128,
    torch.float32: torch.complex64,
    torch.bfloat16: torch.complex64,
    torch.float16: torch.complex32,
}
_FALLBACKS = (torch.float32, torch.bfloat16, torch.float16)  # highest precision first
_NO_KERNEL = re.compile(r"Double|[Ff]loat64|[Dd]type|scalar type|BFloat16|Half|data type")
# Writes that need no arithmetic, or that change what the tensor is: they go to the tensor itself.
_DIRECT_WRITES = {"copy_", "fill_", "zero_", "resize_", "resize_as_", "set_", "_resize_output_"}
# Random operators without a generator argument (`randn`, `rand_like` ... of which overloads exist with one).
_DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
# Random operators whose result moves with their operands: drawing in low precision rounds it.
_SMOOTH_DRAWS = {"_standard_gamma", "_sample_dirichlet"}


@dataclasses.dataclass(frozen=True)
class _Operator:
    """What the schema says about an operator, looked up once."""

    name: str  # "aten._grouped_mm.default"
    base: str  # "_grouped_mm"
    written: frozenset[int | str]  # positions and names of the operands that it writes
    view: bool
    random: bool
    takes_dtype: bool
    foreign: bool  # collectives write operands that their schemas do not mark
    special: Callable[..., Any] | None


@functools.cache
def _operator(func: Any) -> _Operator:
    schema = func._schema
    namespace, base = schema.name.split("::")
    written: set[int | str] = set()
    aliased = False
    # native_batch_norm updates the running statistics without saying so in its schema.
    updates_statistics = "batch_norm" in base and "backward" not in base
    for position, argument in enumerate(schema.arguments):
        alias = argument.alias_info
        hidden = updates_statistics and argument.name in {"running_mean", "running_var"}
        if hidden or (alias is not None and alias.is_write):
            written |= {position, argument.name}
        elif alias is not None:
            aliased = True
    generator = any("Generator" in str(argument.type) for argument in schema.arguments)
    return _Operator(
        name=str(func),
        base=base,
        written=frozenset(written),
        view=aliased and not written,
        random=generator or (namespace == "aten" and base in _DRAWS | {"native_dropout"}),
        takes_dtype=any(argument.name == "dtype" for argument in schema.arguments),
        foreign=namespace == "c10d",
        special=_SPECIAL.get(base) if namespace == "aten" else None,
    )


class Promotion(_python_dispatch.TorchDispatchMode):
    """Compute every floating operator in float64; enter it through `promoted`.

    Attributes:
        lowered: Operators that could not be computed in float64 -> the dtype they computed in, and
            writes to low-precision tensors from outside ("in-place write to torch.bfloat16").
        working_dtype: The dtype in which code without a dtype draws random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self, working_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.working_dtype = working_dtype
        self.lowered: dict[str, torch.dtype] = {}
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
        if not isinstance(
            func, torch._ops.OpOverload
        ):  # a higher-order operator, for example flex_attention
            return _up(func(*_up(args), **_up(kwargs)))
        operator = _operator(func)
        if types and any(_dispatches(kind) for kind in types):
            return self._subclass(func, operator, args, kwargs)
        if operator.foreign or (operator.view and operator.base != "view"):
            result = func(*args, **kwargs)
            # torch.tensor(..., dtype=torch.float32) arrives here.
            return _up(result) if operator.base == "lift_fresh" else result
        default = torch.get_default_dtype()
        if default not in _PROMOTED:
            return self._run(func, operator, args, kwargs, self.working_dtype)
        # The user's code has set it: integers divided by integers must not become float32 for that.
        torch.set_default_dtype(torch.float64)
        try:
            return self._run(func, operator, args, kwargs, default)
        finally:
            torch.set_default_dtype(default)

    def _subclass(
        self, func: Any, operator: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Name float64 to a tensor subclass, whose own handler then comes back with plain tensors."""
        if operator.view or operator.foreign:
            return NotImplemented
        promoted_args, promoted_kwargs, _ = _operands(operator, args, kwargs)
        if promoted_args is args and promoted_kwargs is kwargs:
            return NotImplemented
        with self:
            return func(*promoted_args, **promoted_kwargs)

    def _run(
        self,
        func: Any,
        operator: _Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        working_dtype: torch.dtype,
    ) -> Any:
        if operator.special is not None:
            result = operator.special(self, func, args, kwargs, working_dtype)
            if result is not NotImplemented:
                return result
        if operator.random:
            return _draw(self, func, operator, args, kwargs, working_dtype)
        route = self._routes.get(func)
        if route is not None:
            return _through(func, operator, args, kwargs, route)
        original_args, original_kwargs = args, kwargs
        args, kwargs, low = _operands(operator, args, kwargs)
        if low is not None:
            direct = operator.base in _DIRECT_WRITES or torch.Tag.inplace_view in func.tags
            if operator.base != "zero_" and torch.Tag.inplace_view not in func.tags:
                self.lowered[f"in-place write to {low}"] = low
            if direct:
                return func(*args, **kwargs)
            return _through(func, operator, args, kwargs, torch.float64)
        try:
            return _up(func(*args, **kwargs))
        except (RuntimeError, NotImplementedError) as error:
            if not isinstance(error, NotImplementedError) and not _NO_KERNEL.search(str(error)):
                raise
            return self._lower(func, operator, original_args, original_kwargs, error)

    def _lower(
        self,
        func: Any,
        operator: _Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        error: Exception,
    ) -> Any:
        """Compute in the highest precision that has a kernel; raise `error` if none has."""
        for dtype in _FALLBACKS:
            try:
                result = _through(func, operator, args, kwargs, dtype)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue
            self._routes[func] = self.lowered[operator.name] = dtype
            return result
        raise error


def _dispatches(kind: type) -> bool:
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]


def _up(value: Any) -> Any:
    """Return `value` with low-precision tensors in any nesting cast up; itself if there are none."""
    if isinstance(value, Tensor):
        wanted = _PROMOTED.get(value.dtype)
        return value if wanted is None else value.to(wanted)
    if isinstance(value, (list, tuple)):
        changed = [_up(item) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: _up(item) for key, item in value.items()}
    return value


def _operand(value: Any) -> Any:
    """Return `value` with low-precision tensors and dtypes promoted; itself if there are none."""
    if isinstance(value, Tensor):
        wanted = _PROMOTED.get(value.dtype)
        return value if wanted is None else value.to(wanted)
    if isinstance(value, torch.dtype):
        return _PROMOTED.get(value, value)
    if isinstance(value, (list, tuple)):
        changed = None
        for index, item in enumerate(value):
            new = _operand(item)
            if new is not item:
                changed = list(value) if changed is None else changed
                changed[index] = new
        if changed is None:
            return value
        return changed if isinstance(value, list) else tuple(changed)
    return value


def _operands(
    operator: _Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], torch.dtype | None]:
    """Return the operands in float64 (the same objects if they were), and a low dtype that is written."""
    written = operator.written
    low: torch.dtype | None = None
    new_args: list[Any] | None = None
    for position, value in enumerate(args):
        if position in written:
            low = low or _low_dtype(value)
            continue
        new = _operand(value)
        if new is not value:
            new_args = list(args) if new_args is None else new_args
            new_args[position] = new
    new_kwargs: dict[str, Any] | None = None
    for name, value in kwargs.items():
        if name in written:
            low = low or _low_dtype(value)
            continue
        new = _operand(value)
        if new is not value:
            new_kwargs = dict(kwargs) if new_kwargs is None else new_kwargs
            new_kwargs[name] = new
    return (
        args if new_args is None else tuple(new_args),
        kwargs if new_kwargs is None else new_kwargs,
        low,
    )


def _low_dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, Tensor):
        return value.dtype if value.dtype in _PROMOTED else None
    if isinstance(value, (list, tuple)):
        return next((dtype for item in value if (dtype := _low_dtype(item)) is not None), None)
    return None


def _in_dtype(
    value: Any, dtype: torch.dtype, pending: list[tuple[Tensor, Tensor]], *, written: bool
) -> Any:
    """Return `value` with every floating tensor and dtype in `dtype`; written ones as a temporary."""
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.is_complex()):
            return value
        wanted = _COMPLEX_OF.get(dtype, dtype) if value.is_complex() else dtype
        if value.dtype is wanted:
            return value
        if not written:
            return value.to(wanted)
        if value.layout is torch.strided:
            # The same strides: normal_ and uniform_ draw in an order that depends on them.
            temporary = torch.empty_strided(
                value.size(), value.stride(), dtype=wanted, device=value.device
            ).copy_(value)
        else:
            temporary = value.to(wanted)
        pending.append((value, temporary))
        return temporary
    if isinstance(value, torch.dtype):
        if value.is_complex:
            return _COMPLEX_OF.get(dtype, dtype)
        return dtype if value.is_floating_point else value
    if isinstance(value, (list, tuple)):
        return [_in_dtype(item, dtype, pending, written=written) for item in value]
    return value


def _through(
    func: Any,
    operator: _Operator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
) -> Any:
    """Run `func` on operands in `dtype`, copy what it wrote back, and cast its result up."""
    pending: list[tuple[Tensor, Tensor]] = []
    written = operator.written
    new_args = [
        _in_dtype(value, dtype, pending, written=position in written)
        for position, value in enumerate(args)
    ]
    new_kwargs = {
        name: _in_dtype(value, dtype, pending, written=name in written)
        for name, value in kwargs.items()
    }
    result = func(*new_args, **new_kwargs)
    originals = {id(temporary): original for original, temporary in pending}
    for original, temporary in pending:
        if original.shape != temporary.shape:  # an out= operand
            original.resize_(temporary.shape)
        original.copy_(temporary)
    kept = {
        id(value) for key, value in [*enumerate(new_args), *new_kwargs.items()] if key in written
    }

    def back(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([back(item) for item in value])
        if id(value) in originals:
            return originals[id(value)]
        return value if id(value) in kept else _up(value)

    return back(result)


def _draw(
    mode: Promotion,
    func: Any,
    operator: _Operator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """Draw as the unpromoted code would have, so that a seed gives the same numbers and state."""
    dtype = _draw_dtype([*args, *kwargs.values()], working_dtype)
    if (
        operator.takes_dtype
        and "dtype" not in kwargs
        and operator.base in {"rand", "randn", "normal"}
    ):
        kwargs = {**kwargs, "dtype": dtype}
    if operator.base in _SMOOTH_DRAWS:
        mode.lowered[operator.name] = dtype
    return _through(func, operator, args, kwargs, dtype)


def _draw_dtype(values: Sequence[Any], working_dtype: torch.dtype) -> torch.dtype:
    for value in values:
        if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex):
            return _real(value, working_dtype)
    for value in values:
        if isinstance(value, Tensor) and value.dtype in _PROMOTED:
            return _real(value.dtype, working_dtype)
    return working_dtype


def _real(dtype: torch.dtype, working_dtype: torch.dtype) -> torch.dtype:
    if dtype is torch.complex64:
        return torch.float32
    if dtype is torch.complex32:
        return torch.float16
    return dtype if dtype in _PROMOTED else working_dtype


def _normal(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """torch.normal(mean, std) with tensors: a standard normal draw, moved and scaled in float64."""
    if func._overloadname not in {"Tensor_float", "float_Tensor", "Tensor_Tensor"}:
        return NotImplemented
    names = ("mean", "std")
    given = {"std": 1.0, **dict(zip(names, args, strict=False)), **kwargs}
    mean, std = given["mean"], given["std"]
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(value.shape for value in tensors))
    draw = torch.empty(
        shape, dtype=_draw_dtype(tensors, working_dtype), device=tensors[0].device
    ).normal_(generator=given.get("generator"))
    return _up(mean) + _up(std) * draw.double()


def _native_dropout(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """native_dropout: the mask of the working dtype, the product in float64."""
    operand, probability, train = args
    if train is False or func._overloadname != "default":
        return NotImplemented
    _, mask = func(operand.to(_draw_dtype([operand], working_dtype)), probability, train)
    scale = 0.0 if probability == 1.0 else 1.0 / (1.0 - probability)
    return _up(operand) * mask * scale, mask


def _rrelu(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """rrelu in training: the slopes of the working dtype, the product in float64."""
    operand, noise, *rest = args
    if len(rest) < 3 or not rest[2] or operand.dtype in _PROMOTED:
        return NotImplemented
    slopes = torch.empty_strided(
        noise.size(), noise.stride(), dtype=working_dtype, device=noise.device
    )
    torch.ops.aten.rrelu_with_noise(operand.to(working_dtype), slopes, *rest, **kwargs)
    noise.copy_(slopes)
    if func._schema.name.endswith("_"):
        return operand.mul_(noise)
    return operand * noise


def _unscale(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> None:
    """_amp_foreach_non_finite_check_and_unscale_, which demands float32 scalars.

    Source: aten/src/ATen/native/cuda/AmpKernels.cu: found_inf becomes 1 where a gradient is not finite
    (never 0 again), and a scale of exactly 1 leaves the gradients untouched.
    """
    gradients, found_inf, inverse_scale = args
    factor = float(inverse_scale)
    for gradient in gradients:
        if not bool(torch.isfinite(gradient).all()):
            found_inf.fill_(1.0)
        if factor != 1.0:
            gradient.mul_(factor)


def _update_scale(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Tensor:
    """_amp_update_scale_, which demands float32 scalars.

    Source: aten/src/ATen/native/cuda/AmpKernels.cu: the product is formed in double and stored in
    float32; growth that float32 cannot hold is not applied, but the tracker starts again.
    """
    scale, growth_tracker, found_inf, growth, backoff, interval = args
    if float(found_inf):
        scale.fill_(float(np.float32(float(scale) * backoff)))
        growth_tracker.zero_()
        return scale  # type: ignore[no-any-return]
    successful = int(growth_tracker) + 1
    if successful == interval:
        with np.errstate(over="ignore"):
            new_scale = np.float32(float(scale) * growth)
        if np.isfinite(new_scale):
            scale.fill_(float(new_scale))
        successful = 0
    growth_tracker.fill_(successful)
    return scale  # type: ignore[no-any-return]


def _fused_step(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """Fused optimizers, which read grad_scale and found_inf (and on cuda the steps) as float32."""
    operator = _operator(func)
    if _low_dtype(args):
        return NotImplemented
    names = [argument.name for argument in func._schema.arguments]
    single = {"grad_scale", "found_inf"}
    if args[0] and args[0][0].is_cuda:
        single.add("state_steps")

    def operand(name: str, value: Any) -> Any:
        if name in operator.written:
            return value
        if name in single:
            return _in_dtype(value, torch.float32, [], written=False)
        return _operand(value)

    args = tuple(operand(name, value) for name, value in zip(names, args, strict=False))
    return func(*args, **{name: operand(name, value) for name, value in kwargs.items()})


def _keep_empty(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """Leave `torch.empty((0,), dtype=...)` as written: torch.load and deepcopy put a storage into it."""
    size = args[0] if func._schema.name == "aten::empty" else args[1]
    if list(size) == [0] or (not size and func._schema.name == "aten::new_empty"):
        return func(*args, **kwargs)
    return NotImplemented


def _view_dtype(
    mode: Promotion,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    working_dtype: torch.dtype,
) -> Any:
    """x.view(dtype): bits of integers are read as they are, float64 stays float64."""
    if func._overloadname == "dtype" and args[0].dtype is torch.float64:
        return func(args[0], _operand(args[1]))
    return func(*args, **kwargs)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
    "_amp_update_scale_": _update_scale,
    "_fused_adam_": _fused_step,
    "_fused_adamw_": _fused_step,
    "_fused_sgd_": _fused_step,
    "_fused_adagrad_": _fused_step,
    "empty": _keep_empty,
    "new_empty": _keep_empty,
    "normal": _normal,
    "native_dropout": _native_dropout,
    "rrelu_with_noise": _rrelu,
    "rrelu_with_noise_": _rrelu,
    "view": _view_dtype,
}


@contextmanager
def promoted(working_dtype: torch.dtype = torch.float32) -> Iterator[Promotion]:
    """Compute in float64 within the block, whatever precision the code in it names.

    Args:
        working_dtype: The dtype in which that code would have drawn random numbers where it names none.

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
            mode.__enter__()
            yield mode
    finally:
        while torch._C._len_torch_dispatch_stack() > depth:
            top = _python_dispatch._get_current_dispatch_mode()
            assert top is not None
            top.__exit__(None, None, None)
        torch.set_default_dtype(default)


def promote_module(module: torch.nn.Module) -> None:
    """Cast a module's parameters, buffers and plain tensor attributes to float64 in place.

    Tensors keep their identity, `requires_grad` and shared storage (tied weights stay tied); complex
    ones become complex128, integers are untouched. Attributes are searched through lists, tuples and
    mappings.
    """
    bases: dict[tuple[int, torch.dtype], Tensor] = {}
    seen: set[int] = set()

    def cast(tensor: Tensor) -> None:
        wanted = _PROMOTED.get(tensor.dtype)
        if wanted is None or id(tensor) in seen:
            return
        seen.add(id(tensor))
        gradient, tensor.grad = (tensor.grad, None) if tensor.is_leaf else (None, None)
        if type(tensor) not in {Tensor, torch.nn.Parameter} or tensor.layout is not torch.strided:
            tensor.data = tensor.data.to(wanted)
        else:
            storage = tensor.untyped_storage()
            key = (storage._cdata, tensor.dtype)
            if key not in bases:
                whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
                bases[key] = whole.to(wanted)
            tensor.data = bases[key].as_strided(
                tensor.size(), tensor.stride(), tensor.storage_offset()
            )
        if gradient is not None:
            tensor.grad = gradient.to(_PROMOTED.get(gradient.dtype, gradient.dtype))

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            cast(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for part in module.modules():
        visit(list(part._parameters.values()))
        visit(list(part._buffers.values()))
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(part, name, _up(value))  # computed from parameters, as by weight_norm
            elif not name.startswith("_") or isinstance(value, Tensor):
                visit(value)


def promote_tree(batch: Any) -> Any:
    """Return `batch` with low-precision tensors and arrays in any nesting cast to float64.

    Mappings, lists, tuples, namedtuples and dataclasses keep their type; complex becomes complex128;
    everything else, integer tensors included, is returned as it is. A tensor that occurs twice is one
    tensor afterwards.
    """
    done: dict[int, Any] = {}

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = _up(value)
            return done[id(value)]
        if isinstance(value, np.ndarray):
            if value.dtype.kind in "fc" and value.dtype.itemsize < (
                8 if value.dtype.kind == "f" else 16
            ):
                return value.astype(np.float64 if value.dtype.kind == "f" else np.complex128)
            return value
        if isinstance(value, Mapping):
            return _rebuilt(value, {key: cast(item) for key, item in value.items()})
        if isinstance(value, tuple):
            items = [cast(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, list):
            return type(value)([cast(item) for item in value])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = copy.copy(value)
            for field in dataclasses.fields(value):
                if hasattr(value, field.name):
                    object.__setattr__(changed, field.name, cast(getattr(value, field.name)))
            return changed
        return value

    return cast(batch)


def _rebuilt(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return `items` as the mapping's own type where that can be copied, else as a dict."""
    if type(mapping) is dict:
        return items
    if isinstance(mapping, MutableMapping):
        changed = copy.copy(mapping)
        for key, item in items.items():
            changed[key] = item
        return changed
    try:
        return type(mapping)(items)  # type: ignore[call-arg]
    except TypeError:
        return items
