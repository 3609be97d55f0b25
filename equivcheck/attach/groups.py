"""Keep process groups that a script has destroyed in memory until the process ends.

torch 2.13 deadlocks where `destroy_process_group` comes first and a DistributedDataParallel that still holds the group
is freed after it, as at the end of a `main()`: the destructor of the group waits for gloo's thread, which waits for the
interpreter's lock. A script that is run eight times in two processes would meet it sooner or later.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from equivcheck.hooks.base import replace

__all__ = ["never_freed"]


def never_freed(stack: ExitStack) -> None:
    """Hold every process group for good before the script destroys it; it is destroyed all the same."""
    if not dist.is_available():
        return
    from torch.distributed import distributed_c10d  # noqa: PLC0415 - not in every build of torch

    original = distributed_c10d.destroy_process_group

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        for group in list(distributed_c10d._world.pg_map):  # noqa: SLF001 - the one list of groups
            # A reference of Python's own would go with the interpreter, and the group in the midst of its end.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        original(*args, **kwargs)

    for module in (dist, distributed_c10d):
        replace(stack, module, "destroy_process_group", destroy_process_group)
