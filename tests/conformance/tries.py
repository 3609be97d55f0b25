"""What cannot run on this machine, tried: the reason is what the framework itself says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Name to the environment it is tried in, and the program.
TRIES = {
    "Lightning FSDP": (
        "lightning",
        "import lightning\nlightning.Trainer(accelerator='cpu', strategy='fsdp', logger=False)",
    ),
    "SyncBatchNorm": (
        "torch",
        (
            "import torch\ntorch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, "
            "world_size=1)\ntorch.nn.SyncBatchNorm(4)(torch.randn(8, 4))"
        ),
    ),
    "Keras DataParallel on its torch backend": (
        "keras",
        (
            "import os\nos.environ['KERAS_BACKEND'] = 'torch'\nimport keras\n"
            "print(keras.distribution.list_devices())"
        ),
    ),
    "Accelerate FSDP2": (
        "transformers",
        (
            "import torch, accelerate\nplugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)\n"
            "made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)\n"
            "raise SystemExit(f'asked for FSDP on a CPU, it says distributed type {made.distributed_type.value}')"
        ),
    ),
}
# In no environment of `make envs`, so not tried by this script; the first two were installed once, and said this.
UNTRIED = {
    "Unsloth": "2026.10.7, on import: Unsloth cannot find any torch accelerator? You need a GPU.",
    "torchtitan": (
        "0.3.0: its Trainer asks for a GPU, and its language models take flex attention alone, which says: "
        "FlexAttention does not support backward on CPU"
    ),
    "DeepSpeed's ZeRO on several ranks, as a subject": (
        "ends in an error: every rank holds another stretch of one flat float32 parameter, whose place in the model "
        "DeepSpeed's own map alone tells, and what is set in it does not reach the module before DeepSpeed gathers"
    ),
}


def tried(envs: Path) -> dict[str, str]:
    """Return, for everything that cannot run, the last words of the try."""
    found = {}
    for name, (family, program) in TRIES.items():
        python = Path(sys.executable) if family == "torch" else envs / family / "bin" / "python"
        if not python.exists():
            found[name] = f"not tried: make env-{family}"
            continue
        done = subprocess.run(
            [python, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        words = done.stderr.strip().splitlines()[-1:] or ["it ran"]
        found[name] = " ".join(words[0].split())[:220]
    return found | UNTRIED
