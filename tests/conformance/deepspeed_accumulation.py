"""DeepSpeed's batch settings, whole = micro-batch x accumulation x ranks: what it derives, and what it refuses.

Prints one JSON object: for each combination of what is stated, the three numbers that it comes to, or how it refuses.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read while deepspeed is imported

from deepspeed.runtime.config import DeepSpeedConfig

NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
COMBINATIONS = (
    (16, 4, 4),
    (16, 4, None),
    (16, None, 4),
    (None, 4, 4),
    (16, None, None),
    (None, 4, None),
    (None, None, 4),
    (16, 4, 2),
    (16, 3, 4),
    (16, 3, None),
    (16, None, 3),
    (0, 4, 4),
)


def come_to(stated: tuple[int | None, ...]) -> str:
    """Return what the settings come to on one rank, or the error."""
    given = {name: value for name, value in zip(NAMES, stated, strict=True) if value is not None}
    try:
        config = DeepSpeedConfig(given)
    except Exception as error:  # noqa: BLE001 - whatever it refuses with
        said = " ".join(str(error).split())[:110]
        return f"refused: {type(error).__name__}: {said}"
    return " = ".join(
        (
            str(config.train_batch_size),
            f"{config.train_micro_batch_size_per_gpu} x {config.gradient_accumulation_steps} x 1",
        )
    )


def main() -> None:
    """Print what every combination comes to."""
    words = {
        ", ".join("-" if value is None else str(value) for value in stated): come_to(stated)
        for stated in COMBINATIONS
    }
    print(json.dumps(words, indent=1))


if __name__ == "__main__":
    main()
