"""What a rank needs of torch, imported once in the fork server: each rank then starts in milliseconds.

Nothing is computed here: a server that has run a kernel may hold threads that a fork does not copy.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

NAMES = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch.distributed.optim",
    "torch.distributed.pipelining",
    "torch.nn.parallel",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.algorithms.join",
    "equivcheck.execute",
    "equivcheck.ranks.worker",
)

for _name in NAMES:
    with suppress(ImportError):  # A torch built without some of it serves what it has.
        importlib.import_module(_name)
