"""A headless browser without a network, and results of every size to look at in it."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import math
import random
import shutil
import zlib
from pathlib import Path

import pytest

from equivcheck.report import html

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "reports" / "examples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_skipped: list[str] = []


def pytest_terminal_summary(terminalreporter):
    """Say it aloud: a report that no browser has opened is not proven."""
    if _skipped:
        terminalreporter.section(
            "browser tests SKIPPED: no Chromium, or no playwright (apt-get install chromium)"
        )
        for name in _skipped:
            terminalreporter.line(name)


@pytest.fixture(scope="session")
def chromium():
    """Chromium, started once; None where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None or importlib.util.find_spec("playwright") is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def visit(chromium, request, tmp_path):
    """Open a page from disk with the network off; console and requests are kept in `page.seen`."""
    if chromium is None:
        _skipped.append(request.node.nodeid)
        pytest.skip("no Chromium, or no playwright: apt-get install chromium")
    contexts = []

    def go(source, *, place="", width=1440, theme="light", script=True, height=900):
        path = source
        if not isinstance(source, Path):
            path = tmp_path / "page.html"
            path.write_text(source, encoding="utf-8")
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=theme,
            java_script_enabled=script,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.until = functools.partial(until, page)
        page.seen = {"console": [], "requests": []}
        page.on("console", lambda message: page.seen["console"].append(message.text))
        page.on("pageerror", lambda error: page.seen["console"].append(str(error)))
        page.on("request", lambda asked: page.seen["requests"].append(asked.url))
        page.goto(path.as_uri() + place)
        if script:
            page.until("window.equivcheck && equivcheck.ready")
        return page

    yield go
    for context in contexts:
        context.close()


def until(page, claim):
    """Wait until an expression is true: playwright's own waiting evaluates text, which the page's policy forbids."""
    for _ in range(400):
        if page.evaluate(f"Boolean({claim})"):
            return
        page.wait_for_timeout(25)
    raise AssertionError(claim)


def example(name):
    """Return a committed result."""
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def large():
    """A result of 2,000 parameters x 1,000 optimizer steps, with everything that a run writes."""
    return large_result()


def large_result(parameters=2000, steps=1000):
    """Return one divergent case of any size; the fault begins in the middle."""
    draw = random.Random(0)  # noqa: S311 - numbers to look at
    names = [
        f"blocks.{i // 16}.{('mlp', 'attn')[i % 2]}.fc{i % 8}.weight{i}" for i in range(parameters)
    ]
    onset = steps // 2

    def line(high):
        return [high * (1 + draw.random()) if s >= onset else 1e-16 for s in range(steps)]

    x = list(range(steps))
    code = [2 + round(12 * (math.log10(3e15) + 3)) if s >= onset else 37 for s in range(100)]
    cells = bytes(min(254, c + draw.randrange(12)) for _ in names for c in code)
    case = {
        **example("EQ101")["cases"][0],
        "id": "abcdef0123",
        "headline": "EQ101 missing-division: 4x the full_batch gradient (accumulation_steps=4)",
        "steps": {
            "optimizer_step": x,
            "of": steps,
            "gradients": {
                "relative": line(3.0),
                "control": [2e-16] * steps,
                "allowed": [2e-13] * steps,
            },
            "parameters": {"relative": line(1e-2), "control": [1e-18] * steps},
            "losses": {
                "full_batch": line(1.0),
                "accumulated": line(1.0),
                "relative": line(1e-3),
                "source": "logged",
            },
            "learning_rates": {
                "full_batch": [0.1] * steps,
                "accumulated": [0.1] * steps,
                "relative": [0.0] * steps,
            },
        },
        "modules": {
            "optimizer_step": x,
            "of": 32,
            "rows": [
                {
                    "name": f"blocks.*.mlp.fc{i}",
                    "parameters": 60,
                    "relative": line(3.0),
                    "multiple": line(3e15),
                    "scale": 4.0,
                    "cosine": 1.0,
                }
                for i in range(32)
            ],
        },
        "parameters_by_step": {
            "optimizer_step": x,
            "of": parameters,
            "rows": [
                {"name": n, "relative": line(3.0), "multiple": line(3e15)} for n in names[:64]
            ],
        },
        "cells": {
            "names": names,
            "of": parameters,
            "optimizer_step": list(range(0, steps, max(1, steps // 100))),
            "zlib_base64": base64.b64encode(zlib.compress(cells)).decode(),
        },
        "per_parameter": [
            {
                "name": n,
                "optimizer_step": onset,
                "relative": 3.0 - i / parameters,
                "multiple": 3e15,
                "scale": 4.0,
                "cosine": 1.0,
                "norm": 0.5,
                "zero": False,
            }
            for i, n in enumerate(names)
        ],
    }
    return {**example("EQ101"), "cases": [case]}


def suite_result(workloads=200, each=25, failing=100):
    """Return a result of a whole suite: most agree, some fail for five causes."""
    wrong = [example(c)["cases"][0] for c in ("EQ101", "EQ103", "EQ201", "EQ306", "EQ307")]
    right = example("equivalent")["cases"][0]
    cases = []
    for w in range(workloads):
        for k in range(each):
            n = len(cases)
            every = workloads * each // failing
            found = wrong[n // every % 5] if n % every == 7 else right
            cases.append(
                {
                    **found,
                    "id": f"{n:010x}",
                    "target": "suites/normalization.py",
                    "workload": f"workload-{w}",
                    "accumulation_steps": (2, 3, 4, 8, 16)[k % 5],
                    "split": ("even", "uneven")[k // 5 % 2],
                    "precision": ("native", "bf16", "fp16")[k // 10],
                }
            )
    return {**example("several"), "target": "suites/", "cases": cases}


@pytest.fixture(scope="session")
def suite():
    """A suite of 5,000 cases."""
    return suite_result()


@pytest.fixture(scope="session")
def pages(large, suite):
    """The pages of both, rendered once."""
    return {"large": html.render(large), "suite": html.render(suite)}
