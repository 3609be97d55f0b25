"""Check an unmodified script by its two command lines: the full batch's, and the accumulated one's."""

from __future__ import annotations
