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

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from equivcheck.hooks import Backwards, Clips, Edits, Functions, Scaling, Schedulers, Steps, Usage
from equivcheck.hooks.base import Hooks
from equivcheck.parts import Holdings, Part, is_distributed, itself
from equivcheck.recording import Event, Place, Recording
from equivcheck.shadow import probes

if TYPE_CHECKING:
    from typing_extensions import Self

    from equivcheck.feed import Data, Key
    from equivcheck.interventions import Intervention
    from equivcheck.observe import Observer
    from equivcheck.subject import Code


class Recorder:
    """Watches one run; a context manager.

    Attributes:
        model: The module under test.
        recording: What was seen so far.
        schedule: Place of every backward, known from an earlier run of the same loop; empty in the first.
        interventions: What is put right in this run.
        is_paused: What happens now is our own doing.
        names: Of parameters, by id.
        modules: Ids of the modules that `build` returned.
        trained, autocast: Dtypes of the parameters that got gradients, and that autocast computed in.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        observer: Observer,
        *,
        interventions: Iterable[Intervention] = (),
        schedule: list[Place] | None = None,
        world_size: int = 1,
    ) -> None:
        self.model = model
        self.recording = recording
        self.observer = observer
        self.interventions = list(interventions)
        self.schedule = schedule or []
        self.code: Code | None = None
        self.data: Data | None = None
        self.is_promoted = True
        self.rank, self.world_size, self.part = 0, world_size, 0
        self.holdings = Holdings(model) if world_size > 1 else None
        self.share: frozenset[int] | None = None
        self.cut = False
        self.watch: Callable[[Recording], None] | None = None
        self.is_paused = False
        self.shadow_holders: dict[str, Any] = {}
        self.shadow_owners: dict[str, Any] = {}
        self.start = probes(model)
        self.modules = {id(module) for module in model.modules()}
        self.names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
        self.optimizers: dict[int, str] = {}
        self.alive: dict[str, weakref.ref[Optimizer]] = {}
        self.trained: set[torch.dtype] = set()
        self.autocast: set[torch.dtype] = set()
        self._foreign: list[torch.Tensor] = []
        self._stack = ExitStack()
        self.usage = Usage(self)
        self.edits = Edits(self)
        self.scaling = Scaling(self)
        self.clips = Clips(self)
        self.backward = Backwards(self)
        self.functions = Functions(self)
        self.schedulers = Schedulers(self)
        self.steps = Steps(self)

    @property
    def _hooks(self) -> tuple[Hooks, ...]:
        return (
            self.steps,
            self.backward,
            self.functions,
            self.clips,
            self.scaling,
            self.schedulers,
            self.edits,
            self.usage,
        )

    def __enter__(self) -> Self:
        try:
            if self.holdings is not None:
                self.holdings.install(self._stack)
            for hooks in self._hooks:
                hooks.install(self._stack)
            for each in self.interventions:
                self._stack.enter_context(each.installed(self))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for hooks in self._hooks:
            hooks.close()
        # Closures of the hooks keep this object until the garbage collector comes by; they must not keep a model with
        # its gradients, 0.15 GB for each role of ten million parameters.
        self.model = nn.Module()
        self._foreign.clear()
        self.shadow_holders.clear()
        self.shadow_owners.clear()
        if self.holdings is not None:
            self.holdings.close()

    # ---- what interventions and hooks ask ------------------------------------------------------

    @property
    def backwards(self) -> int:
        """Root backwards that have run, or begun."""
        return self.backward.count

    def place(self) -> Place | None:
        """Return the place of the backward that ran last, or is running; None before the first."""
        if not self.backwards or self.backwards > len(self.schedule):
            return None
        return self.schedule[self.backwards - 1]

    def factor(self, factors: Mapping[int, Sequence[float]]) -> float:
        """Return the factor for the backward that ran last, or is running; 1 where there is none.

        Args:
            factors: Per cycle, one for each micro-step; or for those of rank 0, then for those of rank 1 ...
        """
        place = self.place()
        if place is None:
            return 1.0
        chosen = factors.get(place.cycle, ())
        index = place.micro_step
        if len(chosen) > place.micro_steps:
            index += self.part * place.micro_steps
        return chosen[index] if index < len(chosen) else 1.0

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
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def note(self, kind: str, **detail: Any) -> None:
        """Add an event to the timeline."""
        event = Event(kind, self.backwards, len(self.recording.fetched), detail)
        self.recording.timeline.append(event)
        if self.watch is not None:
            self.watch(self.recording)

    def fetched(self, keys: list[Key]) -> None:
        """Note a micro-batch that is about to be handed out."""
        for each in self.interventions:
            each.before_fetch(self)
        self.observer.fetched(self)
        self.recording.fetched.append(keys)
        self.note("fetch", samples=len(keys))

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters and those that only an optimizer knows, by name.

        Of a rank, those that its optimizers hold whole.
        """
        if self.holdings is not None and (held := self.holdings.held()):
            return {part.name: part.holder for part in held if part.is_whole}
        found: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        found.update((self.names[id(each)], each) for each in self._foreign)
        return found

    def gradient_holders(self) -> list[torch.Tensor]:
        """Return the model's parameters and those that only an optimizer knows; of a rank, what its optimizers hold."""
        return list(self.each_holder())

    def each_holder(self) -> Iterator[torch.Tensor]:
        """Yield them one by one: to walk a whole model for the first few costs more than to look at those."""
        if self.holdings is not None and (held := self.holdings.held()):
            yield from {id(part.holder): part.holder for part in held}.values()
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                yield parameter
        yield from self._foreign

    def leaves(self) -> dict[str, torch.Tensor]:
        """Return the parameters whose gradients arrive whole in this process, whoever steps them."""
        if self.holdings is None:
            return self.parameters()
        found = self.holdings
        named = ((found.name_in(n), p) for n, p in self.model.named_parameters())
        return {
            name: p
            for name, p in named
            if name is not None and not is_distributed(p) and tuple(p.shape) == found.shape(name)
        }

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of every parameter, whole."""
        if self.holdings is not None:
            return dict(self.holdings.sizes)
        return {name: p.numel() for name, p in self.parameters().items()}

    def look_again(self) -> None:
        """Learn the names of parameters that a wrapper has put in the place of others."""
        if self.holdings is None:
            return
        kept = {id(each): self.names[id(each)] for each in self._foreign}
        found = ((id(p), self.holdings.name_in(n)) for n, p in self.model.named_parameters())
        self.names = {key: name for key, name in found if name is not None} | kept

    def parts_of(self, parameter: torch.Tensor, optimizer: Optimizer) -> list[Part]:
        """Return what this process holds of the model in one parameter of an optimizer."""
        if self.holdings is None:
            return [Part(self.name_of(parameter, optimizer), parameter, itself, itself)]
        found = self.holdings.parts(parameter, self.names.get(id(parameter)))
        if found is None:
            found = self.holdings.parts(parameter, self.name_of(parameter, optimizer))
        return found or []

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
                part.name
                for group in optimizer.param_groups
                for p in group["params"]
                for part in self.parts_of(p, optimizer)
            ]
            key = f"{type(optimizer).__name__}({names[0] if names else ''}..{len(names)})"
            while key in self.recording.optimizers:
                key += "'"
            self.optimizers[id(optimizer)] = key
            self.recording.optimizers[key] = names
            self.alive[key] = weakref.ref(optimizer)
        return key
