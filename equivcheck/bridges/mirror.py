"""The mirror of a model: a torch module whose backwards and steps are those of another framework.

P parameters; all tensors lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Mirror(nn.Module):
    """Holds the parameters of a framework's model, under its own names.

    Args:
        tensors: Parameters by name; floating ones alone are parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self._parameters[name] = nn.Parameter(tensor.detach().clone())


class Driven(Optimizer):
    """Makes the steps that another framework's optimizer makes, so that those who watch torch's see them.

    Args:
        parameters: Those that it may update.

    Attributes:
        body: What a step does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(list(parameters), {})
        self.body: Callable[[], None] = lambda: None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters; there is no closure."""
        assert closure is None
        self.body()


class _Given(torch.autograd.Function):
    """A loss whose gradients were computed elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, seen: dict[int, Tensor], gradients: Any, *parameters: Tensor
    ) -> Tensor:
        ctx.seen, ctx.gradients, ctx.parameters = seen, gradients, parameters
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *roots: Tensor) -> Any:
        for parameter in ctx.parameters:
            # Added now, it is called after the hooks of those who change a parameter's gradient.
            _note(parameter, ctx.seen)
        return (None, None, None, *(each * roots[0].to(each.dtype) for each in ctx.gradients))


def _note(parameter: Tensor, seen: dict[int, Tensor]) -> None:
    def hook(gradient: Tensor) -> None:
        seen[id(parameter)] = gradient.detach().clone()
        handle.remove()

    handle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]


class Link:
    """Tells the mirror what the framework does, and the framework what was set in the mirror.

    Args:
        module: The mirror.
        recorder: Whose run it is.

    Attributes:
        held: The values that the user's code holds, by name: they differ from the mirror's once the engine has set it.
    """

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        self.parameters: dict[str, Tensor] = dict(module.named_parameters())
        self.recorder = recorder
        self.optimizer = Driven(list(self.parameters.values()))
        self.held = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._state: dict[str, Tensor] = {}
        self._entering: dict[str, Tensor] = {}
        self._following: dict[str, Tensor] = {}

    # ---- what the framework asks -----------------------------------------------------------------

    def current(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values that parameters have by now, for those that the user's code holds.

        Other values than those that the code was given last (a perturbed copy, say) keep their distance.
        """
        found = {}
        for name, value in given.items():
            parameter, held = self.parameters[name].detach(), self.held[name]
            if torch.equal(parameter, held):
                found[name] = value
            elif torch.equal(value, held):
                found[name] = parameter.clone()
            else:
                found[name] = parameter + (value - held)
        return found

    def backward(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make a backward of the mirror and return what it added, with the factors that it was given."""
        parameters = [self.parameters[name] for name in gradients]
        seen: dict[int, Tensor] = {}
        given = [each.to(p.dtype) for each, p in zip(gradients.values(), parameters, strict=True)]
        with torch.enable_grad():
            _Given.apply(loss, seen, given, *parameters).backward()  # type: ignore[no-untyped-call]
        return {
            name: seen.get(id(p), gradients[name])
            for name, p in zip(gradients, parameters, strict=True)
        }

    def state(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the optimizer's state as it is by now, for the one that the user's code holds."""
        now = self._entries()
        if now.keys() != given.keys() or any(
            not torch.equal(given[n], self._state[n]) for n in given
        ):
            return dict(given)
        return now

    def entering(self, gradients: Mapping[str, Tensor], following: Mapping[str, Tensor]) -> None:
        """Note the gradients that enter the optimizer, and the state that it comes to with them."""
        self._entering, self._following = dict(gradients), dict(following)

    def step(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make a step of the mirror's optimizer to these values and return what the parameters are then."""

        def update() -> None:
            for name, value in values.items():
                self.parameters[name].copy_(value)
            self._set_entries(self._following)

        with torch.no_grad():
            for name, gradient in self._entering.items():
                parameter = self.parameters[name]
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter.dtype).clone()
                else:
                    parameter.grad.copy_(gradient)
        self._entering = {}
        self.optimizer.body = update
        self.optimizer.step()
        self._state = {name: each.clone() for name, each in self._following.items()}
        self.held.update({name: self.parameters[name].detach().clone() for name in values})
        self.optimizer.zero_grad()
        return {name: self.parameters[name].detach().clone() for name in values}

    # ---- the optimizer's state, an entry of the mirror's for each leaf ------------------------------

    def _entries(self) -> dict[str, Tensor]:
        found = {}
        for entries in self.optimizer.state.values():
            found.update(
                {key: value for key, value in entries.items() if isinstance(value, Tensor)}
            )
        return found

    def _set_entries(self, leaves: Mapping[str, Tensor]) -> None:
        for key, leaf in leaves.items():
            self.optimizer.state[self._owner(key, leaf)][key] = leaf.clone()

    def _owner(self, key: str, leaf: Tensor) -> Tensor:
        """Return the parameter that an entry belongs to: of its name and shape; or the first."""
        for name, parameter in self.parameters.items():
            if parameter.shape == leaf.shape and key.endswith(name):
                return parameter
        return next(iter(self.parameters.values()))
