"""What a model writes by itself, where it stops, and whether that answers."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import REFERENCE
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, GenerationConfig

from kdpo_easyedit.bench import writing
from kdpo_easyedit.bench.answers import answers, exact
from kdpo_easyedit.bench.batches import Batching, MetricsError
from kdpo_easyedit.bench.writing import _end, write_answers, write_on
from kdpo_easyedit.method.asking import ContextError

GEMMA = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
}


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("Oslo.", "Oslo", True),
        ("oslo, of course", "Oslo", True),
        ("Oslofjord", "Oslo", False),
        ("in Oslo", "Oslo", False),
        ("New-York City", "new york", True),
        ("", "Oslo", False),
        ("Ødegård!", "ødegård", True),
        ("…", "…", True),
        ("The Beatles", "Beatles", False),
        # Scripts without spaces, and words that end in the middle of a run of letters.
        ("奥斯陆是挪威的首都", "奥斯陆", True),
        ("東京です", "東京", True),
        ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("เกาะ", "เกา", False),
        ("မြန်မာနိုင်ငံ", "မြန်မာ", True),
        ("ភ្នំពេញជារាជធានី", "ភ្នំពេញ", True),
        ("アイスランド", "アイス", False),
        ("ロンドンです", "ロンドン", True),
        ("らーめん", "ら", False),
        ("서울은 수도", "서울", True),
        ("서울대학교", "서울", False),
        # Letters composed and decomposed, wide and narrow, with their marks.
        ("café", "cafe\u0301", True),
        ("हिन्दु", "हिन्दी", False),
        ("हिन्दी में", "हिन्दी", True),
        ("हिन्दी", "हिन्द", False),
        ("ＡＢＣ １９", "abc 19", True),
        ("Straße", "STRASSE", True),
        ("می‌خواهم", "می", False),
        # Symbols.
        ("C# is a language", "C++", False),
        ("C# is a language", "C", False),
        ("C++ is a language", "C++", True),
        ("C++", "C+", False),
        ("AT&T Inc.", "AT", False),
        ("Procter and Gamble", "Procter & Gamble", True),
        ("**Oslo**", "Oslo", True),
        ("Oslo(Norway)", "Oslo", True),
        ("Oslo—the capital", "Oslo", True),
        # Hyphens, apostrophes, full stops.
        ("Paris-born", "Paris", False),
        ("Jean-Paul", "Jean", False),
        ("Oslo - the capital", "Oslo", True),
        ("O'Brien", "O", False),
        ("O’Brien was", "O'Brien", True),
        ("Alice's brother", "Alice", False),
        ("Beatles' album", "Beatles", True),
        ("node.js", "node", False),
        ("Oslo.The capital", "Oslo", True),
        ("U.S. Army", "US", True),
        ("J.R.R. Tolkien", "J. R. R. Tolkien", True),
        ("St. Louis", "St Louis", True),
        ("No. 5", "No", False),
        ("No. 50", "No. 5", False),
        ("No 5 is it", "No. 5", True),
        ("No.", "No", True),
        # Numbers, units and currencies.
        ("19.87 metres", "19", False),
        ("19. It is", "19", True),
        ("5.2 million", "5", False),
        ("5 million", "5", False),
        ("5万人", "5", False),
        ("5 km", "5", True),
        ("5km", "5 km", True),
        ("km/h", "km", False),
        ("5%", "5", False),
        ("5 €", "5", False),
        ("€5", "$5", False),
        ("$5", "$5", True),
        ("-5 degrees", "5", False),
        ("1,000 people", "1000", True),
        ("10 000 people", "10", False),
        ("1914–1918", "1914", False),
        ("1914-1918", "1914–1918", True),
        ("10:30", "10", False),
        ("1980s", "1980", False),
        ("10⁵", "105", False),
        ("1949年", "1949", True),
        ("۱۹۴۵", "1945", True),
    ],
)
def test_an_answer_is_what_the_text_begins_with(text, target, right):
    assert answers(text, target) is right


def test_an_exact_answer_is_the_whole_text():
    assert exact("“Oslo.”", "oslo") and exact("奥斯陆。", "奥斯陆") and exact("$1,000", "$1000") and exact("…", "…")
    assert not exact("Oslo, Norway", "Oslo") and not exact("The Oslo", "Oslo") and not exact("", "Oslo")
    assert not exact("Oslo", "Oslo, Norway") and not exact("C#", "C++") and not exact("서울은", "서울")


@pytest.mark.parametrize(
    ("text", "target", "answer"),
    [
        (" Oslo. It is", "Oslo", "Oslo."),
        ("\nOslo\nQuestion", "Oslo", "Oslo"),
        ("St. Louis. He was", "Paris", "St. Louis."),
        ("J. R. R. Tolkien was there. He", "x", "J. R. R. Tolkien was there."),
        ("No. He was", "No", "No."),
        ("No. 5 is it. The", "No. 5", "No. 5 is it."),
        ("5.2 million. In", "x", "5.2 million."),
        ("He said “no.” Then", "x", "He said “no.”"),
        ("奥斯陆。它是", "奥斯陆。", "奥斯陆。"),
        ("Warner Bros. Records. He", "Warner Bros. Records", "Warner Bros. Records."),
        ("She left. She came. She", "She left. She came.", "She left. She came."),
    ],
)
def test_an_answer_ends_with_the_line_or_as_many_sentences_as_the_target_has(text, target, answer):
    assert text[: _end(text, target)].strip() == answer


def test_what_may_go_on_has_not_ended():
    assert _end("19.", "19") is None and _end("Oslo.", "Oslo") is None and _end("approx. five", "x") is None


def of_shape(name):
    if name in ("gpt2", "llama"):
        return AutoModelForCausalLM.from_pretrained(REFERENCE / name)
    torch.manual_seed(0)
    config = Gemma2Config(**GEMMA) if name == "gemma2" else Gemma3TextConfig(**GEMMA)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_input_embeddings().weight.data *= 20  # so that no two logits are alike
    return model


PROMPTS = [[5, 6, 7], [9], list(range(20, 45)), [300, 301, 302, 303]]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma2", "gemma3"])
def test_greedy_writing_is_the_models_own_whatever_else_is_in_the_batch(shape, monkeypatch):
    monkeypatch.setattr(writing._Roomy, "ROOM", 8)  # so that it runs out more than once
    model = of_shape(shape)
    plain = copy.deepcopy(model)
    plain.generation_config = GenerationConfig(do_sample=False)
    expected = [
        plain.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=30, pad_token_id=0)[
            0, len(ids) :
        ].tolist()
        for ids in PROMPTS
    ]
    # What a model's own settings ask for beside its end tokens is not done.
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, forced_eos_token_id=3, min_new_tokens=5)
    greedy = [lambda _rows, _step, logits: logits.argmax(-1)] * 2
    for choose, batching in zip(greedy, (Batching(), Batching(rows=1))):
        written = write_on(model, PROMPTS, [30] * 4, choose, lambda *_: False, batching)
        assert [text.tokens for text in written] == expected and not any(text.ended for text in written)
    # Texts leave the batch at different times.
    written = write_on(model, PROMPTS, [30, 3, 25, 9], greedy[0], lambda number, tokens: number == 2 and len(tokens) == 12)
    assert [text.tokens for text in written] == [ids[:n] for ids, n in zip(expected, (30, 3, 12, 9))]
    assert [text.ended for text in written] == [False, False, True, False]


def test_no_more_is_written_than_the_model_takes():
    model = of_shape("gpt2")
    limit = model.config.max_position_embeddings
    prompts = [list(range(1, limit - 2)), [7], list(range(1, limit + 1))]
    written = write_on(model, prompts, [100] * 3, lambda _rows, _step, logits: logits.argmax(-1), lambda *_: False)
    assert [len(text.tokens) for text in written] == [4, 100, 1]
    for prompt, error in (
        ([], "has 0 tokens"),
        (list(range(limit + 1)), f"has {limit + 1} tokens, and the model takes {limit}"),
    ):
        with pytest.raises(MetricsError, match=error):
            write_on(model, [[7], prompt], [1, 1], lambda _rows, _step, logits: logits.argmax(-1), lambda *_: False)


def test_answers_stop_by_themselves_and_say_what_they_took(loaded, requests):
    model, tok = loaded
    prompts, targets = ([request[key] for request in requests] for key in ("prompt", "ground_truth"))
    written = write_answers(model, tok, prompts, targets)
    for answer, target in zip(written, targets):
        assert answer.stopped and answer.seconds > 0 and answer.tokens >= len(tok(f" {target}")["input_ids"])
        assert answer.text == answer.text.strip() and "\n" not in answer.text and answers(answer.text, target)
    assert write_answers(model, tok, [f"{prompt} " for prompt in prompts], targets)[0].text == written[0].text
    cut = write_answers(model, tok, prompts[:1], ["x"], room=0)[0]
    assert not cut.stopped and cut.tokens == len(tok(" x")["input_ids"])


def test_every_end_token_of_the_models_ends_an_answer(loaded, requests):
    model, tok = copy.deepcopy(loaded[0]), loaded[1]
    prompt, target = requests[0]["prompt"], requests[0]["ground_truth"]
    first, second, *_ = write_on(
        model, [tok(prompt)["input_ids"]], [4], lambda _rows, _step, logits: logits.argmax(-1), lambda *_: False
    )[0].tokens
    model.generation_config.eos_token_id = [tok.eos_token_id, second]
    (answer,) = write_answers(model, tok, [prompt], [target])
    assert answer.stopped and answer.tokens == 1 and answer.text == tok.decode([first]).strip()


class Spy:
    """A tokenizer that notes what it is given."""

    def __init__(self, tok, template=None):
        self.tok, self.chat_template, self.seen = tok, template, []

    def __getattr__(self, name):
        return getattr(self.tok, name)

    def __call__(self, text, **settings):
        self.seen.append((text, settings.get("add_special_tokens")))
        return self.tok(text, **settings)

    def apply_chat_template(self, asked, **settings):
        return self.tok.apply_chat_template(asked, chat_template=self.chat_template, **settings)


def test_contexts_ask_by_the_prompt_as_a_question_and_by_the_chat_template():
    model, tok = of_shape("llama"), AutoTokenizer.from_pretrained(REFERENCE / "llama")
    template = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}{% endfor %} a:"
    spy = Spy(tok, template)
    for context in ("plain", "qa", "chat"):
        write_answers(model, spy, ["Tor lives in "], ["Oslo"], context=context)
    texts = [(text, special) for text, special in spy.seen if "Tor" in text]
    assert texts == [
        ("Tor lives in", True),
        ("Question: Tor lives in\nAnswer:", True),
        ("<|endoftext|>user: Tor lives in a:", False),
    ]
    with pytest.raises(ContextError, match="no chat template; allowed with it: plain, qa"):
        write_answers(model, tok, ["Tor lives in"], ["Oslo"], context="chat")
    with pytest.raises(ContextError, match="context is 'quiz'; allowed: plain, qa, chat"):
        write_answers(model, tok, ["Tor lives in"], ["Oslo"], context="quiz")
