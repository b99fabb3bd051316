"""The most memory that a piece of work takes."""

from __future__ import annotations

import gc

import pytest
import torch

from kdpo_easyedit.bench import peak
from kdpo_easyedit.bench.peak import PeakMemory

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_taken_and_given_back_counts_and_what_was_there_does_not(device):
    gc.collect()  # else what earlier tests left may be given back while it is measured
    kept = torch.ones(2**25, device=device)  # 134 MB
    measured = PeakMemory(kept.device)
    if measured.bytes() is None:
        pytest.skip("cannot be measured here")
    for _ in range(3):
        torch.ones(2**24, device=device)  # 67 MB, three times after one another
    assert 2**26 - 2**20 <= measured.bytes() < 2**26 + 2**24
    assert PeakMemory(kept.device).bytes() < 2**24


def test_where_it_cannot_be_measured_there_is_none(tmp_path, monkeypatch):
    assert PeakMemory(torch.device("mps")).bytes() is None
    monkeypatch.setattr(peak, "_PROCESS", tmp_path / "nothing")
    assert PeakMemory(torch.device("cpu")).bytes() is None
