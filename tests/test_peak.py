"""The most memory that a piece of work takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kdpo_easyedit.bench import peak
from kdpo_easyedit.bench.peak import PeakMemory

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# In a process of its own: on the CPU it is the process that is measured, and what earlier tests left behind, threads among it,
# takes and gives back memory whenever it likes.
MEASURED = """
import json, sys, torch
from kdpo_easyedit.bench.peak import PeakMemory
kept = torch.ones(2**25, device=sys.argv[1])  # 134 MB
measured = PeakMemory(kept.device)
for _ in range(3):
    torch.ones(2**24, device=sys.argv[1])  # 67 MB, three times after one another
print(json.dumps([measured.bytes(), PeakMemory(kept.device).bytes()]))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_taken_and_given_back_counts_and_what_was_there_does_not(device):
    done = subprocess.run([sys.executable, "-c", MEASURED, device], capture_output=True, text=True, check=True)
    taken, again = json.loads(done.stdout)
    if taken is None:
        pytest.skip("cannot be measured here")
    assert 2**26 - 2**20 <= taken < 2**26 + 2**24
    assert again < 2**24


def test_where_it_cannot_be_measured_there_is_none(tmp_path, monkeypatch):
    assert PeakMemory(torch.device("mps")).bytes() is None
    monkeypatch.setattr(peak, "_PROCESS", tmp_path / "nothing")
    assert PeakMemory(torch.device("cpu")).bytes() is None
