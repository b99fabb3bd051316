"""A list of edits with a gate: what is kept, what is taken back, and why."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import EditsError, apply_edits, apply_kdpo_to_model
from kdpo_easyedit.cli import apply as command
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.edits import gated, read_header
from kdpo_easyedit.edits.base import says
from kdpo_easyedit.edits.file import read_changes
from kdpo_easyedit.edits.gate import Gate, Regression


def test_a_gate_is_comparisons_joined_by_and_and_or():
    gate = Gate.parse("success and locality>=0.98 and perplexity <= 1.02")
    good = {"success": 1.0, "locality": 0.98, "perplexity": 1.02}
    assert gate.failing(good) == "" and gate.needs_regression and not Gate.parse("success").needs_regression
    assert gate.failing(good | {"success": 0.0}) == "success is 0, not >= 1"
    assert gate.failing(good | {"locality": 0.5, "perplexity": 2}) == "locality is 0.5, not >= 0.98"
    either = Gate.parse("locality>0.9 or success and perplexity<1.5")
    assert either.failing({"success": 0.0, "locality": 0.95, "perplexity": 9}) == ""
    assert either.failing({"success": 1.0, "locality": 0.5, "perplexity": 1.4}) == ""
    assert (
        either.failing({"success": 1.0, "locality": 0.9, "perplexity": 2})
        == "locality is 0.9, not > 0.9; perplexity is 2, not < 1.5"
    )


@pytest.mark.parametrize(
    "text",
    ["", "fluency", "success and", "success or or locality", "locality => 1", "success(1)", "1 < locality", "success locality"],
)
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(EditsError, match="is no condition; allowed: success, locality, perplexity"):
        Gate.parse(text)


def test_locality_and_perplexity_are_the_models_own(fresh, requests, hparams):
    model, tok = fresh
    prompts = [request["prompt"] for request in requests[5:8]]
    regression = Regression(model, tok, prompts)
    assert regression.measure(model) == {"locality": 1.0, "perplexity": 1.0}
    model.generation_config.repetition_penalty = 1.5  # a model's own settings for writing are no matter
    assert Regression(model, tok, prompts).measure(model) == {"locality": 1.0, "perplexity": 1.0}
    with pytest.raises(EditsError, match="a regression prompt has 6001 tokens, which leave no room"):
        Regression(model, tok, ["word " * 2000])
    losses, said, answered = [], 0, 0
    apply_kdpo_to_model(model, tok, requests[:1], hparams)
    for written, start in regression.texts:
        with torch.no_grad():
            logits = model(written).logits[0]
        for position in range(1, written.shape[1]):
            losses.append(-logits[position - 1].log_softmax(-1)[written[0, position]].item())
            if position >= start:
                said += int(logits[position - 1].argmax() == written[0, position])
                answered += 1
    measured = regression.measure(model)
    assert answered == 24 and measured["locality"] == said / answered
    original = AutoModelForCausalLM.from_pretrained(model.config.name_or_path)
    with torch.no_grad():
        before = torch.cat(
            [original(w).logits[0, :-1].log_softmax(-1).gather(-1, w[0, 1:, None])[:, 0] for w, _ in regression.texts]
        )
    assert measured["perplexity"] == pytest.approx((torch.tensor(losses).mean() + before.mean()).exp().item(), rel=1e-4)


@pytest.fixture
def folder(tmp_path, requests, aware):
    """Five edits, of which the model has no room for the third; prompts they should not touch; KDPO+C's settings."""

    def written(name, columns, rows):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])

    edits = [[r["prompt"], r["target_new"], r["rephrase_prompt"]] for r in requests[:5]]
    edits[2] = [" ".join(["word"] * 2000), "x", ""]
    written("list.csv", ["Prompt", "answer", "rephrasing 1"], edits)
    written("prompts.csv", ["prompt"], [[r["prompt"]] for r in requests[10:16]])
    settings = {key: value for key, value in vars(aware).items() if value is not None}
    (tmp_path / "aware.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def arguments(folder, *more) -> list[str]:
    return ["apply", str(folder / "list.csv"), "--editing_method", "KDPO+C", "--hparams_dir", str(folder / "aware.yaml"), *more]


def test_a_list_is_kept_as_one_file_and_what_fails_is_told(folder, fresh, requests, capsys):
    model, tok = fresh
    before = state(model)
    assert main(arguments(folder)) == 1
    said = capsys.readouterr().out
    assert "4 of 5 edits are kept" in said and re.search(r"^3 is not kept: .* the model takes", said, re.MULTILINE)
    rows = json.loads((folder / "list.safetensors.json").read_text())["rows"]
    assert [row["kept"] for row in rows] == [True, True, False, True, True]
    assert [row["success"] for row in rows] == [1, 1, None, 1, 1] and rows[2]["why"]
    kept = [requests[n] for n in (0, 1, 3, 4)]
    assert [r["prompt"] for r in read_header(folder / "list.safetensors")["requests"]] == [r["prompt"] for r in kept]
    apply_edits(model, folder / "list.safetensors")
    assert [says(model, tok, request) for request in kept] == [rows[n]["in_the_end"] for n in (0, 1, 3, 4)]
    assert not same_state(before, state(model)) and rows[0]["rephrased"] in (0, 1) and rows[0]["locality"] is None
    assert main(["edits", "remove", str(folder / "list.safetensors"), "2"]) == 0
    assert len(read_changes(folder / "list.safetensors")) == 3
    assert main(arguments(folder)) == 1  # as reported, not made again
    assert re.search("4 of 5 edits are kept, in .*, which has 3 of them left", capsys.readouterr().out)
    assert len(read_changes(folder / "list.safetensors")) == 3
    files = ["aware.yaml", "list.csv", "list.safetensors", "list.safetensors.json", "prompts.csv"]
    assert sorted(path.name for path in folder.iterdir()) == files


def test_what_the_gate_does_not_let_through_is_taken_back(folder, fresh, capsys):
    model, tok = fresh
    regression = Regression(model, tok, [row["prompt"] for row in csv.DictReader((folder / "prompts.csv").open())])
    gate = ("--regression", str(folder / "prompts.csv"), "--keep_if", "success and locality>=0.93")
    assert main(arguments(folder, *gate)) == 1
    rows = json.loads((folder / "list.safetensors.json").read_text())["rows"]
    made = [row for row in rows if row["locality"] is not None]
    assert len(made) == 4 and {row["kept"] for row in made} == {True, False}
    assert all(row["kept"] == (row["success"] == 1 and row["locality"] >= 0.93) for row in made)
    assert all(("locality is" in row["why"]) == (row["locality"] < 0.93) for row in made)
    kept = [row for row in rows if row["kept"]]
    assert len(read_header(folder / "list.safetensors")["requests"]) == len(kept)
    apply_edits(model, folder / "list.safetensors")
    assert regression.measure(model) == {key: pytest.approx(kept[-1][key]) for key in ("locality", "perplexity")}


def test_a_rephrasing_without_room_and_ctrl_c_leave_the_model_as_it_was(tmp_path, fresh, requests, aware, monkeypatch):
    model, tok = fresh
    before = state(model)

    def made(rephrasing: str) -> gated.GatedList:
        edit = {"request": requests[0], "rephrasings": [rephrasing]}
        return gated.GatedList(tmp_path / "list", model, tok, aware, Gate.parse("success"), [edit])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gated, "says", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(made("Who?").go_on())
    assert same_state(before, state(model)) and not (tmp_path / "list.json").exists()
    (row,) = made("word " * 2000).go_on()
    assert not row["kept"] and "the model takes" in row["why"] and same_state(before, state(model))
    for report in ("{", "[]", "{}"):
        (tmp_path / "list.json").write_text(report)
        with pytest.raises(EditsError, match=r"list.json is there already, and is no list's"):
            made("Who?")


@pytest.mark.parametrize("at", ["an edit", "the file"])
def test_a_list_that_was_stopped_goes_on_to_the_same_weights(folder, monkeypatch, at):
    """With the keys that KDPO+C steps around; also where it stopped between the report and the file."""
    assert main(arguments(folder, "--save_edits", str(folder / "whole"))) == 1
    name = "apply_kdpo_to_model" if at == "an edit" else "save_edits"
    original, calls = getattr(gated, name), []

    def stopped(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(gated, name, stopped)
    assert main(arguments(folder)) == 130
    monkeypatch.setattr(gated, name, original)
    report = folder / "list.safetensors.json"
    assert len(json.loads(report.read_text())["rows"]) == (1 if at == "an edit" else 2)
    assert len(read_header(folder / "list.safetensors")["requests"]) == 1
    assert main(arguments(folder)) == 1
    one, other = (read_header(folder / name)["weights"] for name in ("whole", "list.safetensors"))
    assert one == other and report.read_text() == (folder / "whole.json").read_text()
    assert not list(folder.glob("*.keys"))
    assert main(arguments(folder)) == 1 and report.read_text() == (folder / "whole.json").read_text()
    (folder / "list.safetensors").unlink()
    assert main(arguments(folder)) == 2  # the report alone says that it is done


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: main(["edits", "remove", str(file), "1"]), "does not hold the edits that"),
        (lambda file: file.unlink(), "does not hold the edits that"),
        (lambda file: file.with_name(f"{file.name}.2.keys").unlink(), "keys is gone, without which"),
    ],
)
def test_a_list_does_not_go_on_from_what_is_not_its_own_any_more(folder, fresh, requests, aware, spoil, message):
    file, edits = folder / "list.safetensors", [{"request": request, "rephrasings": []} for request in requests[:3]]
    given = (file, *fresh, aware, Gate.parse("success"), edits)
    work = gated.GatedList(*given).go_on()
    assert all(row["kept"] for row in itertools.islice(work, 2))
    work.close()
    gated.GatedList(*given)
    spoil(file)
    with pytest.raises(EditsError, match=message):
        gated.GatedList(*given)


def test_a_list_goes_on_with_what_was_known_of_the_model_as_it_was(folder, requests, aware):
    """Statistics of several layers are known by the weights below, and texts before prompts are the unedited model's."""
    aware = replace(aware, layers=[2, 3], contexts=2)
    edits = [{"request": request, "rephrasings": []} for request in requests[:3]]

    def made(file, stop: int | None) -> dict[str, str]:
        for number in (stop, None) if stop else (None,):
            model, tok = (cls.from_pretrained(aware.model_name) for cls in (AutoModelForCausalLM, AutoTokenizer))
            work = gated.GatedList(file, model, tok, aware, Gate.parse("success"), edits).go_on()
            kept = [row["kept"] for row in itertools.islice(work, number)]
            assert kept and all(kept)
            work.close()
        return read_header(file)["weights"]

    assert made(folder / "parts.safetensors", 1) == made(folder / "whole.safetensors", None)


def test_a_list_that_cannot_be_made_is_told_before_the_model_is_loaded(folder, capsys, monkeypatch):
    def error(*given) -> str:
        assert main(list(given)) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(command, "_loaded", None)
    assert "name a file of them with --regression" in error(*arguments(folder, "--keep_if", "locality>0.9"))
    assert "is no condition" in error(*arguments(folder, "--keep_if", "import os"))
    for content, message in (
        ("prompt,answer\n", "there are no edits in it"),
        ("", "there is no column 'prompt'; there are none"),
        ("prompt;answer\na;b\n", "there is no column 'prompt'; there are prompt;answer"),
        ("prompt,answer\na,b\nc,\n", "row 3 has an empty answer"),
        ("prompt,answer\na,b\na,c\n", "the prompt 'a' is there twice"),
        ("prompt,answer,subject\n{} is,b,x\nx is,c,\n", "the prompt 'x is' is there twice"),
        ("prompt,answer\n{} is,b\n", "a request's prompt is '{} is', and its subject"),
        (
            "prompt,rephrasing,rephrasing,answer\na,b,c,d\n",
            "the column 'rephrasing' is there twice; give each a name of its own",
        ),
        ("prompt,answer\na,b, or c\n", "line 2 has more cells than the header; quote those with a comma in them"),
    ):
        (folder / "list.csv").write_text(content)
        assert message in error(*arguments(folder))
    (folder / "list.csv").write_bytes(b"prompt,answer\n\xff,b\n")
    assert "cannot be read as CSV in UTF-8" in error(*arguments(folder))
    (folder / "list.csv").write_text("prompt,answer\na,b,,\n")  # as spreadsheets end a line
    assert "whose folder is not there or cannot be written" in error(
        *arguments(folder, "--save_edits", str(folder / "no" / "x"))
    )


def test_another_lists_file_is_not_gone_on_with(folder, capsys):
    (folder / "list.safetensors").touch()
    assert main(arguments(folder)) == 2
    assert "is none of this list's" in capsys.readouterr().err
    (folder / "list.safetensors").unlink()
    (folder / "list.safetensors.json").write_text(json.dumps({"settings": {}, "rows": []}))
    assert main(arguments(folder)) == 2
    assert "is of another list, condition or method" in capsys.readouterr().err
    assert main([*arguments(folder)[:3], "FT", "--hparams_dir", "world"]) == 2
    assert "editing_method is FT; allowed for a list: KDPO or KDPO+C" in capsys.readouterr().err


def test_a_list_in_a_context_is_measured_there_and_as_plain_text(folder, fresh, requests, capsys):
    model, tok = fresh
    gate = ("--regression", str(folder / "prompts.csv"), "--keep_if", "success and locality>=0")
    assert main(arguments(folder, "--context", "qa", *gate)) == 1
    rows = json.loads((folder / "list.safetensors.json").read_text())["rows"]
    kept = [row["request"] for row in rows if row["kept"]]
    assert read_header(folder / "list.safetensors")["requests"] == kept and {r["context"] for r in kept} == {"qa"}
    assert "plain" in capsys.readouterr().out and {row["as_plain"] for row in rows} <= {0, 1, None}
    apply_edits(model, folder / "list.safetensors")
    assert [says(model, tok, request) for request in kept] == [row["in_the_end"] for row in rows if row["kept"]]
    (last,) = [row for row in rows if row["request"] == kept[-1]]
    assert says(model, tok, {**kept[-1], "context": "plain"}) == bool(last["as_plain"])
    prompts = [row["prompt"] for row in csv.DictReader((folder / "prompts.csv").open())]
    unedited = AutoModelForCausalLM.from_pretrained(model.config.name_or_path)
    assert last["locality"] == pytest.approx(Regression(unedited, tok, prompts, "qa").measure(model)["locality"])


def test_a_list_has_its_subjects(folder, aware, requests, capsys):
    """Where positions goes by them; one that is not in its prompt is told."""
    settings = {key: value for key, value in vars(aware).items() if value is not None} | {
        "positions": "subject",
        "layers": [1],
        "cycles": 40,
    }
    (folder / "aware.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[request["prompt"], request["target_new"], request["subject"]] for request in requests[:2]]
        csv.writer(file).writerows([["prompt", "answer", "subject"], *rows, ["The sky is", "green", "sea"]])
    assert main(arguments(folder)) == 1
    kept = read_header(folder / "list.safetensors")["requests"]
    assert [request["subject"] for request in kept] == [request["subject"] for request in requests[:2]]
    assert "3 is not kept: a request's subject is 'sea'" in capsys.readouterr().out
