"""What each panel of a page shows of one case: plain data, with the conclusion in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.report.panels._panel import Panel, short
from equivcheck.report.panels.causes import causes, proof, ruler, warnings
from equivcheck.report.panels.measured import control, precision, ranks
from equivcheck.report.panels.parameters import heatmap, parameters
from equivcheck.report.panels.start import start
from equivcheck.report.panels.walk import event_in_words, walk
from equivcheck.report.panels.weights import weights

__all__ = [
    "Panel",
    "causes",
    "control",
    "event_in_words",
    "heatmap",
    "of",
    "parameters",
    "precision",
    "proof",
    "ranks",
    "ruler",
    "short",
    "start",
    "walk",
    "warnings",
    "weights",
]


def of(case: Mapping[str, Any]) -> dict[str, Panel]:
    """Return all panels of a case by name, in the order of the page."""
    return {
        "start": start(case),
        "weights": weights(case),
        "walk": walk(case),
        "parameters": parameters(case),
        "precision": precision(case),
        "ranks": ranks(case),
        "control": control(case),
    }
