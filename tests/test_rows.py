"""Rows of results: edits that fail, intervals, orders, ordinary text, and files of version 0.1."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import same_state, state

from kdpo_easyedit import apply_kdpo_to_model
from kdpo_easyedit.bench import ability, metrics
from kdpo_easyedit.bench.ability import read as read_text
from kdpo_easyedit.bench.answers import answers
from kdpo_easyedit.bench.datasets import DatasetError
from kdpo_easyedit.bench.measuring import Measuring, retention, seed_everything
from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.runs import RunError, RunFolder
from kdpo_easyedit.bench.schema import (
    MEASURES,
    SEQUENTIAL,
    SINGLE,
    VERSION,
    EditMetrics,
    Summary,
    from_json,
    in_order,
    to_json,
)
from kdpo_easyedit.bench.significance import joint_interval, share_interval
from kdpo_easyedit.bench.versions import versions
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.easyedit.host import HostError
from kdpo_easyedit.easyedit.loading import in_place
from kdpo_easyedit.files import json_text
from kdpo_easyedit.report.documents import write_documents
from kdpo_easyedit.report.results import read_results
from kdpo_easyedit.report.tables import flips, remarks, sheets


@pytest.fixture
def kdpo(loaded, hparams) -> Method:
    hparams = in_place(hparams)
    hparams.model_name = loaded
    return Method("KDPO", hparams)


def test_an_edit_that_cannot_be_made_is_a_row_that_says_so(kdpo, loaded, requests, tmp_path, monkeypatch, capfd):
    """Of a single edit and in a sequence: the others are made, the model is as if it had not been tried."""
    edit, before = algorithms.apply_edit, state(loaded[0])

    def failing(editor, model, request, traces=None):
        if request["prompt"] == requests[1]["prompt"]:
            raise torch.OutOfMemoryError("no room")
        return edit(editor, model, request, traces)

    monkeypatch.setattr(algorithms, "apply_edit", failing)
    comparison = compare([kdpo], requests[:3], [SINGLE, SEQUENTIAL], tmp_path, quiet=True)
    assert [row.failed for row in comparison.rows] == [1, 1] and same_state(before, state(loaded[0]))
    for protocol in (SINGLE, SEQUENTIAL):
        entries = from_json(EditMetrics, json.loads((tmp_path / f"metrics-KDPO-{protocol}.json").read_text()))
        assert [entry.error for entry in entries] == [None, "OutOfMemoryError: no room", None]
        assert entries[0].post["rewrite_acc"] == [1.0] and entries[1].time is None
    single = from_json(EditMetrics, json.loads((tmp_path / "metrics-KDPO-single.json").read_text()))
    assert single[1].post["rewrite_acc"] == single[1].pre["rewrite_acc"]
    assert "1 of 3 edits could not be made" in remarks(comparison)[0]
    assert "could not edit" in capfd.readouterr().err
    assert "1 of 3 edits could not be made" in write_documents([tmp_path], tmp_path)[1].read_text()


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**32 + 5])
def test_any_whole_number_is_a_seed(seed):
    """Of which NumPy takes 32 bits."""
    seed_everything(seed)
    first = np.random.random(), random.random(), torch.rand(1).item()
    seed_everything(seed)
    assert first == (np.random.random(), random.random(), torch.rand(1).item())


def test_numbers_that_are_not_finite_leave_json_readable(tmp_path):
    content = {"loss": [math.nan, math.inf, 1.5], "text": "ü"}
    assert json.loads(json_text(content)) == {"loss": [None, None, 1.5], "text": "ü"}
    with RunFolder(tmp_path / "run", {"seed": 0}) as run:
        run.write("some.json", content)
        run.journal("some.jsonl").append(content)
        assert run.read("some.json")["loss"] == run.journal("some.jsonl").entries[0]["loss"] == [None, None, 1.5]


def test_intervals_of_shares_are_right_at_the_ends_and_in_between():
    assert share_interval([100.0] * 100) == [pytest.approx(96.3, abs=0.05), 100]
    assert share_interval([0.0] * 100) == [0, pytest.approx(3.7, abs=0.05)]
    yes_and_no = share_interval([100.0] * 50 + [0.0] * 50)
    alike = share_interval([49.0, 51.0] * 50)  # as many edits, which hardly vary
    assert yes_and_no == [pytest.approx(40.4, abs=0.2), pytest.approx(59.6, abs=0.2)] and alike[1] - alike[0] < 1
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = share_interval(list(100.0 * (rng.random(30) < 0.97)))
        covered += low <= 97 <= high
    assert covered >= 360
    low, high = joint_interval([[100.0, 0.0] * 20, [50.0, None] * 20])
    assert low < 50 < high


def test_a_folder_that_was_given_up_before_anything_was_measured_is_free(tmp_path):
    with RunFolder(tmp_path / "run", {"model": "nothing"}):
        pass
    with RunFolder(tmp_path / "run", {"model": "something"}) as run:
        run.journal("before.jsonl").append({})
    with pytest.raises(RunError, match="model is 'something' there"), RunFolder(tmp_path / "run", {"model": "other"}):
        pass


def test_a_method_is_named_once(kdpo, requests, tmp_path):
    with pytest.raises(HostError, match="names 'KDPO' twice"):
        compare([kdpo, kdpo], requests[:1], [SINGLE], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_with_folders_of_one_name_are_told_apart(kdpo, requests, tmp_path):
    for parent in ("a", "b"):
        compare([kdpo], requests[:2], [SINGLE], tmp_path / parent / "out", quiet=True)
    (joined,) = read_results([tmp_path / "a" / "out", tmp_path / "b" / "out"])
    assert [row.method for row in joined.comparison.rows] == ["KDPO (a/out)", "KDPO (b/out)"]


def test_the_same_edits_in_several_orders(kdpo, requests, tmp_path):
    protocols = [SEQUENTIAL, in_order(2), in_order(3)]
    comparison = compare([kdpo], requests[:6], protocols, tmp_path, quiet=True)
    orders = [
        [entry["case_id"] for entry in json.loads((tmp_path / f"metrics-KDPO-{protocol}.json").read_text())]
        for protocol in protocols
    ]
    assert orders[0] == list(range(6)) and all(sorted(order) == orders[0] for order in orders) and orders[1] != orders[2]
    assert any(line.startswith("KDPO over 3 orders: edit success ") for line in remarks(comparison))
    (result,) = read_results([tmp_path])
    assert [entry.case_id for entry in result.metrics["KDPO", in_order(2)]] == list(range(6))
    again = compare([kdpo], requests[:6], protocols, tmp_path, quiet=True)
    assert [row.edit_success for row in again.rows] == [row.edit_success for row in comparison.rows]


def test_reading_is_the_mean_loss_of_the_models_own_forward(loaded, small_world):
    model, tok = loaded
    passages = small_world.passages()[:3]
    reading = ability.read(model, tok, passages, tokens=10**6)
    losses = []
    for passage in passages:
        ids = torch.tensor([tok(passage)["input_ids"][: ability.PASSAGE]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1))
    assert reading.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    assert reading.divergence(reading) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.5)
    try:
        other = ability.read(model, tok, passages, tokens=10**6)
        assert other.perplexity > reading.perplexity and other.divergence(reading) > 0.01
    finally:
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(2)


def test_a_sequence_is_measured_on_ordinary_text(kdpo, requests, small_world, tmp_path):
    comparison = compare([kdpo], requests[:2], [SEQUENTIAL], tmp_path, quiet=True, ability_texts=small_world.passages()[:20])
    (row,) = comparison.rows
    assert comparison.before.perplexity < row.perplexity < 100 * comparison.before.perplexity and row.divergence > 0
    assert "perplexity" in write_documents([tmp_path], tmp_path)[1].read_text()


def test_an_interval_needs_more_than_one_passage(loaded, small_world):
    model, tok = loaded
    (one,) = texts = small_world.passages()[:1]
    left = ability.Ability.of(model, tok, texts, None).left_in(model, tok)
    assert left["perplexity"] > 1 and left["divergence"] == pytest.approx(0, abs=1e-6) and left["intervals"] == {}
    left = ability.Ability.of(model, tok, small_world.passages()[:2], None).left_in(model, tok)
    assert left["intervals"].keys() == {"perplexity", "divergence"}
    with pytest.raises(DatasetError, match="ability_text: it holds no passage of two tokens or more"):
        ability.read(model, tok, [one[:1]])


def test_text_that_names_the_subject_of_an_edit_is_left_out(kdpo, requests, small_world, tmp_path):
    (first, second), texts = requests[:2], small_world.passages()[:20]
    about = [f"{first['subject']} is well known.", f"Nobody knows {second['subject']}'s name."]
    assert ability.about_no_edit([*about, *texts, f"x{first['subject']}"], [first, second])[-1] == f"x{first['subject']}"
    kept = ability.about_no_edit([*about, *texts], [first, second])
    assert kept and not set(about) & set(kept) and ability.about_no_edit(about, [{"prompt": "no subject"}]) == about
    assert ability.about_no_edit(["Gambia is a country", "the gambia"], [{"subject": "The Gambia"}]) == ["the gambia"]
    # Scripts without spaces, and Korean's particles.
    names = [{"subject": name} for name in ("東京", "กรุงเทพ", "서울", "Paris")]
    texts = ["私は東京に住んでいます。", "ไปกรุงเทพมหานคร", "서울에서는 비가 온다", "他在Paris住", "Parisian life", "서울시"]
    assert ability.about_no_edit(texts, names) == ["Parisian life", "서울시"]
    with pytest.raises(DatasetError, match="ability_text: every passage names the subject of an edit"):
        compare([kdpo], [first, second], [SEQUENTIAL], tmp_path / "all", ability_texts=about)
    assert not (tmp_path / "all").exists()
    single = compare([kdpo], [first], [SINGLE], tmp_path / "single", quiet=True, ability_texts=about)  # reads no such text
    assert single.before.perplexity is None


def test_what_is_asked_for_beside_the_tables_has_columns_and_intervals(kdpo, requests, small_world, tmp_path):
    how = Measuring(contexts=("qa", "plain"), fluency=False, probes=True)
    texts = small_world.passages()[:20]
    comparison = compare(
        [kdpo], requests[:4], [SINGLE, SEQUENTIAL], tmp_path, eval_at=[4], quiet=True, how=how, ability_texts=texts
    )
    single, sequential = comparison.rows
    assert single.further["generated_success_plain"] == 100 and 0 <= single.further["unstopped"] <= 100
    assert single.tokens_per_second > 0 and {"negation", "contradiction", "score", "em"} <= single.further.keys()
    assert single.further["score"] == pytest.approx(metrics.harmonic_score([single.es, single.ps, single.ns]))
    for row in comparison.rows:
        figures = {key for key in (*MEASURES, "mean") if getattr(row, key) is not None} | row.further.keys()
        assert figures <= row.intervals.keys()
        assert {"seconds_per_edit", "megabytes_per_edit"} <= row.intervals.keys() or row.megabytes_per_edit is None
        assert all(low <= high for low, high in row.intervals.values())
    low, high = sequential.intervals["perplexity"]
    assert low < sequential.perplexity < high and sequential.intervals["divergence"][0] > 0
    (result,) = read_results([tmp_path])
    assert result.comparison.before.perplexity == comparison.before.perplexity and result.comparison.spent["measuring"] > 0
    shown = {sheet.title: sheet.rows for sheet in sheets(result.comparison, result.settings["context"])}
    assert shown["What the model can still do"][SEQUENTIAL]["KDPO"].keys() == {"perplexity", "KL, nats"}
    assert re.fullmatch(r"[\d.]+ \([\d.]+–[\d.]+\)", shown["What the model can still do"][SEQUENTIAL]["(before)"]["perplexity"])
    assert {"qa: whole", "qa: did not stop", "plain: whole", "plain: did not stop", "tokens a second"} <= set(
        shown["Written answers"][SINGLE]["KDPO"]
    )
    assert shown["Negation and contradiction"][SINGLE].keys() == {"(before)", "KDPO"}
    assert any(re.match(r"Measuring took \d+ s of the \d+ s", line) for line in remarks(result.comparison))


@pytest.mark.parametrize("settings", ["hparams", "aware"])
def test_a_fact_is_edited_twice_and_back(settings, request, fresh, requests, small_world):
    model, tok = fresh
    hparams = replace(request.getfixturevalue(settings), sequential_edit=False)
    fact, other = requests[0], next(r for r in requests[1:] if r["prompt"].endswith(" works for"))
    targets = [fact["target_new"], other["ground_truth"], fact["ground_truth"]]
    assert len(set(targets)) == 3 and fact["prompt"].endswith(" works for")
    before = read_text(model, tok, small_world.passages()[:20]).perplexity
    for target in targets:
        edit = {**fact, "target_new": target}
        apply_kdpo_to_model(model, tok, [edit], hparams)
        (found,) = metrics.measure(model, tok, [edit], fluency=False)
        (answer,) = write_answers(model, tok, [fact["prompt"]], [target])
        assert found["rewrite_acc"] == [1.0] and answers(answer.text, target), (target, answer.text)
    assert read_text(model, tok, small_world.passages()[:20]).perplexity < 1.5 * before


def test_a_run_that_is_called_again_keeps_what_every_checkpoint_read(kdpo, requests, small_world, tmp_path):
    """The weights of an earlier checkpoint are gone by then."""
    texts = small_world.passages()[:20]

    def curve():
        compare([kdpo], requests[:4], [SEQUENTIAL], tmp_path, eval_at=[1], quiet=True, ability_texts=texts)
        return json.loads((tmp_path / "curve.json").read_text())

    first = curve()
    readings = [(row["n_edits"], row["perplexity"], row["divergence"]) for row in first]
    assert [row[0] for row in readings] == [1, 4] and readings[0][2] < readings[1][2]
    assert curve() == first


def test_retention_is_the_mean_of_each_tenth_oldest_first():
    entries = [EditMetrics(n, {}, {}, {"rewrite_acc": [float(n >= 10)]}) for n in range(20)]
    tenths = retention(entries)
    assert [mean for mean, _, _ in tenths] == [0.0] * 5 + [100.0] * 5 and retention(entries[:9]) == []
    assert all(low <= mean <= high for mean, low, high in tenths) and retention(entries[:10]) == [[0.0]] * 10


def test_rankings_that_flip_are_told_in_words():
    def row(name, forced, whole):
        return Summary(
            name, SINGLE, 10, forced, forced, None, None, None, None, None, None, None, {}, exact_success=whole,
            exact_generalization=whole,
        )  # fmt: skip

    (sentence,) = flips([row("A", 90, 40), row("B", 80, 70), row("C", 70, 30)])
    assert sentence.startswith("A is ahead of B by teacher forcing (10.0 points)") and "(30.0)" in sentence


def test_the_files_of_version_0_1_are_read(kdpo, requests, tmp_path):
    """A run as 0.1 wrote it: fewer fields, one text where there is a list, no commit in the versions."""
    compare([kdpo], requests[:2], [SINGLE], tmp_path, quiet=True)
    old = {
        "method", "protocol", "n_edits", "edit_success", "generalization", "locality", "portability", "fluency",
        "generated_success", "generated_generalization", "seconds_per_edit", "megabytes_per_edit", "intervals",
    }  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps([{key: row[key] for key in old} for row in summary]))
    metrics = json.loads((tmp_path / "metrics-KDPO-single.json").read_text())
    for entry in metrics:
        for key in ("error", "once"):
            del entry[key]
        for phase in ("pre", "post"):
            written = entry[phase]["generated"]
            entry[phase]["generated"] = {key: written[key][0] for key in ("rewrite", "rewrite_acc", "rephrase", "rephrase_acc")}
    (tmp_path / "metrics-KDPO-single.json").write_text(json.dumps(metrics))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record.pop("schema") == VERSION
    (tmp_path / "run.json").write_text(json.dumps(record))
    page, table = write_documents([tmp_path], tmp_path)
    assert "KDPO" in table.read_text() and requests[0]["target_new"] in page.read_text()
    (tmp_path / "summary.json").write_text(json.dumps([{**row, "of_the_future": 1} for row in summary]))
    with pytest.raises(RunError, match="'of_the_future' is missing or not known"):
        read_results([tmp_path])
    (tmp_path / "run.json").write_text(json.dumps({**record, "schema": VERSION + 1}))
    with pytest.raises(RunError, match="by a later version"):
        read_results([tmp_path])


def test_rows_are_what_they_were_once_written():
    row = EditMetrics(3, {"prompt": "x"}, {"rewrite_acc": [1.0]}, time=1.5)
    assert from_json(EditMetrics, json.loads(json.dumps(to_json([row])))) == [row]


def test_versions_name_the_code_that_measured():
    found = versions()
    assert found["easyeditor"].split(", ")[0] in ("main", "release")
    assert any(word in found["easyeditor"] for word in ("commit ", "sources "))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
