"""The measuring engine: EasyEdit's figures, prompt by prompt, whatever a prompt shares its batch with."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import REFERENCE
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from kdpo_easyedit.bench import datasets, metrics
from kdpo_easyedit.bench.ability import read
from kdpo_easyedit.bench.batches import Batching, in_batches
from kdpo_easyedit.bench.metrics import (
    harmonic_score,
    measure,
    ngram_entropy,
    probe,
    rephrasings,
    teacher_forced,
    with_locality,
    written_for_fluency,
)
from kdpo_easyedit.bench.metrics_benchmark import benchmark_metrics, whole_words
from kdpo_easyedit.cli.benchmark import print_metrics
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.loading import ModelName
from kdpo_easyedit.easyedit.measuring import edit_quality
from kdpo_easyedit.method.preference import prompt_ids

# One or two small records of every layout.
LAYOUTS = {
    "knowedit": [
        {
            "subject": "Mara Vell",
            "prompt": "Which family does Mara Vell belong to?",
            "target_new": "Noctuidae of the north",
            "ground_truth": ["Aspidae"],
            "rephrase_prompt": "What family is Mara Vell of, as far as anybody knows?",
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "Mara Vell rank", "ground_truth": ["genus"]},
                    {"prompt": "The rank that Mara Vell was given in the year 1832 is", "ground_truth": [["species", "kind"]]},
                ],
                "Forgetfulness": [{"prompt": "Mara Vell works as a", "ground_truth": ["singer"]}],
            },
            "portability": {
                "Reasoning": [{"prompt": "What is the common name of her family?", "ground_truth": "Owlet moths"}],
                "Subject_Aliasing": [{"prompt": "Vell belongs to", "ground_truth": "Noctuidae"}],
            },
        },
        {
            "subject": "Tor",
            "prompt": "Tor lives in",
            "target_new": "Oslo",
            "ground_truth": "Bergen",
            "locality": {},
            "portability": {},
        },
    ],
    "wikibio": [
        {
            "text": "This is a passage about tor arne. Tor Arne was a doctor.",
            "labels": "In 1852, he went to Oslo (Norway), and began to practise.",
            "concept": "tor arne",
            "locality": {"Relation_Specificity": [{"prompt": "The country of tor arne is", "ground_truth": ["Norway"]}]},
        }
    ],
    "zsre_mend": [
        {
            "subject": "Charity Creek",
            "src": "Which river system contains Charity Creek?",
            "rephrase": "What river system is Charity Creek in?",
            "alt": "Chichester River",
            "answers": ["Parramatta River"],
            "loc": "nq question: how many parts are there",
            "loc_ans": "12",
        }
    ],
    "counterfact_rome": [
        {
            "requested_rewrite": {
                "prompt": "{} speaks",
                "subject": "Mara Vell",
                "target_new": {"str": "French"},
                "target_true": {"str": "Dutch"},
            },
            "paraphrase_prompts": ["It rained. Mara Vell speaks the language"],
            "neighborhood_prompts": ["Tor speaks", "The mother tongue of Arne Holm is"],
        }
    ],
    "flat": [
        {
            "prompt": "Reed Glacier is in",
            "target_new": "Asia",
            "subject": "Reed Glacier",
            "ground_truth": "Europe",
            "rephrase_prompt": "Snow fell. Reed Glacier is located in the continent",
            "locality_prompt": "Mount Ember, in",
            "locality_ground_truth": "Antarctica",
        }
    ],
}


@pytest.fixture(scope="module", params=["llama", "gpt2", "world"])
def pair(request, small_world):
    """A model and its tokenizer: with a BOS token, and without one on two tokenizers."""
    folder = small_world.folder if request.param == "world" else REFERENCE / request.param
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama():
    return AutoModelForCausalLM.from_pretrained(REFERENCE / "llama"), AutoTokenizer.from_pretrained(REFERENCE / "llama")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The requests of every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    requests = []
    for name, records in LAYOUTS.items():
        (folder / name).write_text(json.dumps(records))
        requests += datasets.load_requests(folder / name, name)
    return requests


def by_easyedit(model, tok, request, **settings):
    """EasyEdit's metrics, without what main notes beside them, and in Python's own numbers."""
    hparams = SimpleNamespace(alg_name="KDPO", max_length=30, device="cpu", **settings)
    editor = SimpleNamespace(hparams=hparams, tok=tok, model_name=ModelName("model", model.config.model_type))
    found = edit_quality(editor, model, request, fluency=False)
    found.pop("metric_meta", None)
    return json.loads(json.dumps(found, default=float))


def each_alone(model, tok, request):
    """The same, with every prompt of a kind asked by itself, so that none is padded."""
    found = by_easyedit(model, tok, {**request, "locality": {}, "portability": {}})
    for section in ("locality", "portability"):
        for kind, asked in request[section].items():
            for prompt, answer in zip(asked["prompt"], asked["ground_truth"]):
                alone = {kind: {"prompt": prompt, "ground_truth": answer}}
                for name, value in by_easyedit(model, tok, {**request, section: alone})[section].items():
                    if name.startswith(kind):
                        found[section].setdefault(name, []).extend(value)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_figures_are_easyedits_on_every_layout(pair, layouts, requests, side):
    model, tok = pair[0], copy.deepcopy(pair[1])
    tok.padding_side = side
    every = [*layouts, *requests[:4]]
    assert measure(model, tok, every, fluency=False) == [each_alone(model, tok, request) for request in every]


def test_lists_of_prompts_too_where_positions_are_relative(llama, layouts):
    model, tok = llama
    assert measure(model, tok, layouts, fluency=False) == [by_easyedit(model, tok, request) for request in layouts]


def test_a_prompt_does_not_hang_on_its_batch(pair, layouts, monkeypatch):
    monkeypatch.setattr(metrics, "FLUENCY_TOKENS", 30)
    model, tok = pair
    together = measure(model, tok, layouts, seed=3)
    alone = [measure(model, tok, [request], seed=3, batching=Batching(tokens=1, rows=1))[0] for request in layouts]
    assert together == alone and all(found["fluency"]["ngram_entropy"] > 1 for found in together)
    assert [found["fluency"] for found in measure(model, tok, layouts, seed=4)] != [found["fluency"] for found in together]


def test_a_list_of_rephrasings_has_a_score_each(llama, layouts):
    model, tok = llama
    request = {**layouts[0], "rephrase_prompt": ["Mara Vell is of the family", "Vell's family:", "Family?"]}
    single = [
        measure(model, tok, [{**request, "rephrase_prompt": one}], fluency=False)[0] for one in request["rephrase_prompt"]
    ]
    assert measure(model, tok, [request], fluency=False)[0]["rephrase_acc"] == [found["rephrase_acc"][0] for found in single]


def test_locality_is_the_share_of_tokens_said_as_before():
    pre = {"locality": {"a_output": [[1, 2, 3, 4], [5]], "b_output": [[6, 7]]}, "rewrite_acc": [0.0]}
    post = {"locality": {"a_output": [[1, 2, 9, 4], [8]], "b_output": [[6, 7]]}, "rewrite_acc": [1.0]}
    found = with_locality(pre, post)
    assert found["locality"] == {**post["locality"], "a_acc": [0.75, 0.0], "b_acc": [1.0]} and found["rewrite_acc"] == [1.0]
    assert "a_acc" not in post["locality"]
    with pytest.raises(ValueError, match="zip"):
        with_locality({"locality": {"a_output": [[1]], "b_output": [[6, 7]]}}, post)


def test_a_tokenizer_that_appends_an_end_token_is_measured_and_continued_before_it(layouts):
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "gpt2")
    tok, appending = (AutoTokenizer.from_pretrained(REFERENCE / "gpt2") for _ in range(2))
    end = tok.eos_token
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tok.eos_token_id)]
    )
    assert appending("Oslo")["input_ids"] == [*tok("Oslo")["input_ids"], tok.eos_token_id]
    assert prompt_ids(appending, "Oslo") == tok("Oslo")["input_ids"]
    assert measure(model, appending, layouts) == measure(model, tok, layouts)
    texts = ["The parliament meets in Oslo.", "Ada is a pilot."]
    assert read(model, appending, texts).perplexity == read(model, tok, texts).perplexity


def test_a_begin_token_is_kept_and_is_all_of_an_empty_prompt(llama):
    tok = llama[1]
    assert prompt_ids(tok, "Oslo") == tok("Oslo")["input_ids"] and prompt_ids(tok, "") == [tok.bos_token_id]


def test_probabilities_are_the_models_own_through_scaling_and_capping():
    torch.manual_seed(0)
    tok = AutoTokenizer.from_pretrained(REFERENCE / "gpt2")
    config = Gemma2Config(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=3.0,
        sliding_window=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data *= 60
    pairs = [("Tor lives in", "Oslo and Bergen"), ("Snow fell. Reed Glacier is in the", "north"), ("Mara", "Vell")]
    for (prompt, answer), said in zip(pairs, teacher_forced(model, tok, pairs)):
        ids, length = tok(f"{prompt} {answer}", return_tensors="pt")["input_ids"], len(tok(prompt)["input_ids"])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].log_softmax(-1)[length - 1 : -1]
        own = log_probabilities.gather(-1, ids[0, length:, None]).mean().item()
        assert said.log_probability == pytest.approx(own, abs=1e-5) and said.targets == ids[0, length:].tolist()
        assert said.tokens == log_probabilities.argmax(-1).tolist()


def test_new_answers_are_held_against_old_ones(llama, layouts):
    model, tok = llama
    request = next(request for request in layouts if request["prompt"] == "Mara Vell speaks")
    (found,) = measure(model, tok, [request], fluency=False, old_answers=True)

    def probability(prompt, answer):
        return math.exp(teacher_forced(model, tok, [(prompt, answer)])[0].log_probability)

    scores = found["probabilities"]
    expected = probability(request["prompt"], "French") - probability(request["prompt"], "Dutch")
    assert scores["success"]["magnitudes"] == [pytest.approx(expected, abs=1e-6)]
    assert scores["success"]["scores"] == [float(expected > 0)]
    neighbours = request["locality"]["neighborhood"]["prompt"]
    expected = [probability(prompt, "Dutch") - probability(prompt, "French") for prompt in neighbours]
    assert scores["neighborhood"]["magnitudes"] == pytest.approx(expected, abs=1e-6) and len(neighbours) == 2
    assert len(scores["paraphrase"]["scores"]) == 1
    unknown = {**request, "ground_truth": None}
    assert "probabilities" not in measure(model, tok, [unknown], fluency=False, old_answers=True)[0]
    assert harmonic_score([1, 0.5, 0.5]) == pytest.approx(0.6) and harmonic_score([1, 0, 1]) == 0


def test_probes_hold_the_new_answer_against_the_old_one_denied_and_claimed(llama, layouts):
    model, tok = llama
    request = next(request for request in layouts if request["prompt"] == "Mara Vell speaks")

    def probability(prompt, answer):
        return teacher_forced(model, tok, [(prompt, answer)])[0].log_probability

    denied = "The following is false: Mara Vell speaks"
    claims = [f"Mara Vell speaks {answer}\nTrue or false? Answer:" for answer in ("French", "Dutch")]
    expected = {
        "negation": float(probability(denied, "Dutch") > probability(denied, "French")),
        "contradiction": float(all(probability(claim, "True") > probability(claim, "False") for claim in claims)),
    }
    swapped = {**request, "target_new": "Dutch", "ground_truth": "French"}
    found = probe(model, tok, [{**request, "ground_truth": None}, request, swapped])
    assert found[:2] == [{}, expected]
    assert found[2] == {"negation": 1 - expected["negation"], "contradiction": expected["contradiction"]}


@pytest.mark.parametrize(
    "text", ["", "one", "The end. The end. The end, they said.", "a b a b a b c", "Don't go – it's 5 p.m. (or later)!"]
)
def test_fluency_of_a_text_is_easyedits(text):
    utils = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    assert ngram_entropy(text) == pytest.approx(utils.n_gram_entropy([text]), abs=1e-12)


def test_fluency_is_of_what_is_written_and_not_of_the_prompt(pair):
    model, tok = pair
    limit = model.config.max_position_embeddings
    prompt = "Tor lives in"
    long = " ".join(["and"] * (limit * 3))
    while len(tok(long)["input_ids"]) > limit - 30:
        long = long.rpartition(" ")[0]
    short, rest = written_for_fluency(model, tok, [prompt, long])
    assert not short.startswith(prompt) and "and and and" not in rest[:11]
    assert rest and len(tok(short)["input_ids"]) > len(tok(rest)["input_ids"])


def test_every_text_has_random_numbers_of_its_own(llama):
    model, tok = llama
    prompts = ["Tor lives in", "Mara Vell works as a", "Tor"]
    texts = written_for_fluency(model, tok, prompts)
    assert written_for_fluency(model, tok, prompts[::-1]) == texts[::-1] and len(set(texts)) == 3
    # Drawn from the five likeliest, in proportion: the first token of many seeds.
    ids = torch.tensor([prompt_ids(tok, prompts[0])])
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].topk(5)
    wanted = likeliest.values.softmax(-1)
    draws = torch.cat([metrics._uniforms(prompts[0], seed)[:1] for seed in range(2000)])
    found = torch.bincount((wanted.cumsum(-1)[:-1] < draws[:, None]).sum(-1), minlength=5) / 2000
    assert found == pytest.approx(wanted, abs=0.04)


class Wrapper:
    """Wraps a model as a method does that decides by one token whether an edit is asked for."""

    def __init__(self, model):
        self.model, self.decided, self.calls = model, [], []

    def __call__(self, **inputs):
        self.calls.append(tuple(inputs["input_ids"].shape))
        return self.model(**inputs)

    def decide_at(self, token):
        self.decided.append(token)


def test_wrappers_go_one_by_one_and_are_told_where_to_decide(llama, layouts):
    model, tok = llama
    wrapper = Wrapper(model)
    batching = Batching(one_by_one=True, decide_at=Wrapper.decide_at)
    (found,) = measure(wrapper, tok, layouts[:1], fluency=False, batching=batching)
    assert found == measure(model, tok, layouts[:1], fluency=False)[0]
    assert all(rows == 1 for rows, _ in wrapper.calls) and len(wrapper.calls) == 7
    assert len(tok(layouts[0]["prompt"])["input_ids"]) - 1 in wrapper.decided
    texts = written_for_fluency(wrapper, tok, ["Tor lives in", "Mara"], batching=batching)
    assert wrapper.decided[-2:] == [-1, -1] and texts == written_for_fluency(model, tok, ["Tor lives in", "Mara"])


def test_a_batch_that_does_not_fit_is_halved():
    ran = []

    def run(batch):
        ran.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return [item * 10 for item in batch]

    assert in_batches(run, [3, 9, 1, 2, 8], tokens=100) == [0, 10, 20, 30, 40] and ran == [5, 2, 3, 1, 2]
    ran.clear()
    assert in_batches(run, [3, 9, 1, 2, 8], tokens=9) == [0, 10, 20, 30, 40] and ran == [1, 1, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()), [1])


def test_the_model_is_left_as_it_was(llama, layouts):
    model, tok = llama
    side = tok.padding_side
    measure(model, tok, layouts[:2])
    assert not any("forward" in vars(module) for module in model.modules()) and tok.padding_side == side


def test_the_benchmark_times_both_and_compares_them(llama, layouts, capsys):
    model, tok = llama[0], copy.deepcopy(llama[1])
    several = {**layouts[0], "rephrase_prompt": ["Mara Vell is of the family", "Vell's family:"]}
    result = benchmark_metrics(model, tok, [several, layouts[1]])
    assert (result.edits, result.figures, result.differing) == (2, 9, []) and result.forced.ratio > 0
    assert result.everything is not None and result.everything.ratio > 0 and min(result.fluency) > 1
    print_metrics(result, Console(width=120))
    assert "equal, prompt by prompt: 9 of 9" in capsys.readouterr().out


def test_the_benchmark_runs_on_random_weights_of_a_shape_without_any_file(capsys):
    main(["benchmark", "--metrics", "--shape", "tiny", "--size", "2"])
    printed = capsys.readouterr().out
    assert "tiny, 3 million parameters, float32 on cpu" in printed and "all metrics" in printed
    found = re.search(r"equal, prompt by prompt: (\d+) of (\d+)", printed)
    assert found and found[1] == found[2] and int(found[2]) > 15


def test_whole_words_are_tokens_for_every_text_of_the_edits(layouts):
    tok = whole_words(layouts, 5000)
    assert len(tok) == 5000
    for text in (layouts[0]["prompt"], layouts[3]["target_new"], rephrasings(layouts[-1])[0]):
        ids = tok(text)["input_ids"]
        assert ids[0] == tok.bos_token_id and tok.unk_token_id not in ids
        assert tok.decode(ids, skip_special_tokens=True).split() == re.findall(r"\w+|[^\w\s]", text)
