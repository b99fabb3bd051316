"""Devices, and what a model is loaded in there, by the names that people and EasyEdit give them."""

from __future__ import annotations

from typing import Any

#: What a model can be loaded in: what ``dtype`` may be.
DTYPES = ("bfloat16", "float16", "float32")


def device_name(value: Any) -> str:
    """A device as torch names it: a number, also as text, is that of a CUDA device; everything else names itself."""
    return f"cuda:{value}" if str(value).isdigit() else str(value)


def synchronize() -> None:
    """Wait until every device has done what it was told, so that a clock can be read."""
    import torch  # here, so that a device's name can be had without it

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
