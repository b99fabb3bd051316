"""KDPO+C: S, its updates, the step, and statistics that are wrong."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REFERENCE, same_state, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import EditFailed, HParamsError, KDPOHyperParams, apply_kdpo_to_model, execute_kdpo
from kdpo_easyedit.easyedit.statistics import statistics_file
from kdpo_easyedit.method import kdpo_c
from kdpo_easyedit.method.kdpo_c import Usage
from kdpo_easyedit.method.preference import edit_tokens, pair_margin, runners_up
from kdpo_easyedit.method.statistics import Text, make, second_moment
from kdpo_easyedit.method.weights import write

WEIGHT = "transformer.h.3.mlp.c_proj.weight"


@pytest.fixture
def statistics(small_world):
    """EasyEdit's file of the small world's last layer."""
    return statistics_file(small_world.statistics, str(small_world.folder), WEIGHT.removesuffix(".weight"), "world", 1000)


@pytest.fixture
def aware(hparams, small_world) -> KDPOHyperParams:
    """KDPO+C for the small world."""
    return replace(
        hparams, mom2_adjustment=True, mom2_dataset="world", mom2_n_samples=1000, stats_dir=str(small_world.statistics)
    )


def dense(moment: torch.Tensor, damping: float, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """S as it is written, in float64."""
    mean = moment.diagonal().mean()
    used = moment + weight * keys.T @ keys
    return torch.linalg.inv(used / mean + damping * torch.eye(len(moment), dtype=torch.float64))


def far_from(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("damping", [0.001, 0.01, 1.0])
def test_s_is_the_dense_inverse(statistics, damping):
    moment = second_moment(statistics)
    keys = torch.randn(5, len(moment), generator=torch.Generator().manual_seed(0))
    expected = keys.double() @ dense(moment, damping, keys[:0].double(), 0)
    assert far_from(expected, Usage.of(moment, damping, 0.1).times(keys)) < 1e-6


def test_edits_that_are_made_together_step_around_one_another(statistics):
    """Each as the last of all would be, to the dense inverse."""
    moment, generator = second_moment(statistics), torch.Generator().manual_seed(0)
    keys = torch.randn(9, len(moment), generator=generator) * moment.diagonal().mean().sqrt()
    earlier = torch.randn(4, len(moment), generator=generator) * moment.diagonal().mean().sqrt()
    usage, parts = Usage.of(moment, 0.01, 0.05).protecting(earlier), [slice(0, 2), slice(2, 3), slice(3, 9)]
    found = usage.times_around(keys, parts)
    for part in parts:
        others = torch.cat((earlier, keys[: part.start], keys[part.stop :])).double()
        assert far_from(keys[part].double() @ dense(moment, 0.01, others, 0.05), found[part]) < 1e-3
    assert torch.equal(usage.times_around(keys, [slice(0, 9)]), usage.times(keys))  # of one edit
    alone = Usage.of(moment, 0.01, 0)
    assert torch.equal(alone.times_around(keys, parts), alone.times(keys))


def test_keys_that_count_beyond_all_measure_are_told(statistics):
    moment = second_moment(statistics)
    keys = torch.ones(3, len(moment)) * moment.diagonal().mean().sqrt()
    usage = Usage.of(moment, 1e-6, 1e18)
    with pytest.raises(HParamsError, match="mom2_edit_weight is too large"):
        usage.times_around(keys, [slice(0, 1), slice(1, 3)])
    with pytest.raises(HParamsError, match="mom2_edit_weight is too large"):
        usage.protecting(keys)


@pytest.mark.parametrize("weight", [0.01, 0.1])
def test_fifty_updates_of_low_rank_are_one_new_inverse(statistics, weight):
    """Twelve keys an edit are more than twice the inputs after 50, so that they were also put together."""
    moment = second_moment(statistics)
    usage = Usage.of(moment, 0.01, weight)
    generator = torch.Generator().manual_seed(0)
    edits = [torch.randn(12, len(moment), generator=generator) * moment.diagonal().mean().sqrt() for _ in range(50)]
    for keys in edits:
        usage = usage.protecting(keys)
    assert len(usage.protected) <= 2 * len(moment) < 50 * 12
    every = torch.cat(edits).double()
    probe = torch.cat((every[:3], torch.randn(3, len(moment), generator=generator).double()))
    expected = probe @ dense(moment, 0.01, every, weight)
    assert far_from(expected, usage.times(probe.float())) < 5e-3
    untouched = Usage.of(moment, 0.01, 0)
    assert untouched.protecting(edits[0]) is untouched


def test_without_the_adjustment_nothing_changes_to_the_bit(fresh, requests, hparams):
    model, tok = fresh
    others = replace(hparams, mom2_step=1, mom2_damping=3, mom2_edit_weight=5, mom2_dataset="none", stats_dir="/nowhere")
    for request in requests[:2]:
        (plain, trace), (same, trace_of_same) = (execute_kdpo(model, tok, request, h) for h in (hparams, others))
        assert torch.equal(plain[WEIGHT], same[WEIGHT]) and trace == trace_of_same


@pytest.mark.parametrize("sequential", [False, True])
def test_a_step_is_the_gradient_times_s_and_gains_what_it_is_told_to(fresh, requests, aware, statistics, sequential):
    model, tok = fresh
    edit = edit_tokens(tok, requests[0]["prompt"], requests[0]["target_new"], model.device)
    at = slice(edit.prompt_length - 1, -1)
    parameter = model.get_parameter(WEIGHT)
    logits = model(edit.input_ids).logits[0, at]
    pairs = torch.stack((edit.targets, logits.argmax(-1)), -1)
    (gradient,) = torch.autograd.grad(pair_margin(logits.gather(-1, pairs)), parameter)
    aware = replace(aware, num_steps=1, cycles=1, sequential_edit=sequential, sequential_lr_scale=0.25)
    weights, trace = execute_kdpo(model, tok, requests[0], aware)
    assert trace.steps == 1
    step, gradient = (weights[WEIGHT] - parameter).cpu().double(), gradient.cpu()
    moment = second_moment(statistics)
    expected = dense(moment, aware.mom2_damping, moment[:0], 0) @ gradient.double()  # a Conv1D's weight is [in, out]
    assert torch.nn.functional.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.9999
    assert (step * gradient).sum().item() == pytest.approx(aware.mom2_step / (4 if sequential else 1), rel=1e-3)


@pytest.fixture
def lengths(monkeypatch):
    """√tr(Δ S⁻¹ Δᵀ) of the steps that are taken."""
    step, found = kdpo_c.SteepestDescent.step, []

    def watched(self):
        before = [change.coefficients.clone() for change in self.weights.values()]
        step(self)
        square = 0.0
        for coefficients, change in zip(before, self.weights.values()):
            taken = (change.coefficients - coefficients).double()
            square += (taken * ((change.keys @ change.basis.T).double() @ taken)).sum().item()
        found.append(max(square, 0.0) ** 0.5)

    monkeypatch.setattr(kdpo_c.SteepestDescent, "step", watched)
    return found


@pytest.mark.parametrize("form", [{"layers": [1], "margin": 20, "mom2_step": 20}, {"layers": [2]}], ids=str)
def test_no_step_is_much_longer_than_the_first(fresh, requests, aware, lengths, monkeypatch, form):
    """Where the gradient vanishes, as low in the small world, an edit's aim in logits knows no bounds; nor does, without a
    margin, a later step of a cycle, where the gradient has grown."""
    model, tok = fresh
    aware = replace(aware, positions="subject_last", **form)
    for request in requests[:5]:
        lengths.clear()
        _, trace = execute_kdpo(model, tok, request, aware)
        assert max(lengths) <= 4.01 * lengths[0] and trace.steps == len(lengths)
    monkeypatch.setattr(kdpo_c, "_LONGEST", 1e30)
    longest = 0.0
    try:
        for request in requests[:5]:
            lengths.clear()
            execute_kdpo(model, tok, request, aware)
            longest = max(longest, max(lengths) / lengths[0])
    except EditFailed as error:
        assert "margin" in form and re.search(r"the loss is nan|not finite|beyond those of", str(error))
    else:
        assert "margin" not in form and longest > 100


def test_edits_cost_what_they_should_not_touch_less(fresh, requests, hparams, aware, statistics):
    model, tok = fresh
    moment = second_moment(statistics)
    before = model.get_parameter(WEIGHT).detach().clone()
    costs = []
    for settings in (hparams, aware):
        for request in requests[:5]:
            weights, trace = execute_kdpo(model, tok, request, replace(settings, sequential_edit=True))
            assert trace.final_token_accuracy == 1
            change = (weights[WEIGHT] - before).cpu().double()
            costs.append((change * (moment @ change)).sum().item())
    assert all(with_s < without / 2 for without, with_s in zip(costs[:5], costs[5:]))


def test_keys_of_edits_count_for_as_long_as_the_model_holds_them(fresh, requests, aware):
    model, tok = fresh
    aware.sequential_edit = True
    before = state(model)
    first, _ = execute_kdpo(model, tok, requests[1], aware)
    _, originals = apply_kdpo_to_model(model, tok, requests[:1], aware, return_orig_weights=True)
    rows = len(kdpo_c.protected_keys(model)[WEIGHT])
    assert rows == edit_tokens(tok, requests[0]["prompt"], requests[0]["target_new"]).input_ids.shape[1] - 1
    again = copy.deepcopy(model)  # the same weights, of which nothing is known
    assert kdpo_c.protected_keys(again) == {}
    around, _ = execute_kdpo(model, tok, requests[1], aware)
    plain, _ = execute_kdpo(again, tok, requests[1], aware)
    assert not torch.equal(around[WEIGHT], plain[WEIGHT])
    kdpo_c.protect_keys(again, tok, aware, kdpo_c.protected_keys(model))
    assert torch.equal(around[WEIGHT], execute_kdpo(again, tok, requests[1], aware)[0][WEIGHT])

    apply_kdpo_to_model(model, tok, requests[1:2], aware)
    assert len(kdpo_c.protected_keys(model)[WEIGHT]) > rows
    model.load_state_dict(before)  # undone
    assert torch.equal(first[WEIGHT], execute_kdpo(model, tok, requests[1], aware)[0][WEIGHT])
    assert torch.equal(originals[WEIGHT], before[WEIGHT])


def test_several_layers_share_an_edit(fresh, requests, aware):
    model, tok = fresh
    weights, trace = execute_kdpo(model, tok, requests[0], replace(aware, layers=[1, 3]))
    assert trace.final_token_accuracy == 1
    for name, weight in weights.items():
        assert not torch.equal(weight, model.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llama_is_edited_in_every_precision(tmp_path, dtype):
    """A weight stored [out, in]; statistics computed from a text."""
    folder = REFERENCE / "llama"
    model, tok = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    hparams = KDPOHyperParams(
        alg_name="KDPO", model_name=str(folder), device="cpu", layers=[1], mom2_adjustment=True,
        mom2_dataset="mine", mom2_n_samples=50, stats_dir=str(tmp_path),
    )  # fmt: skip
    text = Text("mine", ["The sky is blue.", "Water is wet."] * 25)
    names = [name.removesuffix(".weight") for name in hparams.edited_parameters(model)]
    full = AutoModelForCausalLM.from_pretrained(folder)
    (file,) = make(full, tok, names, text, tmp_path, dataset="mine", quiet=True).values()
    assert file.is_file()
    request = {"prompt": "The capital of France is", "target_new": "Rome"}
    weights, trace = execute_kdpo(model, tok, request, hparams)
    ((name, weight),) = weights.items()
    assert weight.dtype == dtype and weight.shape == model.get_parameter(name).shape
    assert trace.final_token_accuracy == 1 and trace.steps > 0


def test_an_interrupt_leaves_model_and_keys_as_they_were(fresh, requests, aware, monkeypatch):
    model, tok = fresh
    apply_kdpo_to_model(model, tok, requests[:1], aware)
    before, rows = state(model), len(kdpo_c.protected_keys(model)[WEIGHT])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kdpo_c.Usage, "protecting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_kdpo_to_model(model, tok, requests[1:2], aware)
    assert same_state(before, state(model)) and len(kdpo_c.protected_keys(model)[WEIGHT]) == rows


def write_statistics(file, moment) -> None:
    file.parent.mkdir(parents=True)
    constructor = "util.runningstats.SecondMoment()"
    np.savez(file, **{"mom2.constructor": constructor, "mom2.count": 7, "mom2.mom2": moment, "sample_size": 1000})


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (None, "there are no such statistics"),
        (np.eye(3, dtype=np.float32), r"\[3, 3\], and transformer.h.3.mlp.c_proj needs \[256, 256\]"),
        (-np.eye(256, dtype=np.float32), "not positive semidefinite"),
        (np.full((256, 256), np.nan, dtype=np.float32), "not finite"),
        ("text", "not a file of EasyEdit's statistics"),
        (np.array([object()]), "not a file of EasyEdit's statistics"),
    ],
)
def test_wrong_statistics_are_told_before_the_model_is_touched(fresh, requests, aware, tmp_path, moment, message):
    model, tok = fresh
    before = state(model)
    aware.stats_dir = str(tmp_path / "stats")
    file = statistics_file(tmp_path / "stats", model.config.name_or_path, WEIGHT.removesuffix(".weight"), "world", 1000)
    if isinstance(moment, str):
        file.parent.mkdir(parents=True)
        file.write_text(moment)
    elif moment is not None:
        write_statistics(file, moment)
    for edit in (execute_kdpo, lambda m, t, request, h: apply_kdpo_to_model(m, t, [request], h)):
        with pytest.raises(HParamsError, match=message) as told:
            edit(model, tok, requests[0], aware)
        assert "kdpo statistics" in str(told.value) if moment is None else str(file) in str(told.value)
    assert same_state(before, state(model))


@pytest.mark.parametrize(("key", "value"), [("negatives", "autoregressive"), ("weight_decay", 0.1), ("norm_constraint", 1e-3)])
def test_what_does_not_go_together_is_refused(aware, key, value):
    with pytest.raises(HParamsError, match=re.escape(f"{key} is {value!r}; allowed with mom2_adjustment")):
        replace(aware, **{key: value})


def test_a_copy_goes_on_from_the_edits_that_it_was_made_with(fresh, requests, aware):
    model, tok = fresh
    apply_kdpo_to_model(model, tok, requests[:1], aware)
    rows = kdpo_c.protected_keys(model)[WEIGHT]
    copied, _ = apply_kdpo_to_model(model, tok, requests[1:2], aware, copy=True)
    assert torch.equal(kdpo_c.protected_keys(copied)[WEIGHT][: len(rows)], rows)
    assert len(kdpo_c.protected_keys(copied)[WEIGHT]) > len(rows)
    assert torch.equal(kdpo_c.protected_keys(model)[WEIGHT], rows)
    apply_kdpo_to_model(model, tok, requests[1:2], aware)
    assert torch.equal(copied.get_parameter(WEIGHT), model.get_parameter(WEIGHT))


def test_the_last_edit_is_taken_back_and_the_one_before_still_counts(fresh, requests, aware):
    model, tok = fresh
    apply_kdpo_to_model(model, tok, requests[:1], aware)
    rows = kdpo_c.protected_keys(model)[WEIGHT]
    _, originals = apply_kdpo_to_model(model, tok, requests[1:2], aware, return_orig_weights=True)
    write(model, originals)
    assert torch.equal(kdpo_c.protected_keys(model)[WEIGHT], rows)
    apply_kdpo_to_model(model, tok, [], aware)
    _, originals = apply_kdpo_to_model(model, tok, requests[2:3], aware, return_orig_weights=True)
    write(model, originals)  # the second in a row
    assert torch.equal(kdpo_c.protected_keys(model)[WEIGHT], rows)
    with torch.no_grad():
        model.get_parameter(WEIGHT)[5, 7] += 1e-6  # by something else, and by one number
    assert kdpo_c.protected_keys(model) == {}


def test_keys_count_in_whatever_order_a_file_gives_them(fresh, requests, aware):
    """By name layer 10 stands before layer 9."""
    model, tok = fresh
    aware = replace(aware, layers=[2, 3], sequential_edit=True)
    apply_kdpo_to_model(model, tok, requests[:1], aware)
    weights, trace = execute_kdpo(model, tok, requests[1], aware)
    keys = kdpo_c.protected_keys(model)
    kdpo_c.protect_keys(model, tok, aware, dict(reversed(keys.items())))
    again, same = execute_kdpo(model, tok, requests[1], aware)
    assert same.losses == trace.losses and all(torch.equal(weights[name], again[name]) for name in keys)


def test_a_model_without_a_name_has_no_statistics(fresh, requests, aware):
    model, tok = fresh
    model.config._name_or_path = ""
    with pytest.raises(HParamsError, match="the model has no name_or_path"):
        apply_kdpo_to_model(model, tok, requests[:1], aware)


def test_keys_that_carry_nothing_are_told(statistics):
    usage = Usage.of(second_moment(statistics), 0.01, 0.01)
    keys = torch.randn(1, len(usage.inverse), generator=torch.Generator().manual_seed(0))
    keys *= (usage.ordinary / (keys @ usage.inverse @ keys.T)).sqrt()  # an ordinary one
    assert usage.carries(torch.cat((keys, keys / 2, keys / 10))) == [True, True, False]


def test_where_the_subject_carries_nothing_what_follows_it_does(fresh, requests, aware, monkeypatch):
    model, tok = fresh
    request = next(r for r in requests if r["prompt"].startswith(r["subject"]))
    aware = replace(aware, positions="subject_last", margin=2)
    after = len(tok(request["prompt"])["input_ids"]) - len(tok(request["subject"])["input_ids"])
    for least, rank in ((0, 1), (1e9, after)):
        monkeypatch.setattr(kdpo_c, "_LEAST", least)
        _, trace = execute_kdpo(model, tok, request, aware)
        assert trace.factors[WEIGHT][0].shape[1] == rank
    assert trace.final_token_accuracy == 1


def test_what_is_rounded_off_is_not_counted(aware, small_world, requests):
    """What an edit tells of its lead is that of the weights that it leaves, of which bfloat16 holds less than the change."""
    tok = AutoTokenizer.from_pretrained(small_world.folder)
    for request in requests[:4]:
        model = AutoModelForCausalLM.from_pretrained(small_world.folder, dtype=torch.bfloat16)
        known, traces = {**request, "target_new": request["ground_truth"]}, []  # so that little has to change
        far = lead(model, tok, known) + 0.2
        settings = replace(aware, layers=[0, 1, 2, 3], margin=far, mom2_step=0.1, cycles=100, sequential_edit=False)
        apply_kdpo_to_model(model, tok, [known], settings, traces=traces)
        assert traces[0].lead == lead(model, tok, known)


def lead(model, tok, request) -> float:
    """By how much a target leads the runner-up, where it does least, by a plain forward pass."""
    edit = edit_tokens(tok, request["prompt"], request["target_new"])
    with torch.no_grad():
        logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
    return runners_up(logits, edit.targets)[1].min().item()
