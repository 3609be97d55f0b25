"""Measure what ranks send each other per optimizer step, loop by loop, and write it as a table.

Counted by gloo's flight recorder, which needs no change to the loop: name and tensors of every collective. The numbers
are counts and sizes, not times, so they are the same on every machine. P = parameters, R = ranks, K = micro-batches.

    python tests/bench/traffic.py reports/traffic.json reports/traffic.md
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parents[2]
LOOPS = {
    "DDP, every micro-batch": "ddp.sync_every",
    "DDP, no_sync": "ddp.token_weighted",
    "ZeroRedundancyOptimizer, no_sync": "zero.bucket_view",
    "FSDP1, every micro-batch": "fsdp.fsdp1_sync_every",
    "FSDP1, no_sync": "fsdp.fsdp1",
    "FSDP1 SHARD_GRAD_OP, no_sync": "fsdp.fsdp1_grad_op",
    "FSDP2, every micro-batch": "fsdp.fsdp2_sync_every",
    "FSDP2, without communication": "fsdp.fsdp2",
    "FSDP2, without communication or resharding": "fsdp.fsdp2_no_reshard",
}
PROSE = """\
# What ranks send each other per optimizer step

Measured by `make traffic` on gloo with torch 2.13.0, and measured again by the tests: counts of collectives and the
bytes of the whole tensors in them, for a GPT of P = 9576 float32 parameters (38,304 bytes) with one block. R ranks,
K micro-batches. A count of tokens, one number, is left out.

- DDP reduces once per cycle under no_sync and K times without: K times the bytes (C19).
- "FSDP without communication: 0" does not hold. One reduction of all parameters remains per cycle; what is saved is
  the K - 1 others. And unless parameters stay gathered they are gathered again for every micro-batch: by FSDP2 the
  block for forward and backward and the root once, 3 K times; by FSDP1 with one unit K times. The price of saving the
  reductions is that every rank keeps whole gradients in between (C22, C23).
- With parameters kept gathered (no resharding, SHARD_GRAD_OP) it is one reduction and one gathering per unit and
  cycle, whatever K is.
- gloo has no reduce-scatter: FSDP's appears as an all-reduce. On a ring an all-reduce moves 2 (R - 1)/R bytes per
  byte, an all-gather or a reduce-scatter half of that.
"""
POINTS = ((2, 2), (2, 4), (4, 4))
_SIZES = {"Float": 4, "Long": 8, "Int": 4, "Byte": 1, "Double": 8}
_PATIENCE = 120.0


def measured(name: str, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """Return what rank 0 takes part in during the second optimizer step, after all set-up.

    Returns:
        {"parameters": P, "collectives": {kind: [count, bytes]}, "sequence": count by the group's own number}.
        Bytes are those of the whole tensor: what is reduced, broadcast, or gathered. Counts of tokens
        and losses (single numbers) are left out, and stand under "scalars".
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.nn.parallel"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(name, rank, world_size, accumulation_steps, folder))
            for rank in range(world_size)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(_PATIENCE)
            if each.is_alive():
                each.kill()
        found: dict[str, Any] = json.loads(Path(folder, "found").read_text(encoding="utf-8"))
    return found


def _rank(name: str, rank: int, world_size: int, accumulation_steps: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    subject = importlib.import_module(f"fixtures.trainers.{name}")
    torch.manual_seed(0)
    model = subject.build()
    parameters = sum(p.numel() for p in model.parameters())
    shares = [
        {key: value.tensor_split(world_size)[rank] for key, value in batch.items()}
        for batch in subject.batches()[:2] * 2
    ]
    loader = [
        {key: value.tensor_split(accumulation_steps)[k] for key, value in share.items()}
        for share in shares
        if len(next(iter(share.values()))) >= accumulation_steps
        for k in range(accumulation_steps)
    ]
    marks: list[tuple[int, int]] = []

    def mark(*_: object) -> None:
        group = dist.group.WORLD
        marks.append((len(_entries()), group._get_sequence_number_for_group()))

    register_optimizer_step_post_hook(mark)
    subject.train(
        model=model, loader=loader, accumulation_steps=accumulation_steps, world_size=world_size
    )
    steps = len(loader) // accumulation_steps
    every = len(marks) // steps  # ZeRO's optimizer holds one of the usual kind, which steps too.
    (start, before), (stop, after) = marks[-1 - every], marks[-1]
    if rank == 0:
        found: dict[str, Any] = {"parameters": parameters, "sequence": after - before}
        found |= _counted(_entries()[start:stop])
        Path(folder, "found").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # torch 2.13 may hang while a DDP object and its group are taken down


def _entries() -> list[dict[str, Any]]:
    trace = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())
    return trace.get("entries", [])


def _counted(entries: list[dict[str, Any]]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    scalars = 0
    for entry in entries:
        kind = entry["profiling_name"].removeprefix("gloo:")
        shapes, dtypes = entry["output_sizes"], entry["output_dtypes"]
        elements = [int(torch.Size(shape).numel()) for shape in shapes]
        if max(elements) == 1:
            scalars += 1
            continue
        counts[kind] += 1
        sizes[kind] += sum(
            number * _SIZES[dtype] for number, dtype in zip(elements, dtypes, strict=True)
        )
    collectives = {kind: [counts[kind], sizes[kind]] for kind in sorted(counts)}
    return {"collectives": collectives, "scalars": scalars}


def table(found: list[dict[str, Any]]) -> str:
    """Return the measurements as a Markdown table; bytes in units of all parameters in float32."""
    kinds = ("all_reduce", "all_gather", "broadcast")
    lines = [
        "| loop | R | K | " + " | ".join(kind.replace("_", "-") for kind in kinds) + " | bytes |",
        "| --- | --- | --- |" + " --- |" * (len(kinds) + 1),
    ]
    for row in found:
        whole = 4 * row["parameters"]
        cells = []
        for kind in kinds:
            count, size = row["collectives"].get(kind, (0, 0))
            cells.append(f"{count} ({size / whole:.2g} P)" if count else "0")
        total = sum(size for _, size in row["collectives"].values())
        place = f"{row['loop']} | {row['world_size']} | {row['accumulation_steps']}"
        lines.append(f"| {place} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines)


def _row(loop: str, ranks: int, steps: int) -> dict[str, Any]:
    point = {"loop": loop, "world_size": ranks, "accumulation_steps": steps}
    return {**point, **measured(LOOPS[loop], ranks, steps)}


def main() -> None:
    """Measure all loops at all points and write the JSON and the page named; `--one LOOP R K` prints one point."""
    if sys.argv[1:2] == ["--one"]:
        loop, ranks, steps = sys.argv[2:]
        print(json.dumps(_row(loop, int(ranks), int(steps))))
        return
    found = [_row(loop, *point) for loop in LOOPS for point in POINTS]
    print(table(found))
    if len(sys.argv) > 2:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        Path(sys.argv[2]).write_text(f"{PROSE}\n{table(found)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
