"""Suites and fixtures, where a wheel carries them; in a clone they lie beside the package."""

from __future__ import annotations
