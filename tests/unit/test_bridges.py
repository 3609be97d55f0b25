"""Frameworks tell their bridges what they do from when they are loaded on."""

from __future__ import annotations

import sys
from types import ModuleType

from equivcheck import bridges


def test_what_is_loaded_late_is_tapped_then(monkeypatch):
    """A rank loads the framework in its first run, after the taps of what was loaded before."""
    made = []
    bridge = ModuleType("bridge_of_a_framework")
    bridge.install = made.append
    monkeypatch.setattr(bridges, "BRIDGES", {"a_framework": bridge.__name__})
    monkeypatch.setitem(sys.modules, bridge.__name__, bridge)

    with bridges.installed() as install_loaded:
        assert not install_loaded()
        monkeypatch.setitem(sys.modules, "a_framework", ModuleType("a_framework"))
        assert install_loaded()
        assert not install_loaded()

    assert len(made) == 1
