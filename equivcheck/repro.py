"""Write one failing case as a script that stands alone: the code under test, its rows as numbers, one assertion.

The script needs torch and whatever the code under test imports. Nothing in it is pickled: tensors are literals.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from equivcheck.case import Case
from equivcheck.report import words
from equivcheck.result import write_text

MARK = "# Written by equivcheck search."
# More numbers than this are no tiny batch: the script then calls the subject's own batches() and takes the rows.
MOST_NUMBERS = 50_000
# Rounding of a float64 and of a float32 sum, the latter twice what a correct loop measures (README).
NOISE = {True: 1e-15, False: 1e-6}
SECONDS = 300.0


@dataclass(frozen=True)
class Sources:
    """Where the code under test is.

    Attributes:
        target: What the user typed.
        train: `FILE:ATTR` of another training loop, or None.
    """

    target: str
    train: str | None = None


def write(path: Path, sources: Sources, case: Mapping[str, Any]) -> tuple[bool, str]:
    """Write the script, run it, and return what it said; in float64 first, else as written.

    Args:
        path: Where it goes.
        sources: The code under test, which is text that a command line would take.
        case: The failing case.

    Returns:
        Whether the script is there and fails as it should; and the last line of its error, "" if the two runs agree in
        plain torch.
    """
    said = ""
    for precise in (True, False):
        write_text(path, script(sources, case, precise=precise))
        said = error_of(path)
        if said.startswith("AssertionError: "):
            return True, said.removeprefix("AssertionError: ")
    path.unlink()
    return False, said


def error_of(path: Path) -> str:
    """Run a script of ours and return the last line of its error, "" if there is none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(  # noqa: S603 - the script that was just written, by this very Python
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS:g} s"
    return next(iter(reversed(ended.stderr.strip().splitlines())), "") if ended.returncode else ""


def script(sources: Sources, case: Mapping[str, Any], *, precise: bool) -> str:
    """Return the script.

    Args:
        sources: The code under test.
        case: The failing case.
        precise: Whether to compute in float64.
    """
    from equivcheck.execute import process_state, seed_all  # noqa: PLC0415 - torch is loaded to run
    from equivcheck.feed import read_batches  # noqa: PLC0415 - as above
    from equivcheck.split import plan  # noqa: PLC0415 - as above
    from equivcheck.subject import load_subject  # noqa: PLC0415 - as above

    what = Case.from_dict(case)
    with process_state():
        seed_all(what.seed)
        subject = load_subject(sources.target, sources.train)
        seed_all(what.seed)
        code = subject.fresh()
        seed_all(what.seed)
        data = read_batches(code.batches, what.optimizer_steps, what.rows)
    cuts = [cycle[0] for cycle in plan(data.rows, what.accumulation_steps, what.split)]
    far = words.farthest(case)
    size = far[1] if far and far[1] and math.isfinite(far[1]) else 1.0
    limit = math.sqrt(min(size, 1.0) * NOISE[precise])
    return _TEMPLATE.format(
        mark=MARK,
        headline=words.headline(case).replace('"""', "'''").replace("\\", "/"),
        case=f"{sources.target}  {words.label(case)}",
        code=_code(sources),
        batches=_batches(data.batches, what.rows),
        cuts=repr(cuts),
        seed=what.seed,
        precise=precise,
        limit=f"{limit:.0e}",
        k=what.accumulation_steps,
        precision=what.precision,
        found=f"{size:.1e}",
    )


# ---- the code under test -----------------------------------------------------------------------


def _code(sources: Sources) -> str:
    lines = [_one(sources.target, "subject")]
    if sources.train is None:
        lines.append("train = subject.train")
    else:
        place, _, attribute = sources.train.partition(":")
        lines += [_one(place, "other"), f"train = other.{attribute or 'train'}"]
    return "\n".join(lines)


def _one(target: str, name: str) -> str:
    """Return lines that load a target: its text, or its path where it imports from its own folder."""
    place, _, attribute = target.partition(":")
    is_file = place.endswith(".py") or "/" in place
    pick = f".{attribute}" if attribute else ""
    made = f"\n{name} = {name}() if isinstance({name}, type) else {name}"
    if is_file:
        path = Path(place).resolve()
        text = path.read_text(encoding="utf-8")
        if not _imports_neighbours(text, path.parent):
            return f"{name} = load({path.stem!r}, {_literal(text)}){pick}{made}"
        root, module = path.parent, path.stem
        while (root / "__init__.py").is_file():
            root, module = root.parent, f"{root.name}.{module}"
    else:
        root, module = Path.cwd(), place
    return f"sys.path.insert(0, {str(root)!r})\n{name} = importlib.import_module({module!r}){pick}{made}"


def _imports_neighbours(text: str, folder: Path) -> bool:
    """Return whether a file imports others of its folder; its text alone would not do then."""
    import ast  # noqa: PLC0415 - needed for this alone

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            return True
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for each in names:
            first = each.split(".")[0]
            if (folder / f"{first}.py").is_file() or (folder / first / "__init__.py").is_file():
                return True
    return "__file__" in text  # it looks for something beside itself


def _literal(text: str) -> str:
    """Return source code as a literal that can be read, if quotes and backslashes allow it."""
    if "'''" in text or text.endswith("'") or "\r" in text or "\0" in text:
        return repr(text)
    if text.endswith("\\"):
        return repr(text)
    return f"r'''\n{text}'''" if not text.startswith("\n") else f"r'''{text}'''"


# ---- the batches -------------------------------------------------------------------------------


def _batches(batches: list[Any], rows: str | None) -> str:
    """Return the batches as literals; or lines that take them from the subject, where they are large or strange."""
    from equivcheck.rows import parse  # noqa: PLC0415 - small, but used here only
    from equivcheck.split import tensors_in  # noqa: PLC0415 - torch is loaded to run

    numbers = sum(tensor.numel() for batch in batches for tensor in tensors_in(batch))
    if numbers <= MOST_NUMBERS:
        try:
            shown = ",\n".join("    " + _value(batch, 4) for batch in batches)
        except TypeError:
            pass
        else:
            return f"BATCHES = [\n{shown},\n]"
    chosen = parse(rows) if rows else [(i, None) for i in range(len(batches))]
    return (
        "torch.manual_seed(SEED)\n"
        "every = list(subject.batches())  # as they are: too many numbers, or other types, to be written here\n"
        f"BATCHES = [take(every[batch], rows) for batch, rows in {chosen!r}]"
    )


def _value(value: Any, indent: int) -> str:
    import numpy as np  # noqa: PLC0415 - torch is loaded to run
    import torch  # noqa: PLC0415 - as above

    inner = " " * (indent + 4)
    if isinstance(value, torch.Tensor):
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise TypeError(value.dtype)
        return f"torch.tensor({_numbers(value.tolist())}, dtype={value.dtype})"
    if isinstance(value, np.ndarray):
        return f"torch.tensor({_numbers(value.tolist())}, dtype=torch.{value.dtype}).numpy()"
    if isinstance(value, Mapping) and type(value) is dict:
        items = [f"{inner}{key!r}: {_value(item, indent + 4)},\n" for key, item in value.items()]
        return "{\n" + "".join(items) + " " * indent + "}"
    if type(value) in (list, tuple):
        items = [_value(item, indent) for item in value]
        return f"[{', '.join(items)}]" if type(value) is list else f"({', '.join(items)},)"
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if type(value) is float:
        return _numbers(value)
    raise TypeError(f"{type(value)}, dataclass {is_dataclass(value)}")


def _numbers(value: Any) -> str:
    """Return nested lists of numbers; infinities and nan as Python reads them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_numbers, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


_TEMPLATE = '''\
{mark}
"""{headline}

The smallest failing case of {case}
It fails while the fault is there: python repro.py. It needs torch, and what the training code imports.
"""

import importlib
import inspect
import linecache
import sys
import types

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

SEED = {seed}
ACCUMULATION_STEPS = {k}
PRECISE = {precise}  # float64: what differs is then no rounding
LIMIT = {limit}  # between rounding and the {found} that was found, in the middle of the decades


def load(name, text):
    """Execute the code under test, which stands below as it was."""
    module = types.ModuleType(name)
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    sys.modules[name] = module
    exec(compile(text, name, "exec"), module.__dict__)
    return module


def take(value, rows):
    """Return some rows of a batch in any nesting; None is all of them."""
    if isinstance(value, dict):
        return {{key: take(item, rows) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        items = [take(item, rows) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if getattr(value, "ndim", 0) == 0 or rows is None:
        return value
    return value[rows]


def convert(value):
    """Return floats in float64."""
    if isinstance(value, dict):
        return {{key: convert(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        items = list(map(convert, value))
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


torch.manual_seed(SEED)
{code}

{batches}
# Rows of every micro-batch of every full batch.
CUTS = {cuts}


def count(batch):
    """Return the rows of a batch."""
    if isinstance(batch, (dict, list, tuple)):
        items = batch.values() if isinstance(batch, dict) else batch
        return next((found for found in map(count, items) if found), 0)
    return len(batch) if getattr(batch, "ndim", 0) else 0


def run(accumulate):
    """Train with full batches, or with micro-batches; return what can be compared."""
    torch.manual_seed(SEED)
    model = subject.build()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    batches = BATCHES
    if PRECISE:
        model, batches = model.double(), [convert(batch) for batch in BATCHES]
    served = batches
    if accumulate:
        served = [
            take(batch, slice(*rows)) for batch, cut in zip(batches, CUTS) for rows in cut
        ]
    sizes = [count(batch) for batch in served]
    offers = {{
        "model": model,
        "loader": torch.utils.data.DataLoader(served, batch_size=None, collate_fn=lambda batch: batch),
        "dataset": [
            take(batch, row) for batch in batches for row in range(count(batch))
        ],
        "accumulation_steps": ACCUMULATION_STEPS if accumulate else 1,
        "micro_batch_size": max(sizes),
        "optimizer_steps": len(BATCHES),
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "strategy": "none",
        "precision": {precision!r},
    }}
    gradients = []

    def observe(*_):
        found = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.to_dense().detach().double().flatten() for g in found]))

    hook = register_optimizer_step_pre_hook(observe)
    torch.manual_seed(SEED + 1)
    wanted = inspect.signature(train).parameters
    logged = train(**{{name: offers[name] for name in wanted if name in offers}})
    logged = list(logged) if hasattr(logged, "__next__") else logged
    hook.remove()
    state = [v.detach().double().flatten() for v in model.state_dict().values() if torch.is_tensor(v)]
    found = {{
        "number of optimizer steps": torch.tensor([float(len(gradients))]),
        "gradients of the first step": gradients[0] if gradients else torch.zeros(1),
        "parameters and buffers at the end": torch.cat(state),
    }}
    if isinstance(logged, (list, tuple)) and logged and isinstance(logged[0], (float, torch.Tensor)):
        found["losses returned"] = torch.tensor([float(each) for each in logged]).double()
    return found


full, accumulated = run(accumulate=False), run(accumulate=True)
worst, where = 0.0, ""
for name, truth in full.items():
    other = accumulated.get(name, torch.zeros(0))
    same = other.shape == truth.shape
    relative = float((other - truth).norm() / truth.norm().clamp_min(1e-300)) if same else float("inf")
    print(f"{{name:<36}} relative difference {{relative:.1e}}")
    if not relative <= worst:
        worst, where = relative, name
print("limit", LIMIT)
assert worst < LIMIT, f"{{where}} differ by {{worst:.1e}}, full against accumulated (K={{ACCUMULATION_STEPS}})"
print("full and accumulated runs agree")
'''
