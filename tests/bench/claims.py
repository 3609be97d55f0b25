"""What is claimed of accumulation, with numbers: writes reports/claims.md and reports/cosine.svg.

The table is made from the rows of the suites that bear witness to a claim, each at one cut; what is no matter of
equivalence (memory, time, variance, curves) is measured here.

K accumulation steps, N rows of a full batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from equivcheck.api import Job, outcomes, plan
from equivcheck.config import OPTIONS
from equivcheck.report import words
from equivcheck.suite import read_suite

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fixtures.batches import digits, text  # noqa: E402 - fixtures are no installed package
from fixtures.losses import CrossEntropy, Tokens  # noqa: E402
from fixtures.models.gpt import GPT  # noqa: E402
from fixtures.models.normed import Normed  # noqa: E402
from fixtures.suite_trainers import naive, per_micro_batch, standard  # noqa: E402

UPDATES = 1000


def witnesses(targets: list[str]) -> Iterator[tuple[tuple[str, ...], Job]]:
    """Yield a job for each row that names a claim: at K=4 where it has that, else at its first cut."""
    values = {name: option.default for name, option in OPTIONS.items()}
    for target in targets:
        rows = read_suite(target).workloads
        jobs, _ = plan([target], values, explicit=False)
        for name, row in rows.items():
            own = [job for job in jobs if job.case.workload == name]
            if row.claims:
                four = [job for job in own if job.case.accumulation_steps == 4]
                yield row.claims, (four or own)[0]


def line(claims: tuple[str, ...], case: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    shown = " | ".join(
        [
            ", ".join(claims),
            f"{case['target'].split('/')[-1]} {words.label(case)}",
            case["theory"]["found"],
            " ".join(words.codes(case)) or "-",
            words.number(gradients.get("relative")),
            words.factor(gradients.get("scale")),
            case["theory"]["source"].replace("|", "/"),
        ]
    )
    return f"| {shown} |"


def activation_bytes(accumulation_steps: int, rows: int = 64) -> int:
    """Return the most bytes that autograd keeps at once for one update."""
    model = Normed("layer")
    [batch] = digits.classification(1, rows)
    most = 0
    for part in batch["x"].chunk(accumulation_steps):
        kept = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor._base is None:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            model(part).logsumexp(1).sum().backward()
        most = max(most, sum(kept.values()))
    return most


def seconds_per_update(accumulation_steps: int, rows: int = 512) -> float:
    """Return the least CPU time of five updates of 512 rows, in seconds."""
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 10))
    [batch] = digits.classification(1, rows)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        parts = zip(*(batch[name].chunk(accumulation_steps) for name in "xy"), strict=True)
        for x, y in parts:
            (functional.cross_entropy(model(x), y) / accumulation_steps).backward()
        model.zero_grad()
        best = min(best, time.process_time() - began)
    return best


def gradient_variance(rows: int, accumulation_steps: int, draws: int = 100) -> float:
    """Return the variance of the gradient of `rows` digits drawn with replacement, summed over parameters."""
    torch.manual_seed(0)
    model = Normed("layer").double()
    [batch] = digits.classification(1, 1024)
    found = []
    for _ in range(draws):
        chosen = torch.randint(1024, (rows,))
        model.zero_grad()
        for part in chosen.chunk(accumulation_steps):
            loss = functional.cross_entropy(model(batch["x"][part].double()), batch["y"][part])
            (loss * len(part) / rows).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return float(torch.stack(found).var(0).sum())


def curve(train: Any, accumulation_steps: int, updates: int = 100) -> list[float]:
    """Return the full batch's loss before each update of training on ragged text, in float64."""
    torch.manual_seed(0)
    model, loss = GPT().double(), Tokens()
    [batch] = text.causal(1, 16)
    micro = [
        {name: tensor.chunk(accumulation_steps)[i] for name, tensor in batch.items()}
        for i in range(accumulation_steps)
    ]
    seen = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        stepper = torch.optim.SGD(parameters, lr=0.5)
        stepper.register_step_pre_hook(lambda *_: seen.append(float(loss(model, batch).detach())))
        return stepper

    more = {"scheduler": lambda _: None, "max_norm": None, "precision": "native"}
    given = more if train is standard.train else {}
    result = train(model, micro * updates, accumulation_steps, loss, optimizer, **given)
    list(result or ())
    return seen


def cosine_rates(train: Any, accumulation_steps: int = 4) -> list[float]:
    """Return the learning rate of each of 1000 updates under a cosine of 1000 steps."""
    torch.manual_seed(0)
    rates: list[float] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        stepper = torch.optim.SGD(parameters, lr=0.1)
        stepper.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
        return stepper

    def scheduler(stepper: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            stepper,
            lambda step: (
                0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(step / UPDATES, 1))).item())
            ),
        )

    batch = {"x": torch.zeros(1, 2), "y": torch.zeros(1, dtype=torch.long)}
    more = {"max_norm": None, "precision": "native"} if train is standard.train else {}
    loader = [batch] * (UPDATES * accumulation_steps)
    result = train(
        nn.Linear(2, 2), loader, accumulation_steps, CrossEntropy(), optimizer, scheduler, **more
    )
    list(result or ())
    return rates


def plot(right: list[float], wrong: list[float]) -> str:
    """Return both learning rates over the updates as SVG."""

    def path(rates: list[float]) -> str:
        points = (f"{60 + i * 0.5:.1f},{220 - rate * 1900:.1f}" for i, rate in enumerate(rates))
        return " ".join(list(points)[::5])

    ticks = "".join(
        f'<text x="{60 + i * 0.5}" y="240" text-anchor="middle">{i}</text>'
        for i in (0, 250, 500, 1000)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 270" font-family="sans-serif" font-size="12">\n'
        "<title>A cosine of 1000 optimizer steps at K=4</title>\n"
        '<rect width="600" height="270" fill="white"/>\n'
        f'<polyline fill="none" stroke="#0072b2" stroke-width="2" points="{path(right)}"/>\n'
        f'<polyline fill="none" stroke="#d55e00" stroke-width="2" stroke-dasharray="6 3" points="{path(wrong)}"/>\n'
        '<path d="M60 20V220H570" fill="none" stroke="black"/>\n'
        f'{ticks}<text x="310" y="262" text-anchor="middle">optimizer step</text>\n'
        '<text x="12" y="34">0.1</text><text x="12" y="222">rate 0</text>\n'
        '<text x="330" y="90" fill="#0072b2">once per optimizer step</text>\n'
        '<text x="190" y="205" fill="#d55e00">per micro-batch: through after 250</text>\n'
        "</svg>\n"
    )


def measured() -> str:
    """Return what is measured here, as Markdown."""
    memory = {k: activation_bytes(k) for k in (1, 2, 4, 8)}
    times = {k: seconds_per_update(k) for k in (1, 2, 4, 8)}
    variances = {n: (gradient_variance(n, 1), gradient_variance(n, 4)) for n in (16, 32, 64, 128)}
    full, fixed, wrong = (
        curve(standard.train, 1),
        curve(standard.train, 4),
        curve(naive.train, 4),
    )
    right, ahead = cosine_rates(standard.train), cosine_rates(per_micro_batch.schedule)
    (ROOT / "reports" / "cosine.svg").write_text(plot(right, ahead), encoding="utf-8")
    through = next(i for i, rate in enumerate(ahead) if rate < 1e-6)
    apart = max(abs(a - b) for a, b in zip(full, fixed, strict=True))
    gap = max(abs(a - b) for a, b in zip(full, wrong, strict=True))
    [full_batch] = digits.classification(1, 16)
    lines = [
        f"| C1 | samples of an update: micro-batches of 4, K = 4, one device | {len(full_batch['y'])} |",
        *(
            f"| C6 | bytes kept for the backward, 64 rows, K = {k} | {b} |"
            for k, b in memory.items()
        ),
        *(
            f"| C7 | CPU time of an update of 512 rows, K = {k}, over K = 1 | {t / times[1]:.2f} |"
            for k, t in times.items()
        ),
        *(
            f"| C8 | variance of the gradient, {n} rows: full batch, K = 4 | {a:.4f}, {b:.4f} |"
            for n, (a, b) in variances.items()
        ),
        f"| C11 | update at which a cosine of {UPDATES} is through when stepped per micro-batch, K = 4 | {through} |",
        f"| C11 | rate at update 250 in optimizer steps, over the first | {right[250] / right[0]:.3f} |",
        f"| C30 | largest gap of 100 losses, sum over the total count against the full batch | {apart:.1e} |",
        f"| C30 | the same, a mean of means | {gap:.1e} |",
    ]
    return "\n".join(lines)


def main(targets: list[str]) -> None:
    """Write the page."""
    torch.set_num_threads(1)
    rows = []
    for claims, job in witnesses(targets):
        [case] = outcomes([job])
        rows.append((int(claims[0][1:]), line(claims, case)))
    page = (
        "# Claims about accumulation, with numbers\n\n"
        "Made by `make claims` from the rows of `suites/` that name a claim (relative error and scale of the gradient\n"
        "against the full batch), and from measurements on a CPU; times are CPU time, as ratios within one run.\n\n"
        "| claim | case | found | causes | relative | scale | theory |\n| --- | --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(shown for _, shown in sorted(rows))
        + "\n\nClaims of frameworks (C20, C21, C24, C25, C28, C29) have their numbers in\n"
        "[conformance](conformance/conformance.md)."
        + "\n\n| claim | measured | value |\n| --- | --- | --- |\n"
        + measured()
        + "\n\n![A cosine of 1000 optimizer steps](cosine.svg)\n"
    )
    path = ROOT / "reports" / "claims.md"
    _, title, ranks = path.read_text(encoding="utf-8").partition("## Several ranks\n")
    path.write_text(f"{page}\n{title}{ranks}" if title else page, encoding="utf-8")


if __name__ == "__main__":
    main(
        sys.argv[1:]
        or [
            "suite:normalization",
            "suite:loss_normalization",
            "suite:amp",
            "suite:clipping",
            "suite:schedulers",
            "suite:tail",
            "suite:logging",
        ]
    )
