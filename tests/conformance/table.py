"""Write reports/conformance: what each framework's release does under accumulation, measured by running it.

    python tests/conformance/table.py [--envs .venvs] [--results FOLDER] [--heads heads.jsonl] [--readme README.md]

Every trainer of a framework, and every faulty twin, is run by `equivcheck run` in the environment of its family, in one
process. A family whose result lies in the folder already is taken from there.
What a row shows (`FRAMEWORK`, `SHOWS`) stands in the trainer's own file; what came out is never written down by hand.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from page import page  # noqa: E402 - found on the path set above
from tries import tried  # noqa: E402

from fixtures import frameworks  # noqa: E402

OUT = ROOT / "reports" / "conformance"
BEGIN, END = "<!-- begin: conformance -->", "<!-- end: conformance -->"
ACCUMULATION_STEPS = 4
LIMIT = 1800  # seconds for a family, on a machine that others use too
DISTRIBUTIONS = {
    "transformers": ("transformers", "accelerate", "trl", "peft", "bitsandbytes"),
    "lightning": ("lightning",),
    "deepspeed": ("deepspeed",),
    "jax": ("jax", "optax", "flax"),
    "keras": ("keras",),
}
# What families are asked besides, by scripts of their own.
BESIDE = {
    "torch": "torch.distributed.pipelining: every schedule on two ranks against the full batch in one process",
    "deepspeed": "C20: the batch settings of DeepSpeed (whole, micro, accumulation), and what they come to",
    "transformers": (
        "Every loss of TRL's trainers, without the engine: relative difference of the first step's gradient in float64"
    ),
    "jax": "C29: JAX without the engine, relative difference of the update or the gradient",
    "keras": "Keras without the engine, relative difference of the update",
}
# Claims of accumulation (reports/claims.md) that a row of this kind speaks of.
CLAIMS = {"schedule": "C24", "incomplete last cycle": "C25", "ragged tokens": "C14"}
SAYS = {
    "C14": "tokens are counted over the whole cycle, not per micro-batch",
    "C21": "ZeRO stages 0 to 3 accumulate to the full batch's update",
    "C24": "a framework steps its scheduler once per optimizer step",
    "C25": "a framework handles an incomplete last cycle",
    "C28": "adapters (LoRA, QLoRA) and preference training (DPO) accumulate",
    "C29": "JAX accumulates in its training loop",
}
FAMILY_CLAIMS = {"deepspeed_zero": "C21", "peft": "C28", "trl": "C28", "jax": "C29"}


def constants(path: Path) -> dict[str, Any]:
    """Return the plain constants of a file, without importing it."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def says(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def name_of(path: Path) -> str:
    """Return how a file is called in the table: its path below `fixtures`, shortened."""
    return str(path.relative_to(ROOT / "fixtures").with_suffix("")).partition("/")[2]


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of some distributions."""
    code = "import json,sys,importlib.metadata as m;print(json.dumps({n:m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def described(path: Path) -> dict[str, Any]:
    """Return what a row is about, before it is run."""
    stated = constants(path)
    shows = list(stated.get("SHOWS", ()))
    named = name_of(path)
    claims = {CLAIMS[each] for each in shows if each in CLAIMS}
    claims |= {
        c
        for prefix, c in FAMILY_CLAIMS.items()
        if path.stem.startswith(prefix)
        or f"_{prefix}" in path.stem
        or named.startswith(f"{prefix}/")
    }
    return {
        "trainer": named,
        "family": str(frameworks.family(path)),
        "framework": stated.get("FRAMEWORK"),
        "shows": shows,
        "claims": sorted(claims),
        "says": says(path),
    }


def run(family: str, paths: list[Path], envs: Path, results: Path) -> list[dict[str, Any]]:
    """Return one row for each trainer of a family: its case at K = 4, or why there is none."""
    rows = [described(path) for path in paths]
    python = envs / family / "bin" / "python"
    if not python.exists():
        reason = f"no environment: make env-{family}"
        return [{**row, "outcome": "cannot run here", "reason": reason} for row in rows]
    known = sorted(results.glob(f"{family}-[0-9]*.json"))
    cases = [case for each in known for case in json.loads(each.read_text())["cases"]]
    by_target = {case["target"]: case for case in cases}
    missing = [path for path in paths if str(path.relative_to(ROOT)) not in by_target]
    said = ""
    for ranks in sorted({frameworks.ranks(path) for path in missing}):
        mine = [path for path in missing if frameworks.ranks(path) == ranks]
        found = next(
            path for n in range(1000) if not (path := results / f"{family}-{n}.json").exists()
        )
        said = measured(python, mine, found, ranks)
        cases = json.loads(found.read_text())["cases"] if found.exists() else []
        by_target |= {case["target"]: case for case in cases}
    return [
        {**row, **outcome(by_target.get(str(path.relative_to(ROOT))), said)}
        for row, path in zip(rows, paths, strict=True)
    ]


def measured(python: Path, paths: list[Path], found: Path, ranks: tuple[int, str]) -> str:
    """Run trainers, on the ranks they are made for, write their result, and return the last words of the run."""
    command = [str(python), "-m", "equivcheck", "run", *(str(p.relative_to(ROOT)) for p in paths)]
    command += ["--accumulation-steps", str(ACCUMULATION_STEPS), "-q", "--json", str(found)]
    command += ["--world-size", str(ranks[0]), "--strategy", ranks[1]]
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {LIMIT} s"
    return done.stderr.strip()[-300:]


def outcome(case: dict[str, Any] | None, said: str) -> dict[str, Any]:
    """Return what a case came to, in the table's words."""
    if case is None or case["verdict"] == "error":
        reason = said if case is None else case["headline"]
        return {"outcome": "cannot run here", "reason": reason}
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    attribution = case.get("attribution") or {}
    return {
        "outcome": case["verdict"],
        "causes": [{key: c[key] for key in ("code", "name", "status")} for c in case["causes"]],
        "relative": gradients.get("relative"),
        "control": gradients.get("control"),
        "weights": attribution.get("candidate_weights"),
        "detection_power": case["detection_power"],
        "judged": case.get("judged", "float64"),
        "headline": case["headline"],
    }


def tally(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each family of heads, how many there are of each outcome, and which are wrong."""
    rows = []
    for family in dict.fromkeys(each["family"] for each in heads):
        mine = [each for each in heads if each["family"] == family]
        wrong: dict[str, list[str]] = {}
        for each in mine:
            if each["outcome"] == "divergent":
                wrong.setdefault(each["cause"], []).append(each["head"])
        outcomes = Counter(each["outcome"] for each in mine)
        rows.append({"family": family, "heads": len(mine), **outcomes, "divergent_by_cause": wrong})
    return rows


# ---- renderings ----------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Return a number for a table."""
    return "-" if value is None else f"{value:.1e}"


def verdict_of(row: dict[str, Any]) -> str:
    """Return a row's outcome in one cell."""
    if row["outcome"] == "divergent":
        return " ".join(cause["code"] for cause in row["causes"]) or "divergent"
    return str(row["outcome"])


def compact(table: dict[str, Any]) -> str:
    """Return what each framework does with each part of accumulation: the table of the README."""
    columns = (
        "full cycles",
        "clipping",
        "schedule",
        "incomplete last cycle",
        "ragged tokens",
        "logged loss",
    )
    lines = [f"| framework | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    named = [row for row in table["trainers"] if row["framework"]]
    for framework in sorted({row["framework"] for row in named}):
        cells = []
        for column in columns:
            shown = {
                verdict_of(r) for r in named if r["framework"] == framework and column in r["shows"]
            }
            cells.append(", ".join(sorted(shown)) or "")
        lines.append(f"| {framework} | {' | '.join(cells)} |")
    heads = table["heads"]
    ran = sum(row["heads"] - row.get("not run", 0) for row in heads)
    wrong = sum(row.get("divergent", 0) for row in heads)
    undivided = sum(
        len(names)
        for row in heads
        for cause, names in row["divergent_by_cause"].items()
        if cause.startswith("EQ101")
    )
    shown = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines += [
        "",
        (
            f"Measured at K = {ACCUMULATION_STEPS} on a CPU: {shown}. "
            f"Of {ran} pairs of a head of Transformers and a task of it in `Trainer`'s loop, {wrong} diverge, "
            f"{undivided} because nobody divides by K (EQ101)."
        ),
    ]
    return "\n".join(lines)


def markdown(table: dict[str, Any]) -> str:
    """Return the whole report as Markdown."""
    lines = [
        "# Conformance of the frameworks",
        "",
        "Made by `make conformance`.",
        "",
        compact(table),
    ]
    lines += [
        "",
        (
            "A cell is the verdict, or the causes of a divergence. What a release does wrong is in "
            "[findings](../findings/README.md)."
        ),
        "",
    ]
    lines += by_claim(table)
    lines += [
        "## Every row",
        "",
        "Relative error of the gradients against the full batch, and of the control: its noise.",
        "",
    ]
    lines += [
        "| trainer | what it does | claims | verdict | cause | gradients | noise | weights |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["trainers"]:
        causes = ", ".join(
            f"{c['code']} {c['name']} ({c['status']})" for c in row.get("causes", [])
        )
        cells = [
            row["trainer"],
            row["says"],
            " ".join(row["claims"]),
            row["outcome"],
            causes or row.get("reason", ""),
            number(row.get("relative")),
            number(row.get("control")),
            weights(row.get("weights")),
        ]
        lines.append(
            "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
        )
    for name, found in table["others"].items():
        if not found:
            continue
        lines += ["", f"## {BESIDE[name]}", ""]
        lines += [
            f"- {case}: {value if isinstance(value, str) else number(value)}"
            for case, value in found.items()
        ]
    lines += ["", "## Heads of Transformers under Trainer", ""]
    lines += [
        "| family | heads | equivalent | divergent | inconclusive | not run | causes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["heads"]:
        causes = "; ".join(
            f"{cause}: {len(found)}" for cause, found in row["divergent_by_cause"].items()
        )
        kinds = ("heads", "equivalent", "divergent", "inconclusive", "not run")
        lines.append(
            f"| {row['family']} | {' | '.join(str(row.get(k, 0)) for k in kinds)} | {causes} |"
        )
    lines += ["", "## Cannot run here", ""]
    lines += [f"- {name}: {reason}" for name, reason in table["cannot_run_here"].items()]
    return "\n".join(lines) + "\n"


def by_claim(table: dict[str, Any]) -> list[str]:
    """Return what speaks for or against each claim of frameworks; loops with a fault of their own are left out."""
    lines = [
        "## By claim",
        "",
        "| claim | framework | verdict | gradients | noise |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim, words in SAYS.items():
        for row in table["trainers"]:
            if claim in row["claims"] and row["framework"]:
                cells = (
                    row["framework"],
                    verdict_of(row),
                    number(row.get("relative")),
                    number(row.get("control")),
                )
                lines.append(f"| {claim}: {words} | {' | '.join(cells)} |")
    return [*lines, ""]


def weights(found: Any) -> str:
    """Return the weights that micro-batches got, rank by rank."""
    if not found:
        return ""
    if isinstance(found[0], list):
        return "; ".join(weights(each) for each in found)
    return " ".join("?" if w is None else f"{w:.4g}" for w in found)


def updated(text: str, table: dict[str, Any]) -> str:
    """Return the README with the table between its markers rewritten."""
    block = f"{BEGIN}\n{compact(table)}\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)


def beside(family: str, envs: Path, results: Path) -> dict[str, float | str]:
    """Return what a family's own script measures, without the engine."""
    script = Path(__file__).with_name(f"{family}_accumulation.py")
    python = Path(sys.executable) if family == "torch" else envs / family / "bin" / "python"
    saved = results / f"{family}-script.json"
    if python.exists() and not (saved.exists() and saved.read_text().strip()):
        done = subprocess.run(
            [python, script], capture_output=True, text=True, timeout=LIMIT, check=False
        )
        saved.write_text(done.stdout)
    return dict(json.loads(saved.read_text() or "{}")) if saved.exists() else {}


def main() -> None:
    """Run what has no result yet and write the three renderings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=ROOT / ".venvs")
    parser.add_argument("--results", type=Path, default=ROOT / "reports" / "latest" / "conformance")
    parser.add_argument("--heads", type=Path, default=OUT / "heads.jsonl")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    envs = options.envs.absolute()
    options.results.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    known: dict[str, str] = {}
    every = [*frameworks.trainers(), *frameworks.mutants()]
    for family, names in DISTRIBUTIONS.items():
        mine = [path for path in every if frameworks.family(path) == family]
        rows += run(family, mine, envs, options.results)
        python = envs / family / "bin" / "python"
        known |= versions(python, names) if python.exists() else {}
    heads = options.heads.read_text().splitlines() if options.heads.exists() else []
    table = {
        "accumulation_steps": ACCUMULATION_STEPS,
        "versions": known,
        "trainers": rows,
        "others": {family: beside(family, envs, options.results) for family in BESIDE},
        "heads": tally([json.loads(line) for line in heads]),
        "cannot_run_here": tried(envs),
    }
    (OUT / "conformance.json").write_text(json.dumps(table, indent=1) + "\n")
    text = markdown(table)
    (OUT / "conformance.md").write_text(text)
    (OUT / "conformance.html").write_text(page(text))
    options.readme.write_text(updated(options.readme.read_text(encoding="utf-8"), table))


if __name__ == "__main__":
    main()
