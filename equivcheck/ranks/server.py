"""Start processes of ours, ranks and workers, from a server that has torch loaded already.

Not by fork of this process, which may hold threads, a GPU or a test runner's state; not by spawn, which loads torch
again in each rank (1.4 s for two ranks, against 0.1 s).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Final

# What a process has loaded when it starts; whoever starts the server says what else. A process has one server.
PRELOAD: Final = ("equivcheck.ranks.preload",)


@functools.cache
def _context(preload: tuple[str, ...]) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def start_server(preload: tuple[str, ...] = PRELOAD) -> ForkServerContext:
    """Start the server, if it does not run; it loads torch while this process goes on."""
    context = _context(preload)
    with _without_main(), _elsewhere():
        forkserver.ensure_running()
    return context


def start(
    target: Callable[..., None],
    *args: Any,
    preload: tuple[str, ...] = PRELOAD,
    daemon: bool = True,
) -> ForkServerProcess:
    """Return a started process that calls a function of ours.

    Args:
        target: The function, by name.
        args: Its arguments, which travel by pickle through a pipe.
        preload: What the server loads, if it is not there yet.
        daemon: The process starts no others, and ends with this one.
    """
    process = start_server(preload).Process(target=target, args=args, daemon=daemon)
    with _without_main():
        process.start()
    return process


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Keep a file of the user's (random.py, torch.py) from being imported by the server in place of a module."""
    here = Path.cwd()
    os.chdir(Path(here.anchor))
    try:
        yield
    finally:
        os.chdir(here)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from executing the caller's script again in every process."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
