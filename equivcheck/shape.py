"""The shape of a result: which keys are of which kind, so that a file edited by hand is refused with the place.

A dict is a table, of which other keys are allowed and known ones may be absent or null; `key!` has to be there, `key+`
has to be there and may be null, `*` stands for every key. `[kind]` is a list, a tuple one of several kinds.
"""

from __future__ import annotations

import math
from typing import Any

TEXT, NUMBER, WHOLE, FLAG = "a string", "a number", "a whole number", "true or false"

_NUMBERS = [NUMBER]
_WEIGHTS = [(NUMBER, _NUMBERS)]
_RATES = [(NUMBER, _NUMBERS)]
_COMPARED = {
    "relative": NUMBER,
    "control": NUMBER,
    "scale": NUMBER,
    "cosine": NUMBER,
    "optimizer_step": WHOLE,
    "source": TEXT,
    "full_batch": _RATES,
    "accumulated": _RATES,
}
_ATTRIBUTION = {
    "optimizer_step": WHOLE,
    "reference_weights": _WEIGHTS,
    "candidate_weights": _WEIGHTS,
    "reference_residual": NUMBER,
    "candidate_residual": NUMBER,
    "rank": WHOLE,
}
_EVIDENCE = {
    "because": TEXT,
    "relative": NUMBER,
    "count": WHOLE,
    "bytes": NUMBER,
    "minimum_count": WHOLE,
    "minimum_bytes": NUMBER,
    "ruled_out": [TEXT],
    "intervention": {
        "put_right": [TEXT],
        "relative_before": NUMBER,
        "relative_after": NUMBER,
        "logged_after": NUMBER,
    },
}
_SERIES = {
    "relative": _NUMBERS,
    "control": _NUMBERS,
    "allowed": _NUMBERS,
    "scale": _NUMBERS,
    "cosine": _NUMBERS,
    "full_batch_norm": _NUMBERS,
    "accumulated_norm": _NUMBERS,
}
_PAIRED = {"full_batch": _NUMBERS, "accumulated": _NUMBERS, "relative": _NUMBERS, "source": TEXT}
_BY_STEP = {
    "optimizer_step!": [WHOLE],
    "of": WHOLE,
    "rows!": [
        {
            "name!": TEXT,
            "parameters": WHOLE,
            "relative!": _NUMBERS,
            "multiple!": _NUMBERS,
            "scale": NUMBER,
            "cosine": NUMBER,
        }
    ],
}
_EVENT = {
    "event!": TEXT,
    "optimizer_step": WHOLE,
    "micro_step": WHOLE,
    "samples": WHOLE,
    "loss": NUMBER,
    "loss_scale": NUMBER,
    "odd": TEXT,
}
_TIMELINE = {"events!": [_EVENT | {"micro_step+": WHOLE}], "left_out": WHOLE}

CASE = {
    "id!": TEXT,
    "verdict!": TEXT,
    "target": TEXT,
    "accumulation_steps": WHOLE,
    "split": TEXT,
    "world_size": WHOLE,
    "strategy": TEXT,
    "precision": TEXT,
    "seed": WHOLE,
    "device": TEXT,
    "optimizer_steps": WHOLE,
    "workload": TEXT,
    "rows": TEXT,
    "train": TEXT,
    "rng": TEXT,
    "expect": [TEXT],
    "headline": TEXT,
    "location": TEXT,
    "notes": [TEXT],
    "because": TEXT,
    "expected": TEXT,
    "fix": TEXT,
    "replay": TEXT,
    "warnings": [{"code!": TEXT, "name": TEXT, "fix": TEXT, "evidence": _EVIDENCE}],
    "causes": [
        {
            "code!": TEXT,
            "name": TEXT,
            "status!": TEXT,
            "optimizer_step": WHOLE,
            "fix": TEXT,
            "because": TEXT,
            "evidence": _EVIDENCE,
        }
    ],
    "theory": {"verdict!": TEXT, "causes": [TEXT], "source": TEXT, "met!": FLAG, "found": TEXT},
    "error": {
        **dict.fromkeys(("type", "message", "where", "expected", "because", "fix"), TEXT),
        "traceback": TEXT,
        "exit_code": WHOLE,
    },
    "divergence": dict.fromkeys(
        ("gradients", "losses", "parameters", "buffers", "learning_rates", "optimizer_state"),
        _COMPARED,
    ),
    "attribution": _ATTRIBUTION,
    "attributions": [_ATTRIBUTION],
    "detection_power": NUMBER,
    "margin": NUMBER,
    "limit": NUMBER,
    "seconds": NUMBER,
    "dtype": TEXT,
    "role": TEXT,
    "lowered": {"*": TEXT},
    "precision_loss": {"*": NUMBER},
    "interventions": [
        {"codes": [TEXT], "put_right": [TEXT], "relative": NUMBER, "within_noise": FLAG}
    ],
    "findings": [
        {
            "kind!": TEXT,
            "optimizer_step+": WHOLE,
            "relative+": NUMBER,
            "allowed": NUMBER,
            "tensors": [TEXT],
            "detail": TEXT,
        }
    ],
    "optimizer_steps_seen": {"*": WHOLE},
    "parameters_count": WHOLE,
    "per_parameter": [
        {
            "name!": TEXT,
            "optimizer_step": WHOLE,
            "relative": NUMBER,
            "multiple": NUMBER,
            "scale": NUMBER,
            "cosine": NUMBER,
            "norm": NUMBER,
            "zero": FLAG,
        }
    ],
    "logged_losses": {"full_batch": _NUMBERS, "accumulated": _NUMBERS},
    "micro_batches": {"optimizer_step": WHOLE, "counts": {"*": (_NUMBERS, [_NUMBERS])}},
    "steps": {
        "optimizer_step!": [WHOLE],
        "of": WHOLE,
        **dict.fromkeys(("gradients", "parameters", "buffers", "optimizer_state"), _SERIES),
        **dict.fromkeys(("learning_rates", "losses"), _PAIRED),
    },
    "modules": _BY_STEP,
    "parameters_by_step": _BY_STEP,
    "cells": {"names": [TEXT], "of": WHOLE, "optimizer_step": [WHOLE], "zlib_base64": TEXT},
    "timeline": [_EVENT],
    "timelines": {
        "full_batch!": _TIMELINE,
        "accumulated!": _TIMELINE,
        "missing": [{"event!": TEXT, "optimizer_step": WHOLE}],
    },
    "precision_by_module": [{"name!": TEXT, "full_batch": NUMBER, "accumulated": NUMBER}],
    "runs": [{"role": TEXT, "seconds": NUMBER}],
}

RESULT = {
    "schema!": TEXT,
    "verdict": TEXT,
    "exit_code": WHOLE,
    "target": TEXT,
    "environment": {},
    "interrupted": FLAG,
    "notes": [TEXT],
    "shard": TEXT,
    "planned": WHOLE,
    "run": {"versions": {}, "code": {}, "settings": {}},
    "counts": {"*": {"*": WHOLE}},
    "cases!": [CASE],
}


def misfit(value: Any, shape: Any = RESULT, place: str = "") -> str | None:
    """Return the first place where a value is not of the shape, in words; None where all of it is."""
    if isinstance(shape, tuple):
        tried = [misfit(value, each, place) for each in shape]
        return None if None in tried else tried[0]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{place or 'the whole'} is {kind(value)}, not a table"
        return _in_table(value, shape, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place} is {kind(value)}, not a list"
        [each] = shape
        found = (
            misfit(item, each, f"{place}[{number}]")
            for number, item in enumerate(value)
            if item is not None or isinstance(each, dict)
        )
        return next(filter(None, found), None)
    return None if _is_a(value, shape) else f"{place} is {kind(value)}, not {shape}"


def _in_table(value: dict[str, Any], shape: dict[str, Any], place: str) -> str | None:
    for name, each in shape.items():
        key = name.rstrip("!+")
        if name == "*":
            names = list(value)
        elif key in value:
            names = [key]
        elif key != name:
            return f"{place or 'the whole'} has no {key!r}"
        else:
            continue
        for found in names:
            within = f"{place}.{found}" if place else found
            if value[found] is None and not name.endswith("!"):
                continue
            told = misfit(value[found], each, within)
            if told:
                return told
    return None


def kind(value: Any) -> str:
    """Return what a value of JSON is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return "a number" if _is_finite(value) else "a number out of range"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "a table"


def _is_a(value: Any, what: str) -> bool:
    if what == TEXT:
        return isinstance(value, str)
    if what == FLAG:
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        return False
    return what == NUMBER or isinstance(value, int)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
