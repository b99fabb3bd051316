"""Tokens and the loss, against forms written out at length."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import REFERENCE, same_state, state
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kdpo_easyedit import KDPOHyperParams, apply_kdpo_to_model
from kdpo_easyedit.method import preference
from kdpo_easyedit.method.asking import asked
from kdpo_easyedit.method.preference import (
    edit_tokens,
    normalised,
    pair_margin,
    preference_loss,
    prompt_ids,
    sequence_margin,
    teacher_forced_negatives,
    tokens_of,
)


@pytest.fixture
def llama_tok():
    return AutoTokenizer.from_pretrained(REFERENCE / "llama")


def test_one_space_stands_between_prompt_and_target(llama_tok):
    plain = edit_tokens(llama_tok, "Gutel Tazili was born in", "Cisjersun")
    spaced = edit_tokens(llama_tok, "Gutel Tazili was born in", " Cisjersun")
    assert torch.equal(plain.input_ids, spaced.input_ids)
    assert plain.input_ids.tolist() == [llama_tok("Gutel Tazili was born in Cisjersun")["input_ids"]]
    assert llama_tok.decode(plain.targets) == " Cisjersun"


def test_the_prompt_length_counts_special_tokens(llama_tok):
    prompt = "Gutel Tazili was born in"
    assert llama_tok(prompt)["input_ids"][0] == llama_tok.bos_token_id
    assert edit_tokens(llama_tok, prompt, "Cisjersun").prompt_length == len(llama_tok(prompt)["input_ids"])


def _word_tokenizer(words: list[str], closing: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("b c| |[a-z]+"), behavior="removed", invert=True)
    if closing:
        backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")


def test_a_merge_across_the_boundary_is_split_by_characters_and_logged(caplog):
    tok = _word_tokenizer(["a", "b", "c", "d", "b c", " "])
    assert tok("a b")["input_ids"] != tok("a b c d")["input_ids"][: len(tok("a b")["input_ids"])]
    with caplog.at_level(logging.INFO, logger="kdpo_easyedit"):
        edit = edit_tokens(tok, "a b", "c d")
    assert tok.convert_ids_to_tokens(edit.targets.tolist()) == ["b c", " ", "d"]
    assert "split by character offsets" in caplog.text


def test_a_token_that_closes_every_text_is_no_part_of_the_target():
    tok = _word_tokenizer(["a", "b", "c", "d", "b c", " "], closing=True)
    edit = edit_tokens(tok, "a d", "c")
    assert tok.convert_ids_to_tokens(edit.input_ids[0].tolist()) == ["a", " ", "d", " ", "c"]
    assert tok.convert_ids_to_tokens(edit.targets.tolist()) == [" ", "c"]


def test_a_prompt_without_tokens_is_refused(loaded):
    with pytest.raises(ValueError, match="prompt is ''"):
        edit_tokens(loaded[1], "", "x")


def test_margin_of_pairs_is_the_difference_of_log_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(5, 30)
    targets, negatives = torch.randint(0, 30, (2, 5))
    negatives[2] = targets[2]
    log_probs = logits.log_softmax(-1)
    expected = sum(log_probs[t, targets[t]] - log_probs[t, negatives[t]] for t in range(5) if targets[t] != negatives[t])
    pairs = torch.stack((targets, negatives), -1)
    torch.testing.assert_close(pair_margin(logits.gather(-1, pairs)), expected)


def test_margin_of_sequences_takes_each_on_its_own_prefix():
    torch.manual_seed(0)
    logits, sequences = torch.randn(2, 4, 30), torch.randint(0, 30, (2, 4))
    log_probs = logits.log_softmax(-1)
    each = [sum(log_probs[s, t, sequences[s, t]] for t in range(4)) for s in range(2)]
    torch.testing.assert_close(sequence_margin(logits, sequences), each[0] - each[1])


def test_loss_is_log_2_at_the_reference_and_falls_with_the_margin():
    at = [preference_loss(torch.tensor(1.5 + d), torch.tensor(1.5), 0.1).item() for d in (-10, 0, 10)]
    assert at == pytest.approx([math.log(1 + math.e), math.log(2), math.log(1 + 1 / math.e)])


def test_negatives_are_what_is_most_likely():
    assert teacher_forced_negatives(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("prompt", ["Gutel Tazili was born in", "Gutel Tazili was born in ", "Gutel Tazili was born in \n\t"])
@pytest.mark.parametrize("target", ["Cisjersun", " Cisjersun", "\u00a0 Cisjersun"])
def test_whatever_white_space_is_brought_one_space_joins(llama_tok, prompt, target):
    plain = edit_tokens(llama_tok, "Gutel Tazili was born in", "Cisjersun")
    found = edit_tokens(llama_tok, prompt, target)
    assert torch.equal(found.input_ids, plain.input_ids) and found.prompt_length == plain.prompt_length
    assert asked(llama_tok, prompt.rstrip()).answered(target.strip()) == "Gutel Tazili was born in Cisjersun"
    request = normalised({"prompt": prompt, "target_new": target, "locality": {}})
    assert request == {"prompt": "Gutel Tazili was born in", "target_new": "Cisjersun", "locality": {}}
    assert normalised(request) == request


def test_what_is_cut_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(preference, "_SAID", set())
    for _ in range(3):
        normalised({"prompt": "He works as a ", "target_new": " pilot"})
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "prompt is 'He works as a '" in caplog.text and "target_new is ' pilot'" in caplog.text


@pytest.mark.parametrize("target", ["pilot", {"str": "pilot", "id": "Q2095549"}, ["pilot"], [{"str": " pilot"}]])
def test_requests_stand_as_datasets_have_them(target):
    given = {"prompt": "{} works as a ", "subject": "Gutel Tazili", "target_new": target}
    request = normalised(given)
    assert (request["prompt"], request["target_new"]) == ("Gutel Tazili works as a", "pilot")
    assert given["prompt"] == "{} works as a " and request["subject"] == "Gutel Tazili"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "{} works as a", "target_new": "pilot"}, r"prompt is '\{\} works as a', and its subject.*is None"),
        (
            {"prompt": "{} works as a", "target_new": "pilot", "subject": " "},
            "subject, which belongs in the place of {}, is ' '",
        ),
        ({"prompt": "{} and {}", "target_new": "pilot", "subject": "A"}, r"allowed: at most one \{\}"),
        ({"prompt": "x", "target_new": []}, r"target_new is \[\]"),
        ({"prompt": "x", "target_new": ["a", "b"]}, r"target_new is \['a', 'b'\]"),
        ({"prompt": "x", "target_new": {"id": 3}}, "target_new is {'id': 3}"),
        ({"prompt": " \n", "target_new": "a"}, r"prompt is ' \\n'"),
        ("He works as a", "a request is 'He works as a'"),
    ],
)
def test_other_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        normalised(request_)


def test_a_prompt_is_continued_before_what_closes_a_text(llama_tok):
    tok = _word_tokenizer(["a", "b", "c", "d", "b c", " "], closing=True)
    assert tok.convert_ids_to_tokens(tok("a d")["input_ids"]) == ["a", " ", "d", "<end>"]
    assert tok.convert_ids_to_tokens(prompt_ids(tok, "a d")) == ["a", " ", "d"]
    assert edit_tokens(tok, "a d", "c").prompt_length == 3
    # What opens a text stays, and what a text says itself.
    assert prompt_ids(llama_tok, "Gutel Tazili") == llama_tok("Gutel Tazili")["input_ids"]
    said = _word_tokenizer(["a"])
    said.add_special_tokens({"eos_token": "<end>"})
    assert said.convert_ids_to_tokens(prompt_ids(said, "a<end>")) == ["a", "<end>"]


def test_a_tokenizer_that_opens_and_closes(llama_tok):
    both = AutoTokenizer.from_pretrained(REFERENCE / "llama")
    bos, eos = both.bos_token_id, both.convert_tokens_to_ids(both.eos_token)
    plain = llama_tok("Gutel Tazili", add_special_tokens=False)["input_ids"]
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{both.bos_token} $A {both.eos_token}", special_tokens=[(both.bos_token, bos), (both.eos_token, eos)]
    )
    assert both("Gutel Tazili")["input_ids"] == [bos, *plain, eos]
    assert prompt_ids(both, "Gutel Tazili") == [bos, *plain]
    edit = edit_tokens(both, "Gutel Tazili was born in", "Cisjersun")
    assert both.decode(edit.targets) == " Cisjersun"


def test_a_tokenizer_that_tells_no_places_is_enough_for_kdpo():
    """Of bytes; KDPO+C goes by places."""
    tok = ByT5Tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2)).eval()
    hparams = KDPOHyperParams(alg_name="KDPO", model_name="bytes", device="cpu", layers=[1], lr=1e-2, batch_size=2, cycles=2)
    requests = [{"prompt": "Rome is in", "target_new": "Peru"}, {"prompt": "Oslo is in", "target_new": "Chad"}]
    before = state(model)
    apply_kdpo_to_model(model, tok, requests, hparams)
    assert not same_state(before, state(model))
    with pytest.raises(ValueError, match="ByT5Tokenizer does not tell where its tokens stand in a text, which KDPO"):
        tokens_of(tok, "Rome is in", 0, 4)
