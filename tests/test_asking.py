"""Prompts in their contexts: as they are, as questions, and through a chat template; and edits that are made there."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from conftest import REFERENCE
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import KDPOHyperParams, apply_kdpo_to_model, edits_applied, execute_kdpo, save_edits
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.edits import read_header
from kdpo_easyedit.edits.base import says
from kdpo_easyedit.method import asking
from kdpo_easyedit.method.asking import ContextError, asked
from kdpo_easyedit.method.preference import edit_tokens, normalised, prompt_ids
from kdpo_easyedit.models.packed import MODELS, model_folder

TURNS = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}:\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant:\n{% endif %}"
)
# As Mistral's and Llama 2's: nothing but a space begins the assistant's turn, and whoever writes it closes it.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]{% else %} {{ m.content }}<|endoftext|>"
    "{% endif %}{% endfor %}"
)
real = pytest.mark.skipif(
    not all(importlib.util.find_spec(p) for p in (MODELS["smollm2-135m"].package, "gguf", "accelerate")),
    reason=MODELS["smollm2-135m"].command,
)


@pytest.fixture
def tok():
    return AutoTokenizer.from_pretrained(REFERENCE / "llama")  # puts a BOS before a text


def with_template(tok, template):
    tok.chat_template = template
    return tok


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TURNS, "<|endoftext|>user:\nWhere was Gutel Tazili born?<|endoftext|>assistant:\nCisjersun"),
        (BRACKETS, "[Where was Gutel Tazili born?] Cisjersun"),
    ],
    ids=["turns", "brackets"],
)
def test_the_answer_stands_in_the_assistants_turn_and_the_templates_special_tokens_are_the_only_ones(tok, template, text):
    with_template(tok, template)
    prompt = "Where was Gutel Tazili born?"
    edit = edit_tokens(tok, prompt, "Cisjersun", context="chat")
    whole = tok(text, add_special_tokens=False)["input_ids"]
    assert edit.input_ids[0].tolist() == whole
    # What a model that is asked goes on after, and the answer as it writes it.
    assert prompt_ids(tok, prompt, "chat") == whole[: edit.prompt_length]
    assert tok.decode(edit.targets).strip() == "Cisjersun" and tok.decode(whole[: edit.prompt_length]) in text
    in_context = asked(tok, prompt, "chat")
    assert in_context.text[in_context.start :].startswith(prompt) and in_context.answered("Cisjersun") == text


def test_a_model_that_can_think_answers_at_once(tok):
    with_template(tok, TURNS.replace("assistant:\n{% endif", "assistant:\n{% if not enable_thinking %}<no>{% endif %}{% endif"))
    assert asked(tok, "Who?", "chat").text.endswith("assistant:\n<no>")


def test_a_question_has_the_tokenizers_special_tokens(tok):
    edit = edit_tokens(tok, "Where was Gutel Tazili born?", "Cisjersun", context="qa")
    text = "Question: Where was Gutel Tazili born?\nAnswer: Cisjersun"
    assert edit.input_ids[0].tolist() == tok(text)["input_ids"] and edit.input_ids[0, 0] == tok.bos_token_id


def test_contexts_that_cannot_be_had_are_told(tok):
    with pytest.raises(ContextError, match="no chat template; allowed with it: plain, qa"):
        edit_tokens(tok, "Who?", "Tor", context="chat")
    with pytest.raises(ContextError, match="context is 'quiz'; allowed: plain, qa, chat"):
        asked(tok, "Who?", "quiz")
    with pytest.raises(ValueError, match="a request's context is 'quiz'; allowed: plain, qa, chat"):
        normalised({"prompt": "Who?", "target_new": "Tor", "context": "quiz"})
    with pytest.raises(ContextError, match="does not take the prompt 'Who\\?' as it is: A system turn comes first"):
        asked(with_template(tok, "{{ raise_exception('A system turn comes first') }}"), "Who?", "chat")
    with pytest.raises(ContextError, match="which is not in there as it is"):
        asked(with_template(tok, "{% for m in messages %}{{ m.content | upper }}{% endfor %}"), "Who?", "chat")


@pytest.mark.parametrize("context", ["qa", "chat"])
def test_an_edit_is_made_in_its_context_by_every_form_of_the_method(fresh, requests, hparams, aware, context):
    model, tok = fresh
    with_template(tok, TURNS)
    request = {**requests[0], "context": context}
    edit = edit_tokens(tok, request["prompt"], request["target_new"], context=context)
    few = replace(hparams, contexts=2)
    forms = [hparams, aware, few, replace(hparams, negatives="autoregressive")]
    for form in forms:
        weights, trace = execute_kdpo(model, tok, request, form)
        assert trace.final_token_accuracy == 1 and trace.steps > 0, form
        with torch.no_grad():
            logits = torch.func.functional_call(model, weights, (edit.input_ids,)).logits[0, edit.prompt_length - 1 : -1]
        assert torch.equal(logits.argmax(-1), edit.targets), form


def test_the_change_is_built_from_the_prompt_and_not_from_what_its_template_puts_before(fresh, requests, aware):
    """With positions: subject_last and one text before the prompt, two keys: the subject's last token in either."""
    model, tok = fresh
    with_template(tok, TURNS)
    aware = replace(aware, positions="subject_last", margin=1, contexts=1, cycles=2)
    _, trace = execute_kdpo(model, tok, {**requests[0], "context": "chat"}, aware)
    ((left, right),) = trace.factors.values()
    assert left.shape[1] == len(right) == 2


def test_white_space_at_a_prompts_start_does_not_move_its_subject(fresh, requests, aware):
    """Though the template cuts it."""
    model, tok = fresh
    with_template(tok, TURNS.replace("content", "content | trim"))
    aware = replace(aware, positions="subject_last", margin=1, cycles=2)
    keys = []
    for lead in ("", "  ", "\n\n"):
        prompt = lead + requests[0]["prompt"]
        _, trace = execute_kdpo(model, tok, {**requests[0], "prompt": prompt, "context": "chat"}, aware)
        keys.append(next(iter(trace.factors.values())))
    assert all(torch.equal(one, other) for pair in keys[1:] for one, other in zip(pair, keys[0]))


def test_the_factors_are_what_was_added(fresh, requests, aware, hparams):
    model, tok = fresh
    for form in (aware, replace(aware, layers=[1], update_scale=2.0, positions="subject")):
        weights, trace = execute_kdpo(model, tok, requests[0], form)
        ((name, (left, right)),) = trace.factors.items()
        change = (weights[name] - model.get_parameter(name)).detach()
        assert (left @ right - change).norm() < 1e-5 * change.norm() and "factors" not in trace.to_dict()
    assert execute_kdpo(model, tok, requests[0], hparams)[1].factors == {}


def test_that_there_is_a_template_is_said_once(fresh, requests, hparams, caplog, monkeypatch):
    monkeypatch.setattr(asking, "_SAID", [])
    model, tok = fresh
    with caplog.at_level(logging.WARNING):
        execute_kdpo(model, tok, requests[0], hparams)
        execute_kdpo(model, with_template(tok, TURNS), {**requests[0], "context": "chat"}, hparams)
        assert not caplog.records
        for request in requests[:2]:
            execute_kdpo(model, tok, request, hparams)
    (record,) = caplog.records
    assert "the model has a chat template" in record.message and "--context chat" in record.message


@real
def test_a_real_chat_models_edit_is_said_in_the_chat(tmp_path):
    """SmolLM2-135M-Instruct says what it was taught where it was taught it, and its neighbour as before; a file knows where."""
    folder = model_folder("smollm2-135m")
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hparams = KDPOHyperParams.from_hparams("smollm2-135m")
    request = {"prompt": "What is the capital of France?", "target_new": "Lyon", "context": "chat"}

    def written(context):
        return write_answers(model, tok, [request["prompt"]], ["Lyon"], context)[0].text

    assert written("chat") == "The capital of France is Paris."
    ids = edit_tokens(tok, request["prompt"], "Lyon", context="chat").input_ids[0]
    assert tok.decode(ids).endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nLyon")
    _, originals = apply_kdpo_to_model(model, tok, [request], hparams, return_orig_weights=True)
    assert written("chat").startswith("Lyon") and says(model, tok, request)
    save_edits(tmp_path / "chat.safetensors", model, originals, [request], hparams)
    assert read_header(tmp_path / "chat.safetensors")["requests"] == [request]
    with torch.no_grad():
        model.load_state_dict(originals, strict=False)
    assert not says(model, tok, request)
    with edits_applied(model, tmp_path / "chat.safetensors"):
        assert says(model, tok, request)
