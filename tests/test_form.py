"""The fields that the paper does not have: a margin to reach, the model's own contexts, and the positions of the keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import REFERENCE, same_state, state
from transformers import AutoTokenizer

from kdpo_easyedit import HParamsError, KDPOHyperParams, apply_kdpo_to_model, execute_kdpo
from kdpo_easyedit.easyedit.statistics import statistics_file
from kdpo_easyedit.method import kdpo_c
from kdpo_easyedit.method.contexts import contexts
from kdpo_easyedit.method.preference import edit_tokens, runners_up, subject_span, tokens_of
from kdpo_easyedit.method.replay import CannotReplay, Suffix
from kdpo_easyedit.method.statistics import second_moment
from kdpo_easyedit.method.weights import write

W = "transformer.h.1.mlp.c_proj.weight"


@pytest.fixture
def aware(hparams, small_world) -> KDPOHyperParams:
    """KDPO+C at a layer of the small world with another above it."""
    return replace(
        hparams, layers=[1], mom2_adjustment=True, mom2_dataset="world", mom2_n_samples=1000,
        stats_dir=str(small_world.statistics), cycles=40, mom2_step=6,
    )  # fmt: skip


def least_lead(model, tok, prompt, target) -> float:
    """By how many logits the target leads the runner-up, where it does least, by a plain forward pass."""
    edit = edit_tokens(tok, prompt, target)
    with torch.no_grad():
        logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
    of_target = logits.gather(-1, edit.targets.unsqueeze(-1))
    return (of_target - logits.scatter(-1, edit.targets.unsqueeze(-1), -1e9).amax(-1, keepdim=True)).min().item()


def test_runners_up_and_the_lead_over_them():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 2.5, 1.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]])
    tokens, leads = runners_up(logits, torch.tensor([1, 1]))
    assert tokens.tolist() == [[2, 0], [2, 2]] and leads.tolist() == [[1, -0.5], [-1, -1]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_subject_is_found_among_the_tokens(kind):
    tok = AutoTokenizer.from_pretrained(REFERENCE / kind)
    prompt = "Gutel Tazili, said Gutel Tazili, was born in"
    start, end = subject_span({"prompt": prompt, "subject": " Gutel Tazili"})
    assert prompt[start:end] == "Gutel Tazili" and start == 19
    ids = tok(prompt)["input_ids"]
    assert tok.decode([ids[place] for place in tokens_of(tok, prompt, start, end)]).strip() == "Gutel Tazili"


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("Ana was born in Anatolia, and", "Ana", 0),  # not in a longer word
        ("Anatolia's Ana is in Ana-Maria", "Ana", 21),
        ("Anatolia is in", "Ana", 0),  # but where it is nowhere else
        ("法国的首都是法国人", "法国", 6),  # a script without spaces
        ("What C++ and C are; C++ is", "C++", 20),
    ],
)
def test_the_subject_is_a_word_where_it_stands_as_one(prompt, subject, start):
    assert subject_span({"prompt": prompt, "subject": subject}) == (start, start + len(subject))


@pytest.mark.parametrize("subject", [None, "", "Gutel Tazili"])
def test_a_subject_that_is_not_in_the_prompt_is_told(subject):
    with pytest.raises(ValueError, match=r"subject is .*positions is not 'all'"):
        subject_span({"prompt": "The sky is", "subject": subject})


def test_an_edit_goes_on_to_the_margin(fresh, requests, hparams):
    model, tok = fresh
    request = requests[0]
    _, plain = execute_kdpo(model, tok, request, hparams)
    _, trace = execute_kdpo(model, tok, request, replace(hparams, margin=4))
    assert plain.lead is None and plain.ended == "the target is said"
    assert trace.ended == "the target leads by the margin" and trace.lead >= 4 and trace.steps > plain.steps
    targets = edit_tokens(tok, request["prompt"], request["target_new"]).targets.tolist()
    first, *_, last = trace.negatives
    assert first == plain.negatives[0] and last == targets  # the runner-up no longer counts
    traces = []
    apply_kdpo_to_model(model, tok, [request], replace(hparams, margin=4), traces=traces)
    assert least_lead(model, tok, request["prompt"], request["target_new"]) == pytest.approx(traces[0].lead, abs=1e-3)
    # What is said already, but not by so much, is learnt too; what is, costs nothing.
    _, again = execute_kdpo(model, tok, request, replace(hparams, margin=7))
    assert again.token_accuracy[0] == 1 and again.steps > 0 and again.lead >= 7
    assert execute_kdpo(model, tok, request, replace(hparams, margin=4))[1].steps == 0


def test_a_margin_that_is_not_reached_is_told(loaded, requests, hparams):
    _, trace = execute_kdpo(*loaded, requests[0], replace(hparams, margin=500, cycles=1))
    assert trace.ended == "all cycles are used" and trace.final_token_accuracy == 1 and trace.lead < 500


def test_the_models_texts_are_written_once(fresh):
    model, tok = fresh
    written = contexts(model, tok, 4)
    assert len(set(written)) == 4 and contexts(model, tok, 0) == [] and contexts(model, tok, 4) is written
    assert all(len(tok(text)["input_ids"]) > 5 for text in written)


def test_an_edit_holds_in_its_contexts(fresh, requests, hparams):
    model, tok = fresh
    request, traces = requests[0], []
    apply_kdpo_to_model(model, tok, [request], replace(hparams, margin=3, contexts=3), traces=traces)
    assert traces[0].ended == "the target leads by the margin"
    prompts = [request["prompt"], *(f"{text}. {request['prompt']}" for text in contexts(model, tok, 3))]
    leads = [least_lead(model, tok, prompt, request["target_new"]) for prompt in prompts]
    assert min(leads) == pytest.approx(traces[0].lead, abs=1e-3) and min(leads) >= 3 - 1e-3
    assert len(traces[0].negatives[0]) == len(edit_tokens(tok, request["prompt"], request["target_new"]).targets)


@pytest.mark.parametrize(("key", "value"), [("margin", 3.0), ("contexts", 2)])
def test_what_the_ablation_does_not_have_is_refused(hparams, key, value):
    with pytest.raises(HParamsError, match=f"{key} is {value}; allowed with negatives: autoregressive"):
        replace(hparams, negatives="autoregressive", **{key: value})


def test_positions_are_those_of_the_adjusted_method(hparams):
    with pytest.raises(HParamsError, match="positions is 'subject'; allowed without mom2_adjustment: 'all'"):
        replace(hparams, positions="subject")


def test_the_change_is_built_from_the_subjects_last_token_alone(fresh, requests, aware, small_world):
    """One key k, so that Δ is an outer product, along k S on the input's side."""
    model, tok = fresh
    request = requests[0]
    file = statistics_file(small_world.statistics, str(small_world.folder), W.removesuffix(".weight"), "world", 1000)
    inputs = []
    hook = model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    model(tok(request["prompt"], return_tensors="pt")["input_ids"])
    hook.remove()
    last = tokens_of(tok, request["prompt"], *subject_span(request))[-1]
    key = inputs[0][0, last]
    aware = replace(aware, positions="subject_last", margin=1)
    weights, trace = execute_kdpo(model, tok, request, aware)
    assert trace.ended == "the target leads by the margin"
    change = (weights[W] - model.get_parameter(W)).double()  # a Conv1D's: [in, out]
    sizes = torch.linalg.svdvals(change)
    assert sizes[1] < 1e-4 * sizes[0]
    moment = second_moment(file)
    damped = moment / moment.diagonal().mean() + aware.mom2_damping * torch.eye(len(moment), dtype=torch.float64)
    along = torch.linalg.solve(damped, key.double())
    left = torch.linalg.svd(change).U[:, 0]
    assert torch.nn.functional.cosine_similarity(left, along, dim=0).abs() > 0.9999


@pytest.mark.parametrize(("positions", "contexts_"), [("all", 2), ("subject", 2), ("subject_last", 0), ("subject_last", 1)])
def test_an_edit_from_few_positions_holds_in_the_whole_model(fresh, requests, aware, positions, contexts_):
    model, tok = fresh
    request, traces = requests[0], []
    aware = replace(aware, positions=positions, margin=1, contexts=contexts_)
    apply_kdpo_to_model(model, tok, [request], aware, traces=traces)
    assert traces[0].ended == "the target leads by the margin"
    texts = ["", *(f"{text}. " for text in contexts(model, tok, contexts_))]
    rows = 0
    for text in texts:
        prompt, (start, end) = text + request["prompt"], subject_span(request)
        edit = edit_tokens(tok, prompt, request["target_new"])
        with torch.no_grad():
            logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
        assert torch.equal(logits.argmax(-1), edit.targets)
        if positions == "all":
            rows += len(tokens_of(tok, f"{prompt} {request['target_new']}", len(text), 10**6)) - 1
        else:
            rows += 1 if positions == "subject_last" else len(tokens_of(tok, prompt, len(text) + start, len(text) + end))
    assert len(kdpo_c.protected_keys(model)[W]) == rows


def test_a_subject_that_is_not_there_is_told_before_the_model_is_touched(fresh, requests, aware):
    model, tok = fresh
    before = state(model)
    other = requests[1] | {"subject": "Nobody"}
    with pytest.raises(ValueError, match="subject is 'Nobody', and has to stand in its prompt"):
        apply_kdpo_to_model(model, tok, [requests[0], other], replace(aware, positions="subject_last"))
    assert same_state(before, state(model))


def largest_effect(model, tok, usage, request, lead) -> tuple[int, torch.Tensor]:
    """A prompt's token with the largest gain, and its key, by the gradient of a plain pass: through a position alone a step
    gains |g|² kᵀ S k. ``lead`` is what a target must have to be left out."""
    kept = {}

    def keep(_module, arguments, output):
        kept["keys"], kept["output"] = arguments[0].detach()[0], output.detach().requires_grad_()
        return kept["output"]

    edit = edit_tokens(tok, request["prompt"], request["target_new"])
    hook = model.transformer.h[1].mlp.c_proj.register_forward_hook(keep)
    with torch.enable_grad():
        logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
        others, leads = runners_up(logits.detach(), edit.targets)
        behind = (logits.gather(-1, edit.targets[:, None]) - logits.gather(-1, others[:, None]))[leads < lead].sum()
        (gradient,) = torch.autograd.grad(behind, kept["output"])
    hook.remove()
    keys = kept["keys"]
    gains = gradient[0].square().sum(-1) * (usage.times(keys) * keys).sum(-1)
    place = int(gains[: edit.prompt_length].argmax())
    return place, keys[place]


@pytest.mark.parametrize("contexts_", [0, 1])
def test_without_a_subject_the_token_of_the_largest_effect_is_its_last(fresh, requests, aware, contexts_):
    model, tok = fresh
    aware = replace(aware, positions="subject_last", margin=1, contexts=contexts_)
    usage = kdpo_c.usages(model, tok, aware)[W]
    for request in requests[:4]:
        request = request | {"subject": ""}
        _, key = largest_effect(model, tok, usage, request, aware.margin)
        _, trace = execute_kdpo(model, tok, request, aware)
        basis = trace.factors[W][0]
        assert basis.shape[1] == 1 + contexts_
        along = torch.nn.functional.cosine_similarity(basis[:, 0], usage.times(key[None])[0], dim=0)
        assert along > 0.9999


def test_what_holds_but_after_its_contexts_has_a_token_of_the_largest_effect_too(fresh, requests, aware):
    """The one by which the target would lead by more."""
    model, tok = fresh
    aware = replace(aware, positions="subject_last", margin=1, contexts=4, cycles=1, num_steps=1)
    usage, of_contexts = kdpo_c.usages(model, tok, aware)[W], 0
    for request in requests[:8]:
        request = {"prompt": request["prompt"], "target_new": request["ground_truth"]}
        if execute_kdpo(model, tok, request, replace(aware, contexts=0))[1].steps:
            continue
        _, trace = execute_kdpo(model, tok, request, aware)
        if trace.steps:
            place, key = largest_effect(model, tok, usage, request, 1e9)
            along = torch.nn.functional.cosine_similarity(trace.factors[W][0][:, 0], usage.times(key[None])[0], dim=0)
            assert along > 0.9999
            of_contexts += place > 0
    assert of_contexts


@pytest.mark.parametrize("contexts_", [0, 1])
def test_steps_that_leave_tokens_out_end_where_the_whole_model_says_so(fresh, requests, aware, contexts_, monkeypatch):
    """Steps that think too well of themselves: what they say of the target is raised by three logits."""
    model, tok = fresh
    aware = replace(aware, positions="subject_last", margin=1, contexts=contexts_)
    _, plain = execute_kdpo(model, tok, requests[0], aware)
    step_logits, passes = Suffix.step_logits, []

    def too_well(self, weights):
        assert self.starts is not None
        logits = step_logits(self, weights)
        raised = torch.zeros_like(logits)
        raised.scatter_(-1, targets.expand(logits.shape[:-1]).unsqueeze(-1), 3.0)
        return logits + raised

    target_logits = Suffix.target_logits
    monkeypatch.setattr(Suffix, "target_logits", lambda self, w: passes.append(1) or target_logits(self, w))
    targets = edit_tokens(tok, requests[0]["prompt"], requests[0]["target_new"]).targets
    monkeypatch.setattr(Suffix, "step_logits", too_well)
    weights, trace = execute_kdpo(model, tok, requests[0], aware)
    assert trace.ended == plain.ended == "the target leads by the margin" and len(passes) > 1
    write(model, weights)
    for text in ["", *(f"{text}. " for text in contexts(model, tok, contexts_))]:
        edit = edit_tokens(tok, text + requests[0]["prompt"], requests[0]["target_new"])
        with torch.no_grad():
            logits = model(edit.input_ids).logits[0, edit.prompt_length - 1 : -1]
        assert runners_up(logits, edit.targets)[1].min() > 1 - 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_leaving_tokens_out_changes_little_of_an_edit(fresh, requests, aware, dtype, monkeypatch):
    model, tok = fresh
    model.to(dtype)
    aware = replace(aware, positions="subject_last", margin=1, contexts=1)
    part, trace = execute_kdpo(model, tok, requests[0], aware)
    monkeypatch.setattr(Suffix, "_from", lambda self, starts: (_ for _ in ()).throw(CannotReplay("as a test has it")))
    all_of_it, trace_of_all = execute_kdpo(model, tok, requests[0], aware)
    assert trace.ended == trace_of_all.ended == "the target leads by the margin"
    assert trace.losses[0][0] == pytest.approx(trace_of_all.losses[0][0], abs=1e-3)
    before = model.get_parameter(W).float()
    changes = [(weights[W].float() - before).flatten() for weights in (part, all_of_it)]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.8
