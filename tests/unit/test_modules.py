"""The user's modules, executed again for every run."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SourceFileLoader

import pytest

from equivcheck import modules
from equivcheck.modules import executed_again, module_at, modules_restored


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the folder of a file that imports a helper beside it; nothing of it stays loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "helper_of_mine.py").write_text("count = [0]\n", encoding="utf-8")
    (tmp_path / "subject_of_mine.py").write_text(
        "from helper_of_mine import count\n\ndef train():\n    return count\n", encoding="utf-8"
    )
    with modules_restored():
        yield tmp_path


def execute():
    """Execute the subject once more."""
    [module] = executed_again([module_at("subject_of_mine.py")])
    return module


def test_every_execution_starts_anew(package):
    """The helper's state too."""
    first, second = execute(), execute()
    first.count[0] = 7

    assert second.count == [0]
    assert first.train.__code__ is not second.train.__code__


def test_a_source_is_compiled_once(package, monkeypatch):
    """However often it is executed, though no bytecode may be written; anew when it has changed."""
    compiled = []
    original = SourceFileLoader.source_to_code

    def noted(self, data, path, **kwargs):
        compiled.append(str(path).rpartition("/")[2])
        return original(self, data, path, **kwargs)

    monkeypatch.setattr(SourceFileLoader, "source_to_code", noted, raising=False)
    execute()
    execute()
    assert compiled == ["subject_of_mine.py", "helper_of_mine.py"]

    (package / "helper_of_mine.py").write_text("count = [1]  # changed\n", encoding="utf-8")
    assert execute().count == [1]
    assert compiled[2:] == ["helper_of_mine.py"]
    assert SourceFileLoader.source_to_code is noted


def test_the_loader_is_left_as_it_was(package):
    """Also by a file that does not import."""
    (package / "subject_of_mine.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    with pytest.raises(modules.TargetError, match="import-failed"):
        execute()

    assert "source_to_code" not in vars(SourceFileLoader)


def test_a_module_that_is_replaced_is_looked_at_again(package, monkeypatch):
    """A name that a library's module had before may be the user's now."""
    monkeypatch.setitem(sys.modules, "helper_of_mine", subprocess)
    executed_again([])
    monkeypatch.delitem(sys.modules, "helper_of_mine")
    before = execute().count

    assert execute().count is not before
