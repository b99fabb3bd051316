"""Many edits in one optimisation: all of them hold in the end, however they are packed, and each has its own trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import same_state, state

from kdpo_easyedit import EditFailed, HParamsError, KDPOHyperParams, apply_kdpo_to_model
from kdpo_easyedit.method import kdpo_c, packs
from kdpo_easyedit.method.preference import edit_tokens, means, runners_up
from kdpo_easyedit.method.replay import Suffix

W = "transformer.h.1.mlp.c_proj.weight"


@pytest.fixture
def aware(hparams, small_world) -> KDPOHyperParams:
    """KDPO+C at a layer of the small world with others above it, for edits that are made together."""
    return replace(
        hparams, layers=[1], mom2_adjustment=True, mom2_dataset="world", mom2_n_samples=1000, batch_size=20,
        stats_dir=str(small_world.statistics), cycles=40, mom2_step=6,
    )  # fmt: skip


@pytest.fixture
def several(requests):
    """Edits of different subjects, with answers of one to three tokens."""
    return list({request["subject"]: request for request in requests}.values())[:6]


def leads(model, tok, request) -> torch.Tensor:
    edit = edit_tokens(tok, request["prompt"], request["target_new"])
    with torch.no_grad():
        logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
    return runners_up(logits, edit.targets)[1]


def made(fresh, several, hparams):
    model, tok = fresh
    before = model.state_dict()[W].clone() if W in hparams.edited_parameters(model) else None
    traces = []
    apply_kdpo_to_model(model, tok, several, hparams, traces=traces)
    return traces, None if before is None else model.get_parameter(W).detach() - before


@pytest.mark.parametrize(
    "form",
    [{}, {"margin": 1}, {"margin": 1, "contexts": 1}],
    ids=str,
)
def test_all_edits_of_a_batch_hold_together(fresh, several, aware, form):
    model, tok = fresh
    traces, change = made(fresh, several, replace(aware, **form))
    targets = [edit_tokens(tok, request["prompt"], request["target_new"]).targets for request in several]
    assert len({len(target) for target in targets}) > 1
    for request, trace, target in zip(several, traces, targets):
        assert trace.ended == ("the target leads by the margin" if form.get("margin") else "the target is said")
        assert leads(model, tok, request).min() > (form.get("margin", 0) and form["margin"] - 1e-3)
        assert all(len(negatives) == len(target) for negatives in trace.negatives) and trace.steps > 0
    # Each edit's own part of the change, and the whole of it.
    parts = [left @ right for left, right in (trace.factors[W] for trace in traces)]
    torch.testing.assert_close(sum(parts), change, rtol=1e-4, atol=1e-5)
    assert len(kdpo_c.protected_keys(model)[W]) == sum(trace.factors[W][0].shape[1] for trace in traces)


def test_a_batch_of_one_is_an_edit_by_itself(fresh, requests, aware):
    model, tok = fresh
    aware = replace(aware, positions="subject_last", margin=1)
    changes, traces = [], []
    for size in (1, 20):
        before = state(model)
        apply_kdpo_to_model(model, tok, requests[:1], replace(aware, batch_size=size), traces=traces)
        changes.append(model.get_parameter(W).detach() - before[W])
        model.load_state_dict(before)
    assert traces[0].negatives == traces[1].negatives and traces[0].losses == traces[1].losses
    assert torch.equal(*changes)


@pytest.mark.parametrize("form", ["KDPO", "KDPO+C", "KDPO+C, subject_last"])
def test_packs_are_one_pass_in_parts(fresh, several, hparams, aware, form, monkeypatch):
    """What one pass finds, many find whose gradients are put together, but for the order of sums."""
    model = fresh[0]
    its = replace(hparams, layers=[1], batch_size=20) if form == "KDPO" else aware
    its = replace(its, positions="subject_last" if "last" in form else "all", cycles=2, num_steps=2, stop_crit=False)
    before, changes, entered = state(model), [], []
    enter = Suffix.__enter__
    monkeypatch.setattr(Suffix, "__enter__", lambda self: entered.append(self) or enter(self))
    for tokens in (10_000, 12):
        monkeypatch.setattr(packs, "PACK_TOKENS", tokens)
        changes.append(made(fresh, several, its)[1])
        model.load_state_dict(before)
    assert len(entered) > 2 and changes[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(*(change.flatten() for change in changes), dim=0) > 0.999


def test_plain_kdpo_makes_many_at_once(fresh, several, hparams):
    model, tok = fresh
    traces, _ = made(fresh, several, replace(hparams, batch_size=20))
    assert all(trace.ended == "the target is said" for trace in traces)
    assert all(leads(model, tok, request).min() > 0 for request in several)


def test_requests_are_taken_in_batches_in_their_order(fresh, several, hparams, monkeypatch):
    model, tok = fresh
    together = []
    packed = packs.packed
    monkeypatch.setattr("kdpo_easyedit.method.kdpo.packed", lambda edits: together.append(edits) or packed(edits))
    apply_kdpo_to_model(model, tok, several, replace(hparams, batch_size=4))
    assert [[edit.request["prompt"] for edit in edits] for edits in together] == [
        [request["prompt"] for request in part] for part in (several[:4], several[4:])
    ]


def test_an_edit_that_others_undo_goes_on(fresh, several, aware, monkeypatch):
    """The whole is made to say once that an edit that holds does not: it begins another cycle, and ends as it should."""
    model, tok = fresh
    target_logits, asked = Suffix.target_logits, []

    def doubting(self, weights):
        logits = target_logits(self, weights)
        asked.append(1)
        if len(asked) == 1:
            logits[0] -= 3 * torch.nn.functional.one_hot(logits[0].argmax(-1), logits.shape[-1])
        return logits

    monkeypatch.setattr(Suffix, "target_logits", doubting)
    aware = replace(aware, positions="subject_last", margin=1)
    (trace,), _ = made(fresh, several[:1], aware)
    assert len(asked) > 1 and trace.ended == "the target leads by the margin"
    assert leads(model, tok, several[0]).min() > 1 - 1e-3


@pytest.mark.parametrize("form", [{}, {"mom2_adjustment": False, "lr": 3e-3}], ids=str)
def test_an_edit_that_was_said_at_first_goes_on_where_negatives_are_not_online(fresh, several, aware, form):
    """Its negatives at first are its target; where another edit of the batch undoes it, they are what is said then."""
    model, tok = fresh
    known = {**several[0], "target_new": several[0]["ground_truth"]}
    traces = []
    aware = replace(aware, layers=[3], batch_size=3, cycles=20, online=False, **form)
    apply_kdpo_to_model(model, tok, [known, several[1], several[0]], aware, traces=traces)
    assert len(traces) == 3 and traces[0].steps > 0 and traces[1].final_token_accuracy == 1


def test_a_batch_that_fails_names_the_edit_and_leaves_the_model_as_it_was(fresh, several, aware):
    model, tok = fresh
    before = state(model)
    with pytest.raises(EditFailed, match=r"the edit '.*' → '.*' failed in cycle 1, after step 1"):
        apply_kdpo_to_model(model, tok, several, replace(aware, mom2_step=1e30))
    assert same_state(before, state(model))


def test_a_batch_is_refused_where_there_is_none(hparams):
    with pytest.raises(HParamsError, match="batch_size is 2; allowed with negatives: autoregressive: 1"):
        replace(hparams, negatives="autoregressive", batch_size=2)
    with pytest.raises(HParamsError, match="batch_size is 0; allowed: a whole number, 1 or above"):
        replace(hparams, batch_size=0)


def test_means_of_what_belongs_together():
    values, of = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 0, 2])
    assert means(values, of, 4).tolist() == [2.0, 0.0, 3.5, 0.0]
