"""Sweeps on a real Ray cluster of two nodes: workers, a node and drivers that are killed, and what is left afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from small_tasks import square
from test_sweep import assert_same

from kdpo_easyedit.bench.schema import Cell, from_json
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.sweep.plan import read_plan
from kdpo_easyedit.sweep.run import Sweep, opened, run
from kdpo_easyedit.sweep.simulate import meet
from kdpo_easyedit.sweep.tasks import Event, Resources, Task, connect

ray = pytest.importorskip("ray", reason="an optional extra")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Two methods, sequential so that a run goes on from weights; long enough to be caught in the middle.
YAML = {
    "models": "world", "methods": ["KDPO", "FT"], "protocols": ["single", "sequential"], "sizes": 12, "eval_at": 3,
    "no_fluency": True, "num_cpus": 1,
}  # fmt: skip
# How long anything is waited for: a busy machine may take long, and where all goes well it costs nothing.
SECONDS = 300


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(what: Callable[[], object]) -> object:
    """What a function gives as soon as it is true."""
    end = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


pytestmark = pytest.mark.ray
MARK = f"KDPO_TEST_OF={os.getpid()}"


def command(pid: int) -> bytes:
    """A process's command line; of one that is gone, Agent."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"Agent"


def marked() -> set[int]:
    """The processes that have come from this one since :func:`cluster` began."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}\0".encode() in (folder / "environ").read_bytes() and alive(int(folder.name)):
                found.add(int(folder.name))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[cluster_utils.Cluster]:
    """Two nodes with one CPU each; whatever of it is left at the end is an error."""
    before = dict(os.environ)
    name, _, value = MARK.partition("=")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ |= {name: value, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    try:
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        eventually(lambda: not marked())
        os.environ.clear()
        os.environ |= before


def test_tasks_are_done_on_both_nodes_and_what_fails_is_tried_three_times(cluster, tmp_path):
    troubles = {1: "1 killed", 2: "3 killed", 3: "1 raised", 4: "3 raised"}
    with connect(cluster.address, tmp_path) as workers:
        workers.submit(*(Task(str(n), square, (n, troubles.get(n, ""))) for n in range(12)))
        events = list(workers.events())
        ended = {event.task.name: event for event in events if event.state in ("done", "failed")}
        assert {int(name): event.result for name, event in ended.items() if event.state == "done"} == {
            n: n * n for n in range(12) if n not in (2, 4)
        }
        assert [ended[str(n)].tries for n in (0, 1, 2, 3, 4)] == [1, 2, 3, 2, 3]
        assert "died" in ended["2"].error and ended["4"].error.endswith("ValueError: 4 will not do")
        assert len({event.where for event in events}) >= 2
        workers.submit(Task("one more", square, (30,)))  # and the workers are still there
        assert [event.state for event in workers.events()] == ["running", "done"]


def test_fractions_of_what_a_node_has_are_shared(cluster, tmp_path):
    with connect(cluster.address, tmp_path) as workers:
        workers.submit(*(Task(str(n), meet, (n, 4), resources=Resources(num_cpus=0.5)) for n in range(4)))
        assert [event.state for event in workers.events()].count("done") == 4


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[Path]:
    """The sweep, run in this process."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("alone")
    for _ in events_of(folder, "local"):
        pass
    torch.set_num_threads(threads)
    yield folder / "sweep"


def events_of(folder: Path, address: str, collect: bool = False) -> Iterator[tuple[Sweep, Event]]:
    """The sweep in a folder, as it goes."""
    (folder / "SWEEP.yaml").write_text(yaml.safe_dump(YAML))
    plan = read_plan(folder / "SWEEP.yaml")
    with opened(plan, folder / "sweep") as sweep, connect(address, sweep.folder, collect) as workers:
        for event in run(sweep, workers):
            yield sweep, event


def assert_like(alone: Path, folder: Path) -> list[Cell]:
    cells = from_json(Cell, json.loads((folder / "sweep.json").read_text()))
    assert [cell.state for cell in cells] == ["done"] * 4, [cell.error for cell in cells]
    for cell in cells:
        assert_same(folder / cell.folder, alone / cell.folder, cell)
    return cells


def journal(folder: Path, cell: str) -> bytes:
    """The whole lines of the one method's journal in a cell."""
    files = [file for file in (folder / "cells" / cell).glob("*.jsonl") if file.name not in ("before.jsonl", "measuring.jsonl")]
    content = files[0].read_bytes() if files else b""
    return content[: content.rfind(b"\n") + 1]


@pytest.mark.parametrize("collect", [False, True], ids=["shared folder", "collected"])
def test_a_worker_and_a_node_that_die_cost_nothing_that_was_done(cluster, alone, tmp_path, collect, monkeypatch):
    """A worker is killed in the middle of a cell, then the other node goes; the cells are what they are alone, to the bit."""
    monkeypatch.setattr("kdpo_easyedit.sweep.on_ray._SEND_EVERY", 0.1)
    target, kept = "world/FT_own-12_sequential_seed-0", {}
    folder, added = tmp_path / "sweep", cluster.add_node(num_cpus=1)

    def kill(where: str) -> None:
        # Kept at the checkpoint, after 3 edits.
        eventually(lambda: list((folder / "cells" / target).glob("weights-*.safetensors")))
        kept["journal"] = b"".join(journal(folder, target).splitlines(keepends=True)[:3])
        os.kill(int(re.search(r"process (\d+)", where)[1]), signal.SIGKILL)

    removed = False
    with ThreadPoolExecutor(1) as threads:
        for _sweep, event in events_of(tmp_path, cluster.address, collect):
            if event.task.name == target and event.state == "running" and event.tries == 1:
                killing = threads.submit(kill, event.where)
            if event.task.name == target and event.state == "again" and not removed:
                cluster.remove_node(added, allow_graceful=False)
                removed = True
    killing.result()  # raises what was raised there
    assert removed
    cells = {cell.name: cell for cell in assert_like(alone, folder)}
    assert cells[target].tries >= 2 and kept["journal"]
    assert journal(folder, target).startswith(kept["journal"])  # the edits that were made are not made again


def test_a_driver_that_is_killed_goes_on_where_it_was(cluster, alone, tmp_path, monkeypatch, capsys):
    (tmp_path / "SWEEP.yaml").write_text(yaml.safe_dump(YAML))
    command = [sys.executable, "-m", "kdpo_easyedit", "sweep", "SWEEP.yaml", "--address", cluster.address, "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "sweep"
    eventually(lambda: list(folder.glob("cells/*/*/report.html")))
    driver.kill()
    driver.wait()
    done = {file: file.stat().st_mtime_ns for cell in folder.glob("cells/*/*/report.html") for file in cell.parent.iterdir()}
    assert done and len(list(folder.glob("cells/*/*/report.html"))) < 4
    monkeypatch.chdir(tmp_path)
    assert main(command[3:]) == 0
    assert "4 of 4 runs are done" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == then for file, then in done.items())
    assert_like(alone, folder)


def test_ray_of_this_machine_is_begun_and_ended(cluster, tmp_path):
    """Where no address is named; a driver that is killed takes its Ray with it."""
    code = """
import sys, time
from pathlib import Path
from small_tasks import square
from kdpo_easyedit.sweep.tasks import Task, connect
with connect(None, Path(sys.argv[1])) as workers:
    workers.submit(Task("9", square, (9,)))
    print(*(event.result for event in workers.events()), flush=True)
    time.sleep(60 * int(sys.argv[2]))
"""
    there = marked()
    for waits in (0, 1):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(waits)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "None 81\n"
        if waits:
            process.kill()
        assert process.wait(SECONDS) == (-signal.SIGKILL if waits else 0)
        process.stdout.close()
        # Ray's agents look for their node now and then, and go by themselves after a minute or two.
        eventually(lambda: all(b"Agent" in command(pid) for pid in marked() - there))
        for pid in marked() - there:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: marked() <= there)
