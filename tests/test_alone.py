"""The method and files of edits where nothing but torch and transformers is, and what importing the package leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from conftest import REFERENCE, ROOT

ABSENT = ("easyeditor", "nltk", "scipy", "matplotlib", "rich", "peft", "datasets")

# Packages that are missing, whoever asks for them.
WITHOUT = f"""
import importlib.machinery, sys
find_spec = importlib.machinery.PathFinder.find_spec

def find_no_absent(name, *args, **kwargs):
    return None if name.partition(".")[0] in {ABSENT!r} else find_spec(name, *args, **kwargs)

importlib.machinery.PathFinder.find_spec = find_no_absent
"""


def run(script: str, tmp_path: Path, **environment: str) -> str:
    """What a script prints in a process of its own, which must end well."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("EASYEDIT_HOME", "CUDA_LAUNCH_BLOCKING")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_edits_are_made_saved_applied_and_taken_back_alone(tmp_path):
    script = f"""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from kdpo_easyedit import (
            KDPOHyperParams, apply_edits, apply_kdpo_to_model, execute_kdpo, edits_applied, revert_edits, save_edits,
        )
        folder = {str(REFERENCE / "llama")!r}
        load = lambda: AutoModelForCausalLM.from_pretrained(folder)
        model, tok = load(), AutoTokenizer.from_pretrained(folder)
        hparams = KDPOHyperParams(alg_name="KDPO", model_name=folder, device="cpu", layers=[2], lr=1e-2)
        request = {{"prompt": "Gutel Tazili works as a", "target_new": "pilot"}}
        weights, trace = execute_kdpo(model, tok, request, hparams)
        model, originals = apply_kdpo_to_model(model, tok, [request], hparams, return_orig_weights=True)
        (name,) = weights
        assert torch.equal(weights[name], model.get_parameter(name)) and trace.final_token_accuracy == 1
        save_edits("edit.safetensors", model, originals, [request], hparams)
        other = load()
        before = other.get_parameter(name).clone()
        apply_edits(other, "edit.safetensors")
        assert torch.equal(other.get_parameter(name), model.get_parameter(name)) and not torch.equal(before, weights[name])
        revert_edits(other, "edit.safetensors")
        assert torch.equal(other.get_parameter(name), before)
        assert not [m for m in sys.modules if m.partition(".")[0] in {ABSENT!r}]
        print("done")
    """
    assert "done" in run(WITHOUT + textwrap.dedent(script), tmp_path)


GLOBALS = """
import logging, os, random, sys
import numpy as np
import torch
import transformers

def everything():
    '''What belongs to the whole process, and not to a package.'''
    return {
        "environment": dict(os.environ),
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.random.get_rng_state().tolist(),
        "root": [[repr(h) for h in logging.getLogger().handlers], logging.getLogger().level, logging.root.disabled],
        "ours": [[repr(h) for h in logging.getLogger("kdpo_easyedit").handlers], logging.getLogger("kdpo_easyedit").level],
        "transformers": [repr(h) for h in logging.getLogger("transformers").handlers],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "determinism": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled],
        "hooks": [sys.excepthook, sys.displayhook],
        "folder": os.getcwd(),
        "argv": list(sys.argv),
    }

random.seed(5), np.random.seed(6), torch.manual_seed(7)
random.random(), np.random.rand(), torch.rand(1)
before = everything()
import MODULE
after = everything()
assert before == after, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
print("done", [m for m in ("easyeditor", "nltk", "matplotlib") if m in sys.modules])
"""


def test_importing_the_package_leaves_the_process_as_it_was(tmp_path):
    assert "done []" in run(GLOBALS.replace("MODULE", "kdpo_easyedit"), tmp_path)


def test_importing_the_host_leaves_the_process_as_it_was(tmp_path):
    """Whichever of the two it is."""
    home = {key: os.environ[key] for key in ("EASYEDIT_HOME",) if key in os.environ}
    assert "done ['easyeditor'" in run(GLOBALS.replace("MODULE", "kdpo_easyedit.easyedit"), tmp_path, **home)
