"""Write reports/conformance: what each framework's release does, measured, and the heads of Transformers one by one.

    python tests/conformance/table.py [--envs .venvs] [--results FOLDER] [--heads heads.jsonl]

Every trainer of a framework, and every faulty twin, is run by `equivcheck run` in its environment; a result that lies
in the folder already is taken as it is. What cannot run is named with its reason.
"""

from __future__ import annotations

import argparse
import html
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fixtures import frameworks

OUT = ROOT / "reports" / "conformance"
# What stays out, and why: measured once and written down, not guessed.
CANNOT = {
    "Lightning FSDP": "refused on a CPU: it requires a GPU accelerator",
    "Accelerate FSDP2": "on a CPU it silently gives DistributedDataParallel, or processes that train alone",
    "SyncBatchNorm": "torch: works with GPU modules only",
    "Unsloth": "needs a GPU at import",
    "torchtitan": "its attention has no backward on a CPU",
}
DISTRIBUTIONS = {
    "transformers": ("transformers", "accelerate", "trl", "peft"),
    "lightning": ("lightning",),
    "deepspeed": ("deepspeed",),
}


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of some distributions."""
    code = "import json,sys,importlib.metadata as m;print(json.dumps({n:m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run(path: Path, envs: Path, results: Path) -> dict[str, Any]:
    """Return one row: the case of a trainer at K = 4, or why there is none."""
    family = str(frameworks.family(path))
    row = {"trainer": path.stem, "family": family, "says": says(path)}
    python = envs / family / "bin" / "python"
    if not python.exists():
        return {**row, "verdict": "cannot run here", "reason": f"no environment: make env-{family}"}
    found = results / f"{path.stem}.json"
    if not found.exists():
        command = [
            python,
            "-m",
            "equivcheck",
            "run",
            path.relative_to(ROOT),
            "--accumulation-steps",
            "4",
        ]
        try:
            done = subprocess.run(
                [*command, "-q", "--json", found],
                cwd=ROOT,
                check=False,
                capture_output=True,
                text=True,
                timeout=900,
            )
        except subprocess.TimeoutExpired:
            return {**row, "verdict": "cannot run here", "reason": "no answer in 900 s"}
        if not found.exists():
            return {**row, "verdict": "cannot run here", "reason": done.stderr.strip()[-200:]}
    case = json.loads(found.read_text())["cases"][0]
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    attribution = case.get("attribution") or {}
    return {
        **row,
        "verdict": case["verdict"],
        "causes": [f"{c['code']} {c['name']} ({c['status']})" for c in case["causes"]],
        "relative": gradients.get("relative"),
        "control": gradients.get("control"),
        "weights": attribution.get("candidate_weights"),
        "detection_power": case["detection_power"],
        "judged": case.get("judged", "float64"),
        "headline": case["headline"],
    }


def says(path: Path) -> str:
    """Return the first line of a file's docstring."""
    return path.read_text().split('"""')[1].splitlines()[0]


def tally(heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each family of heads, how many there are of each outcome, and which are wrong."""
    rows = []
    for family in dict.fromkeys(each["family"] for each in heads):
        mine = [each for each in heads if each["family"] == family]
        outcomes = Counter(each["outcome"] for each in mine)
        wrong: dict[str, list[str]] = {}
        for each in mine:
            if each["outcome"] == "divergent":
                wrong.setdefault(each["cause"], []).append(each["head"])
        rows.append({"family": family, "heads": len(mine), **outcomes, "divergent_by_cause": wrong})
    return rows


def number(value: float | None) -> str:
    """Return a number for a table."""
    return "-" if value is None else f"{value:.1e}"


def markdown(table: dict[str, Any]) -> str:
    """Return the whole report as Markdown."""
    shown = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines = ["# Conformance of the frameworks", "", f"One process, CPU, K = 4. {shown}.", ""]
    lines += [
        "| trainer | what it does | verdict | cause | gradients | noise |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["trainers"]:
        cause = ", ".join(row.get("causes", [])) or row.get("reason", "")
        lines.append(
            f"| {row['trainer']} | {row['says']} | {row['verdict']} | {cause} | "
            f"{number(row.get('relative'))} | {number(row.get('control'))} |"
        )
    lines += [
        "",
        "## Outside the engine: JAX and Keras",
        "",
        "Relative difference of the update.",
        "",
    ]
    for name, found in table["others"].items():
        lines += [f"- {name}, {case}: {value:.1e}" for case, value in found.items()]
    lines += ["", "## Heads of Transformers under Trainer", ""]
    lines += [
        "| family | heads | equivalent | divergent | inconclusive | not run | causes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["heads"]:
        causes = "; ".join(
            f"{cause}: {len(names)}" for cause, names in row["divergent_by_cause"].items()
        )
        cells = [
            row.get(each, 0)
            for each in ("heads", "equivalent", "divergent", "inconclusive", "not run")
        ]
        lines.append(f"| {row['family']} | {' | '.join(map(str, cells))} | {causes} |")
    lines += ["", "## Cannot run here", ""]
    lines += [f"- {name}: {reason}" for name, reason in table["cannot_run_here"].items()]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the Markdown as a page that needs nothing else."""
    style = "body{font:14px/1.5 sans-serif;max-width:75em;margin:2em auto}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}"
    parts, table = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            if not line.startswith("| ---"):
                table.append([html.escape(cell.strip()) for cell in line.strip("|").split(" | ")])
            continue
        if table:
            head, *body = ["".join(f"<td>{cell}</td>" for cell in row) for row in table]
            rows = "".join(f"<tr>{row}</tr>" for row in body)
            parts.append(f"<table><tr>{head.replace('td>', 'th>')}</tr>{rows}</table>")
            table = []
        level = len(line) - len(line.lstrip("#"))
        words = html.escape(line.lstrip("# "))
        parts.append(
            f"<h{level}>{words}</h{level}>" if level else f"<p>{words}</p>" if words else ""
        )
    return f"<!doctype html><meta charset=utf-8><title>Conformance</title><style>{style}</style>{''.join(parts)}\n"


def main() -> None:
    """Run what has no result yet and write the three renderings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=ROOT / ".venvs")
    parser.add_argument("--results", type=Path, default=ROOT / "reports" / "latest" / "conformance")
    parser.add_argument("--heads", type=Path, default=OUT / "heads.jsonl")
    options = parser.parse_args()
    envs = options.envs if options.envs.is_absolute() else ROOT / options.envs
    options.results.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = [
        run(path, envs, options.results) for path in (*frameworks.trainers(), *frameworks.mutants())
    ]
    known: dict[str, str] = {}
    for family, names in DISTRIBUTIONS.items():
        if (envs / family / "bin" / "python").exists():
            known |= versions(envs / family / "bin" / "python", names)
    others = {}
    for family in ("jax", "keras"):
        script = Path(__file__).with_name(f"{family}_accumulation.py")
        python = envs / family / "bin" / "python"
        saved = options.results / f"{family}.json"
        if python.exists() and not (saved.exists() and saved.read_text().strip()):
            done = subprocess.run(
                [python, script], capture_output=True, text=True, timeout=900, check=False
            )
            saved.write_text(done.stdout)
        others[family] = json.loads(saved.read_text() or "{}") if saved.exists() else {}
    heads = (
        [json.loads(line) for line in options.heads.read_text().splitlines()]
        if options.heads.exists()
        else []
    )
    table = {
        "versions": known,
        "trainers": rows,
        "others": others,
        "heads": tally(heads),
        "cannot_run_here": CANNOT,
    }
    (OUT / "conformance.json").write_text(json.dumps(table, indent=1) + "\n")
    text = markdown(table)
    (OUT / "conformance.md").write_text(text)
    (OUT / "conformance.html").write_text(page(text))


if __name__ == "__main__":
    main()
