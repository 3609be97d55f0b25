"""Attach equivcheck's recorder to this process once torch has been imported; change nothing else.

Python imports a module of this name by itself when its folder is on PYTHONPATH. A sitecustomize that the environment
has of its own is executed first, as if this one were not there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# Programs that start the training processes and do not train themselves.
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "torch.distributed.run", "torch.distributed.launch")
_LAUNCHERS += ("accelerate.commands.launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch")


def _elsewhere():
    return [each for each in sys.path if os.path.abspath(each or ".") != _HERE]


def _chain():
    """Execute the sitecustomize that this one stands before."""
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere())
    if found is not None and found.loader is not None:
        module = importlib.util.module_from_spec(found)
        sys.modules["sitecustomize"] = module
        found.loader.exec_module(module)


def _launches():
    words = list(getattr(sys, "orig_argv", sys.argv))
    if "RANK" in os.environ:
        return False
    if "-m" in words[1:-1] and words[words.index("-m", 1) + 1] in _LAUNCHERS:
        return True
    return any(os.path.basename(word) in _LAUNCHERS[:3] for word in words[:3])


class _Package:
    """Finds equivcheck alone where it is, and nothing else of the environment that it is installed in."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "equivcheck" or path is not None:
            return None
        home = os.environ["EQUIVCHECK_HOME"]
        return importlib.util.spec_from_file_location(
            name, os.path.join(home, "__init__.py"), submodule_search_locations=[home]
        )


class _Torch:
    """Runs what is to be run once `import torch` is complete."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torch" or path is not None:
            return None
        sys.meta_path.remove(cls)
        found = importlib.util.find_spec(name)
        if found is None or found.loader is None:
            return found
        load = found.loader.exec_module

        def exec_module(module):
            load(module)
            from equivcheck.attach.process import attach

            attach()

        found.loader.exec_module = exec_module
        return found


sys.path[:] = _elsewhere()
_chain()
if os.environ.get("EQUIVCHECK_SPEC") and not _launches():
    if importlib.util.find_spec("equivcheck") is None or os.environ.get("EQUIVCHECK_HOME"):
        sys.meta_path.insert(0, _Package)
    sys.meta_path.insert(0, _Torch)
