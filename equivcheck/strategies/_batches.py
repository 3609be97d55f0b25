"""Full batches that are described by a few numbers, so that a failing one can be read.

Each object is a `batches` function of a subject: calling it gives the full batches. What is stated is what decides
whether accumulation is right: rows, valid tokens, labels. The rest is drawn from `seed`.

B rows, T tokens of the longest row, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FEATURES = 4
VOCABULARY = 11
IGNORED = -100  # what torch.nn.functional.cross_entropy leaves out by default
PADDING = 0


@dataclass(frozen=True)
class Values:
    """Batches {"x": float32 [B, 4], "y": float32 [B, 1]} for a regression.

    Attributes:
        rows: B of each full batch.
        seed: Of the numbers.
    """

    rows: tuple[int, ...]
    seed: int = 0

    def __call__(self) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            {
                "x": torch.randn(rows, FEATURES, generator=generator),
                "y": torch.randn(rows, 1, generator=generator),
            }
            for rows in self.rows
        ]

    @property
    def outputs(self) -> int:
        """Width of what a model has to give for each row."""
        return 1


@dataclass(frozen=True)
class Classes:
    """Batches {"x": float32 [B, 4], "y": int64 [B]} for a classification.

    Attributes:
        labels: The class of every row of every full batch, each below 5.
        seed: Of the features.
    """

    labels: tuple[tuple[int, ...], ...]
    seed: int = 0

    def __call__(self) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            {
                "x": torch.randn(len(row), FEATURES, generator=generator),
                "y": torch.tensor(row, dtype=torch.int64),
            }
            for row in self.labels
        ]

    @property
    def rows(self) -> tuple[int, ...]:
        """B of each full batch."""
        return tuple(map(len, self.labels))

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return 5


@dataclass(frozen=True)
class Tokens:
    """Batches {"tokens", "labels"}: int64 [B, T], padded on the right to the longest row of all.

    Each token is to be found again at its own place, so row i has exactly `valid[i]` labels; all else is -100.

    Attributes:
        valid: Valid tokens of every row of every full batch; 0 is a row that is ignored altogether.
        seed: Of the tokens.
    """

    valid: tuple[tuple[int, ...], ...]
    seed: int = 0

    def __call__(self) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        longest = max(2, *(count for batch in self.valid for count in batch), 2)
        return [self._batch(counts, longest, generator) for counts in self.valid]

    @property
    def rows(self) -> tuple[int, ...]:
        """B of each full batch."""
        return tuple(map(len, self.valid))

    @property
    def outputs(self) -> int:
        """Size of the vocabulary."""
        return VOCABULARY

    def _batch(
        self, counts: Sequence[int], longest: int, generator: torch.Generator
    ) -> dict[str, Any]:
        drawn = torch.randint(1, VOCABULARY, (len(counts), longest), generator=generator)
        is_valid = torch.arange(longest)[None, :] < torch.tensor(counts)[:, None]
        return {
            "tokens": torch.where(is_valid, drawn, PADDING),
            "labels": torch.where(is_valid, drawn, IGNORED),
        }


Batches = Values | Classes | Tokens
