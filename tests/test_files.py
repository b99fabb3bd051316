"""Files that are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from kdpo_easyedit.files import whole


def test_processes_that_write_the_same_file_leave_each_other_alone(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    with whole(path) as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with whole(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and one.read_text() == "one"
        assert one.suffix == other.suffix == ".unfinished"
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_finished_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
