"""What a journal is recognised by."""

from __future__ import annotations

import hashlib

from equivcheck.cli.journal import Journal


def test_a_command_line_longer_than_a_path_can_be_is_no_file(tmp_path):
    """Its files have digests, whatever else is named."""
    loop = tmp_path / "loop.py"
    loop.write_text("pass", encoding="utf-8")
    command = "accelerate launch " + "--option value " * 30 + "train.py"

    journal = Journal(None, [command, str(loop), "suite:amp"], {})

    assert journal.run["code"] == {str(loop): hashlib.sha256(b"pass").hexdigest()[:16]}
