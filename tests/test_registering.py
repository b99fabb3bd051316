"""What BaseEditor's calls tell KDPO: that edits follow one another, and how prompts and targets stand."""

from __future__ import annotations

import pytest
import torch
from conftest import on_main

from kdpo_easyedit.easyedit import host

W = "transformer.h.3.mlp.c_proj.weight"


@pytest.fixture
def traced(fresh, hparams, monkeypatch):
    """KDPO's editor of the small world, and the traces of the edits that it makes."""
    traces = []
    apply = host.ALG_DICT["KDPO"]
    monkeypatch.setitem(host.ALG_DICT, "KDPO", lambda *args, **kwargs: apply(*args, **kwargs, traces=traces))
    hparams.model_name = fresh
    return host.BaseEditor(hparams), traces


def arguments(requests) -> dict[str, list[str]]:
    return {
        "prompts": [request["prompt"] for request in requests],
        "target_new": [request["target_new"] for request in requests],
        "ground_truth": [request["ground_truth"] for request in requests],
        "subject": [request["subject"] for request in requests],
        "verbose": False,
    }


def staying(stays: bool) -> dict[str, bool]:
    """The host's own way to say that edits stay in the model."""
    return {"sequential_edit": stays} if on_main() else {"keep_original_weight": not stays}


def test_edits_that_stay_have_the_papers_smaller_steps_the_first_one_too(traced, requests):
    editor, traces = traced
    editor.edit(**arguments(requests[:2]), **staying(True))
    assert [trace.sequential for trace in traces] == [True, True]
    assert editor.hparams.sequential_edit is None
    editor.edit(**arguments(requests[2:3]), **staying(True))  # a call for itself, on top of them
    assert traces[-1].sequential


def test_edits_that_are_taken_back_have_full_steps(traced, requests):
    editor, traces = traced
    editor.edit(**arguments(requests[:2]), **staying(False))
    editor.edit(**arguments(requests[2:3]), **staying(False))
    assert [trace.sequential for trace in traces] == [False] * 3


def test_a_first_edit_that_stays(traced, requests):
    """Of main it is said that others follow; of the release, whose edits stay by default, it is not known."""
    editor, traces = traced
    editor.edit(**arguments(requests[:1]), **staying(True))
    editor.edit(**arguments(requests[1:2]), **staying(True))
    assert [trace.sequential for trace in traces] == [on_main(), True]


@pytest.mark.parametrize("said", [True, False])
def test_what_the_hyper_parameters_say_goes_before(traced, requests, said):
    editor, traces = traced
    editor.hparams.sequential_edit = said
    editor.edit(**arguments(requests[:2]), **staying(not said))
    assert [trace.sequential for trace in traces] == [said, said] and editor.hparams.sequential_edit is said


def test_requests_are_told_as_well(traced, requests):
    editor, traces = traced
    position = (True,) if on_main() else (False,)
    editor.edit_requests([{**request, "portability": {}, "locality": {}} for request in requests[:2]], *position, verbose=False)
    assert [trace.sequential for trace in traces] == [True, True]


def test_an_error_leaves_the_hyper_parameters_as_they_were(traced, requests):
    editor, _ = traced
    wrong = arguments(requests[:2]) | {"target_new": ["x", " "]}
    with pytest.raises(ValueError, match="target_new is ' '"):
        editor.edit(**wrong, **staying(True))
    assert editor.hparams.sequential_edit is None


def test_prompts_are_measured_as_they_are_edited(traced, requests):
    editor, _ = traced
    plain, _, _ = editor.edit(**arguments(requests[:1]), **staying(False))
    template = requests[0]["prompt"].replace(requests[0]["subject"], "{}") + " "
    given = arguments(requests[:1]) | {"prompts": [template], "target_new": [" " + requests[0]["target_new"]]}
    found, _, _ = editor.edit(**given, **staying(False))
    assert found[0]["requested_rewrite"]["prompt"] == requests[0]["prompt"]
    assert found[0]["post"]["rewrite_acc"] == plain[0]["post"]["rewrite_acc"] == [1.0]
    one = given | {"prompts": template, "target_new": requests[0]["target_new"], "subject": requests[0]["subject"]}
    one["ground_truth"] = requests[0]["ground_truth"]
    assert editor.edit(**one, **staying(False))[0][0]["post"]["rewrite_acc"] == [1.0]


def test_batch_edit_makes_many_edits_in_one_optimisation(traced, requests):
    editor, traces = traced
    editor.hparams.batch_size = 2
    before = editor.model.get_parameter(W).detach().clone()
    metrics, edited, _ = editor.batch_edit(**arguments(requests[:3]), **staying(False))
    assert len(traces) == 3 and traces[0].losses != [] and edited.get_parameter(W).shape == before.shape
    assert [found["post"]["rewrite_acc"] for found in metrics] == [[1.0]] * len(metrics)
    assert len(metrics) == (3 if on_main() else 1)  # the release's has its last batch's alone
    assert torch.equal(editor.model.get_parameter(W), before)
