"""What a watched process is asked to do: written by whoever starts it, read by the process itself.

Imported without torch, so that a script that is only recorded starts at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equivcheck.result import write_text

if TYPE_CHECKING:
    import torch

    from equivcheck.interventions import Intervention
    from equivcheck.recording import Place

__all__ = ["Spec", "adopt_states", "states_of"]


@dataclass
class Spec:
    """How one process of one role is to be watched.

    Attributes:
        role: As in a recording.
        output: Folder that the process writes its own folder into.
        observer: write (the reference), compare, perturb (a control), contribute (the pieces), or watch (record).
        reference: Folder with the recordings of the full batch, for all but write and watch.
        promoted: Compute in float64.
        native: The run computes as written, and is compared with a reference in float64.
        neutral: Switch dropout off.
        ends: End the process once it has shown what was asked for.
        optimizer_steps: As many are watched, if the full batch does not say.
        digests: Of every sample that the full batch used, in the order of their numbers; None in its own run.
        numbers: The number of each of them.
        step_samples: Per optimizer step of the full batch, the numbers of its samples, of all ranks.
        stop_cycle: The run ends before the first sample of this optimizer step of the full batch.
        boundaries: Per optimizer step of this role, the full batch's step that it is compared with, where samples
            cannot be recognised in this precision; None where they can.
        rule: How samples are recognised, as the full batch's run found it.
        schedule: Place of every backward, from an earlier run.
        interventions: What is put right.
        perturbation: Which signs a control's roundings have.
        seed_offset: Random numbers drawn in a forward are others.
        length: What `len(loader)` says.
        launched: The command line, as it is to be typed again.
    """

    role: str
    output: str
    observer: str
    reference: str = ""
    promoted: bool = False
    native: bool = False
    neutral: bool = True
    ends: bool = True
    optimizer_steps: int = 8
    digests: list[tuple[int, int]] | None = None
    numbers: list[int] = field(default_factory=list)
    step_samples: list[list[int]] = field(default_factory=list)
    stop_cycle: int | None = None
    boundaries: list[int | None] | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    schedule: list[Place] = field(default_factory=list)
    interventions: list[Intervention] = field(default_factory=list)
    perturbation: int = 0
    seed_offset: int = 0
    length: int | None = None
    launched: str = ""

    def write(self, path: Path) -> None:
        """Write the specification, and the tensors of its interventions beside it."""
        fields = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name != "interventions"
        }
        if self.observer == "watch":
            # Nothing but text and numbers.
            write_text(path, json.dumps({"fields": fields, "interventions": []}))
            return
        from equivcheck import tensorfile  # noqa: PLC0415 - torch is loaded where there are tensors
        from equivcheck.attach.codec import encode  # noqa: PLC0415

        tensors: dict[str, torch.Tensor] = {}
        body = {
            "fields": encode(fields, tensors),
            "interventions": states_of(self.interventions, tensors),
        }
        tensorfile.save(path.with_suffix(".safetensors"), tensors)
        write_text(path, json.dumps(body))

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read what `write` wrote."""
        from equivcheck import tensorfile  # noqa: PLC0415 - as above
        from equivcheck.attach.codec import decode  # noqa: PLC0415

        body = json.loads(path.read_text(encoding="utf-8"))
        beside = path.with_suffix(".safetensors")
        tensors = tensorfile.load(beside)[0] if beside.exists() else {}
        spec = cls(**decode(body["fields"], tensors))
        made = [_class(entry["class"]) for entry in body["interventions"]]
        spec.interventions = [each.__new__(each) for each in made]
        adopt_states(spec.interventions, body["interventions"], tensors)
        return spec


def states_of(
    interventions: Sequence[Intervention], tensors: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Return what each intervention knows, JSON-ready; what only lives in one process is left out."""
    from equivcheck.attach.codec import Unencodable, encode  # noqa: PLC0415 - as above

    found = []
    for index, each in enumerate(interventions):
        kind = type(each)
        state = {}
        for name, value in vars(each).items():
            own: dict[str, torch.Tensor] = {}
            try:
                state[name] = encode({f"{index}.{name}": value}, own, known=interventions)
            except (Unencodable, TypeError):
                continue
            tensors.update(own)
        found.append({"class": f"{kind.__module__}:{kind.__qualname__}", "state": state})
    return found


def adopt_states(
    interventions: Sequence[Intervention],
    states: Sequence[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Let interventions know what `states_of` returned of their like in another process."""
    from equivcheck.attach.codec import decode  # noqa: PLC0415 - as above

    for each, entry in zip(interventions, states, strict=True):
        for name, value in entry["state"].items():
            [found] = decode(value, tensors, known=interventions).values()
            setattr(each, name, found)


def _class(name: str) -> type[Intervention]:
    from equivcheck.interventions import Intervention  # noqa: PLC0415 - as above

    module, _, attribute = name.partition(":")
    if not module.startswith("equivcheck."):
        raise ValueError(f"{name} is no intervention")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Intervention)):
        raise TypeError(f"{name} is no intervention")
    return found
