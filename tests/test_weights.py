"""What tells one state of a weight from another."""

from __future__ import annotations

import pytest
import torch

from kdpo_easyedit.method.weights import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (1, 1)], ids=str)
def test_one_changed_number_changes_the_sum_and_its_return_the_sum_as_well(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, kept = checksum(weight), weight.clone()
    for place in range(weight.numel()):
        weight.view(-1)[place] = -weight.view(-1)[place]
        assert checksum(weight) != before
        weight.copy_(kept)
        assert checksum(weight) == before
    assert checksum(torch.nn.Parameter(weight)) == checksum(weight.clone()) == before


def test_the_layout_in_memory_is_no_matter():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    part = torch.cat((torch.zeros(1), weight.flatten()))[1:].view(6, 8)  # which no integer of 64 bits begins at
    assert checksum(part) == checksum(weight)
    assert checksum(weight.T.contiguous().T) == checksum(weight) != checksum(weight.T)
    assert checksum(torch.zeros(4, 4)) != checksum(-torch.zeros(4, 4))
