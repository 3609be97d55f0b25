"""The engine's recorder for a whole process: the model is found on the way, samples are what enters it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from equivcheck.attach.digests import Digest, Rule, row_digests
from equivcheck.attach.models import Built, Parts, owner, unwrapped
from equivcheck.attach.seeds import drawing_otherwise
from equivcheck.bridges import open_to_float64
from equivcheck.casting import promote_module
from equivcheck.hooks.base import quiet, replace
from equivcheck.neutral import switch_off_modules
from equivcheck.parts import Holdings, is_distributed
from equivcheck.recorder import Recorder
from equivcheck.recording import Place, Recording
from equivcheck.split import named_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

    from equivcheck.feed import Key
    from equivcheck.interventions import Intervention
    from equivcheck.observe import Observer

__all__ = ["ProcessRecorder", "Samples"]


class Samples:
    """Numbers every sample in the order in which the full-batch run used it.

    Args:
        known: The digests of the full batch's samples with their numbers; None in the full-batch run itself.

    Attributes:
        total: Samples that the full-batch run used; 0 where that is not known yet.
        digests: Of this process's samples, in order.
    """

    def __init__(
        self, known: list[tuple[Digest, int]] | None, *, rank: int, world_size: int
    ) -> None:
        self.is_first = known is None
        self.total = len(known or ())
        self.digests: list[Digest] = []
        self._whole: dict[int, list[int]] = {}
        self._cut: dict[int, list[int]] = {}
        for (whole, cut), number in known or ():
            self._whole.setdefault(whole, []).append(number)
            if cut != whole:
                self._cut.setdefault(cut, []).append(number)
        self._used: set[int] = set()
        self._rank = rank
        self._ranks = world_size

    def keys(self, digests: list[Digest]) -> list[Key]:
        """Return the keys of some samples: (0, number), or (1, number) for one that the full batch never used."""
        return [self._key(each) for each in digests]

    def _key(self, digest: Digest) -> Key:
        place = len(self.digests) * self._ranks + self._rank
        self.digests.append(digest)
        if self.is_first:
            return 0, place
        # The n-th use of a sample is the n-th use there; either run may have cut the last token off.
        whole, cut = digest
        for numbers in (self._whole.get(whole), self._cut.get(whole), self._whole.get(cut)):
            for number in numbers or ():
                if number not in self._used:
                    self._used.add(number)
                    return 0, number
        return 1, place


class ProcessRecorder(Recorder):
    """Watches every optimizer step of a process.

    Attributes:
        rule: How samples are recognised.
        samples: Their numbers.
        is_neutral: Dropout is switched off.
        seed_offset: If not 0, forwards draw other random numbers.
        on_enter: Called with the keys of each micro-batch before its forward; returns whether it is to be noted.
        on_called: Called with the tensors of such a micro-batch, its number of rows, and whether it joins the last.
    """

    def __init__(
        self,
        recording: Recording,
        observer: Observer,
        *,
        interventions: Iterable[Intervention] = (),
        schedule: list[Place] | None = None,
        rule: Rule,
        samples: Samples,
        is_neutral: bool,
        seed_offset: int,
        on_enter: Callable[[list[Key]], bool],
        on_called: Callable[[list[tuple[str, torch.Tensor]], int, bool], None],
    ) -> None:
        super().__init__(
            nn.Module(), recording, observer, interventions=interventions, schedule=schedule
        )
        self.rule = rule
        self.samples = samples
        self.is_neutral = is_neutral
        self.on_enter = on_enter
        self.on_called = on_called
        self.seed_offset = seed_offset
        self.is_adopted = False
        self._built = Built()
        self._made: list[weakref.ref[Optimizer]] = []
        self._inside = False
        self._extra = 0
        self._forwards = 0
        self.usage.by_sample = lambda: True

    def __enter__(self) -> Self:
        try:
            for hooks in self._hooks:
                hooks.install(self._stack)
            self._built.install(self._stack)
            self._watch_calls()
        except BaseException:
            self._stack.close()
            raise
        return self

    def name_of(self, parameter: torch.Tensor, optimizer: Optimizer) -> str:
        if not self.is_adopted:
            # An optimizer is being made: its parameters get their names when the model is seen.
            if all(each() is not optimizer for each in self._made):
                self._made.append(weakref.ref(optimizer))
            if self.is_promoted and parameter.dtype in _LOW:
                parameter.data = parameter.data.to(_LOW[parameter.dtype])
            return ""
        return super().name_of(parameter, optimizer)

    def key_of(self, optimizer: Optimizer) -> str:
        if not self.is_adopted:
            self._adopt(None)
        return super().key_of(optimizer)

    # ---- calls of modules ----------------------------------------------------------------------

    def _watch_calls(self) -> None:
        original = nn.Module.__call__
        compiling = torch.compiler.is_compiling

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # While dynamo traces it sees the original alone, so that compiled graphs stay whole.
            if compiling() or self._inside or self._is_passed_over():
                return original(module, *args, **kwargs)
            self._inside = True
            try:
                self._enter(module, args, kwargs)
                if not self.seed_offset:
                    return original(module, *args, **kwargs)
                self.seed_offset += 1
                with drawing_otherwise(self.seed_offset):
                    return original(module, *args, **kwargs)
            finally:
                self._inside = False

        replace(self._stack, nn.Module, "__call__", call)

    def _is_passed_over(self) -> bool:
        """Return whether a call takes no samples that have not been seen.

        That is so during a backward (checkpointed parts) and in a closure that an optimizer evaluates again.
        """
        return (
            self.backward.is_running
            or self.backward.repeated is not None
            or not torch.is_grad_enabled()
        )

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See what enters a model that is trained; a loss, a metric or a frozen teacher is none."""
        if not any(p.requires_grad for p in module.parameters()):
            return
        named = [
            *((f"args.{path}", t) for path, t in named_tensors(list(args))),
            *((f"kwargs.{path}", t) for path, t in named_tensors(dict(kwargs))),
        ]
        if any(t.requires_grad for _, t in named):
            return  # A later part of the same forward: its rows are no samples.
        with quiet():
            if not self.is_adopted:
                self._adopt(module)
            elif any(p.requires_grad and id(p) not in self.names for p in module.parameters()):
                self._add(module)
            digests = row_digests(named, self.rule)
            if not digests:
                return
            keys = self.samples.keys(digests)
            if not self.on_enter(keys):
                return
            joins = self._joins()
            self.on_called(named, len(keys), joins)
        if joins:
            # Several forwards before one backward are one micro-batch.
            self.recording.fetched[-1] += keys
            self._forwards += 1
            self.rule.forwards = max(self.rule.forwards, self._forwards)
        else:
            self.fetched(keys)
            self._forwards = 1

    def _joins(self) -> bool:
        timeline = self.recording.timeline
        if not timeline or timeline[-1].kind != "fetch":
            return False
        # A loop may run all forwards of a cycle before its backwards: what the full batch does counts.
        return self.samples.is_first or self._forwards < self.rule.forwards

    # ---- the model -----------------------------------------------------------------------------

    def _adopt(self, called: nn.Module | None) -> None:
        """Take the model that is trained as the one under test."""
        optimizers = [each for ref in self._made if (each := ref()) is not None]
        self.is_adopted = True
        model = owner(called, optimizers, self._built)
        if model is None:
            self.observer.start(self)
            return
        self._take(model)
        if any(is_distributed(parameter) for parameter in self.model.parameters()):
            # A DTensor knows the shape of the whole; the model was sharded before it was seen.
            self.holdings = Holdings(self.model)
        recording = self.recording
        first = next((p for p in self.model.parameters()), None)
        recording.dtype = (
            str(first.dtype).removeprefix("torch.") if first is not None else "float32"
        )
        recording.parameters = sum(p.numel() for p in self.model.parameters())
        if self.is_promoted:
            promote_module(self.model)
            open_to_float64(self._stack)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self.name_of(parameter, optimizer)
        for intervention in self.interventions:
            self._stack.enter_context(intervention.installed(self))
        # Classes that were defined, and imported, since the hooks were put in place.
        self.schedulers.install(self._stack)
        self.steps.install_controls(self._stack)
        self.clips.install_frameworks(self._stack)
        self.observer.start(self)

    def _take(self, model: nn.Module) -> None:
        self.model = model
        for name, parameter in model.named_parameters():
            self.names.setdefault(id(parameter), name)
        if self.is_neutral:
            self.recording.dropout |= switch_off_modules(model)

    def _add(self, module: nn.Module) -> None:
        """Take a further model that is trained beside the first."""
        part = unwrapped(module)
        if self.is_promoted:
            promote_module(part)
        parts = self.model if isinstance(self.model, Parts) else Parts(self.model, {})
        self._extra += 1
        self._take(parts.with_part(f"{type(part).__name__}{self._extra}", part))


_LOW = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
