"""Everything is built here: a small world, and the recordings of the paper's implementation that lie beside this file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

# Before the package and torch are imported: nothing is written to the user's cache, and no hub is asked for anything.
os.environ.setdefault("KDPO_CACHE", tempfile.mkdtemp(prefix="kdpo-tests-"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread, here and in the processes that tests start: what is compared to the bit does not depend on how threads share a
# product, models as small as these gain nothing from more, and processes side by side do not wait for one another's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit import KDPOHyperParams
from kdpo_easyedit.bench import datasets
from kdpo_easyedit.bench.schema import Summary
from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit.statistics import build_world
from kdpo_easyedit.models.packed import DEFAULT, MODELS, WIKIPEDIA
from kdpo_easyedit.models.world import Recipe, World

#: Where the models of the tests of the method lie: ``KDPO_TEST_DEVICE=cuda pytest tests/test_parity.py tests/test_kdpo.py …``.
DEVICE = os.environ.get("KDPO_TEST_DEVICE", "cpu")


def real(test: Any) -> Any:
    """For tests on the real model, where its wheels are installed: ``pytest -m real`` runs them alone."""
    return pytest.mark.real(pytest.mark.skipif(missing(), reason="\n".join(missing()))(test))


def missing() -> list[str]:
    """How the wheels of the real model and its text are had, as far as they are not installed."""
    return [wheel.command for wheel in (MODELS[DEFAULT], WIKIPEDIA) if not wheel.is_installed]


REFERENCE = Path(__file__).parent / "reference"
ROOT = Path(__file__).parent.parent

SMALL = Recipe(
    people=20,
    places=12,
    countries=4,
    development=10,
    width=64,
    inner=256,
    vocabulary=1000,
    steps=300,
    rows=16,
    matrix_lr=0.02,
    other_lr=0.01,
)


@pytest.fixture(scope="session")
def small_world() -> World:
    """A world of twenty people, trained in some seconds."""
    return build_world(SMALL, quiet=True)


@pytest.fixture(scope="session")
def requests(small_world):
    """The small world's edits."""
    return datasets.load_requests(small_world.edits)


@pytest.fixture(scope="session")
def loaded(small_world):
    """The small world's model and tokenizer, for tests that leave them as they were."""
    model = AutoModelForCausalLM.from_pretrained(small_world.folder).to(DEVICE)
    return model, AutoTokenizer.from_pretrained(small_world.folder)


@pytest.fixture
def fresh(small_world):
    """The small world's model and tokenizer, for tests that change them."""
    model = AutoModelForCausalLM.from_pretrained(small_world.folder).to(DEVICE)
    return model, AutoTokenizer.from_pretrained(small_world.folder)


@pytest.fixture
def hparams(small_world) -> KDPOHyperParams:
    """KDPO for the small world."""
    return KDPOHyperParams(alg_name="KDPO", model_name=str(small_world.folder), device=DEVICE, layers=[3], lr=3e-3)


@pytest.fixture
def aware(hparams, small_world) -> KDPOHyperParams:
    """KDPO+C for the small world."""
    file = next(small_world.statistics.rglob("transformer.h.3.mlp.c_proj_*.npz"))
    return replace(
        hparams,
        mom2_adjustment=True,
        mom2_dataset="world",
        mom2_n_samples=int(file.stem.rpartition("_")[2]),
        stats_dir=str(small_world.statistics),
    )


def state(model) -> dict[str, torch.Tensor]:
    """A copy of a model's weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


#: A summary's costs, which differ from run to run, as none.
COSTS = {"seconds_per_edit": 0, "megabytes_per_edit": 0, "once_seconds": 0, "tokens_per_second": 0}


def uncosted(row: Summary | dict[str, Any]) -> dict[str, Any]:
    """A summary, or its JSON, without its costs."""
    found = asdict(row) if isinstance(row, Summary) else row
    return found | COSTS | {"intervals": {key: ends for key, ends in found["intervals"].items() if key not in COSTS}}


def interrupt_second_write(monkeypatch) -> list[torch.Tensor]:
    """Let Ctrl-C come at the second write into a parameter; returns the parameters written to, as they come."""
    copy_ = torch.Tensor.copy_
    written = []

    def interrupted(self, *args, **kwargs):
        written.append(self)
        if len(written) == 2:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Parameter, "copy_", interrupted, raising=False)
    return written


def on_main() -> bool:
    """Whether the host is EasyEdit's main branch."""
    return not host.IS_RELEASE
