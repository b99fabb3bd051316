"""Tokens and the loss, against forms written out at length."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import REFERENCE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdpo_easyedit.method.preference import (
    edit_tokens,
    pair_margin,
    preference_loss,
    runners_up,
    sequence_margin,
    subject_span,
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


@pytest.mark.parametrize("subject", [None, "", "Gutel Tazili"])
def test_a_subject_that_is_not_in_the_prompt_is_told(subject):
    with pytest.raises(ValueError, match=r"subject is .*positions is not .all."):
        subject_span({"prompt": "The sky is", "subject": subject})
