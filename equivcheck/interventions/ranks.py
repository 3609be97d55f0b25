"""What is put right between ranks: gradients reduced once at the end of a cycle, parameters made the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from equivcheck.hooks.base import quiet, replace
from equivcheck.interventions.base import Intervention
from equivcheck.parts import is_distributed, plain

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from equivcheck.recorder import Recorder


def _replicas(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that every rank holds whole."""
    return [each for each in tensors if not is_distributed(each) and each.numel()]


def _number(value: object) -> float | None:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(group: dict[str, Any]) -> dict[str, float]:
    """Return the options of a group that are numbers."""
    found = {name: _number(value) for name, value in group.items() if name != "params"}
    return {name: value for name, value in found.items() if value is not None}


class Synchronise(Intervention):
    """Take the mean of the gradients over all ranks, once, after the last backward of each cycle.

    What was reduced before stays as it is: the mean of equal gradients.
    """

    name = "synchronise"

    def after_backward(self, recorder: Recorder) -> None:
        place = recorder.place()
        if place is not None and place.last and recorder.world_size > 1:
            with quiet():
                self._reduce(_replicas(recorder.gradient_holders()), recorder.world_size)

    @staticmethod
    def _reduce(parameters: list[torch.Tensor], world_size: int) -> None:
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size


class SumOverRanks(Intervention):
    """Add up the gradients of some parameters over all ranks, once, after the last backward of each cycle.

    Ranks that compute parts of one batch each hold what flows back through their own part.

    Args:
        names: Those parameters.
    """

    name = "sum over ranks"

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def after_backward(self, recorder: Recorder) -> None:
        place = recorder.place()
        if place is None or not place.last or recorder.world_size == 1:
            return
        with quiet():
            for parameter in _replicas(recorder.gradient_holders()):
                if recorder.names[id(parameter)] in self._names:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    dist.all_reduce(parameter.grad)


class NormOfWhole(Intervention):
    """Clip by the norm of the whole gradient, as the full batch has it.

    Args:
        norms: Per cycle, the norm before the clip.
    """

    name = "clip by the norm of the whole"

    def __init__(self, norms: Mapping[int, float]) -> None:
        self._norms = norms

    def clip_norm(self, recorder: Recorder, total_norm: Any) -> Any:
        place = recorder.place()
        norm = self._norms.get(place.cycle) if place is not None else None
        if norm is None:
            return total_norm
        like = total_norm.full_tensor() if is_distributed(total_norm) else total_norm
        return torch.full_like(like, norm)


class Maximum(Intervention):
    """Clip to the norm that the full batch clips to.

    Args:
        maxima: Per cycle, the largest norm that a clip leaves.
    """

    name = "clip to the norm of the full batch"

    def __init__(self, maxima: Mapping[int, float]) -> None:
        self._maxima = maxima

    def clip_maximum(self, recorder: Recorder, max_norm: Any) -> Any:
        place = recorder.place()
        return self._maxima.get(place.cycle, max_norm) if place is not None else max_norm


class ScaleParts(Intervention):
    """Multiply each rank's part of the gradient, before the step, by a factor that a hypothesis predicts.

    Args:
        factors: Per cycle, one for each rank.
    """

    name = "scale parts"

    def __init__(self, factors: Mapping[int, Sequence[float]]) -> None:
        self._factors = factors

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        place = recorder.place()
        factors = self._factors.get(place.cycle) if place is not None else None
        if factors is None:
            return
        with quiet():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        plain(parameter.grad).mul_(factors[recorder.rank])


class FindUnused(Intervention):
    """Let DDP look for parameters that took no part in a backward."""

    name = "find unused parameters"

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        owner: Any = DistributedDataParallel
        original = owner.__init__

        @functools.wraps(original)
        def init(wrapper: Any, *args: Any, **kwargs: Any) -> None:
            kwargs["find_unused_parameters"] = True
            original(wrapper, *args, **kwargs)

        owner.__init__ = init
        try:
            yield
        finally:
            owner.__init__ = original


class SynchroniseOnce(Intervention):
    """Let wrappers reduce in the last backward of each cycle, and in no other: DDP, FSDP1 and FSDP2.

    What DDP prepared in a forward decides about the backward; FSDP asks when gradients arrive.
    """

    name = "synchronise once"

    def __init__(self) -> None:
        self._wrappers: dict[int, Any] = {}

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - with ranks only

        with ExitStack() as stack:
            self._install(stack, recorder, DistributedDataParallel, "require_backward_grad_sync")
            self._install(stack, recorder, FullyShardedDataParallel, "_sync_gradients")
            stack.callback(self._wrappers.clear)
            yield

    def _install(self, stack: ExitStack, recorder: Recorder, owner: Any, flag: str) -> None:
        original = owner.forward

        @functools.wraps(original)
        def forward(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            upcoming = recorder.schedule[recorder.backwards : recorder.backwards + 1]
            once = not upcoming or upcoming[0].last
            if getattr(wrapper, "static_graph", False) and not (upcoming and upcoming[0].cycle):
                # torch asserts that a static graph reduces every backward of its first cycle.
                once = True
            if flag == "_sync_gradients":
                self._wrappers[id(wrapper)] = wrapper
            before = getattr(wrapper, flag)
            setattr(wrapper, flag, once)
            try:
                return original(wrapper, *args, **kwargs)
            finally:
                # A loop that goes in and out of no_sync finds its own setting.
                setattr(wrapper, flag, before and (once or flag == "_sync_gradients"))

        replace(stack, owner, "forward", forward)

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - with ranks only

        place = recorder.place()
        once = place is None or place.last
        groups = [
            group
            for module in recorder.model.modules()
            if isinstance(module, FSDPModule)
            for group in module._get_fsdp_state()._fsdp_param_groups  # noqa: SLF001 - torch has a setter and no getter
        ]
        flags = [(each, "_sync_gradients") for each in self._wrappers.values()]
        flags += [(each, flag) for each in groups for flag in ("reduce_grads", "all_reduce_grads")]
        before = [getattr(owner, flag) for owner, flag in flags]
        for owner, flag in flags:
            setattr(owner, flag, once)
        try:
            yield
        finally:
            for (owner, flag), value in zip(flags, before, strict=True):
                setattr(owner, flag, value)


class Broadcast(Intervention):
    """Give every rank what one of them has, when a cycle begins and before it steps: parameters, buffers, options.

    The options are the numbers in the optimizer's groups: learning rate, weight decay, momentum.

    Args:
        source: The rank that they are taken from.
    """

    name = "broadcast"

    def __init__(self, source: int) -> None:
        self._source = source
        self._done = -1

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        self._done = -1

        def enter(*_: Any) -> None:
            begins = recorder.backwards == 0 or not recorder.inside()
            if begins and self._done != recorder.backwards:
                self._done = recorder.backwards
                self._send(recorder)

        handle = recorder.model.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        self._send(recorder)
        if recorder.world_size > 1:
            with quiet():
                self._send_options(optimizer)

    def _send_options(self, optimizer: Optimizer) -> None:
        mine = [_numbers(group) for group in optimizer.param_groups]
        sent: list[Any] = [mine]
        dist.broadcast_object_list(sent, self._source)
        if [each.keys() for each in sent[0]] != [each.keys() for each in mine]:
            return  # another kind of optimizer there: nothing can be made the same
        for group, theirs in zip(optimizer.param_groups, sent[0], strict=True):
            for name, value in theirs.items():
                if isinstance(group[name], torch.Tensor):
                    group[name].fill_(value)
                elif _number(group[name]) != value:
                    group[name] = value

    def _send(self, recorder: Recorder) -> None:
        if recorder.world_size == 1:
            return
        tensors = [*recorder.gradient_holders(), *recorder.model.buffers()]
        with quiet():
            for each in _replicas(tensors):
                dist.broadcast(each.detach(), self._source)


class TakeFrom(Intervention):
    """Give every rank, before it steps, the gradients that one of them has made ready for its own step.

    What that rank has clipped is the clipped gradient of all.

    Args:
        source: The rank that they are taken from.
    """

    name = "take the gradients of one rank"

    def __init__(self, source: int) -> None:
        self._source = source

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        if recorder.world_size == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = _replicas(parameters)
        snapshots = recorder.clips.snapshots
        with quiet():
            shares = [snapshots[id(p)][1] if id(p) in snapshots else 0.0 for p in parameters]
            present = [float(p.grad is not None) for p in parameters]
            told = torch.tensor([present, shares], dtype=torch.float64)
            dist.broadcast(told, self._source)
            for parameter, there, share in zip(parameters, *told.tolist(), strict=True):
                if not there:
                    parameter.grad = None
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                before = snapshots.pop(id(parameter), (torch.zeros_like(parameter.grad), 0.0))[0]
                assert isinstance(
                    before, torch.Tensor
                )  # where something is put right, copies are whole
                dist.broadcast(parameter.grad, self._source)
                if share:
                    dist.broadcast(before, self._source)
                    snapshots[id(parameter)] = (before, share)
