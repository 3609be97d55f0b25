"""Watch a script from outside: what is put into its processes, what they write, and how it is read.

The script is not edited. A folder on PYTHONPATH (`inject`) starts the engine's own recorder in every Python process of
the command in which torch is imported, whatever the launcher; each process that trains writes a folder of safetensors
and JSON.
"""

from __future__ import annotations
