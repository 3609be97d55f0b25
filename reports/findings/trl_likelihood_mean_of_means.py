"""Show that the likelihood term of TRL's DPO (loss_type "sft"), CPO and ORPO depends on gradient accumulation.

    pip install trl
    python trl_likelihood_mean_of_means.py

The same 16 pairs, in the same order, in one batch of 16 and in 4 micro-batches of 4; the gradient before the first optimizer
step, without a clip. No dropout; the model is float64.
"""

import os
import tempfile

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SPECIAL = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
NAMES = [*SPECIAL.values(), *(f"w{token}" for token in range(3, 64))]
WORDS = Tokenizer(
    models.WordLevel({name: token for token, name in enumerate(NAMES)}, unk_token="<unknown>")
)
WORDS.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double()


def pairs(ragged):
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(16):
        length = 2 + 2 * (index // 4) if ragged else 6
        chosen, rejected = torch.randint(3, 64, (2, length), generator=generator).tolist()
        text = lambda tokens: "".join(f" w{token}" for token in tokens)
        found.append(
            {"prompt": f"w{3 + index}", "chosen": text(chosen), "rejected": text(rejected)}
        )
    return Dataset.from_list(found)


def gradient(kind, config, ragged, k, **options):
    seen = []

    def note(optimizer, *_):
        held = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([each.flatten() for each in held]).clone())

    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=16 // k,
            gradient_accumulation_steps=k,
            max_grad_norm=0.0,
            num_train_epochs=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            **options,
        )
        extra = {"ref_model": model()} if kind is DPOTrainer else {}
        words = PreTrainedTokenizerFast(tokenizer_object=WORDS, **SPECIAL)
        trainer = kind(
            model=model(),
            args=arguments,
            train_dataset=pairs(ragged),
            processing_class=words,
            **extra,
        )
        handle = register_optimizer_step_pre_hook(note)
        trainer.train()
        handle.remove()
    return seen[0]


CASES = {
    'DPO, loss_type "sigmoid"': (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid"]}),
    'DPO, loss_type "sft"': (DPOTrainer, DPOConfig, {"loss_type": ["sft"]}),
    "DPO, MPO's three": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "bco_pair", "sft"]}),
    "CPO": (CPOTrainer, CPOConfig, {}),
    "ORPO": (ORPOTrainer, ORPOConfig, {}),
}
print("| loss | answers of one length | answers of 2 to 8 tokens |\n| --- | --- | --- |")
for name, (kind, config, options) in CASES.items():
    cells = []
    for ragged in (False, True):
        one, four = (gradient(kind, config, ragged, k, **options) for k in (1, 4))
        cells.append(f"{(one - four).norm() / one.norm():.1e}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
