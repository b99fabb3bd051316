"""Tasks, and workers that do them: here one after another, on a cluster many at once (:mod:`.on_ray`).

A task is a function of a module, with arguments that can be pickled. It is called with a :class:`Place` first: the folder that
all tasks share, and the model that the worker has loaded. ::

    with connect(address, root) as workers:
        workers.submit(Task("one", function, (1, 2)))
        for event in workers.events():  # more tasks may be submitted meanwhile
            if event.state == "done":
                print(event.task.name, event.result)
"""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: How often a task is begun before it counts as failed.
TRIES = 3
_LAST_LINES = 5


@dataclass(frozen=True)
class Resources:
    """What a task asks of a cluster.

    Attributes:
        num_gpus, num_cpus: as Ray counts them; fractions of a GPU are shared. So many CPUs are so many threads of torch, which
            the last bits of a figure hang on; None is 1 on a cluster, and in this process what torch has.
        memory: in bytes; None asks for none.
    """

    num_gpus: float = 0
    num_cpus: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        name: no two have the same.
        function: of a module, so that it can be found by name elsewhere; what it returns is the event's ``result``.
        arguments: what it is called with, after the :class:`Place`.
        model: what it has loaded; a worker goes on with tasks that have the same.
        resources: what it asks for.
        folder: where it writes, within the root; from there it goes on when it is begun again.
        reads: files and folders within the root that it reads.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    model: Hashable = None
    resources: Resources = Resources()
    folder: str = ""
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """What has become of a task.

    Attributes:
        state: ``running``; ``again``: it did not end well and is begun again; ``done``; ``failed``.
        tries: how often it has been begun.
        where: the machine and process.
        seconds: how long it took; of ``running``, 0.
        loads: how many models were loaded for it.
        result: what the function returned.
        error: the last lines of why it did not end well.
    """

    task: Task
    state: str
    tries: int
    where: str
    seconds: float = 0
    loads: int = 0
    result: Any = None
    error: str = ""


class Workers(Protocol):
    """Those who do tasks."""

    def submit(self, *tasks: Task) -> None:
        """Let tasks be done, in this order as far as it can be had."""

    def events(self) -> Iterator[Event]:
        """What becomes of the tasks, as it happens, until all are done or failed."""


class WorkersError(RuntimeError):
    """Workers cannot be had; the message says why and what to do."""


class Place:
    """Where tasks run, one after another.

    Attributes:
        root: the folder that all tasks share.
        loads: how many models were loaded here.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.loads = root, 0
        self._kept: tuple[Any, Any] | None = None

    def model(self, hparams: Any) -> tuple[Any, Any]:
        """The model that hyper-parameters name, and its tokenizer: as loaded for the last task, or loaded now.

        Whoever changes it gives it back as it was.

        Raises:
            HostError: it cannot be loaded.
        """
        from ..easyedit.loading import in_place, load_model, loading

        hparams = in_place(hparams)
        if self._kept is None or self._kept[0] != loading(hparams):
            self.forget()
            self._kept = loading(hparams), load_model(hparams)
            self.loads += 1
        return self._kept[1]

    def forget(self) -> None:
        """Let go of the model: something went wrong, or another is wanted."""
        if self._kept is not None:
            import torch

            self._kept = None
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where there is no CUDA

    def do(self, task: Task) -> tuple[Any, str]:
        """What a task's function returns; or None, and the last lines of why it raised."""
        try:
            return task.function(self, *task.arguments), ""
        except Exception as error:
            self.forget()  # whatever state it is in
            return None, last_lines(error)


def last_lines(error: BaseException) -> str:
    """The end of a traceback."""
    text = "".join(traceback.format_exception(error)).strip()
    return "\n".join(text.splitlines()[-_LAST_LINES:])


def here() -> str:
    """This machine and process, in words."""
    return f"{socket.gethostname()}, process {os.getpid()}"


class Here:
    """Does tasks in this process, one after another; first those that want the model which is loaded."""

    def __init__(self, root: Path) -> None:
        self.place = Place(root)
        self._waiting: list[Task] = []
        self._tries: dict[str, int] = {}

    def submit(self, *tasks: Task) -> None:
        """See :class:`Workers`."""
        self._waiting += tasks

    def events(self) -> Iterator[Event]:
        """See :class:`Workers`."""
        model: Hashable = None
        while self._waiting:
            task = next((task for task in self._waiting if task.model == model), self._waiting[0])
            self._waiting.remove(task)
            model = task.model
            tries = self._tries[task.name] = self._tries.get(task.name, 0) + 1
            yield Event(task, "running", tries, here())
            if task.resources.num_cpus is not None:
                import torch

                torch.set_num_threads(max(1, int(task.resources.num_cpus)))
            loads, started = self.place.loads, time.perf_counter()
            result, error = self.place.do(task)
            seconds, loads = time.perf_counter() - started, self.place.loads - loads
            state = "done" if not error else "again" if tries < TRIES else "failed"
            if state == "again":
                self._waiting.append(task)
            yield Event(task, state, tries, here(), seconds, loads, result, error)


@contextmanager
def connect(address: str | None, root: Path, collect: bool = False) -> Iterator[Workers]:
    """Workers for a block, on a Ray cluster or in this process.

    Args:
        address: of a cluster: ``auto``, for one that runs here, or its URL; ``local``: this process. None: a cluster of this
            machine's own where Ray is installed, else this process.
        root: the folder that tasks share.
        collect: whether what tasks write in it is sent back through Ray, for machines that do not have this one's disk.

    Raises:
        WorkersError: there is no such cluster, or Ray is not installed.
    """
    if runs_here(address):
        yield Here(root)
        return
    if not _has_ray():
        raise WorkersError(f"address is {address!r}, and Ray is not installed: pip install -e '.[ray]'; or --address local")
    from .on_ray import OnRay

    workers = OnRay(root, address, collect)
    try:
        yield workers
    finally:
        workers.close()


def runs_here(address: str | None) -> bool:
    """Whether an address means this process."""
    return address == "local" or (address is None and not _has_ray())


def _has_ray() -> bool:
    return importlib.util.find_spec("ray") is not None
