"""The most memory that a piece of work takes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The most memory taken from here on, beyond what is taken now.

    On CUDA it is that of tensors, over all devices; on the CPU, under Linux, that of the process.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            for number in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(number)
            self._before = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
        elif device.type == "cpu":
            try:
                ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
                (_PROCESS / "clear_refs").write_text("5")  # the peak begins anew
                self._before = _resident("VmRSS")
            except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or not allowed here
                pass

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be measured."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        else:
            peak = _resident("VmHWM")
        return max(peak - self._before, 0)


def _resident(key: str) -> int:
    """Bytes of the process that are in memory: ``VmRSS`` now, ``VmHWM`` at most."""
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+) kB", (_PROCESS / "status").read_text())
    return int(kilobytes) * 1024
