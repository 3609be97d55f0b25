"""Find the user's modules, and execute them again for every run as if for the first time.

A file or dotted module is executed anew together with what it imports from its own folder, and whatever was loaded
before is put back when the run is over.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import marshal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from equivcheck.errors import TargetError
from equivcheck.usercode import import_failed, is_library, real_path

FORM = "FILE.py, FILE.py:ATTRIBUTE, package.module or package.module:ATTRIBUTE"


@dataclass(frozen=True)
class Module:
    """A module that can be executed anew.

    Attributes:
        place: What was typed.
        root: The folder that it, and what it imports of its own, lies in.
        execute: Does it.
        importable: Whether that folder has to be on the import path.
    """

    place: str
    root: Path
    execute: Callable[[], ModuleType]
    importable: bool = True


def module_at(place: str, *, alone: bool = False) -> Module:
    """Find a module by file or dotted name, without executing it.

    Args:
        place: `FILE.py` or `package.module`.
        alone: A file that is executed under a name that nothing else has, without its folder on the import path: its
            own name may be that of a standard module.

    Raises:
        TargetError: There is none; the closest name is offered.
    """
    is_file = place.endswith(".py") or "/" in place
    return _file_module(place, alone=alone) if is_file else _dotted_module(place)


def _file_module(place: str, *, alone: bool) -> Module:
    path = Path(place).resolve()
    if not path.is_file():
        folder = path.parent
        names = [each.name for each in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        raise TargetError(
            f"file-not-found: {place}",
            where=str(folder) if folder.is_dir() else f"{folder} (no such folder)",
            expected="a Python file with build, batches and train",
            fix=f"did you mean {Path(place).with_name(close[0])}?" if close else None,
        )
    root, name = (
        (path.with_suffix(""), f"_equivcheck_{path.stem}") if alone else _package_root(path)
    )
    if "." not in name and name in sys.modules and not _lies_in(sys.modules[name], root):
        # A file called random.py or train.py must not shadow, or be shadowed by, an installed module.
        name = f"{name}__subject"

    def execute() -> ModuleType:
        if "." in name:
            _make_way(name.partition(".")[0], root)
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise TargetError(f"bad-target: {place} is not a Python file", expected=FORM)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return Module(place, root, execute)


def _make_way(package: str, root: Path) -> None:
    """Let a package be found in this folder, whatever else of its name is loaded or comes first on the path."""
    if package in _NEVER_EVICTED:
        return
    folder = str(root)
    if sys.path[:1] != [folder]:
        sys.path[:] = [folder, *(each for each in sys.path if each != folder)]
    loaded = sys.modules.get(package)
    file = getattr(loaded, "__file__", None)
    if loaded is not None and not (file and real_path(file).startswith(f"{folder}/{package}/")):
        for name in [each for each in sys.modules if f"{each}.".startswith(f"{package}.")]:
            del sys.modules[name]


# What runs everything: a user's folder of such a name cannot take its place.
_NEVER_EVICTED = {*sys.stdlib_module_names, "equivcheck", "numpy", "torch"}


def _dotted_module(place: str) -> Module:
    if not all(part.isidentifier() for part in place.split(".")):
        raise TargetError(f"bad-target: {place!r} is no module name", expected=FORM)
    folder = Path.cwd()

    def execute() -> ModuleType:
        with _importable(folder):
            return importlib.import_module(place)

    try:
        with _importable(folder):
            spec = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        spec = None
    except Exception as error:  # noqa: BLE001 - a parent package may raise anything
        raise import_failed(error, place) from None
    if spec is None or spec.origin is None:
        raise TargetError(
            f"module-not-found: no module named {place!r}",
            where=f"looked in {Path.cwd()} and sys.path",
            expected=FORM,
            fix=f"equivcheck run {place.replace('.', '/')}.py"
            if Path(f"{place.replace('.', '/')}.py").is_file()
            else None,
        )
    origin = Path(spec.origin).resolve()
    # Inside an installed package there are files of any name, which must not be found in place of the user's.
    return Module(place, origin.parent, execute, importable=not is_library(str(origin)))


def _package_root(path: Path) -> tuple[Path, str]:
    """Return the folder to import from and the dotted name, as `python -m` would have it."""
    parts = [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


# Folders from which modules were executed again: what came from there goes when the run is over.
_executed: set[Path] = set()


@contextmanager
def modules_restored() -> Iterator[None]:
    """Put back every module, and the import path, that executing a subject again has replaced.

    A check may run inside a test of the same folder: the test's own module, and the helpers it has imported, must be
    the same objects afterwards, and nothing that was executed for the check alone may be found by a later import.
    """
    before, path = sys.modules.copy(), list(sys.path)
    try:
        yield
    finally:
        for name in sys.modules.keys() - before.keys():
            if any(_lies_in(sys.modules[name], root) for root in _executed):
                _forget(name, sys.modules[name])
        for name, module in before.items():
            if sys.modules.get(name) is not module:
                sys.modules[name] = module
                parent, _, last = name.rpartition(".")
                if parent in before and hasattr(before[parent], last):
                    setattr(before[parent], last, module)
        sys.path[:] = path


def _forget(name: str, module: ModuleType) -> None:
    del sys.modules[name]
    parent, _, last = name.rpartition(".")
    if getattr(sys.modules.get(parent), last, None) is module:
        delattr(sys.modules[parent], last)


def executed_again(modules: Sequence[Module]) -> list[ModuleType]:
    """Execute modules, and what they import from their own folders, as if for the first time.

    Raises:
        TargetError: One does not import; the traceback is its own.
    """
    _executed.update(each.root for each in modules)
    roots = tuple(dict.fromkeys(f"{each.root}/" for each in modules))
    for name, path in _users_modules():
        if path.startswith(roots):
            del sys.modules[name]
    importlib.invalidate_caches()
    found = []
    for each in modules:
        with _importable(each.root) if each.importable else nullcontext(), _compiled_once():
            try:
                found.append(each.execute())
            except TargetError:
                raise
            except (Exception, SystemExit) as error:
                raise import_failed(error, each.place) from error
    return found


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    # The folder stays on the path: user code may import from it again while it trains.
    if str(root) not in sys.path and root.is_dir():
        sys.path.insert(0, str(root))
    yield


# Sources of the user's that were compiled, with what came of them.
_compiled: dict[tuple[str, bytes], bytes] = {}


@contextmanager
def _compiled_once() -> Iterator[None]:
    """Compile a source of the user's once, however often it is executed, whether or not bytecode may be written.

    Each execution still has code objects of its own: `torch.compile` keeps its work by code object, and one run must
    not find what another left.
    """

    def source_to_code(self: SourceFileLoader, data: Any, path: Any, **kwargs: Any) -> CodeType:
        if not isinstance(data, bytes) or is_library(str(path)):
            return original(self, data, path, **kwargs)
        key = (str(path), data)
        if key not in _compiled:
            _compiled[key] = marshal.dumps(original(self, data, path, **kwargs))
        code: CodeType = marshal.loads(_compiled[key])  # noqa: S302 - compiled above, by this process
        return code

    original: Callable[..., CodeType] = SourceFileLoader.source_to_code
    inherited = "source_to_code" not in vars(SourceFileLoader)
    SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if inherited:
            del SourceFileLoader.source_to_code
        else:
            SourceFileLoader.source_to_code = original  # type: ignore[method-assign]


# Modules known not to be the user's: some thousand are loaded, and looked over before every run.
_not_users: dict[str, ModuleType] = {}


def _users_modules() -> list[tuple[str, str]]:
    """Return the names and files of the loaded modules of the user's."""
    found = []
    # Copied in one step: a finalizer that imports may run at any time.
    for name, module in sys.modules.copy().items():
        if _not_users.get(name) is module:
            continue
        path = _user_path(module)
        if path:
            found.append((name, path))
        else:
            _not_users[name] = module
    return found


def _lies_in(module: ModuleType, root: Path) -> bool:
    return _user_path(module).startswith(f"{root}/")


def _user_path(module: ModuleType) -> str:
    """Return the file of a module of the user's; empty for any other, and for the script that runs."""
    filename = getattr(module, "__file__", None)
    if not filename or getattr(module, "__name__", "") == "__main__":
        return ""
    return "" if is_library(filename) else real_path(filename)
