"""``kdpo edit`` in a terminal: it asks, shows before and after side by side, undoes, redoes and saves."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import apply_edits, revert_edits
from kdpo_easyedit.bench.by_hand import Session
from kdpo_easyedit.bench.datasets import DatasetError
from kdpo_easyedit.bench.protocols import Method
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.host import HostError
from kdpo_easyedit.edits import EditsError, read_header
from kdpo_easyedit.edits.base import says
from kdpo_easyedit.edits.file import read_changes
from kdpo_easyedit.method.kdpo_c import protected_keys


def fields(request):
    return {key: request[key] for key in ("prompt", "target_new", "rephrase_prompt")}


@pytest.fixture
def session(aware, fresh):
    aware.model_name = fresh
    with Session(Method("KDPO+C", aware)) as session:
        yield session


def test_edits_are_undone_and_redone_to_the_bit_and_saved(session, requests, tmp_path):
    """With the keys that KDPO+C steps around, so that an edit after an undone one is as it would have been."""
    model, states, keys = session.model, [state(session.model)], [{}]
    for request in requests[:3]:
        before, after = session.edit(fields(request))
        assert after.texts["prompt"].startswith(request["target_new"]) and before.texts != after.texts
        assert after.probability > before.probability and set(after.texts) == {"prompt", "rephrase_prompt"}
        states.append(state(model))
        keys.append(protected_keys(model))
    assert [len(session.made), session.saved] == [3, False]
    for number in (2, 1, 0):
        assert session.undo()["prompt"] == requests[number]["prompt"] and same_state(state(model), states[number])
        assert number == 0 or same_state(protected_keys(model), keys[number])
    assert session.undo() is None and session.saved and session.made == []
    for number in (0, 1, 2):
        assert session.redo()["prompt"] == requests[number]["prompt"] and same_state(state(model), states[number + 1])
        assert same_state(protected_keys(model), keys[number + 1])
    assert session.redo() is None
    session.undo()
    session.edit(fields(requests[2]))
    assert same_state(state(model), states[3])
    session.save(tmp_path / "three.safetensors")
    assert session.saved and len(read_changes(tmp_path / "three.safetensors")) == 3
    revert_edits(model, tmp_path / "three.safetensors")
    assert same_state(state(model), states[0])


def test_an_edit_that_cannot_be_made_leaves_what_there_is(session, requests, tmp_path):
    before = state(session.model)
    with pytest.raises(DatasetError, match=r"prompt and target_new have .* tokens, and the model takes 256"):
        session.edit({"prompt": "word " * 300, "target_new": "x"})
    with pytest.raises(EditsError, match="originals is empty"):
        session.save(tmp_path / "none.safetensors")
    assert same_state(before, state(session.model)) and session.made == [] and not list(tmp_path.iterdir())
    session.edit(fields(requests[0]))
    with pytest.raises(EditsError, match="cannot be written"):
        session.save(tmp_path / "no" / "one.safetensors")
    assert len(session.made) == 1 and not session.saved


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, folder, *arguments):
        self.ours, theirs = os.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "dumb"}
        command = [sys.executable, "-m", "kdpo_easyedit", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment, start_new_session=True
        )
        os.close(theirs)

    def until(self, text: str, seconds: float = 300) -> str:
        """What it prints up to a text."""
        found, end = "", time.monotonic() + seconds
        while text not in found:
            assert time.monotonic() < end, found
            if select.select([self.ours], [], [], 1)[0]:
                found += os.read(self.ours, 4096).decode(errors="replace")
        return found

    def say(self, line: str) -> None:
        os.write(self.ours, line.encode() + b"\n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_terminal_is_asked(aware, small_world, requests, tmp_path):
    settings = {key: value for key, value in vars(aware).items() if value is not None}
    (tmp_path / "aware.yaml").write_text(yaml.safe_dump(settings))
    terminal = Terminal(tmp_path, "edit", "--editing_method", "KDPO+C", "--hparams_dir", "aware.yaml")

    def edit(request, locality="") -> str:
        terminal.say(request["prompt"])
        terminal.until("new answer> ")
        terminal.say(request["target_new"])
        terminal.until("the same in other words (or nothing)> ")
        terminal.say("")
        terminal.until("a prompt that should stay as it is (or nothing)> ")
        terminal.say(locality)
        return terminal.until("prompt> ")

    try:
        assert "undo " in terminal.until("prompt> ")
        shown = edit(requests[0], requests[5]["prompt"])
        (row,) = re.findall(r"│ prompt +│ (.*?) +│ (.*?) +│", shown)
        assert row[0].startswith(requests[0]["ground_truth"]) and row[1].startswith(requests[0]["target_new"])
        assert "locality" in shown and "rephrasing" not in shown and "before" in shown
        edit(requests[1])
        terminal.say("undo")
        assert requests[1]["prompt"] in terminal.until("prompt> ")
        terminal.say("redo")
        assert "made again" in terminal.until("prompt> ")
        terminal.say("undo")
        terminal.until("prompt> ")
        terminal.say("quit")
        terminal.until("1 edits are not saved; quit all the same? (yes or no)> ")
        terminal.say("no")
        terminal.until("prompt> ")
        terminal.say("save mine.safetensors")
        assert "1 edits are in mine.safetensors" in terminal.until("prompt> ")
        terminal.say("\x04")  # Ctrl-D
        assert terminal.process.wait(300) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aware.yaml", "mine.safetensors"]
    assert [r["prompt"] for r in read_header(tmp_path / "mine.safetensors")["requests"]] == [requests[0]["prompt"]]
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    apply_edits(model, tmp_path / "mine.safetensors")
    assert says(model, AutoTokenizer.from_pretrained(small_world.folder), requests[0])


def test_what_is_no_terminal_is_not_asked(capsys):
    with pytest.raises(SystemExit):
        main(["edit"])
    assert "without both it asks for them, in a terminal" in capsys.readouterr().err


def test_edits_that_cannot_be_undone_one_by_one_are_refused(hparams):
    hparams.alg_name = "GRACE"
    with pytest.raises(HostError, match="GRACE edits no weights of the model"):
        Session(Method("GRACE", hparams))
