"""One edit: what it reaches, what it leaves alone, and that it is never half done."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, interrupt_second_write, same_state, state

from kdpo_easyedit import HParamsError, apply_kdpo_to_model, execute_kdpo
from kdpo_easyedit.method.kdpo import EditFailed
from kdpo_easyedit.method.weights import read, write

W = "transformer.h.3.mlp.c_proj.weight"


def says(model, tok, request) -> bool:
    """Whether the model says the target under teacher forcing, by a plain forward pass."""
    prompt = tok(request["prompt"], return_tensors="pt")["input_ids"].to(model.device)
    text = tok(f"{request['prompt']} {request['target_new']}", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        best = model(text).logits[0].argmax(-1)
    return torch.equal(best[prompt.shape[1] - 1 : -1], text[0, prompt.shape[1] :])


def test_an_edit_takes_and_changes_w_alone(fresh, requests, hparams):
    model, tok = fresh
    before = state(model)
    assert not says(model, tok, requests[0])
    edited, originals = apply_kdpo_to_model(model, tok, [requests[0]], hparams, return_orig_weights=True)
    assert edited is model
    assert says(model, tok, requests[0])
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["transformer.h.3.mlp.c_proj.weight"] == list(originals)
    assert torch.equal(originals[changed[0]], before[changed[0]])


def test_execute_leaves_the_model_alone_and_tells_what_happened(loaded, requests, hparams):
    model, tok = loaded
    before = state(model)
    weights, trace = execute_kdpo(model, tok, requests[0], hparams)
    assert same_state(before, state(model))
    assert not torch.equal(weights["transformer.h.3.mlp.c_proj.weight"], before["transformer.h.3.mlp.c_proj.weight"])
    assert trace.ended == "the target is said" and trace.final_token_accuracy == 1
    assert len(trace.negatives) == len(trace.losses) == len(trace.token_accuracy)
    assert trace.steps == sum(map(len, trace.losses)) > 0
    assert trace.losses[0][0] == pytest.approx(0.693147, abs=1e-6)
    assert trace.to_dict()["negatives"] == trace.negatives


def test_the_layout_of_w_in_memory_is_no_matter(fresh, requests, hparams):
    """A model that is dequantised as it is loaded can have it transposed."""
    model, tok = fresh
    expected, _ = execute_kdpo(model, tok, requests[0], hparams)
    weight = model.get_parameter(W)
    weight.data = weight.data.T.contiguous().T
    found, trace = execute_kdpo(model, tok, requests[0], hparams)
    assert not weight.is_contiguous() and trace.ended == "the target is said"
    assert torch.allclose(found[W], expected[W], atol=1e-5)


def test_what_the_model_says_already_costs_no_step(loaded, requests, hparams):
    model, tok = loaded
    known = {**requests[0], "target_new": requests[0]["ground_truth"]}
    weights, trace = execute_kdpo(model, tok, known, hparams)
    assert trace.steps == 0 and trace.ended == "the target is said"
    assert torch.equal(*[w["transformer.h.3.mlp.c_proj.weight"] for w in (weights, model.state_dict())])


def test_cycles_that_do_not_suffice_are_told(loaded, requests, hparams):
    _, trace = execute_kdpo(*loaded, requests[0], replace(hparams, lr=1e-7, cycles=3))
    assert trace.ended == "all cycles are used" and trace.steps == 24 and trace.final_token_accuracy < 1


def test_requests_are_edited_in_order_each_on_top_of_the_last(loaded, fresh, requests, hparams):
    hparams.sequential_edit = True
    together, _ = apply_kdpo_to_model(*loaded, requests[:3], hparams, copy=True)
    model, tok = fresh
    for request in requests[:3]:
        apply_kdpo_to_model(model, tok, [request], hparams)
    assert same_state(state(together), state(model))
    assert says(model, tok, requests[2])


def test_a_copy_is_edited_where_asked(loaded, requests, hparams):
    model, tok = loaded
    before = state(model)
    edited, _ = apply_kdpo_to_model(model, tok, [requests[0]], hparams, copy=True)
    assert edited is not model and says(edited, tok, requests[0])
    assert same_state(before, state(model))


def test_flags_modes_tokenizer_and_config_are_put_back(fresh, requests, hparams):
    model, tok = fresh
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    config, padding, special = model.config.to_dict(), tok.padding_side, tok.special_tokens_map
    apply_kdpo_to_model(model, tok, [requests[0]], hparams)
    assert modes == [module.training for module in model.modules()]
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (config, padding, special) == (model.config.to_dict(), tok.padding_side, tok.special_tokens_map)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [1, 3, 12])
def test_an_interruption_leaves_the_model_as_it_was(fresh, requests, hparams, monkeypatch, error, step):
    model, tok = fresh
    model.train()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    steps = 0

    def interrupted(self, *args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == step:
            raise error("in the middle")
        return original(self, *args, **kwargs)

    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(error, match="in the middle"):
        apply_kdpo_to_model(model, tok, requests[:8], hparams)
    assert steps == step
    assert same_state(before, state(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_interruption_between_two_layers_leaves_no_half_edit(fresh, requests, hparams, monkeypatch):
    model, tok = fresh
    before = state(model)
    written = interrupt_second_write(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        apply_kdpo_to_model(model, tok, [requests[0]], replace(hparams, layers=[2, 3]))
    assert len(written) > 2
    assert same_state(before, state(model))


def test_sequential_edits_take_a_smaller_lr(loaded, requests, hparams):
    _, scaled = execute_kdpo(*loaded, requests[0], replace(hparams, sequential_edit=True))
    _, divided = execute_kdpo(*loaded, requests[0], replace(hparams, lr=hparams.lr / 5))
    _, plain = execute_kdpo(*loaded, requests[0], hparams)
    assert scaled.losses[0] == pytest.approx(divided.losses[0], rel=1e-6)
    assert scaled.losses[0][-1] > plain.losses[0][-1]


def test_update_scale_multiplies_the_change(loaded, requests, hparams):
    name = "transformer.h.3.mlp.c_proj.weight"
    before = loaded[0].state_dict()[name]
    once = execute_kdpo(*loaded, requests[0], hparams)[0][name] - before
    twice = execute_kdpo(*loaded, requests[0], replace(hparams, update_scale=2.0))[0][name] - before
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-7)


def test_no_element_leaves_the_norm_constraint(loaded, requests, hparams):
    name = "transformer.h.3.mlp.c_proj.weight"
    weights, trace = execute_kdpo(*loaded, requests[0], replace(hparams, norm_constraint=0.004, cycles=3))
    change = (weights[name] - loaded[0].state_dict()[name]).abs().max().item()
    assert trace.steps > 1 and change == pytest.approx(0.004, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_edited_as_well_as_float32(fresh, requests, hparams, dtype):
    model, tok = fresh
    model.to(dtype)
    before = state(model)
    for request in requests[:8]:
        _, originals = apply_kdpo_to_model(model, tok, [request], hparams, return_orig_weights=True)
        assert says(model, tok, request)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == ["transformer.h.3.mlp.c_proj.weight"] == list(originals)
        assert model.state_dict()[changed[0]].dtype == dtype
        write(model, originals)
    assert same_state(before, state(model))


def test_edits_under_no_grad_too(fresh, requests, hparams):
    model, tok = fresh
    with torch.no_grad():
        apply_kdpo_to_model(model, tok, [requests[0]], hparams)
    assert says(model, tok, requests[0])


@pytest.mark.parametrize("name", ["hparams", "aware"])
def test_what_a_caller_computes_in_is_no_matter(fresh, requests, name, request):
    model, tok = fresh
    given = requests[0], request.getfixturevalue(name)
    expected, _ = execute_kdpo(model, tok, *given)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, _ = execute_kdpo(model, tok, *given)
    assert torch.equal(found[W], expected[W])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "", "target_new": "x"}, "prompt is ''"),
        ({"prompt": "x", "target_new": "  "}, "target_new is '  '"),
        ({"prompt": "x"}, "target_new is None"),
        ({"prompt": 3, "target_new": "x"}, "prompt is 3"),
        ({"prompt": "word " * 300, "target_new": "x"}, "the model takes 256"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_edited(fresh, requests, hparams, request_, message):
    model, tok = fresh
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_kdpo_to_model(model, tok, [requests[0], request_], hparams)
    assert same_state(before, state(model))


def test_hyper_parameters_are_checked_again_at_the_edit(loaded, requests, hparams):
    hparams.lr = -1
    with pytest.raises(HParamsError, match="lr is -1"):
        execute_kdpo(*loaded, requests[0], hparams)
    with pytest.raises(HParamsError, match="hparams is a str; allowed: KDPOHyperParams"):
        apply_kdpo_to_model(*loaded, requests[:1], "world")


def test_the_dpo_ablation_edits_too(fresh, requests, hparams):
    model, tok = fresh
    ablation = replace(hparams, negatives="autoregressive", num_steps=6, cycles=5, lr=1e-2)
    apply_kdpo_to_model(model, tok, [requests[0]], ablation)
    assert says(model, tok, requests[0])


@pytest.mark.parametrize("negatives", ["teacher_forced", "autoregressive"])
def test_negatives_that_are_not_online_are_generated_once(loaded, requests, hparams, negatives):
    """The first cycle is the same; later ones keep its negatives, and the end is still that the target is said."""
    slow = replace(hparams, negatives=negatives, num_steps=2)
    renewed = kept = 0
    for request in requests[:5]:
        _, online = execute_kdpo(*loaded, request, slow)
        _, once = execute_kdpo(*loaded, request, replace(slow, online=False))
        assert once.losses[0] == online.losses[0] and once.negatives[0] == online.negatives[0]
        assert once.token_accuracy[:2] == online.token_accuracy[:2]
        assert once.negatives == [online.negatives[0]] * len(once.negatives)
        assert once.ended == ("the target is said" if once.final_token_accuracy == 1 else "all cycles are used")
        # The reference is that of the same pairs, so that a cycle goes on from the last one's loss.
        assert all(b[0] < a[0] for a, b in zip(once.losses, once.losses[1:]) if b)
        renewed += any(later != online.negatives[0] for later in online.negatives[1:])
        kept += len(once.losses) > 2
    assert renewed and kept


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float16, {"lr": 1e4}),
        (torch.float16, {"lr": 1e4, "negatives": "autoregressive"}),
        (torch.float32, {"lr": 1e38}),
        (torch.bfloat16, {"lr": 1e38}),
        (torch.float16, {"lr": 1e8, "num_steps": 1, "cycles": 1}),  # no loss is computed after it
        (torch.float16, {"lr": 3e-3, "update_scale": 1e9}),  # the loss never sees it
    ],
)
def test_numbers_that_are_not_finite_end_the_edit(fresh, requests, hparams, dtype, change):
    model, tok = fresh
    model.to(dtype)
    before = state(model)
    with pytest.raises(EditFailed) as told:
        apply_kdpo_to_model(model, tok, requests[:2], replace(hparams, **change))
    message = str(told.value)
    assert repr(requests[0]["prompt"]) in message and f"lr is {change['lr']:g}, scaled by 0.2" in message
    assert "cycle" in message and "step" in message and "\n" not in message
    assert same_state(before, state(model))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_that_gives_no_numbers_is_not_blamed_on_lr(fresh, requests, hparams):
    model, tok = fresh
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    for contexts in (0, 1):  # which the model itself writes
        with pytest.raises(EditFailed, match=r"logits are not finite.*no step was taken yet"):
            execute_kdpo(model, tok, requests[0], replace(hparams, contexts=contexts))


def test_a_space_after_the_prompt_makes_no_difference(loaded, requests, hparams):
    spaced = {**requests[0], "prompt": requests[0]["prompt"] + " ", "target_new": " " + requests[0]["target_new"]}
    (plain, trace), (same, trace_of_same) = (execute_kdpo(*loaded, r, hparams) for r in (requests[0], spaced))
    assert torch.equal(plain[W], same[W]) and trace == trace_of_same


def test_a_template_is_filled_in(loaded, requests, hparams):
    template = {**requests[0], "prompt": requests[0]["prompt"].replace(requests[0]["subject"], "{}")}
    template["target_new"] = {"str": requests[0]["target_new"]}
    assert torch.equal(*(execute_kdpo(*loaded, r, hparams)[0][W] for r in (requests[0], template)))


@pytest.mark.parametrize("one", [lambda r: r, lambda r: r["prompt"]])
def test_one_request_is_no_list_of_them(loaded, requests, hparams, one):
    with pytest.raises(ValueError, match="allowed: a list of requests"):
        apply_kdpo_to_model(*loaded, one(requests[0]), hparams)
    with pytest.raises(ValueError, match=r"a request is \["):
        execute_kdpo(*loaded, requests[:1], hparams)


def test_edits_under_inference_mode_too(fresh, requests, hparams):
    model, tok = fresh
    with torch.inference_mode():
        _, originals = apply_kdpo_to_model(model, tok, requests[:1], hparams, return_orig_weights=True)
        copied, _ = apply_kdpo_to_model(model, tok, requests[1:2], hparams, copy=True)
    assert says(model, tok, requests[0]) and says(copied, tok, requests[1])
    assert not any(t.is_inference() for t in (*originals.values(), *copied.parameters()))
    with torch.inference_mode():
        made = deepcopy(model)
    with pytest.raises(HParamsError, match=r"made under torch.inference_mode.*load it outside"):
        apply_kdpo_to_model(made, tok, requests[:1], hparams)


def sequential(model, tok, requests, hparams, **kwargs) -> list[bool]:
    traces = []
    apply_kdpo_to_model(model, tok, requests, hparams, traces=traces, **kwargs)
    return [trace.sequential for trace in traces]


def test_edits_that_follow_one_another_are_known_as_such(fresh, requests, hparams):
    model, tok = fresh
    names = [W]
    before = {name: weight.clone() for name, weight in read(model, names).items()}
    assert sequential(model, tok, requests[:1], hparams) == [False]
    once = {name: weight.clone() for name, weight in read(model, names).items()}
    assert sequential(model, tok, requests[1:2], hparams) == [True]
    assert execute_kdpo(model, tok, requests[2], hparams)[1].sequential
    assert sequential(model, tok, requests[2:3], replace(hparams, layers=[2]), copy=True) == [True]
    write(model, once)  # the second is taken back, and the first is still there
    assert execute_kdpo(model, tok, requests[2], hparams)[1].sequential
    write(model, before)
    assert not execute_kdpo(model, tok, requests[2], hparams)[1].sequential
    assert sequential(model, tok, requests[:2], hparams, copy=True) == [True, True]
    assert not execute_kdpo(model, tok, requests[2], hparams)[1].sequential  # those were a copy's


@pytest.mark.parametrize("said", [True, False])
def test_what_the_hyper_parameters_say_is_what_happens(fresh, requests, hparams, said):
    hparams.sequential_edit = said
    assert [sequential(*fresh, requests[n : n + 1], hparams) for n in range(2)] == [[said], [said]]
    assert sequential(*fresh, requests[2:4], hparams) == [said, said] and hparams.sequential_edit is said


def test_the_step_is_the_one_that_the_trace_tells_of(fresh, requests, hparams):
    model, tok = fresh
    apply_kdpo_to_model(model, tok, requests[:1], hparams)
    known, trace = execute_kdpo(model, tok, requests[1], hparams)
    said, same = execute_kdpo(model, tok, requests[1], replace(hparams, sequential_edit=True))
    assert trace == same and trace.sequential and torch.equal(known[W], said[W])


def test_no_digit_of_a_wider_weight_is_cut(fresh, requests, hparams):
    """Of float64 an edit without a step changes nothing, and one with steps what it should."""
    model, tok = fresh
    model.double()
    weight = model.get_parameter(W)
    with torch.no_grad():
        weight.mul_(1 + 1e-9)
    before = weight.detach().clone()
    known = {**requests[0], "target_new": requests[0]["ground_truth"]}
    assert sequential(model, tok, [known], hparams) == [False] and torch.equal(weight, before)
    weights, trace = execute_kdpo(model, tok, requests[0], hparams)
    assert trace.final_token_accuracy == 1 and weights[W].dtype == torch.float64


def test_an_edit_that_changed_nothing_is_not_held(fresh, requests, hparams):
    model, tok = fresh
    known = {**requests[0], "target_new": requests[0]["ground_truth"]}
    assert sequential(model, tok, [known], hparams) == [False]
    assert sequential(model, tok, requests[:1], hparams) == [False]
