"""One edit by hand: what it shows is what the model says, and the model is as it was afterwards."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import same_state, state
from rich.console import Console

from kdpo_easyedit import apply_edits
from kdpo_easyedit.bench.by_hand import Said, edit_by_hand, in_full
from kdpo_easyedit.bench.datasets import DatasetError
from kdpo_easyedit.bench.protocols import Method
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.easyedit.host import HostError
from kdpo_easyedit.easyedit.hparams import load_hparams, set_dtype
from kdpo_easyedit.method.kdpo import execute_kdpo
from kdpo_easyedit.report.by_hand import print_by_hand


@pytest.fixture(scope="module")
def record(requests):
    """Three questions of the first edit."""
    request = requests[0]
    locality = request["locality"]["Relation_Specificity"]["prompt"][0]
    keys = ("prompt", "target_new", "rephrase_prompt", "subject")
    return {key: request[key] for key in keys} | {"locality_prompt": locality}


def written(model, tok, prompts, record) -> dict[str, str]:
    answers = write_answers(model, tok, list(prompts.values()), [record["target_new"]] * len(prompts))
    return {key: answer.text for key, answer in zip(prompts, answers)}


def likelihood(model, tok, record) -> float:
    """The probability of the target, token by token, each with a forward pass of its own."""
    ids = tok(f"{record['prompt']} {record['target_new']}", return_tensors="pt")["input_ids"]
    product = 1.0
    for end in range(len(tok(record["prompt"])["input_ids"]), ids.shape[1]):
        with torch.no_grad():
            product *= model(ids[:, :end]).logits[0, -1].double().softmax(-1)[ids[0, end]].item()
    return product


def test_texts_probabilities_and_steps_are_the_models_own_and_the_edit_is_kept(fresh, record, hparams, tmp_path):
    model, tok = fresh
    before = state(model)
    file = tmp_path / "one.safetensors"
    _, trace = execute_kdpo(model, tok, record, hparams)
    hparams.model_name = fresh
    said, after = edit_by_hand([Method("KDPO", hparams)], record, save_edits=file)
    assert same_state(before, state(model)) and [path.name for path in tmp_path.iterdir()] == [file.name]
    prompts = {key: record[key] for key in ("prompt", "rephrase_prompt", "locality_prompt")}
    assert said.texts == written(model, tok, prompts, record)
    assert said.probability == pytest.approx(likelihood(model, tok, record), rel=1e-4) and said.seconds is None
    assert {key: after.trace[key] for key in trace.to_dict()} == trace.to_dict() and after.seconds > 0

    apply_edits(model, file)
    assert after.texts == written(model, tok, prompts, record)
    assert after.texts["prompt"].startswith(record["target_new"])
    assert after.probability == pytest.approx(likelihood(model, tok, record), rel=1e-4) and after.probability > 0.3


def test_every_method_edits_the_original_model(fresh, record, hparams, small_world):
    model, _ = fresh
    before = state(model)
    rome = load_hparams("ROME", "world")
    rome.stats_dir = str(small_world.statistics)
    hparams.model_name = rome.model_name = fresh
    both = edit_by_hand([Method("ROME", rome), Method("KDPO", hparams)], record)
    (_, alone) = edit_by_hand([Method("KDPO", hparams)], record)
    assert same_state(before, state(model))
    assert (both[2].texts, both[2].probability) == (alone.texts, alone.probability)
    assert both[2].trace["losses"] == alone.trace["losses"]
    assert both[1].texts != both[0].texts and "steps" not in both[1].trace


def test_methods_edit_models_in_bfloat16(fresh, record, hparams, small_world):
    methods = [Method(name, load_hparams(name, "world")) for name in ("KDPO", "FT", "ROME")]
    for method in methods:
        set_dtype(method.hparams, "bfloat16")
        method.hparams.model_name = str(small_world.folder)
        if hasattr(method.hparams, "stats_dir"):
            method.hparams.stats_dir = str(small_world.statistics)
    before, *after = edit_by_hand(methods, record)
    for one in after:
        assert one.probability > 10 * before.probability, one.name


def test_an_edit_that_float16_has_no_room_for_is_told(fresh, record):
    """FT's Adam divides by a number that float16 does not have."""
    model, _ = fresh
    model.half()
    fine_tuning = load_hparams("FT", "world")
    fine_tuning.model_name = fresh
    set_dtype(fine_tuning, "float16")
    before = state(model)
    with pytest.raises(HostError, match=r"FT could not edit .*, of torch.float16, that are not finite: .*dtype: bfloat16"):
        edit_by_hand([Method("FT", fine_tuning)], record)
    assert same_state(before, state(model))


def test_what_the_model_has_no_room_for_is_told_by_its_field(fresh, record, hparams):
    hparams.model_name = fresh
    with pytest.raises(DatasetError, match=r"^locality_prompt and target_new have \d+ tokens, and the model takes 256"):
        edit_by_hand([Method("KDPO", hparams)], record | {"locality_prompt": "word " * 300})


def test_braces_are_the_subjects_place_in_every_prompt(fresh, hparams):
    hparams.model_name = fresh
    record = {"prompt": "{} was born in", "subject": "Ada", "target_new": "Oslo", "locality_prompt": "{} works for "}
    assert in_full(record) == record | {"prompt": "Ada was born in", "locality_prompt": "Ada works for"}
    said, _ = edit_by_hand([Method("KDPO", hparams)], record)
    assert said == edit_by_hand([Method("KDPO", hparams)], in_full(record))[0]
    for broken, message in (("{} and {}", "there are 2 of them"), ("The \udcff is", "half a surrogate pair")):
        with pytest.raises(DatasetError, match=f"^locality_prompt is .*{message}"):
            edit_by_hand([Method("KDPO", hparams)], record | {"locality_prompt": broken})


def test_it_is_printed_within_eighty_columns(record):
    trace = {"steps": 12, "losses": [[0.7] * 8, [0.1] * 4, []], "ended": "the target is said"}
    texts = dict.fromkeys(("prompt", "rephrase_prompt", "locality_prompt"), "Oslo [bold] " * 20)
    found = [
        Said("(before)", texts, 1.2345e-7, None, {}),
        Said("KDPO", texts | {"prompt": ""}, 0.98765, 0.031, trace),
        Said("ROME", texts, 0.5, 1.5, {"final_token_accuracy": 1.0}),
    ]
    console = Console(file=io.StringIO(), width=80)
    print_by_hand(record, found, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "[bold]" in text and "(nothing)" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["(before)", "1.2e-05 %", "–", "–", "–", "–"],
        ["KDPO", "98.77 %", "12", "2", "0.03", "the target is said"],
        ["ROME", "50.00 %", "–", "–", "1.50", "–"],
    ]
