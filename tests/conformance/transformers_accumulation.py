"""Print what every loss of TRL's trainers does under accumulation, without the engine, as JSON.

Relative difference of the first step's gradient, in float64, between one batch of B rows and K micro-batches of B / K:
no clip, no dropout, the rows in order. A loss that couples the rows of a batch by its definition says so.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from equivcheck.promotion import promoted
from fixtures.trainers import _transformers as shared
from fixtures.trainers._trl import answered, options, pairs, tokenizer, written

ROWS, K, GENERATIONS = 16, 4, 2
DPO = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
GRPO = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")
# What the library itself says of a loss whose gradient depends on how rows are put into batches.
STATED = {
    "DPO aot": "sorts the rows of a batch: they are coupled by definition",
    "DPO aot_unpaired": "sorts the rows of a batch: they are coupled by definition",
    "KTO kto": "takes its KL from the batch: rows are coupled by definition",
    "GRPO dapo, entropy bonus": "stated in its code: the bonus is a mean over each micro-batch",
    "GRPO bnpo": "documented as normalised over the local batch",
}


def rows() -> list[list[int]]:
    """Return ragged rows of tokens."""
    return shared.token_rows(_Rows(shared.batches(number=1, rows=ROWS)[0]["input_ids"]))


class _Rows:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}


def preferences() -> Dataset:
    """Return prompts with a better and a worse answer."""
    return Dataset.from_list(pairs(rows()))


def unpaired() -> Dataset:
    """Return prompts with one answer each, and whether it is a good one."""
    return Dataset.from_list(
        [
            {
                "prompt": each["prompt"],
                "completion": each["chosen" if index % 2 else "rejected"],
                "label": bool(index % 2),
            }
            for index, each in enumerate(pairs(rows()))
        ]
    )


def cases() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Return, for every loss, how its trainer is made from the arguments that all of them take."""

    def dpo(loss: str, given: dict[str, Any]) -> Any:
        smoothing = 0.1 if loss in {"robust", "exo_pair"} else 0.0
        arguments = DPOConfig(loss_type=[loss], label_smoothing=smoothing, **given)
        return DPOTrainer(
            shared.llama().double(),
            ref_model=shared.llama().double(),
            args=arguments,
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )

    def online(kind: Any, config: Any, given: dict[str, Any], **more: Any) -> Any:
        extra = {"rollout_func": answered} if kind is GRPOTrainer else {}
        size = given.pop("per_device_train_batch_size") * GENERATIONS
        arguments = config(
            per_device_train_batch_size=size,
            num_generations=GENERATIONS,
            shuffle_dataset=False,
            max_completion_length=16,
            **given,
            **more,
        )
        table = Dataset.from_list([{"prompt": written(row[:2])} for row in rows()])
        return kind(
            shared.llama().double(),
            reward_funcs=lambda completion_ids, **_: [float(sum(c) % 7) for c in completion_ids],
            args=arguments,
            train_dataset=table,
            processing_class=tokenizer(),
            **extra,
        )

    def offline(kind: Any, config: Any, table: Any, given: dict[str, Any], **more: Any) -> Any:
        model = shared.scorer() if kind is RewardTrainer else shared.llama()
        extra = {"ref_model": shared.llama().double()} if kind is KTOTrainer else {}
        return kind(
            model=model.double(),
            args=config(**given, **more),
            train_dataset=table(),
            processing_class=tokenizer(),
            **extra,
        )

    def plain() -> Dataset:
        return Dataset.from_list([{"input_ids": row} for row in rows()])

    found: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for loss in DPO:
        found[f"DPO {loss}"] = lambda given, loss=loss: dpo(loss, given)
    for loss in GRPO:
        level = "sequence" if loss == "luspo" else "token"
        found[f"GRPO {loss}"] = lambda given, loss=loss, level=level: online(
            GRPOTrainer, GRPOConfig, given, loss_type=loss, importance_sampling_level=level
        )
    for loss in ("kto", "apo_zero_unpaired"):
        found[f"KTO {loss}"] = lambda given, loss=loss: offline(
            KTOTrainer, KTOConfig, unpaired, given, loss_type=loss
        )
    for loss in ("sigmoid", "hinge", "ipo", "simpo"):
        found[f"CPO {loss}"] = lambda given, loss=loss: offline(
            CPOTrainer, CPOConfig, preferences, given, loss_type=loss
        )
    found["ORPO"] = lambda given: offline(ORPOTrainer, ORPOConfig, preferences, given)
    found["Reward"] = lambda given: offline(RewardTrainer, RewardConfig, preferences, given)
    found["GRPO dapo, entropy bonus"] = lambda given: online(
        GRPOTrainer, GRPOConfig, given, entropy_coef=0.1
    )
    found["RLOO"] = lambda given: online(RLOOTrainer, RLOOConfig, given, beta=0.0)
    for loss in ("nll", "dft"):
        found[f"SFT {loss}"] = lambda given, loss=loss: offline(
            SFTTrainer, SFTConfig, plain, given, loss_type=loss
        )
    return found


def gradient(make: Callable[[dict[str, Any]], Any], k: int) -> Tensor:
    """Return the gradient of the first optimizer step with K = `k` micro-batches, flat."""
    seen: list[Tensor] = []

    def note(optimizer: Any, *_: Any) -> None:
        held = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten().clone() for g in held if g is not None]))

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make({**options(folder, k, ROWS // k), "max_grad_norm": 0.0})
        handle = register_optimizer_step_pre_hook(note)
        try:
            # TRL names float32 in places; promoted, it computes in float64 there too.
            with promoted():
                shared.silenced(trainer).train()
        finally:
            handle.remove()
    return seen[0]


def main() -> None:
    """Print the relative difference of every loss, or what it raised."""
    disable_progress_bars()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    only = sys.argv[1:]
    found: dict[str, Any] = {}
    for name, make in cases().items():
        if only and not any(each in name for each in only):
            continue
        try:
            one, many = gradient(make, 1), gradient(make, K)
            value: Any = float((one - many).norm() / one.norm())
            if name in STATED:
                value = f"{value:.1e}; {STATED[name]}"
        except Exception as error:  # noqa: BLE001 - the reason stands in the table
            value = f"not run: {type(error).__name__}: {error}"[:200]
        print(name, value, file=sys.stderr)
        found[name] = value
    print(json.dumps(found))


if __name__ == "__main__":
    main()
