"""A run's folder, and runs that are cut off: killed at any moment, they end as if nothing had happened."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, same_state, uncosted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import apply_edits, edits_applied, revert_edits
from kdpo_easyedit.bench import datasets, protocols, schema
from kdpo_easyedit.bench.runs import Journal, RunError, RunFolder
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.edits import read_header
from kdpo_easyedit.edits.base import says
from kdpo_easyedit.edits.file import read_changes

METHODS = ("KDPO", "FT", "ROME", "MEMIT")
N = 12


@pytest.fixture(scope="module")
def process():
    """Makes processes that have EasyEdit imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdpo_easyedit.bench.protocols"])
    return context.Process


def test_what_is_written_is_read(tmp_path):
    with RunFolder(tmp_path / "run", {"seed": 0}) as run:
        run.write("some.json", {"a": [1, "ü"]})
        run.write_weights("weights-X.safetensors", {"w": torch.eye(2).T}, {"edits": 3})
        assert run.read("some.json") == {"a": [1, "ü"]} and run.read("none.json") is None
        weights, notes = run.read_weights("weights-X.safetensors")
        assert torch.equal(weights["w"], torch.eye(2)) and notes == {"edits": 3}
        assert run.read_weights("none.safetensors") == ({}, {})
        with pytest.raises(TypeError):
            run.write("some.json", torch.eye(2))
        assert run.read("some.json") == {"a": [1, "ü"]}
        assert not list(run.path.glob("*.unfinished"))


def test_a_journal_keeps_what_was_appended(tmp_path):
    journal = Journal(tmp_path / "x.jsonl")
    for number in range(5):
        journal.append({"edit": number})
    assert Journal(journal.path).entries == journal.entries == [{"edit": n} for n in range(5)]
    journal.cut(3)
    journal.append({"edit": "new"})
    assert Journal(journal.path).entries == [{"edit": 0}, {"edit": 1}, {"edit": 2}, {"edit": "new"}]


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_truncated_line_is_dropped_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    there = '{"edit": 0}\n{"edit": 1}\n'[:-cut]
    path.write_text(there)
    journal = Journal(path)
    assert journal.entries == ([{"edit": 0}] if cut < 13 else [])
    assert path.read_text() == there  # who only reads a run changes nothing in it
    journal.append({"edit": 1})
    assert Journal(path).entries == [{"edit": 0}, {"edit": 1}]


def test_a_broken_line_in_the_middle_is_told(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"edit": 0}\n{"ed\n{"edit": 2}\n')
    with pytest.raises(RunError, match=r"x.jsonl: line 2 cannot be read; start anew with --overwrite"):
        Journal(path)


def test_another_run_is_not_mixed_in(tmp_path):
    settings = {"seed": 0, "methods": {"FT": {"lr": 0.1}}, "data": "a"}
    with RunFolder(tmp_path / "run", settings) as run:
        run.journal("x.jsonl").append(1)
    with RunFolder(tmp_path / "run", settings) as run:
        assert run.journal("x.jsonl").entries == [1]
    with RunFolder(tmp_path / "run", settings, about={"device": "another"}) as run:
        assert run.journal("x.jsonl").entries == [1]
        run.settle(weights="w")
        assert run.read("run.json") == settings | {"found": {"weights": "w"}, "about": {"device": "another"}}
    with RunFolder(tmp_path / "run", settings) as run:
        run.settle(weights="w")
        with pytest.raises(RunError, match=r"another run: weights is 'w' there and 'v' here.*--overwrite"):
            run.settle(weights="v")
    other = {"seed": 0, "methods": {"FT": {"lr": 0.2}}, "data": "b"}
    with pytest.raises(RunError, match=r"methods.FT.lr is 0.1 there and 0.2 here; data is 'a' there and 'b' here.*--overwrite"):
        RunFolder(tmp_path / "run", other).__enter__()
    (tmp_path / "run" / "x.jsonl").rename(tmp_path / "run" / "before.jsonl")
    with RunFolder(tmp_path / "run", other, overwrite=True) as run:
        assert run.journal("before.jsonl").entries == []
        run.settle(weights="v")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="what it holds is no run"):
            RunFolder(tmp_path, {}, overwrite).__enter__()
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_overwriting_removes_a_runs_files_and_no_others(tmp_path):
    mine = ["edits.jsonl", "figure.png", "metrics-of-mine.json", "notes.txt"]
    with RunFolder(tmp_path / "run", {"methods": {"FT": {}}, "protocols": ["single"]}) as run:
        for name in ("summary.json", "metrics-FT-single.json", "weights-FT.safetensors", "FT-single.jsonl", "radar.png", *mine):
            (run.path / name).write_text("[]")
    with RunFolder(tmp_path / "run", {"new": 1}, overwrite=True) as run:
        assert sorted(p.name for p in run.path.iterdir()) == sorted([".lock", "run.json", *mine])


def enter(folder: Path, told: multiprocessing.SimpleQueue) -> None:
    try:
        RunFolder(folder, {}).__enter__()
        told.put("entered")
    except RunError as error:
        told.put(str(error))


def test_a_second_process_is_refused(tmp_path, process):
    told = multiprocessing.get_context("forkserver").SimpleQueue()
    with RunFolder(tmp_path / "run", {}):
        process(target=enter, args=(tmp_path / "run", told)).start()
        assert "another process is at work here" in told.get()
    process(target=enter, args=(tmp_path / "run", told)).start()
    assert told.get() == "entered"


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run: cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run", {}).__enter__()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_and_what_was_done_is_kept(tmp_path):
    with RunFolder(tmp_path / "run", {}) as run:
        run.journal("x.jsonl").append({"edit": 0})
        (run.path / "y.jsonl").symlink_to("/dev/full")
        with pytest.raises(
            RunError, match=r"y.jsonl: cannot be written: No space left on device. What was done is kept; make room"
        ):
            Journal.append(_unread(run.path / "y.jsonl"), {"edit": 0})
        (run.path / f"z.json.{os.getpid()}.unfinished").symlink_to("/dev/full")
        with pytest.raises(RunError, match=r"z.json: cannot be written: No space left on device"):
            run.write("z.json", {"a": 1})
        assert run.read("z.json") is None
        assert run.journal("x.jsonl").entries == [{"edit": 0}]


def _unread(path: Path) -> Journal:
    journal = Journal.__new__(Journal)
    journal.path, journal.entries, journal._cut_off = path, [], None
    return journal


# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(small_world, tmp_path_factory) -> dict[str, Path]:
    """The world's YAMLs, for the small world."""
    folder = tmp_path_factory.mktemp("hparams")
    found = {}
    for name in METHODS:
        config = yaml.safe_load((ROOT / "hparams" / name / "world.yaml").read_text())
        config["model_name"] = str(small_world.folder)
        if "stats_dir" in config:
            config["stats_dir"] = str(small_world.statistics)
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(config))
    return found


def edit_in_sequence(name: str, hparams: Path, data: Path, folder: Path) -> None:
    """A sequential run, in a process of its own; weights are saved every other edit, so that kills fall between."""
    protocols._SAVE_EDITS = 2
    method = protocols.Method(name, load_hparams(name, hparams))
    requests = datasets.load_requests(data, size=N)
    protocols.compare([method], requests, [schema.SEQUENTIAL], folder, eval_at=[4], quiet=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(name, settings, small_world, tmp_path, process):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    chance = random.Random(name)

    def start(folder):
        run = process(target=edit_in_sequence, args=(name, settings[name], small_world.edits, folder))
        run.start()
        return run

    run = start(whole)
    run.join()
    assert run.exitcode == 0

    kills = 0
    for _ in range(100):
        run, before, lines = start(cut), progress(cut), chance.choice((0, 1, 1, 2, 3))
        while run.is_alive() and progress(cut) <= before + lines:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)  # somewhere in what comes next
        if not run.is_alive():
            break
        run.kill()
        run.join()
        kills += 1
    run.join()
    assert run.exitcode == 0 and kills >= 5

    for file in ("summary.json", "curve.json"):
        one, other = ([uncosted(row) for row in json.loads((f / file).read_text())] for f in (whole, cut))
        assert one == other
    assert [row["n_edits"] for row in one] == [4, N]
    one, other = (load_file(f / f"weights-{name}.safetensors") for f in (whole, cut))
    assert same_state(one, other), {key: (one[key] - other[key]).abs().max().item() for key in one}
    assert len(Journal(cut / f"{name}-sequential.jsonl").entries) == N


def test_a_copy_whose_journal_is_behind_its_weights_starts_over(settings, small_world, tmp_path, process):
    for names in (["metrics-KDPO-sequential.json", "summary.json"], []):
        run = process(target=edit_in_sequence, args=("KDPO", settings["KDPO"], small_world.edits, tmp_path / "run"))
        run.start()
        run.join()
        assert run.exitcode == 0
        journal = tmp_path / "run" / "KDPO-sequential.jsonl"
        if names:
            weights = load_file(tmp_path / "run" / "weights-KDPO.safetensors")
            journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]))
            for name in names:
                (tmp_path / "run" / name).unlink()
    assert same_state(load_file(tmp_path / "run" / "weights-KDPO.safetensors"), weights)
    assert len(Journal(journal).entries) == N


def progress(folder: Path) -> int:
    """How many lines and files a run has written."""
    lines = sum(file.read_bytes().count(b"\n") for file in folder.glob("*.jsonl"))
    return lines + len(list(folder.glob("metrics-*.json")))


def command(settings: dict[str, Path], small_world, folder: Path, *more: str, name: str = "KDPO") -> list[str]:
    return [
        sys.executable, str(ROOT / "run_kdpo.py"), "--editing_method", name, "--hparams_dir", str(settings[name]),
        "--data_dir", str(small_world.edits), "--ds_size", str(N), "--eval_at", "4", "--sequential_edit",
        "--metrics_save_dir", str(folder), *more,
    ]  # fmt: skip


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(settings, small_world, tmp_path):
    # A shell lets what it starts in the background ignore Ctrl-C, and so all that is started from there.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    for number in range(3):  # Python drops the interrupt where it happens to come while an object is finalised
        folder = tmp_path / str(number)
        slow = command(settings, small_world, folder, name="ROME")  # of another's edits, all may be made before the signal
        process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
        while not (folder / "ROME-sequential.jsonl").exists() and process.poll() is None:  # until one edit has been made
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            break
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command goes on from here" and "Traceback" not in errors
    done = subprocess.run(slow, capture_output=True, text=True)
    assert done.returncode == 0 and f"{N} sequential edits" in done.stdout


def test_another_command_in_the_folder_is_refused_unless_told_to_overwrite(settings, small_world, tmp_path, capfd):
    def run(*more: str) -> tuple[int, str]:
        status = main(command(settings, small_world, tmp_path / "run", "--ds_size", "2", "--eval_at", "2", *more)[2:])
        return status, capfd.readouterr().err

    status, errors = run("--quiet")
    assert status == 0 and "%|" not in errors
    weights = (tmp_path / "run" / "weights-KDPO.safetensors").read_bytes()
    status = main(command(settings, small_world, tmp_path / "run", "--ds_size", "2", "--eval_at", "2")[2:])
    assert status == 0 and "held this run, complete" in " ".join(capfd.readouterr().out.split())
    status, errors = run("--seed", "1")
    assert status == 2 and "seed is 0 there and 1 here" in errors.splitlines()[-1]
    assert (tmp_path / "run" / "weights-KDPO.safetensors").read_bytes() == weights
    status, errors = run("--seed", "1", "--overwrite")
    assert status == 0 and "KDPO, sequential edits" in errors


def test_a_comparison_keeps_the_factors_of_every_edit_also_where_it_was_stopped(aware, requests, tmp_path, monkeypatch, caplog):
    """KDPO+C's edits of a sequence, one by one; begun without --save_edits, as one change, and a line says so."""
    monkeypatch.setattr(logging.getLogger("kdpo_easyedit"), "handlers", [caplog.handler])  # a run has the root logger's own
    model, tok = (cls.from_pretrained(aware.model_name) for cls in (AutoModelForCausalLM, AutoTokenizer))
    settings = {"requests": requests[:5], "protocols": [schema.SEQUENTIAL], "eval_at": [3], "quiet": True}

    def run(folder, **more):
        protocols.compare([protocols.Method("KDPO+C", aware)], folder=tmp_path / folder, **settings, **more)

    run("whole", save_edits=tmp_path / "whole.safetensors")
    header = read_header(tmp_path / "whole.safetensors")
    assert header["format"] == 2 and len(header["requests"]) == 5
    apply_edits(model, tmp_path / "whole.safetensors")
    (name,) = header["weights"]
    assert torch.equal(model.get_parameter(name), load_file(tmp_path / "whole" / "weights-KDPO+C.safetensors")[name])
    revert_edits(model, tmp_path / "whole.safetensors")
    with edits_applied(model, tmp_path / "whole.safetensors", only=[4]):
        assert says(model, tok, requests[3])
    assert not says(model, tok, requests[3])

    original = protocols.timed_edit
    for begun in ("parts.safetensors", None):  # stopped at the fourth edit
        calls = []

        def stopped(*given, calls=calls):
            calls.append(given)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(*given)

        monkeypatch.setattr(protocols, "timed_edit", stopped)
        folder = "parts" if begun else "late"
        with pytest.raises(KeyboardInterrupt):
            run(folder, save_edits=begun and tmp_path / begun)
        monkeypatch.setattr(protocols, "timed_edit", original)
        run(folder, save_edits=tmp_path / f"{folder}.safetensors")
        found = read_header(tmp_path / f"{folder}.safetensors")
        assert found["weights"] == header["weights"] and found["format"] == (2 if begun else 1)
        assert ("keeps its edits as one change: the first 3" in caplog.text) == (begun is None)
    for one, other in zip(*(read_changes(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))):
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name]))


def test_a_sequence_in_several_layers_goes_on(aware, requests, tmp_path, monkeypatch):
    """A layer's statistics are known by the weights below it, of which some are edited."""
    aware = replace(aware, layers=[2, 3])

    def run(folder):
        method = protocols.Method("KDPO+C", aware)
        protocols.compare([method], requests[:3], [schema.SEQUENTIAL], tmp_path / folder, eval_at=[3], quiet=True)
        return load_file(tmp_path / folder / "weights-KDPO+C.safetensors")

    whole, original, calls = run("whole"), protocols.timed_edit, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(protocols, "timed_edit", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(protocols, "timed_edit", original)
    parts = run("parts")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_the_edits_and_the_model_are_kept(settings, small_world, tmp_path):
    kept, saved = tmp_path / "edits.safetensors", tmp_path / "model"
    arguments = command(
        settings, small_world, tmp_path / "run", "--save_edits", str(kept), "--save_model", str(saved), name="FT"
    )
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    edited = AutoModelForCausalLM.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(small_world.folder)
    assert not same_state(model.state_dict(), edited.state_dict())
    apply_edits(model, kept)
    assert same_state(model.state_dict(), edited.state_dict())
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (saved, small_world.folder)]
    assert tokenizers[0].padding_side == tokenizers[1].padding_side
    header = read_header(kept)
    assert len(header["requests"]) == N and header["hparams"]["alg_name"] == "FT"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits.safetensors", "model", "run"]
