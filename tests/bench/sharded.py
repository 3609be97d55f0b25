"""Measure the memory of ranks that check a model sharded over them, beside the same training without a check.

    python tests/bench/sharded.py [HIDDEN]

Four ranks train a perceptron of some thirty million float64 parameters, sharded by `fully_shard`, with AdamW. The peak
of each rank is taken from the moment at which the model is sharded: until then the loop itself holds all of it.
Gradients are reduced in every micro-batch, since what is not reduced yet is as large as the model, whoever looks on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

RANKS = 4

LOOP = '''
import os, re
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

STATUS = Path("/proc/self/status")


def field(name):
    """Return a size of this process in bytes."""
    return 1024 * int(re.search(name + r":\\s+(\\d+)", STATUS.read_text()).group(1))


def build():
    start = Path(OUT, f"start-{os.getpid()}")
    if not start.exists():
        start.write_text(str(field("VmRSS")))
    return nn.Sequential(*(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(LAYERS)))


def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(16, HIDDEN, generator=g) for _ in range(2)]


def train(model, loader, accumulation_steps, rank, world_size):
    if world_size > 1:
        for block in model:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for i, x in enumerate(loader):
        (model(x).square().mean() / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    if world_size > 1:
        start = int(Path(OUT, f"start-{os.getpid()}").read_text())
        with Path(OUT, f"rank-{rank}").open("a") as file:
            file.write(f"{field('VmHWM') - start}\\n")
'''


def written(folder: Path, out: Path, hidden: int, layers: int) -> Path:
    """Write the loop, and return its file."""
    path = folder / "loop.py"
    path.write_text(
        f"OUT, HIDDEN, LAYERS = {str(out)!r}, {hidden}, {layers}\n" + LOOP, encoding="utf-8"
    )
    return path


def numbers(out: Path) -> list[int]:
    """Return, per rank, the largest number of bytes above what it had before the first model was built."""
    return [max(map(int, (out / f"rank-{rank}").read_text().split())) for rank in range(RANKS)]


def bare(rank: int, path: Path, folder: str) -> None:
    """Train without any check, in float64, as one of four ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    spec = importlib.util.spec_from_file_location("loop", path)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = loop.build()
    loader = [
        x.double()[4 * rank : 4 * rank + 4][2 * k : 2 * k + 2]
        for x in loop.batches()
        for k in range(2)
    ]
    loop.train(model, loader, 2, rank, RANKS)
    sys.stdout.flush()
    os._exit(0)


def main(hidden: int = 1600, layers: int = 12) -> dict[str, object]:
    """Return what was measured, in bytes."""
    import multiprocessing

    import equivcheck

    # Freed tensors go back to the system at once, so that what is resident is what is held (mallopt(3)).
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    parameters = layers * (hidden * hidden + hidden)
    with tempfile.TemporaryDirectory() as folder:
        checked, plain = Path(folder) / "checked", Path(folder) / "plain"
        for each in (checked, plain):
            each.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch._dynamo"])
        path = written(plain, plain, hidden, layers)
        ranks = [context.Process(target=bare, args=(r, path, folder)) for r in range(RANKS)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        path = written(checked, checked, hidden, layers)
        [case] = equivcheck.measure(
            str(path), accumulation_steps=2, world_size=RANKS, strategy="fsdp", optimizer_steps=2
        ).cases
        if case["verdict"] == "error":
            raise SystemExit(json.dumps(case["error"], indent=1))
        return {
            "verdict": case["verdict"],
            "headline": case["headline"],
            "parameters": parameters,
            "whole": 8 * parameters,
            "share": 8 * parameters // RANKS,
            "bare": numbers(plain),
            "checked": numbers(checked),
            "parent_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "seconds": case["seconds"],
        }


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:])), indent=1))
