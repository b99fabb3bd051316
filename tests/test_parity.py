"""The paper's released implementation, recorded, against ours: negatives, every loss, and the weight's change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, REFERENCE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import KDPOHyperParams, execute_kdpo
from kdpo_easyedit.method.config import translate_release
from kdpo_easyedit.method.weights import read, write

RECORDINGS = sorted((REFERENCE / "recordings").glob("*.json"))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recording_is_reproduced(path: Path) -> None:
    recording = json.loads(path.read_text())
    changes = load_file(path.with_suffix(".safetensors"))
    folder = REFERENCE / recording["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    tok = AutoTokenizer.from_pretrained(folder)
    config = {**recording["hparams"], "alg_name": "KDPO", "model_name": str(folder), "device": DEVICE}
    hparams = KDPOHyperParams(
        **translate_release(config),
        # The sequential recording's lr is the undivided one, and the release applies each update twice.
        sequential_edit=recording["sequential"],
        update_scale=2.0 if recording["sequential"] else 1.0,
    )
    names = list(hparams.edited_parameters(model))
    for number, edit in enumerate(recording["edits"]):
        before = {name: weight.clone() for name, weight in read(model, names).items()}
        weights, trace = execute_kdpo(model, tok, edit["request"], hparams)

        assert sorted(weights) == sorted(edit["changed"])
        # The release also predicts the token after the target, and takes it along in its negatives.
        length = len(trace.negatives[0])
        assert trace.negatives == [negatives[:length] for negatives in edit["negatives"]]
        assert [len(losses) for losses in trace.losses] == [len(losses) for losses in edit["losses"]]
        for ours, theirs in zip(trace.losses, edit["losses"]):
            assert ours == pytest.approx(theirs, abs=1e-5)
        assert trace.final_token_accuracy == pytest.approx(edit["scores"][-1][0])
        assert trace.steps == sum(len(losses) for losses in edit["losses"])
        for name, weight in weights.items():
            change = changes[f"{number}/{name}"]
            error = ((weight - before[name]).cpu() - change).norm() / change.norm()
            assert error < 1e-3
        if recording["sequential"]:
            write(model, weights)


def test_all_recordings_are_here() -> None:
    assert len(RECORDINGS) == 6
