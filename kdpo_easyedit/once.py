"""The seconds of what a method does once and keeps, and which are no edit's: contexts, covariances, factors, projections."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .devices import synchronize

_P = ParamSpec("_P")
_T = TypeVar("_T")
_seconds = 0.0
_running = False


def once(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Count what a function takes among :func:`once_seconds`; of two inside each other, the outer one counts."""

    @wraps(function)
    def counted(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        global _seconds, _running
        if _running:
            return function(*args, **kwargs)
        synchronize()
        started, _running = time.perf_counter(), True
        try:
            return function(*args, **kwargs)
        finally:
            synchronize()
            _seconds, _running = _seconds + time.perf_counter() - started, False

    return counted


def once_seconds() -> float:
    """The seconds spent in such functions since this was last asked."""
    global _seconds
    seconds, _seconds = _seconds, 0.0
    return seconds
