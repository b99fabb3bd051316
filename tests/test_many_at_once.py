"""Edits in batches: many at once, batch after batch, all measured on the final model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import on_main, same_state, state, uncosted
from safetensors.torch import load_file
from test_comparison import method_for

from kdpo_easyedit.bench.measuring import Measuring
from kdpo_easyedit.bench.protocols import compare
from kdpo_easyedit.bench.schema import SEQUENTIAL, batch_size, in_batches, is_order
from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.report.documents import write_documents
from kdpo_easyedit.report.results import read_results
from kdpo_easyedit.report.tables import protocol_title, remarks

N, SIZE = 3, 2
HOW = Measuring(fluency=False)


def test_a_protocol_is_named_by_its_size_and_one_at_a_time_is_the_sequential_one():
    assert [in_batches(size) for size in (1, 10)] == [SEQUENTIAL, "batches-10"]
    assert [batch_size(protocol) for protocol in ("single", SEQUENTIAL, "sequential-3", "batches-100")] == [1, 1, 1, 100]
    assert [is_order(protocol) for protocol in ("single", SEQUENTIAL, "sequential-3", "batches-100")] == [
        False,
        False,
        True,
        False,
    ]
    assert protocol_title("batches-10") == "edits in batches of 10, measured on the final model"


@pytest.fixture
def memit(small_world, tmp_path):
    return method_for("MEMIT", small_world, tmp_path)


def test_batches_are_made_in_one_call_each_and_go_on_after_a_stop(memit, requests, loaded, tmp_path, monkeypatch):
    calls, edit, undo = [], algorithms.apply_edit, algorithms.undo_edits

    def noted(editor, model, request, traces=None):
        calls.append([each["prompt"] for each in request])
        if stop and len(calls) == 2:
            raise KeyboardInterrupt
        return edit(editor, model, request, traces)

    def undone(editor, originals):
        undo(editor, originals)
        assert same_state(loaded[0].state_dict(), editor.model.state_dict())

    monkeypatch.setattr(algorithms, "apply_edit", noted)
    monkeypatch.setattr(algorithms, "undo_edits", undone)
    monkeypatch.setattr("kdpo_easyedit.bench.protocols._SAVE_EDITS", 1)
    stop = False
    whole = compare([memit], requests[:N], [in_batches(SIZE)], tmp_path / "whole", how=HOW)
    prompts = [request["prompt"] for request in requests[:N]]
    assert calls == [prompts[:SIZE], prompts[SIZE:]]
    (row,) = whole.rows
    assert row.n_edits == N and row.protocol == "batches-2" and row.edit_success > whole.before.edit_success

    calls, stop = [], True
    with pytest.raises(KeyboardInterrupt):
        compare([memit], requests[:N], [in_batches(SIZE)], tmp_path / "cut", how=HOW)
    calls, stop = [], False
    again = compare([memit], requests[:N], [in_batches(SIZE)], tmp_path / "cut", how=HOW)
    assert calls == [prompts[SIZE:]] and uncosted(again.rows[0]) == uncosted(row)
    files = [tmp_path / name / "weights-MEMIT-batches-2.safetensors" for name in ("whole", "cut")]
    assert same_state(*map(load_file, files))
    journal, whole_journal = (
        [json.loads(line) for line in (tmp_path / name / "MEMIT-batches-2.jsonl").read_text().splitlines()]
        for name in ("cut", "whole")
    )
    assert len(journal) == N and journal[0]["time"] == journal[1]["time"] > 0
    low, high = row.intervals["seconds_per_edit"]  # over the batches
    assert low == pytest.approx(min(entry["time"] for entry in whole_journal), abs=1e-3)
    assert high == pytest.approx(max(entry["time"] for entry in whole_journal), abs=1e-3)
    one = compare([memit], requests[:N], [in_batches(N)], tmp_path / "one", how=HOW)
    assert "seconds_per_edit" not in one.rows[0].intervals and one.rows[0].seconds_per_edit > 0

    def failing(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(algorithms, "apply_edit", failing)
    failed = compare([memit], requests[:N], [in_batches(SIZE)], tmp_path / "failed", how=HOW)
    assert failed.rows[0].failed == N and failed.rows[0].edit_success == whole.before.edit_success


def test_what_makes_one_edit_at_a_time_is_left_out_and_the_report_says_so(memit, small_world, requests, tmp_path):
    rome = method_for("ROME", small_world, tmp_path)
    comparison = compare([memit, rome], requests[:2], [SEQUENTIAL, in_batches(2)], tmp_path / "run", how=HOW, eval_at=[2])
    made = [("MEMIT", SEQUENTIAL), ("ROME", SEQUENTIAL), ("MEMIT", "batches-2")]
    assert [(row.method, row.protocol) for row in comparison.rows] == made
    words = "ROME makes one edit at a time: no batches of 2"
    assert f"{words}." in remarks(comparison)
    (result,) = read_results([tmp_path / "run"])
    assert [(row.method, row.protocol) for row in result.comparison.rows] == made and result.comparison.left_out == [words]
    assert words in write_documents([tmp_path / "run"], tmp_path / "run")[1].read_text()
    with pytest.raises(host.HostError, match="edit_batch is 2, and ROME make one edit at a time"):
        compare([rome], requests[:2], [in_batches(2)], tmp_path / "rome", how=HOW)
    with pytest.raises(host.HostError, match="edit_batch is 4, and there are 3 edits"):
        compare([memit], requests[:3], [in_batches(4)], tmp_path / "few", how=HOW)
    assert not (tmp_path / "rome").exists() and not (tmp_path / "few").exists()


@pytest.mark.skipif(not on_main(), reason="the release fine-tunes on the prompt's last token only")
def test_a_batch_is_read_as_its_edits_are_alone(small_world, requests, tmp_path, monkeypatch):
    """FT-M pads on the left; the loss of a batch's first step is the mean of its edits' losses, each alone."""
    method = method_for("FT-M", small_world, tmp_path)
    method.hparams.num_steps = 1
    editor = host.BaseEditor(method.hparams)
    before = state(editor.model)
    meter = host.submodule("models.ft.ft_main").AverageMeter
    seen, update = [], meter.update
    monkeypatch.setattr(meter, "update", lambda self, loss, n=1: (seen.append(loss), update(self, loss, n)))
    chosen = [requests[0], {**requests[1], "prompt": f"As everybody knows, {requests[1]['prompt']}"}]
    for asked in (*chosen, chosen):
        algorithms.undo_edits(editor, algorithms.apply_edit(editor, editor.model, asked)[1])
        assert same_state(before, state(editor.model))
    assert seen[2] == pytest.approx((seen[0] + seen[1]) / 2, rel=1e-5) and seen[0] != pytest.approx(seen[1], rel=1e-2)
