"""The layers of the package, read from its imports; a rule without a test is a wish."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "equivcheck"

LAYERS = (
    {"errors", "case", "causes", "result", "rows", "shape", "_bundled"},
    {"split", "differences", "attribution", "noise", "counting", "sampled", "tensorfile"},
    {
        *(
            "subject",
            "modules",
            "usercode",
            "feed",
            "recording",
            "recorder",
            "hooks",
            "observe",
            "comparers",
            "shelf",
            "states",
            "shadow",
        ),
        *(
            "promotion",
            "casting",
            "interventions",
            "neutral",
            "keyed",
            "entropy",
            "freeze",
            "addends",
        ),
        *("ranks", "parts"),
        *("bridges", "execute", "memory", "deadline", "strategies", "suite", "workload", "attach"),
    },
    {
        *("topology", "traffic", "denominators", "hypotheses", "wrong_denominator"),
        *(
            "experiment",
            "subject_experiment",
            "cuts",
            "fit",
            "sums",
            "company",
            "verdict",
            "settled",
            "view",
            "diagnose",
            "detectors",
        ),
        *("shared", "precision", "decide", "describe", "doubts", "series", "timelines", "scripts"),
    },
    {"api", "workers", "config", "report", "search", "repro"},
    {"cli", "plugin", "__init__", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def stated(variable):
    """Return the modules of which the Makefile states the coverage in one of its lists."""
    text = (ROOT.parent / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith(f"{variable} :="))
    return {name.removesuffix(".py").removesuffix("/*") for name in line.split(":=")[1].split()}


def imports(tree, *, top_level_only=False):
    """Yield the dotted names that a module imports, those for type checkers left out."""
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not (top_level_only and isinstance(node, ast.FunctionDef)):
            nodes += list(ast.iter_child_nodes(node))


def part(path, root):
    """Return the part of the package a file belongs to: `report/text.py` -> `report`."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def ours(name):
    words = name.split(".")
    return words[1] if words[0] == "equivcheck" and len(words) > 1 else None


def violations(root):
    """Return a sentence for every import that breaks a rule of the layers."""
    found = []
    for path in sorted(root.rglob("*.py")):
        home = part(path, root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if home not in LAYER:
            found.append(f"{home} has no layer")
            continue
        for name in imports(tree):
            other = ours(name)
            outside = name.split(".")[0]
            if other in LAYER and LAYER[other] > LAYER[home]:
                found.append(f"{home} imports {other}, which is above it")
            if home == "report" and other in LAYER and other != "report" and LAYER[other] > 0:
                found.append(f"report imports {other}, which is not layer 0")
            if {home, other} == {"cli", "plugin"}:
                found.append(f"{home} imports {other}, another front end")
            if LAYER[home] == 0 and outside not in (*sys.stdlib_module_names, "equivcheck"):
                found.append(f"{home} imports {outside}, which is not the standard library")
        if LAYER[home] in (0, 4, 5):
            loaded = {name.split(".")[0] for name in imports(tree, top_level_only=True)}
            found += [f"{home} loads {name}" for name in loaded & {"torch", "numpy", "rich"}]
    return found


def test_no_module_imports_upwards():
    """Every import goes down or sideways."""

    assert violations(ROOT) == []


def test_parts_import_each_other_without_a_cycle():
    """At module level no part needs itself through others."""
    needs = {}
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {ours(name) for name in imports(tree, top_level_only=True)} & set(LAYER)
        needs.setdefault(part(path, ROOT), set()).update(found - {part(path, ROOT)})
    while free := [name for name, others in needs.items() if not others]:
        for name in free:
            del needs[name]
        for others in needs.values():
            others -= set(free)

    assert {name: others for name, others in needs.items() if others & set(needs)} == {}


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ("from equivcheck.api import check", "errors imports api, which is above it"),
        ("def late():\n    import equivcheck.cli", "errors imports cli, which is above it"),
        ("import torch", "errors imports torch, which is not the standard library"),
    ],
    ids=["upward", "upward-in-a-function", "torch"],
)
def test_a_planted_import_is_found(tmp_path, planted, told):
    """The test above can fail."""
    (tmp_path / "errors.py").write_text(planted, encoding="utf-8")

    assert told in violations(tmp_path)


def test_a_module_without_a_layer_is_found(tmp_path):
    """A new module has to be given its place."""
    (tmp_path / "utilities.py").write_text("", encoding="utf-8")

    assert violations(tmp_path) == ["utilities has no layer"]


def test_coverage_is_stated_of_every_module_of_three_layers():
    """What the package brings along for its wheel has nothing to be covered."""
    assert stated("LAYERS_0_1") == (LAYERS[0] | LAYERS[1]) - {"_bundled"}
    assert stated("LAYER_3") >= LAYERS[3]
