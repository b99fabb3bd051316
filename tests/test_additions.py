"""What comparisons have beside EasyEdit's methods: LocFT-BF, edits before the prompt; and UltraEdit, which is run otherwise."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import on_main, same_state, state
from test_comparison import method_for

from kdpo_easyedit.bench.batches import Batching, running
from kdpo_easyedit.bench.measuring import Measuring, batching_for, token_accuracy
from kdpo_easyedit.bench.metrics import teacher_forced
from kdpo_easyedit.bench.protocols import compare
from kdpo_easyedit.bench.schema import SINGLE
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.easyedit.additions import Retrieval, RetrievalHyperParams
from kdpo_easyedit.easyedit.lifelong import learnt, left
from kdpo_easyedit.method.preference import prompt_ids
from kdpo_easyedit.method.weights import write
from kdpo_easyedit.report.documents import write_documents
from kdpo_easyedit.report.results import read_results
from kdpo_easyedit.report.tables import tables

on_main_only = pytest.mark.skipif(not on_main(), reason="EasyEdit's main branch only")


def retrieval(model, tok, edits, **settings) -> Retrieval:
    return Retrieval(model, tok, edits, RetrievalHyperParams("Retrieval", "world", **settings))


EDITS = [
    {"prompt": "Ada Brown works as a", "target_new": "baker"},
    {"prompt": "Ada Brown was born in", "target_new": "Rome"},
    {"prompt": "Bob Jones works as a", "target_new": "guard"},
]


def test_the_most_similar_edits_are_chosen_by_rare_words(loaded):
    model = retrieval(*loaded, EDITS)
    assert model.similar("The job of Bob Jones is") == [EDITS[2]]
    assert model.similar("Ada Brown's place of birth is where she was born,") == [EDITS[1]]
    assert retrieval(*loaded, EDITS, k=2).similar("Ada Brown works as a") == [EDITS[2], EDITS[0]]
    assert retrieval(*loaded, EDITS, threshold=0.3).similar("Water is wet") == []
    later = [*EDITS, {"prompt": EDITS[0]["prompt"], "target_new": "judge"}]
    assert [edit["target_new"] for edit in retrieval(*loaded, later).similar("Ada Brown works as a")] == ["judge"]


def test_an_edit_before_the_prompt_is_read_as_if_it_stood_there(loaded, requests):
    """Teacher-forced and written, what the wrapper says is what the model says of the whole text."""
    network, tok = loaded
    request = requests[0]
    pairs = [(requests[1]["prompt"], requests[1]["target_new"])]
    line = f"{request['prompt']} {request['target_new']}.\n"
    model = retrieval(network, tok, [request])
    batching = batching_for(model)
    assert batching.one_by_one
    (said,) = teacher_forced(model, tok, pairs, batching)
    with running(network, Batching()):
        ids = tok(line)["input_ids"] + prompt_ids(tok, f"{pairs[0][0]} {pairs[0][1]}")
        logits = network(torch.tensor([ids])).logits[0]
    answers = logits[-len(said.targets) - 1 : -1]
    assert said.tokens == answers.argmax(-1).tolist()
    mean = answers.log_softmax(-1)[range(len(said.targets)), said.targets].mean().item()
    assert said.log_probability == pytest.approx(mean, rel=1e-4)
    (written,) = write_answers(model, tok, [pairs[0][0]], [pairs[0][1]], batching=batching)
    with torch.no_grad():
        prompt = torch.tensor([tok(line)["input_ids"] + prompt_ids(tok, pairs[0][0])])
        whole = network.generate(prompt, do_sample=False, max_new_tokens=8, pad_token_id=tok.pad_token_id)
    assert tok.decode(whole[0, prompt.shape[1] :]).strip().startswith(written.text.split(".")[0][:12])


def test_a_prompt_that_leaves_no_room_is_read_without_edits(loaded, requests):
    network, tok = loaded
    model = retrieval(network, tok, requests[:3], k=3)
    short = torch.tensor(prompt_ids(tok, requests[0]["prompt"]))
    assert model._before(short)
    assert model._before(short.repeat(network.config.max_position_embeddings // len(short))) == []


def test_remembered_edits_change_no_weights(small_world, requests, loaded, tmp_path):
    method = method_for("Retrieval", small_world, tmp_path)
    editor = host.BaseEditor(method.hparams)
    before = state(editor.model)
    model, originals = algorithms.apply_edit(editor, algorithms.model_to_edit(editor, editor.model), requests[:2])
    model, originals = algorithms.apply_edit(editor, model, requests[2])
    assert [edit["prompt"] for edit in model.edits] == [request["prompt"] for request in requests[:3]] and not originals
    assert model.model is editor.model and same_state(before, state(editor.model))
    assert not algorithms.changes_weights(method.hparams) and algorithms.takes_batches(method.hparams)


def test_methods_that_change_no_weights_are_told_apart(small_world, requests, tmp_path):
    methods = [method_for(name, small_world, tmp_path) for name in ("Retrieval", "FT")]
    comparison = compare(methods, requests[:2], [SINGLE], tmp_path / "run", how=Measuring(fluency=False))
    assert comparison.memories == ["Retrieval"]
    best = replace(comparison.rows[0], locality=101.0)
    made = tables(replace(comparison, rows=[best, comparison.rows[1]]))[SINGLE]
    assert list(made) == ["(before)", "FT", "Retrieval"]
    assert made["FT"]["locality"].best and not made["Retrieval"]["locality"].best
    assert tables(replace(comparison, rows=[best]))[SINGLE]["Retrieval"]["locality"].best
    (result,) = read_results([tmp_path / "run"])
    assert result.comparison.memories == ["Retrieval"]
    text, latex = (path.read_text() for path in write_documents([tmp_path / "run"], tmp_path / "run", latex=True)[1:])
    assert "| Retrieval ‡ |" in text and "‡ changes no weights" in text and r"Retrieval $^{\ddagger}$ &" in latex


@on_main_only
def test_locft_learns_a_batchs_answers_to_their_end(small_world, requests, tmp_path):
    method = method_for("LocFT-BF", small_world, tmp_path)
    method.hparams.lr, method.hparams.num_steps, method.hparams.batch_size = 5e-2, 60, 2
    editor = host.BaseEditor(method.hparams)
    before, padding = state(editor.model), editor.tok.pad_token
    _, originals = algorithms.apply_edit(editor, editor.model, requests[:3])
    assert method.hparams.batch_size == 2 and editor.tok.pad_token == padding
    for request in requests[:3]:
        assert token_accuracy(editor.model, editor.tok, request) == 1
        ids = editor.tok(f"{request['prompt']} {request['target_new']}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert editor.model(ids).logits[0, -1].argmax() == editor.tok.eos_token_id
    algorithms.undo_edits(editor, originals)
    assert same_state(before, state(editor.model))


@on_main_only
@pytest.mark.parametrize("ending", ["", ".weight"])
def test_ultraedit_learns_from_edit_to_edit_and_forgets_what_is_taken_back(
    small_world, requests, tmp_path, monkeypatch, ending
):
    method = method_for("ULTRAEDIT", small_world, tmp_path)
    method.hparams.inner_params = [name + ending for name in method.hparams.inner_params]
    editor = host.BaseEditor(method.hparams)
    before, flags = state(editor.model), [parameter.requires_grad for parameter in editor.model.parameters()]
    _, first = algorithms.apply_edit(editor, editor.model, requests[0])
    kept = copy.deepcopy(learnt)
    tokens = [len(prompt_ids(editor.tok, f"{request['prompt']} {request['target_new']}")) for request in requests[:3]]

    def count() -> float:
        (number,) = (value.item() for key, value in learnt["ULTRAEDIT"].items() if key.endswith(" n"))
        return number

    assert count() == tokens[0]

    after = state(editor.model)
    with monkeypatch.context() as patch:
        patch.setattr(algorithms, "check_finite", lambda _weights: (_ for _ in ()).throw(ArithmeticError("not finite")))
        with pytest.raises(ArithmeticError):
            algorithms.apply_edit(editor, editor.model, requests[1])
    assert same_state(after, state(editor.model)) and same_state(kept["ULTRAEDIT"], learnt["ULTRAEDIT"])

    contexts, tensors = algorithms.memory()
    algorithms.set_memory(contexts, tensors)
    assert same_state(kept["ULTRAEDIT"], learnt["ULTRAEDIT"])
    _, second = algorithms.apply_edit(editor, editor.model, requests[1:3])
    assert count() == sum(tokens)
    assert [parameter.requires_grad for parameter in editor.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in editor.model.parameters())
    algorithms.undo_edits(editor, second | first)
    assert same_state(before, state(editor.model)) and not learnt


@on_main_only
def test_eamet_says_what_it_cannot_edit_before_it_begins(small_world, requests, tmp_path):
    """GPT-2; what it edits, test_provided_yamls.py does."""
    method = method_for("MEMIT", small_world, tmp_path)
    method.hparams.alg_name = "EAMET"
    editor = host.BaseEditor(method.hparams)
    with pytest.raises(host.HostError, match=r"EAMET cannot edit transformer\.h\.0\.mlp\.c_proj"):
        algorithms.apply_edit(editor, editor.model, requests[:2])
    assert algorithms.takes_batches(method.hparams)


@on_main_only
def test_simie_merges_edits_that_are_each_made_on_the_original(small_world, requests, tmp_path):
    """With next to no weight on what was there before, what ROME does to an edit's keys is all there; with much, nothing is."""
    method = method_for("SimIE", small_world, tmp_path)
    editor = host.BaseEditor(method.hparams)
    before, name = state(editor.model), "transformer.h.0.mlp.c_proj.weight"
    changes = {}
    for weight in (1e-3, 1e6):
        editor.hparams.lamHyper = weight
        algorithms.set_memory()
        torch.manual_seed(0)
        _, first = algorithms.apply_edit(editor, editor.model, requests[0])
        assert list(first) == [name] and torch.equal(first[name], before[name])
        _, second = algorithms.apply_edit(editor, editor.model, requests[1])
        assert torch.equal(learnt["SimIE"][f"start {name}"], before[name]) and not torch.equal(second[name], before[name])
        changes[weight] = (editor.model.state_dict()[name] - before[name]).norm().item()
        algorithms.undo_edits(editor, second | first)
        assert same_state(before, state(editor.model)) and not learnt
    assert changes[1e6] < 1e-3 * changes[1e-3]


@on_main_only
@pytest.mark.parametrize("name", ["ULTRAEDIT", "SimIE", "AlphaEdit"])
def test_what_baseeditor_takes_back_is_forgotten_and_another_models_edits_too(name, small_world, requests, tmp_path):
    """``BaseEditor`` puts weights back, and takes other models, and tells no method of it."""
    editor = host.BaseEditor(method_for(name, small_world, tmp_path).hparams)
    other = copy.deepcopy(editor.model)

    def edit(model, request, hparams=editor.hparams):
        torch.manual_seed(0)
        return editor.apply_algo(model, editor.tok, [request], hparams, copy=False, return_orig_weights=True)[1]

    algorithms.set_memory()
    originals = edit(editor.model, requests[1])
    alone = state(editor.model)
    write(editor.model, originals)
    algorithms.set_memory()
    write(editor.model, edit(editor.model, requests[0]))
    originals = edit(editor.model, requests[1])
    assert same_state(state(editor.model), alone)
    edit(editor.model, requests[2])
    edit(other, requests[1])
    assert same_state(state(other), alone)
    algorithms.undo_edits(editor, originals)
    assert not left


@on_main_only
def test_alphaedit_makes_a_projection_of_the_layers_that_it_edits(small_world, requests, tmp_path):
    editor, its = host.BaseEditor(method_for("AlphaEdit", small_world, tmp_path).hparams), []
    algorithms.set_memory()
    for layers in ([0], [1], [0, 1]):
        editor.hparams.layers = layers
        editor.apply_algo(editor.model, editor.tok, requests[:1], editor.hparams, copy=False, return_orig_weights=True)
        its.append(copy.copy(vars(host.submodule("models.alphaedit.AlphaEdit_main"))))
    assert [len(each["P"]) for each in its] == [len(each["cache_c"]) for each in its] == [1, 1, 2]
    assert torch.equal(torch.cat([its[0]["P"], its[1]["P"]]), its[2]["P"]) and not torch.equal(its[0]["P"], its[1]["P"])


@on_main_only
def test_ultraedit_would_make_the_model_half_and_says_so(small_world, requests, tmp_path):
    method = method_for("ULTRAEDIT", small_world, tmp_path)
    method.hparams.half = True
    editor = host.BaseEditor(method.hparams)
    with pytest.raises(host.HostError, match="half is true"):
        algorithms.apply_edit(editor, editor.model, requests[0])
