"""One file per family of causes; each offers `suspect(view)`, which returns suspicions.

A suspicion brings its interventions. A new cause is one new file here and one entry in the
catalogue: the folder itself is the list.
"""

from __future__ import annotations

import importlib
import pkgutil

from equivcheck.view import Suspicion, View


def suspect(view: View) -> list[Suspicion]:
    """Return what every detector suspects, most specific signatures first."""
    found: list[Suspicion] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda each: each.name):
        detector = importlib.import_module(f"{__name__}.{module.name}")
        found += detector.suspect(view)
    return sorted(found, key=lambda each: (each.rank, each.code))
