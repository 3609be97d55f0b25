"""Watch one run of a user's unchanged loop, and leave torch as it was found.

The hooks, and what each one sees (measured on torch 2.13):

- global optimizer step hooks: every torch optimizer, foreach, fused, capturable, compiled, and
  subclasses; a closure is wrapped, because its gradients exist only after it ran;
- `torch.autograd._engine_run_backward`, in both modules that hold it: `backward()` and `autograd.grad`;
- `_clip_grads_with_norm_` and `clip_grad_value_`, `zero_grad`, `GradScaler`, each scheduler class of its own `step`.

What is not a call (a gradient set to None by hand, divided in place, a parameter decayed between two backwards) is seen
by comparing a few coordinates before and after.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes

from equivcheck.differences import dense
from equivcheck.noise import SAFETY, UNIT_ROUNDOFF, gamma
from equivcheck.recording import Backward, Event, Place, Recording, Step
from equivcheck.split import tensors_in

if TYPE_CHECKING:
    from typing_extensions import Self

    from equivcheck.feed import Data, Key
    from equivcheck.interventions import Intervention
    from equivcheck.observe import Observer
    from equivcheck.subject import Code

_MISSING = object()
# Coordinates looked at between two backwards: enough to see an edit of all gradients, too few to cost anything.
PROBE_TENSORS = 16
PROBE_ELEMENTS = 32


class Recorder:
    """Watches one run; a context manager.

    Attributes:
        model: The module under test.
        recording: What was seen so far.
        schedule: Place of every backward, known from an earlier run of the same loop; empty in the first.
        interventions: What is put right in this run.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        observer: Observer,
        *,
        interventions: Iterable[Intervention] = (),
        schedule: list[Place] | None = None,
    ) -> None:
        self.model = model
        self.recording = recording
        self.observer = observer
        self.interventions = list(interventions)
        self.code: Code | None = None
        self.data: Data | None = None
        self.schedule = schedule or []
        self.shadow_holders: dict[str, Any] = {}
        self.prefetches: bool | None = None
        self.boundaries: list[list[int]] = []
        self.one_by_one: Callable[[], bool] = lambda: False
        self.is_promoted = True
        self.in_order = False
        self.on_use: Callable[[list[Key]], None] = lambda _: None
        self._served: dict[int, tuple[StorageWeakRef, int]] = {}
        self._used_last = -1
        self._uses_taken: dict[str, int] = {}
        self.names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
        self.optimizers: dict[int, str] = {}
        self.alive: dict[str, weakref.ref[Optimizer]] = {}
        self._stack = ExitStack()
        self._foreign: list[torch.Tensor] = []
        self._depth = 0
        self._scaler_depth = 0
        self._scheduler_depth = 0
        self._paused = False
        self._consumed: dict[str, int] = {}
        self._first_backward: dict[str, int] = {}
        self._snapshots: dict[int, tuple[torch.Tensor, float]] = {}
        self._loss_scale = 1.0
        self._carries_scale = False
        self.unscale_before_clip = False
        self._stepped = False
        self._open: dict[int, Step] = {}
        self._probe: list[torch.Tensor] | None = None
        self._had_gradients = False
        self._weights_probe: list[torch.Tensor] | None = None
        self._repeated: int | None = None
        self._evaluated: list[tuple[float, float]] = []
        self.trained: set[torch.dtype] = set()
        self.autocast: set[torch.dtype] = set()

    # ---- installing ----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._snapshots.clear()
        self._open.clear()
        # Closures of the hooks keep this object until the garbage collector comes by; they must not keep a model with
        # its gradients, 0.15 GB for each role of ten million parameters.
        self.model = nn.Module()
        self._foreign.clear()
        self.shadow_holders.clear()
        self._served.clear()

    def _install(self) -> None:
        pre = register_optimizer_step_pre_hook(self._before_step)
        self._stack.callback(pre.remove)
        post = register_optimizer_step_post_hook(self._after_step)
        self._stack.callback(post.remove)
        engine = torch.autograd.graph._engine_run_backward
        for module in (torch.autograd, torch.autograd.graph):
            self._replace(module, "_engine_run_backward", self._backward(engine))
        self._replace(
            clip_grad, "_clip_grads_with_norm_", self._clip_norm(clip_grad._clip_grads_with_norm_)
        )
        value = self._clip_value(clip_grad.clip_grad_value_)
        for module in (clip_grad, nn.utils):
            self._replace(module, "clip_grad_value_", value)
        self._replace(
            Optimizer, "add_param_group", self._add_param_group(Optimizer.add_param_group)
        )
        for owner in (Optimizer, nn.Module):
            self._replace(owner, "zero_grad", self._zero_grad(owner.zero_grad))
        self._replace(GradScaler, "scale", self._scale(GradScaler.scale))
        self._replace(GradScaler, "unscale_", self._unscale(GradScaler.unscale_))
        self._replace(GradScaler, "step", self._scaler_step(GradScaler.step))
        self._replace(GradScaler, "update", self._scaler_update(GradScaler.update))
        for each in _schedulers():
            if "step" in vars(each):
                self._replace(each, "step", self._scheduler_step(each.step))
            if "__init__" in vars(each):
                self._replace(each, "__init__", self._scheduler_init(each.__init__))
        self._replace(torch.autocast, "__enter__", self._enter_autocast(torch.autocast.__enter__))
        if any(each.controls_steps for each in self.interventions):
            for each in _optimizer_classes():
                if "step" in vars(each):
                    self._replace(each, "step", self._step(each.step))
        for each in self.interventions:
            self._stack.enter_context(each.installed(self))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        old = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._stack.callback(_put_back, owner, name, old)

    # ---- what the interventions ask ------------------------------------------------------------

    @property
    def backwards(self) -> int:
        """Root backwards that have run, or begun.

        A closure that an optimizer evaluates again goes through the same micro-steps again: it is counted from where
        its first evaluation began.
        """
        return len(self.recording.backwards) if self._repeated is None else self._repeated

    def place(self) -> Place | None:
        """Return the place of the backward that ran last, or is running; None before the first."""
        if not self.backwards or self.backwards > len(self.schedule):
            return None
        return self.schedule[self.backwards - 1]

    def inside(self) -> bool:
        """Return whether a cycle is under way: some of its backwards have run, and not the last."""
        place = self.place()
        return place is not None and not place.last

    def pairing(self) -> tuple[Intervention, ...]:
        """Return what is put right in both runs: what a reference taught, only its own candidate may use."""
        return tuple(each for each in self.interventions if each.both)

    def allowed(self, kind: str) -> bool:
        """Return whether a call of this kind is carried out now."""
        return all(each.allows(kind, self) for each in self.interventions)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let backwards and steps of our own pass unseen."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def note(self, kind: str, **detail: Any) -> None:
        """Add an event to the timeline."""
        event = Event(kind, self.backwards, len(self.recording.fetched), detail)
        self.recording.timeline.append(event)

    def fetched(self, keys: list[Key]) -> None:
        """Note a micro-batch that is about to be handed out."""
        for each in self.interventions:
            each.before_fetch(self)
        self.recording.fetched.append(keys)
        self.note("fetch", samples=len(keys))

    def forget_fetches(self) -> None:
        """Forget what was handed out so far: it was copied, and comes again from the copy."""
        if not self.recording.backwards:
            self.recording.fetched.clear()
            self.recording.timeline = [e for e in self.recording.timeline if e.kind != "fetch"]
            self._consumed.clear()

    # ---- which micro-batch is in use -----------------------------------------------------------

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
        whole = self.model.register_forward_pre_hook(
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
            if known[1] != self._used_last:
                self._used_last = known[1]
                self.recording.uses.append(known[1])
                self.on_use(self.recording.fetched[known[1]])
            return

    def current_keys(self) -> list[Key]:
        """Return the samples of the micro-batch that was used last, or fetched last where that is unknown."""
        if not self.recording.fetched:
            return []
        if self._used_last < 0 and self.prefetches:
            return self.recording.fetched[min(self.backwards, len(self.recording.fetched) - 1)]
        return self.recording.fetched[self._used_last]

    def _take(self, key: str) -> list[int]:
        """Return the micro-batches that an optimizer used up since its previous step.

        All that were handed out, unless the loop fetches ahead, as the full-batch run shows: then those that a forward
        took.
        """
        start, end = self._consumed.get(key, 0), len(self.recording.fetched)
        index = len(self.recording.boundaries)
        if self.boundaries:
            return self.boundaries[index] if index < len(self.boundaries) else []
        used = list(dict.fromkeys(self.recording.uses[self._uses_taken.get(key, 0) :]))
        if self.prefetches is not False and not self.recording.uses and not self.one_by_one():
            # Nothing is known of the use: the loop copies what it is given. If more was handed out than backwards
            # were made, they pair up in order.
            count = self.backwards - self._first_backward.get(key, 0)
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

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters and those that only an optimizer knows, by name."""
        found: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        found.update((self.names[id(each)], each) for each in self._foreign)
        return found

    def gradient_holders(self) -> list[torch.Tensor]:
        """Return the model's parameters and those that only an optimizer knows."""
        return [p for p in self.model.parameters() if p.requires_grad] + self._foreign

    # ---- backward ------------------------------------------------------------------------------

    def _backward(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(engine)
        def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            accumulate = kwargs.get("accumulate_grad", False)
            if self._depth or self._paused or not self._is_root(accumulate, args):
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
        return not create_graph and any(id(each) in self.names for each in inputs or ())

    def _root_backward(
        self,
        engine: Callable[..., Any],
        outputs: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._look_before_backward()
        loss, root = _root_value(outputs, args[0])
        record = Backward(
            self.backwards,
            len(self.recording.fetched),
            loss / self._loss_scale,
            self._loss_scale,
            root,
            _root_scalar(outputs),
            self._used_last,
        )
        repeated = self._repeated is not None
        if self._repeated is None:
            self.recording.backwards.append(record)
        else:
            self._repeated = min(self._repeated + 1, len(self.recording.backwards))
        factor = 1.0
        for each in self.interventions:
            factor *= each.root_factor(self)
        self._evaluated.append((loss, factor))
        if factor != 1.0:
            args = (_scaled(args[0], outputs, factor), *args[1:])
            record.loss *= factor
        self.note(
            "repeat" if repeated else "backward", loss=record.loss, loss_scale=record.loss_scale
        )
        self._snapshots.clear()
        with ExitStack() as around:
            for each in self.interventions:
                around.enter_context(each.around_backward(self, outputs))
            if repeated:
                result = engine(tuple(outputs), *args, **kwargs)
            elif kwargs.get("accumulate_grad", False):
                with self.observer.contributions(self):
                    result = engine(tuple(outputs), *args, **kwargs)
            else:
                result = engine(tuple(outputs), *args, **kwargs)
                self.observer.returned(self, args[3], result)
        self._look_after_backward()
        for each in self.interventions:
            each.after_backward(self)
        return result

    def _look_before_backward(self) -> None:
        """Notice what was done to gradients and parameters since the backward before, without a call."""
        with _quiet():
            if self._stepped and any(bool(g.any()) for g in self._gradient_probe()):
                self.note("leftover")
            elif self._probe is not None and not self._stepped:
                now = self._gradient_probe()
                if self._had_gradients and not now:
                    self.note("cleared")
                elif now and len(now) == len(self._probe):
                    self._note_edit(self._probe, now)
            weights = self._parameter_probe()
            if self._weights_probe is not None and not _same(weights, self._weights_probe):
                self.note("parameters_changed")

    def _note_edit(self, before: list[torch.Tensor], now: list[torch.Tensor]) -> None:
        if _same(before, now):
            return
        old, new = torch.cat(before).double(), torch.cat(now).double()
        if not bool(new.any()):
            self.note("cleared")
            return
        size = float(old @ old)
        scale = float(old @ new) / size if size else 0.0
        rest = float((new - scale * old).norm()) / (float(new.norm()) or 1.0)
        self.note("edited", scale=scale, rest=rest)

    def _look_after_backward(self) -> None:
        self._stepped = False
        with _quiet():
            self._probe = self._gradient_probe()
            self._had_gradients = bool(self._probe)
            self._weights_probe = self._parameter_probe()

    def _gradient_probe(self) -> list[torch.Tensor]:
        found = []
        for parameter in self.gradient_holders():
            if parameter.grad is not None and not parameter.grad.is_sparse:
                found.append(parameter.grad.detach().flatten()[:PROBE_ELEMENTS].clone())
                if len(found) == PROBE_TENSORS:
                    break
        return found

    def _parameter_probe(self) -> list[torch.Tensor]:
        holders = self.gradient_holders()[:PROBE_TENSORS]
        return [p.detach().flatten()[:PROBE_ELEMENTS].clone() for p in holders]

    # ---- gradients between backward and step ---------------------------------------------------

    def _snapshot(self, parameters: Any) -> None:
        for parameter in _each(parameters):
            if parameter.grad is not None:
                with _quiet():
                    self._snapshots[id(parameter)] = (parameter.grad.detach().clone(), 1.0)

    def _clip_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip(parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = _as_list(parameters)
            self.note(
                "clip",
                max_norm=float(max_norm),
                norm=_number(total_norm),
                scale=self._pending_scale(),
            )
            if not self.allowed("clip"):
                return None
            self._snapshot(parameters)
            with self._unscaled(parameters) as pending:
                if pending != 1.0:
                    total_norm = total_norm / pending
                return original(parameters, max_norm, total_norm, *args, **kwargs)

        return clip

    def _clip_value(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip(parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = _as_list(parameters)
            self.note("clip", max_value=float(clip_value), scale=self._pending_scale())
            if not self.allowed("clip"):
                return None
            self._snapshot(parameters)
            with self._unscaled(parameters):
                return original(parameters, clip_value, *args, **kwargs)

        return clip

    def _pending_scale(self) -> float:
        """Return the loss scale that the gradients still carry: 1 once they were unscaled."""
        return self._loss_scale if self._carries_scale else 1.0

    @contextmanager
    def _unscaled(self, parameters: Any) -> Iterator[float]:
        """Let a clip see gradients without the loss scale, if an intervention asks for it."""
        pending = self._pending_scale() if self.unscale_before_clip else 1.0
        gradients = (
            [] if pending == 1.0 else [p.grad for p in _each(parameters) if p.grad is not None]
        )
        with torch.no_grad():
            for gradient in gradients:
                gradient.div_(pending)
        yield pending
        with torch.no_grad():
            for gradient in gradients:
                gradient.mul_(pending)

    def _zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            self.note("zero_grad")
            if not self.allowed("zero_grad"):
                return None
            self._had_gradients = False
            self._probe = None
            return original(owner, *args, **kwargs)

        return zero_grad

    # ---- precision -----------------------------------------------------------------------------

    def _enter_autocast(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def enter(owner: Any) -> Any:
            if owner._enabled and isinstance(owner.fast_dtype, torch.dtype):
                self.autocast.add(owner.fast_dtype)
            return original(owner)

        return enter

    # ---- loss scaling --------------------------------------------------------------------------

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if scaler.is_enabled():
                self._loss_scale = float(scaler.get_scale())
                self._carries_scale = True
            return result

        return scale

    def _unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def unscale_(scaler: GradScaler, optimizer: Optimizer) -> Any:
            if not scaler.is_enabled():
                return original(scaler, optimizer)
            explicit = not self._scaler_depth
            if explicit:
                self.note("unscale")
                if not self.allowed("unscale"):
                    for each in self.interventions:
                        each.left_out("unscale", lambda: scaler.unscale_(optimizer))
                    return None
            result = original(scaler, optimizer)
            scale = float(scaler.get_scale())
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in self._snapshots:
                        gradient, factor = self._snapshots[id(parameter)]
                        self._snapshots[id(parameter)] = (gradient, factor / scale)
            self._carries_scale = False
            self._probe = None
            return result

        return unscale_

    def _scaler_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._scaler_depth += 1
            before = len(self.recording.steps)
            try:
                result = original(scaler, optimizer, *args, **kwargs)
            finally:
                self._scaler_depth -= 1
            if scaler.is_enabled() and len(self.recording.steps) == before and self.allowed("step"):
                self.note("skipped", scale=float(scaler.get_scale()))
                self._skipped(optimizer)
            return result

        return step

    def _scaler_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            if scaler.is_enabled():
                self.note("scaler", scale=float(scaler.get_scale()))
                if not self.allowed("scaler"):
                    return None
            return original(scaler, *args, **kwargs)

        return update

    # ---- schedulers ----------------------------------------------------------------------------

    def _scheduler_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._scheduler_depth or getattr(scheduler, "_is_initial", False):
                return original(scheduler, *args, **kwargs)
            self.note("scheduler", scheduler=type(scheduler).__name__)
            if not self.allowed("scheduler"):
                return None
            self._scheduler_depth += 1
            try:
                result = None
                for _ in range(
                    max(each.scheduler_steps(self) for each in self.interventions)
                    if self.interventions
                    else 1
                ):
                    result = original(scheduler, *args, **kwargs)
                return result
            finally:
                self._scheduler_depth -= 1

        return step

    def _scheduler_init(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            if self._scheduler_depth or type(scheduler).__init__ is not init:
                original(scheduler, *args, **kwargs)
                return
            record = {"scheduler": type(scheduler).__name__, "arguments": _plain(args[1:], kwargs)}
            ordinal = len(self.recording.schedulers)
            self.recording.schedulers.append(record)
            for each in self.interventions:
                args, kwargs = each.scheduler_arguments(ordinal, args, kwargs)
            self._scheduler_depth += 1
            try:
                original(scheduler, *args, **kwargs)
            finally:
                self._scheduler_depth -= 1

        return init

    # ---- optimizer steps -----------------------------------------------------------------------

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self._paused and not self.allowed("step"):
                return None
            return original(optimizer, *args, **kwargs)

        return step

    def _add_param_group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
            original(optimizer, group)
            # Parameters that train makes are known from here on, before any gradient reaches them.
            for parameter in optimizer.param_groups[-1]["params"]:
                self.name_of(parameter, optimizer)

        return add_param_group

    def name_of(self, parameter: torch.Tensor, optimizer: Optimizer) -> str:
        """Return a parameter's name in the model, or one of our own if only an optimizer knows it."""
        name = self.names.get(id(parameter))
        if name is None:
            name = f"(train).{type(optimizer).__name__}.{len(self._foreign)}"
            self.names[id(parameter)] = name
            self._foreign.append(parameter)
        return name

    def key_of(self, optimizer: Optimizer) -> str:
        """Return a name for an optimizer that is the same in every run."""
        key = self.optimizers.get(id(optimizer))
        if key is None:
            names = [
                self.name_of(p, optimizer)
                for group in optimizer.param_groups
                for p in group["params"]
            ]
            key = f"{type(optimizer).__name__}({names[0] if names else ''}..{len(names)})"
            while key in self.recording.optimizers:
                key += "'"
            self.optimizers[id(optimizer)] = key
            self.recording.optimizers[key] = names
            self.alive[key] = weakref.ref(optimizer)
        return key

    def _open_step(self, optimizer: Optimizer) -> Step:
        key = self.key_of(optimizer)
        taken = self._take(key)
        samples = frozenset(each for fetch in taken for each in self.recording.fetched[fetch])
        self.recording.boundaries.append(taken)
        step = Step(
            index=len(self.recording.steps),
            optimizer=key,
            samples=samples,
            backwards=self.backwards,
            first_backward=self._first_backward.get(key, 0),
            learning_rates=[
                _number(group["lr"]) for group in optimizer.param_groups if "lr" in group
            ],
        )
        self._first_backward[key] = self.backwards
        self.recording.steps.append(step)
        return step

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._paused or id(optimizer) in self._open or not self.allowed("step"):
            return None
        for each in self.interventions:
            each.before_step(self, optimizer)
        step = self._open_step(optimizer)
        self.note("step", optimizer=step.optimizer, learning_rates=step.learning_rates)
        self._open[id(optimizer)] = step
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._observe(optimizer, step)
            return None
        with _quiet():
            self.observer.before(self, step, optimizer)

        begin: int | None = None

        @functools.wraps(closure)
        def first_seen(*inner: Any, **named: Any) -> Any:
            nonlocal begin
            self._evaluated = []
            if begin is not None:
                self._repeated = begin
                try:
                    return _reweighted(closure(*inner, **named), self._evaluated)
                finally:
                    self._repeated = None
            begin = self.backwards
            result = _reweighted(closure(*inner, **named), self._evaluated)
            if not step.sample:
                # What the closure consumed counts too; a known boundary has it already.
                later = [] if self.boundaries else self._take(step.optimizer)
                step.samples |= frozenset(
                    each for fetch in later for each in self.recording.fetched[fetch]
                )
                self.recording.boundaries[step.index] += later
                step.backwards = self._first_backward[step.optimizer] = self.backwards
                self._observe(optimizer, step, closure=True)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": first_seen}
        return (args[0], first_seen, *args[2:]), kwargs

    def _observe(self, optimizer: Optimizer, step: Step, *, closure: bool = False) -> None:
        with _quiet():
            if not closure:
                self.observer.before(self, step, optimizer)
            scale = getattr(optimizer, "grad_scale", None)
            factor = 1.0 if scale is None else 1.0 / _number(scale)
            applied: dict[str, torch.Tensor | None] = {}
            gradients: dict[str, torch.Tensor | None] = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self.names[id(parameter)]
                    now = None if parameter.grad is None else dense(parameter.grad.detach())
                    if now is not None:
                        self.trained.add(parameter.dtype)
                    now = now if now is None or factor == 1.0 else now * factor
                    applied[name] = now
                    if id(parameter) in self._snapshots and now is not None:
                        before, share = self._snapshots[id(parameter)]
                        step.clipped = True
                        gradients[name] = dense(before) * share if share != 1.0 else dense(before)
                    else:
                        gradients[name] = now
            found = getattr(optimizer, "found_inf", None)
            step.skipped = found is not None and _number(found) > 0
            self.observer.gradients(self, step, gradients, applied)

    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._paused or id(optimizer) not in self._open:
            return
        step = self._open.pop(id(optimizer))
        with _quiet():
            if not step.sample:
                self._observe(optimizer, step, closure=True)
            self.observer.after(self, step, optimizer)
        self._snapshots.clear()
        self._weights_probe = None
        self._stepped = True

    def _skipped(self, optimizer: Optimizer) -> None:
        """Note a step that a scaler left out, as a step that changed nothing."""
        step = self._open_step(optimizer)
        with _quiet():
            self._observe(optimizer, step)
            step.skipped = True
            self.observer.after(self, step, optimizer)
        self._snapshots.clear()


def _put_back(owner: Any, name: str, old: Any) -> None:
    if old is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, old)


@contextmanager
def _quiet() -> Iterator[None]:
    """Compute for ourselves: no gradient, and none of the modes that the run is under."""
    with torch.no_grad(), _disable_current_modes():
        yield


def _subclasses(base: type) -> Iterator[type]:
    yield base
    each: type
    for each in base.__subclasses__():
        yield from _subclasses(each)


def _schedulers() -> list[Any]:
    return list(dict.fromkeys(_subclasses(lr_scheduler.LRScheduler)))


def _optimizer_classes() -> list[Any]:
    return [each for each in dict.fromkeys(_subclasses(Optimizer)) if each is not Optimizer]


def _each(parameters: Any) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _as_list(parameters: Any) -> Any:
    # A generator, as model.parameters() is, can be walked only once: it is kept for the original too.
    return parameters if isinstance(parameters, torch.Tensor) else list(parameters)


def _number(value: Any) -> float:
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        for x, y in zip(a, b, strict=True)
    )


def _root_value(outputs: list[Any], seeds: Any) -> tuple[float, str]:
    """Return the loss that a backward starts from, weighted with its root gradient, and its grad_fn's name."""
    total, name = 0.0, ""
    with _quiet():
        for output, seed in zip(outputs, seeds, strict=False):
            if not isinstance(output, torch.Tensor):
                continue
            name = name or (type(output.grad_fn).__name__ if output.grad_fn else "leaf")
            value = output.detach()
            total += float((value if seed is None else value * seed.detach()).double().sum())
    return total, name


def _root_scalar(outputs: list[Any]) -> float:
    """Return the number that the loss was multiplied with last: a loss scale by hand; 1 if it was not."""
    node = (
        outputs[0].grad_fn if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) else None
    )
    if type(node).__name__ != "MulBackward0":
        return 1.0
    try:
        other = getattr(node, "_saved_other", None)
    except RuntimeError:  # The graph was freed: a second backward through it.
        return 1.0
    # Outside of any mode: torch hands a number that was wrapped as a tensor to modes as a number again.
    with _quiet():
        return (
            float(other)
            if other is not None and other.numel() == 1 and not other.requires_grad
            else 1.0
        )


def _scaled(seeds: Any, outputs: list[Any], factor: float) -> tuple[Any, ...]:
    with _quiet():
        return tuple(
            torch.full_like(output, factor) if seed is None else seed * factor
            for output, seed in zip(outputs, seeds, strict=False)
        )


def _reweighted(result: Any, evaluated: list[tuple[float, float]]) -> Any:
    """Return what a closure gives to its optimizer, with the factors that its backwards were given.

    Args:
        result: The loss as the loop computed it: the sum of the backward roots, or the last of them; any other value
            is returned as it is.
        evaluated: Per backward of this evaluation, the loss it started from and its factor.
    """
    if all(factor == 1.0 for _, factor in evaluated) or not isinstance(
        result, (torch.Tensor, float)
    ):
        return result
    value = _number(result)
    unit = (
        UNIT_ROUNDOFF.get(result.dtype, 0.0)
        if isinstance(result, torch.Tensor)
        else UNIT_ROUNDOFF[torch.float32]
    )
    close = SAFETY * gamma(len(evaluated), unit)
    for terms in (evaluated, evaluated[-1:]):
        written = sum(loss for loss, _ in terms)
        if written and abs(value - written) <= close * sum(abs(loss) for loss, _ in terms):
            with _quiet():
                return result * (sum(loss * factor for loss, factor in terms) / written)
    return result


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers among a scheduler's arguments, by position or name."""
    named = {str(i): value for i, value in enumerate(args)} | kwargs
    kinds = (int, float, str, bool, list, tuple)
    return {key: value for key, value in named.items() if isinstance(value, kinds)}
