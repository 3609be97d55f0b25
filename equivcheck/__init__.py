"""equivcheck: does accumulating micro-batches give the update that the full batch gives?

Names are looked up when they are used, so that importing the package costs nothing: torch alone
takes a second or two, and a test runner imports its plugins at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equivcheck.api import Result, check, load_result, measure
    from equivcheck.case import Case
    from equivcheck.causes import CAUSES
    from equivcheck.errors import DivergenceError, EquivcheckError, UsageError

__all__ = [
    "CAUSES",
    "Case",
    "DivergenceError",
    "EquivcheckError",
    "Result",
    "UsageError",
    "check",
    "load_result",
    "measure",
]

_HOMES = {
    "CAUSES": "causes",
    "Case": "case",
    "DivergenceError": "errors",
    "EquivcheckError": "errors",
    "Result": "api",
    "UsageError": "errors",
    "check": "api",
    "load_result": "api",
    "measure": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - takes longer than all else that a command needs

        return version("equivcheck")
    if name not in _HOMES:
        raise AttributeError(f"module 'equivcheck' has no attribute {name!r}")
    return getattr(importlib.import_module(f"equivcheck.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
