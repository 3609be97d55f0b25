"""A case: one point of the matrix that a run walks through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from equivcheck.errors import UsageError

SPLITS = ("even", "uneven")
STRATEGIES = ("none", "ddp", "fsdp", "zero", "pipeline", "tensor_parallel")
DEVICES = ("cpu", "cuda")
# Strategies in which every rank consumes all samples: ranks share the model, not the batch.
SHARED_BATCH = frozenset({"pipeline", "tensor_parallel"})
RNGS = ("off", "per-sample")


def shares_of(world_size: int, strategy: str) -> int:
    """Return into how many parts so many ranks cut a full batch."""
    return 1 if strategy in SHARED_BATCH else world_size


@dataclass(frozen=True)
class Case:
    """One experiment to run; two cases with equal fields are the same case, with the same id.

    Attributes:
        target: What the user typed, `train_step.py` or `pkg.mod:Subject`.
        accumulation_steps: Micro-batches per optimizer step, K >= 1.
        split: How a full batch is cut, one of `SPLITS`.
        world_size: Ranks that share a full batch, >= 1.
        strategy: How the ranks work together, one of `STRATEGIES`.
        precision: Handed to a `train` that asks for it; "native" leaves it to the subject.
        seed: Seed of every role.
        device: Where the subject is to compute.
        optimizer_steps: Upper bound on full batches, >= 1.
        workload: Name of a suite's workload, when the target is a suite.
        rows: Which rows of which batches alone are used, as in `0:0-4,1:2`; None for all.
        train: `FILE:ATTR` of a training loop that takes the place of the target's.
        rng: What becomes of randomness, one of `RNGS`: dropout off, or masks keyed by sample.
    """

    target: str
    accumulation_steps: int
    split: str = "even"
    world_size: int = 1
    strategy: str = "none"
    precision: str = "native"
    seed: int = 0
    device: str = "cpu"
    optimizer_steps: int = 8
    workload: str | None = None
    rows: str | None = None
    train: str | None = None
    rng: str = "off"

    def __post_init__(self) -> None:
        for name in ("accumulation_steps", "world_size", "optimizer_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}", expected="a whole number of at least 1")
        for name, allowed in (
            ("split", SPLITS),
            ("strategy", STRATEGIES),
            ("device", DEVICES),
            ("rng", RNGS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name} is {value!r}", expected="one of " + ", ".join(allowed))

    @property
    def id(self) -> str:
        """Ten hex digits that stay the same when a later version adds a field with a default."""
        canonical = json.dumps(self._stated(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]

    @property
    def shares(self) -> int:
        """Into how many parts the ranks cut a full batch."""
        return shares_of(self.world_size, self.strategy)

    @property
    def label(self) -> str:
        """What tells this case from its neighbours, as in `K=4 split=uneven`."""
        stated = self._stated()
        parts = [self.workload] if self.workload else []
        parts.append(f"K={self.accumulation_steps}")
        shown = (name for name in stated if name not in _NAMED_ELSEWHERE)
        return " ".join([*parts, *(f"{name}={stated[name]}" for name in shown)])

    def as_dict(self) -> dict[str, Any]:
        """Return every field, defaults included, JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        """Rebuild a case from `as_dict` or from a case of a saved result.

        Args:
            data: Mapping with at least the fields without a default; other keys are ignored.

        Raises:
            UsageError: A field without a default is missing, or a value is out of range.
        """
        known = {field.name: field for field in fields(cls)}
        missing = [n for n, f in known.items() if f.default is MISSING and n not in data]
        if missing:
            raise UsageError(f"the case has no {missing[0]!r}", fix="run the target again")
        return cls(**{name: data[name] for name in known if name in data})

    def _stated(self) -> dict[str, Any]:
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}


_NAMED_ELSEWHERE = frozenset({"target", "accumulation_steps", "workload", "train"})
