"""Workers on a Ray cluster: an actor each, which keeps the model of its tasks.

Ray says where and when a worker runs, by the resources that its tasks ask for; this module asks it for workers, and hands each
that is free the next task of its model. A worker that has none left makes room where others wait for theirs.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .pieces import Piece, Sent, changes, files_in, pieces_of, receive
from .tasks import TRIES, Event, Place, Resources, Task, WorkersError, here, last_lines

# What a worker has from the environment of whoever called.
_ENVIRONMENT = ("EASYEDIT_HOME", "KDPO_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY")
# How often the driver looks around while nothing happens, and how often a worker sends what it has written, in seconds.
_PULSE, _SEND_EVERY = 1.0, 2.0
# How many seconds a worker has to end well, and how many may go before they have begun.
_PATIENCE, _MISFITS = 10, 20

Parcel = list[ray.ObjectRef]


@ray.remote
class _Worker:
    """A process with a :class:`Place`.

    Args:
        root: the folder that tasks share; None for one of its own, to which files are brought and from which they are sent.
        send_every: in seconds.
    """

    def __init__(self, root: str | None, threads: int, environment: Mapping[str, str], send_every: float) -> None:
        os.environ.update(environment)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # what torch reads when it is imported, which it is not yet
        self._own = None if root else _folder_of_ones_own()
        self.place = Place(Path(root or str(self._own)))
        self._sent: Sent = {}
        self._send_every = send_every

    def where(self) -> str:
        """This process, and the GPUs that it was given.

        Raises:
            WorkersError: the folder that tasks share is not here.
        """
        if not self.place.root.is_dir():
            raise WorkersError(f"{self.place.root} is not on {here()}: use a folder that all machines share, or --collect")
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return here() + (f", GPU {', '.join(gpus)}" if gpus else "")

    def do(self, task: Task) -> tuple[Any, str, int, float]:
        """What :meth:`Place.do` gives, how many models were loaded, and the seconds."""
        loads, started = self.place.loads, time.perf_counter()
        result, error = self.place.do(task)
        return result, error, self.place.loads - loads, time.perf_counter() - started

    def do_and_send(self, task: Task, parcel: Parcel) -> Iterator[Any]:
        """The same, after the pieces of what the task writes, as it writes them."""
        for ref in parcel:
            receive(self.place.root, ray.get(ref))
        for _ in changes(self.place.root, task.folder, self._sent):  # what has been brought need not be sent
            pass
        with ThreadPoolExecutor(1) as thread:
            working = thread.submit(self.do, task)
            while not wait([working], timeout=self._send_every).done:
                yield from changes(self.place.root, task.folder, self._sent)
        yield from changes(self.place.root, task.folder, self._sent)
        yield working.result()

    def leave(self) -> None:
        """Remove what is this worker's alone."""
        if self._own:
            shutil.rmtree(self._own, ignore_errors=True)


def _folder_of_ones_own() -> Path:
    """A folder for this process; those that killed ones have left are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_OWN}*"):
        with suppress(ValueError, OSError):
            try:
                os.kill(int(left.name.removeprefix(_OWN).partition("-")[0]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_OWN}{os.getpid()}-"))


_OWN = "kdpo-sweep-"
Key = tuple[Hashable, Resources]


@dataclass
class _Hired:
    """A worker as the driver knows it.

    Attributes:
        call: what is waited for: first where it is, then what has become of its task; None while it is idle.
        brought: the files that it has, each with its time and size.
    """

    actor: Any
    key: Key
    call: Any
    where: str = ""
    task: Task | None = None
    brought: dict[str, tuple[int, int]] = field(default_factory=dict)


class OnRay:
    """Does tasks on a Ray cluster.

    Args:
        root: the folder that tasks share; with ``collect``, the driver's alone.
        address: a cluster's, as ``ray.init`` takes it; None begins one on this machine.
        collect: whether files are brought to workers and sent back by Ray.

    Raises:
        WorkersError: there is no such cluster.
    """

    def __init__(self, root: Path, address: str | None, collect: bool = False) -> None:
        self.root, self.collect = root.resolve(), collect
        self._waiting: dict[Key, deque[Task]] = {}
        self._tries: dict[str, int] = {}
        self._hired: list[_Hired] = []
        self._kept: dict[str, tuple[tuple[int, int], Parcel]] = {}
        self._capacity: tuple[float, Mapping[str, float]] = (-1e9, {})
        self._begun = not ray.is_initialized()
        self._misfits = 0
        if self._begun:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            address = address or os.environ.get("RAY_ADDRESS") or "local"  # which is Ray's word for a new one
            new: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **new)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise WorkersError(f"address is {address!r}, where no Ray cluster answers: {last_lines(error)}") from None

    def close(self) -> None:
        """Let all workers go, and leave the cluster."""
        leaving = [worker.actor.leave.remote() for worker in self._hired if self.collect and worker.call is None]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=_PATIENCE)
        for worker in self._hired:
            ray.kill(worker.actor)
        self._hired.clear()
        if self._begun:
            ray.shutdown()

    def submit(self, *tasks: Task) -> None:
        """See :class:`.tasks.Workers`."""
        for task in tasks:
            self._waiting.setdefault((task.model, task.resources), deque()).append(task)

    def events(self) -> Iterator[Event]:
        """See :class:`.tasks.Workers`.

        Raises:
            WorkersError: no worker can be begun.
        """
        while True:
            self._hire()
            for worker in self._hired:
                queue = self._waiting.get(worker.key)
                if worker.call is None and queue:
                    yield self._begin(worker, queue.popleft())
            calls = {worker.call: worker for worker in self._hired if worker.call is not None}
            if not any(worker.task for worker in self._hired) and not any(self._waiting.values()):
                return
            ready, _ = ray.wait(list(calls), timeout=_PULSE) if calls else ([], [])
            for call in ready:
                event = self._heard(calls[call])
                if event is not None:
                    yield event

    def _heard(self, worker: _Hired) -> Event | None:
        """What a worker's call has come to, where that is more than a piece or its being there."""
        try:
            answer = ray.get(next(worker.call) if self.collect and worker.task else worker.call)
        except RayTaskError as error:
            if worker.task is None:
                raise WorkersError(f"a worker cannot begin: {last_lines(error)}") from None
            return self._lost(worker, last_lines(error))
        except RayError as error:  # whose first lines say it
            lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
            return self._lost(worker, f"{type(error).__name__}: " + "\n".join(lines[:3]))
        if isinstance(answer, Piece):
            receive(self.root, answer)
            return None
        if worker.task is None:
            worker.where, worker.call, self._misfits = answer, None, 0
            return None
        result, reason, loads, seconds = answer
        return self._ended(worker, seconds, loads, result, reason)

    def _begin(self, worker: _Hired, task: Task) -> Event:
        worker.task = task
        self._tries[task.name] = self._tries.get(task.name, 0) + 1
        if self.collect:
            parcel = self._parcel(worker, task)
            worker.call = worker.actor.do_and_send.options(num_returns="streaming").remote(task, parcel)
        else:
            worker.call = worker.actor.do.remote(task)
        return Event(task, "running", self._tries[task.name], worker.where)

    def _ended(self, worker: _Hired, seconds: float, loads: int, result: Any, error: str) -> Event:
        task, worker.task, worker.call = worker.task, None, None
        assert task is not None
        tries = self._tries[task.name]
        state = "done" if not error else "again" if tries < TRIES else "failed"
        if state == "again":
            self.submit(task)
        return Event(task, state, tries, worker.where, seconds, loads, result, error)

    def _lost(self, worker: _Hired, reason: str) -> Event | None:
        """A worker is gone, with its process or its machine."""
        self._dismiss(worker)
        if worker.task is not None:
            return self._ended(worker, 0, 0, None, reason)
        self._misfits += 1  # a machine may go with all that were about to begin on it
        if self._misfits == _MISFITS:
            raise WorkersError(f"{_MISFITS} workers one after another ended before they had begun: {reason}")
        return None

    def _dismiss(self, worker: _Hired) -> None:
        self._hired.remove(worker)
        with suppress(RayError):
            if self.collect and worker.call is None:
                ray.wait([worker.actor.leave.remote()], timeout=_PATIENCE)
            ray.kill(worker.actor)

    def _hire(self) -> None:
        """As many workers as there are tasks for and the cluster has room for; those that nothing is left for make room.

        One more than there is room for waits its turn: for a worker that goes, or a cluster that grows when it is asked.
        """
        free = Counter(worker.key for worker in self._hired if worker.task is None)
        coming = sum(worker.task is None and worker.call is not None for worker in self._hired)
        for key, queue in self._waiting.items():
            if queue:
                room = max(self._room(key[1]) - len(self._hired), 1 - coming)
                for _ in range(min(len(queue) - free[key], room)):
                    self._hired.append(self._new(key))
                    coming += 1
        if coming:
            for worker in list(self._hired):
                if worker.task is None and not self._waiting.get(worker.key):
                    self._dismiss(worker)

    def _room(self, resources: Resources) -> int:
        """How many such workers the whole cluster has room for."""
        asked = {"GPU": resources.num_gpus, "CPU": resources.num_cpus or 1, "memory": resources.memory or 0}
        looked, there = self._capacity
        if time.monotonic() - looked > _PULSE:
            there = ray.cluster_resources()
            self._capacity = time.monotonic(), there
        return min(int(there.get(kind, 0) / amount + 1e-9) for kind, amount in asked.items() if amount)

    def _new(self, key: Key) -> _Hired:
        resources = key[1]
        cpus = resources.num_cpus or 1
        asked = {"num_gpus": resources.num_gpus, "num_cpus": cpus}
        if resources.memory is not None:
            asked["memory"] = resources.memory
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        root = None if self.collect else str(self.root)
        actor = _Worker.options(**asked).remote(root, max(1, int(cpus)), environment, _SEND_EVERY)  # type: ignore[attr-defined]
        return _Hired(actor, key, actor.where.remote())

    def _parcel(self, worker: _Hired, task: Task) -> Parcel:
        """The files that a task needs and its worker does not have, in Ray's keeping; those that many tasks read stay there."""
        parcel: Parcel = []
        for path in dict.fromkeys((*task.reads, task.folder)):
            for file in files_in(self.root, path) if path else ():
                stat = file.stat()
                name, now = str(file.relative_to(self.root)), (stat.st_mtime_ns, stat.st_size)
                if worker.brought.get(name) == now:
                    continue
                worker.brought[name] = now
                there, refs = self._kept.get(name, (None, []))
                if there != now:
                    refs = [ray.put(piece) for piece in pieces_of(self.root, file)]
                    if path != task.folder:
                        self._kept[name] = now, refs
                parcel += refs
        return parcel
