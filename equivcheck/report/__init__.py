"""Renderings of a saved result; they read plain dictionaries, so they work without torch."""
