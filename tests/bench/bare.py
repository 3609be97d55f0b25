"""A subject of a given size, its case, and the same five runs without the engine.

Run as a script it makes one of these in a process of its own and prints seconds and peak memory:
`python tests/bench/bare.py FILE K case|bare|reference|control|candidate|...`.

K accumulation steps.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equivcheck.case import Case
from equivcheck.casting import promote_module, promote_tree
from equivcheck.decide import run_case
from equivcheck.feed import Feed, read_batches
from equivcheck.promotion import promoted
from equivcheck.split import block_permutation, plan
from equivcheck.subject import Subject, load_subject

ROLES = ("reference", "control", "candidate", "native_reference", "native_candidate")

SUBJECT = """
import torch
from torch import nn

def build():
    wide = {width}
    layers = [nn.Linear(512, wide), nn.GELU()]
    for _ in range({depth}):
        layers += [nn.LayerNorm(wide), nn.Linear(wide, wide), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(wide, 10))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {{
            "x": torch.randn({rows}, 512, generator=generator),
            "y": torch.randint(10, ({rows},), generator=generator),
        }}
        for _ in range(2)
    ]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    micro_batches = iter(loader)
    for first in micro_batches:
        cycle = [first] + [next(micro_batches) for _ in range(accumulation_steps - 1)]
        optimizer.zero_grad()
        for batch in cycle:
            loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
            (loss / {rows}).backward()
        optimizer.step()
"""


def write_subject(folder: Path, width: int, depth: int, rows: int) -> Path:
    """Write the file of an MLP with `depth` square layers that trains on `rows` rows, twice."""
    path = folder / f"mlp_{width}_{depth}_{rows}.py"
    path.write_text(SUBJECT.format(width=width, depth=depth, rows=rows), encoding="utf-8")
    return path


def case(subject: Subject, accumulation_steps: int) -> dict[str, Any]:
    """Decide the case."""
    result = run_case(subject, Case(subject.target, accumulation_steps))
    assert result["verdict"] == "equivalent", result["headline"]
    return result


def bare(subject: Subject, accumulation_steps: int, roles: tuple[str, ...] = ROLES) -> None:
    """Make the runs of a case with nobody looking: no hooks, nothing kept, nothing compared."""
    data = read_batches(subject.fresh().batches, 8)
    cuts = [cycle[0] for cycle in plan(data.rows, accumulation_steps, "even")]
    full, permuted, micro = [], [], []
    for batch, slices in enumerate(cuts):
        rows = [data.start(batch) + row for row in range(data.rows[batch])]
        full.append(rows)
        permuted.append([rows[row] for row in block_permutation(slices, 0)])
        micro += [rows[start:stop] for start, stop in slices]
    high = None
    for role in roles:
        code = subject.fresh()
        torch.manual_seed(0)
        model = code.build()
        steps = accumulation_steps if "candidate" in role else 1
        order = micro if steps > 1 else permuted if role == "control" else full
        if role.startswith("native"):
            code.train(model, Feed(data, order).loader(), steps)
            continue
        if high is None:
            high = type(data)([promote_tree(batch) for batch in data.batches], data.rows)
        promote_module(model)
        with promoted(torch.float32):
            code.train(model, Feed(high, order).loader(), steps)


def main(path: str, accumulation_steps: str, what: str) -> None:
    subject = load_subject(path)
    start = time.perf_counter()
    if what == "case":
        case(subject, int(accumulation_steps))
    else:
        bare(subject, int(accumulation_steps), ROLES if what == "bare" else (what,))
    seconds = time.perf_counter() - start
    # Not ru_maxrss, in which a process begins with what its parent had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024
    print(f"{seconds:.4f} {peak:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
