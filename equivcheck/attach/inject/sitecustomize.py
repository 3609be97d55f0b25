"""Attach equivcheck's recorder to this process once torch has been imported; change nothing else.

Python imports a module of this name by itself when its folder is on PYTHONPATH. A sitecustomize that the environment
has of its own is executed first, as if this one were not there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_HERE = os.path.realpath(os.path.join(__file__, ".."))
# Programs that start the training processes and do not train themselves, as scripts and as modules.
_SCRIPTS = ("torchrun", "accelerate", "accelerate-launch", "deepspeed")
_MODULES = (
    *("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"),
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch"),
)


def _elsewhere() -> list[str]:
    return [each for each in sys.path if os.path.realpath(each or ".") != _HERE]


def _chain() -> None:
    """Execute the sitecustomize that this one stands before."""
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere())
    if found is not None and found.loader is not None:
        module = importlib.util.module_from_spec(found)
        sys.modules["sitecustomize"] = module
        found.loader.exec_module(module)


def _launches() -> bool:
    """Return whether this process only starts those that train."""
    words = sys.orig_argv
    if "-m" in words[1:-1] and words[words.index("-m", 1) + 1] in _MODULES:
        return True
    return "RANK" not in os.environ and any(os.path.basename(w) in _SCRIPTS for w in words[:3])


class _Package:
    """Finds equivcheck alone where it is, and nothing else of the environment that it is installed in."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "equivcheck" or path is not None:
            return None
        home = os.environ["EQUIVCHECK_HOME"]
        return importlib.util.spec_from_file_location(
            name, os.path.join(home, "__init__.py"), submodule_search_locations=[home]
        )


class _Attaching(importlib.machinery.SourceFileLoader):
    """Loads torch, and then runs what is to be run once `import torch` is complete."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        from equivcheck.attach.process import attach

        attach()


class _Torch:
    """Finds torch where it is, once."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch" or path is not None:
            return None
        sys.meta_path.remove(cls)
        found = importlib.util.find_spec(name)
        if found is not None and isinstance(found.loader, importlib.machinery.SourceFileLoader):
            found.loader = _Attaching(found.loader.name, found.loader.path)
        return found


sys.path[:] = _elsewhere()
_chain()
if os.environ.get("EQUIVCHECK_SPEC") and not _launches():
    sys.meta_path[:0] = [_Package, _Torch]
