"""A model on a device without float64, and one spread over two devices, edited as on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import REFERENCE, ROOT

SCRIPT = """
import logging, sys, warnings
from dataclasses import replace

import torch
from far_device import Far, FarDevice, spread
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import KDPOHyperParams, apply_kdpo_to_model, execute_kdpo
from kdpo_easyedit.method import config, kdpo_c

folder = sys.argv[1]
above = lambda name: name in ("model.norm", "lm_head") or name.startswith(("model.layers.2", "model.layers.3"))
places = {"all": lambda name: True, "above": above, "below": lambda name: not above(name)}
tok = AutoTokenizer.from_pretrained(folder)
request = {"prompt": "Gutel Tazili works as a", "target_new": "pilot"}
hparams = KDPOHyperParams(alg_name="KDPO", model_name=folder, device="cpu", layers=[1, 2], lr=1e-2, norm_constraint=0.1)
kinds = {
    "KDPO": hparams,
    "the DPO ablation": replace(hparams, negatives="autoregressive"),
    "KDPO+C": replace(hparams, norm_constraint=False, mom2_adjustment=True, sequential_edit=True),
    "twice its update": replace(hparams, update_scale=2.0),
}

# A far parameter is of another type; and statistics are nobody's but this test's.
config._dense_weight = lambda name, module: module._parameters["weight"]
width = AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size
moment = torch.diag(torch.linspace(1, 3, width, dtype=torch.float64))
kdpo_c._ordinary = lambda model, tok, names, hparams: {name: kdpo_c.Usage.of(moment, 0.01, 0.01) for name in names}

# The device refuses what Metal refuses, and what CUDA does.
with FarDevice():
    far = torch.ones(2, device="far:0")
    made = lambda: torch.ones(2, dtype=torch.float64, device="far:0")
    for wrong in (lambda: far.double(), lambda: far + torch.ones(2), made):
        try:
            wrong()
        except (TypeError, RuntimeError):
            continue
        raise AssertionError(wrong)

logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("kdpo_easyedit").addHandler(handler)
for kind, settings in kinds.items():
    expected, told = execute_kdpo(AutoModelForCausalLM.from_pretrained(folder), tok, request, settings)
    for is_far in places.values() if kind in ("KDPO", "KDPO+C") else [places["above"]]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        spread(model, is_far)
        with FarDevice():
            weights, trace = execute_kdpo(model, tok, request, settings)
            traces = []
            _, originals = apply_kdpo_to_model(model, tok, [request], settings, return_orig_weights=True, traces=traces)
        assert trace.negatives == told.negatives == traces[0].negatives, kind
        assert trace.ended == told.ended and trace.final_token_accuracy == told.final_token_accuracy, kind
        for ours, theirs in zip(trace.losses, told.losses, strict=True):
            assert all(abs(a - b) < 1e-4 for a, b in zip(ours, theirs, strict=True)), kind
        for name, weight in weights.items():
            there = is_far(name.removesuffix(".weight"))
            assert isinstance(weight, Far) == isinstance(originals[name], Far) == there, (kind, name)
            found = weight.inner if isinstance(weight, Far) else weight
            assert (found - expected[name]).norm() < 1e-3 * expected[name].norm(), (kind, name)
assert not logged, logged  # the layers below W were not run again
print("done")
"""


def test_edits_are_those_of_the_cpu():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(REFERENCE / "llama")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
