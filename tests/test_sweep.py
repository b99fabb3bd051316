"""Sweeps: the YAML, cells in this process, and going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import yaml
from conftest import same_state, uncosted
from filelock import FileLock
from safetensors.torch import load_file

from kdpo_easyedit.bench.schema import Cell, from_json
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.method.config import HPARAMS_DIR
from kdpo_easyedit.sweep import run as run_module
from kdpo_easyedit.sweep.pieces import changes, receive
from kdpo_easyedit.sweep.plan import read_plan
from kdpo_easyedit.sweep.run import opened, run
from kdpo_easyedit.sweep.tasks import TRIES, Event, Here, Place, Task

LOCAL = ["--address", "local"]
TWO = {"models": "world", "methods": ["KDPO", "FT"], "protocols": ["single", "sequential"], "sizes": 2, "no_fluency": True}


def write(folder: Path, **content: object) -> Path:
    path = folder / "SWEEP.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Done:
    """Does no task, and says that each is done."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def submit(self, *tasks: Task) -> None:
        self.tasks += tasks

    def events(self) -> Iterator[Event]:
        for task in self.tasks:  # others come meanwhile
            yield Event(task, "running", 1, "nowhere")
            yield Event(task, "done", 1, "nowhere")


def states(folder: Path) -> list[str]:
    """Of the cells, as they are on disk."""
    return [cell["state"] for cell in json.loads((folder / "sweep.json").read_text())]


def assert_same(folder: Path, alone: Path, cell: Cell) -> None:
    """A cell's run is that of its method and protocol in another run, to the bit and but for the costs."""
    for file in (f"metrics-{cell.method}-{cell.protocol}.json", "summary.json"):
        one, other = (json.loads((there / file).read_text()) for there in (folder, alone))
        for entry in (*one, *other):
            entry.update(uncosted(entry) if "intervals" in entry else {}, time=0, memory=0, once=0)
        assert one and all(entry in other for entry in one)
    weights = f"weights-{cell.method}.safetensors"
    assert (folder / weights).exists() == (cell.protocol == "sequential")
    if cell.protocol == "sequential":
        assert same_state(load_file(folder / weights), load_file(alone / weights))
    assert (folder / "before.jsonl").read_bytes() == (alone / "before.jsonl").read_bytes()


def test_whatever_has_come_of_a_folder_that_is_being_written_can_be_gone_on_from(tmp_path):
    here, there, sent = tmp_path / "here", tmp_path / "there", {}
    here.mkdir()

    def edit() -> None:
        """As a run does: a journal's line, then weights, replaced as one."""
        with (here / "z.jsonl").open("a") as journal:
            journal.write("edit\n")
        (here / "new").write_text(str(edits(here)))
        (here / "new").replace(here / "a.safetensors")

    def edits(folder: Path) -> int:
        return len((folder / "z.jsonl").read_text().splitlines())

    for report in (False, False, True):
        edit()
        if report:
            (here / "report.html").write_text("complete")
        for piece in changes(here, "", sent):
            assert not (there / "report.html").exists()
            receive(there, piece)
            if (there / "a.safetensors").exists():
                assert edits(there) >= int((there / "a.safetensors").read_text())
            if not report:
                edit()
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (here, there))
    assert one == other


def test_cells_are_the_product_less_what_is_excluded(tmp_path):
    path = write(
        tmp_path, models=["world", "smollm2-135m"], methods=["KDPO", "FT"], protocols=["single", "sequential"], orders=[1, 2],
        seeds=[0, 1], sizes=[3, "all"], overrides={"KDPO": {"lr": [1e-3, "3e-3"], "beta": 0.2}},
        exclude=[{"model": "smollm2-135m", "size": "all"}, {"method": "FT", "order": 2}, {"lr": 1e-3, "seed": [1]}],
    )  # fmt: skip
    plan = read_plan(path)
    cells = {cell.name: cell for cell in plan.cells}
    assert len(cells) == len(plan.cells)  # of single edits there is one order
    assert len(cells) == 2 * 2 * 2 * (3 * 2 + 2) - 2 * 8 - 3 * 3
    cell = cells["world/KDPO_own-3_sequential-2_seed-1_lr=3e-3_beta=0.2"]
    assert (cell.order, cell.seed, cell.size, cell.overrides) == (2, 1, 3, {"lr": "3e-3", "beta": 0.2})
    hparams = plan.hparams[cell.name]
    assert (hparams.lr, hparams.beta, hparams.model_name) == (3e-3, 0.2, "world")
    assert "world/FT_own-all_single_seed-0" in cells and not any("smollm2" in name and "all" in name for name in cells)


def test_a_model_or_data_by_a_path_leads_out_of_no_folder(tmp_path, monkeypatch):
    for name, place in (("world", "world"), ("mine/world", "mine/world"), ("../mine/world", "mine/world"), ("/a/../b", "a/b")):
        assert Cell(name, "FT", "own", "single", 2, 0).folder == f"cells/{place}/FT_own-2_single_seed-0"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for method in ("FT", "KDPO+C"):
        (tmp_path / "mine" / method).mkdir(parents=True)
        shutil.copyfile(HPARAMS_DIR / method / "world.yaml", tmp_path / "mine" / method / "world.yaml")
    Path("text.txt").write_text("Person 1 works as a painter in the city.")
    edits = [{"subject": "Ann", "prompt": "Ann lives in", "target_new": "Rome"}]
    Path("edits.json").write_text(json.dumps(edits))
    path = write(
        tmp_path / "here", models="../mine/world", methods=["FT", "KDPO+C"], stats_text="text.txt", data={"../it": "edits.json"}
    )
    workers = Done()
    with opened(read_plan(path), Path("sweep")) as sweep:
        list(run(sweep, workers))
    paths = {PurePosixPath(path) for task in workers.tasks for path in (task.folder, *task.reads)}
    assert {path.parts[0] for path in paths} == {"before", "cells", "inputs", "statistics"}
    assert not [path for path in paths if ".." in path.parts]
    assert PurePosixPath("statistics/mine/world") in paths and PurePosixPath("before/mine/world/..-it-all_seed-0") in paths


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": ["KDPO"]}, "missing key 'models'"),
        ({"models": "world", "methods": []}, "methods is empty"),
        ({**TWO, "seed": 1}, "unknown key 'seed'; allowed: models"),
        ({**TWO, "sizes": [0]}, "sizes is [0]; allowed: whole numbers, 1 or above, or all"),
        ({**TWO, "seeds": [1, 1]}, "seeds names 1 twice"),
        ({**TWO, "protocols": "batch"}, "protocols is 'batch'; allowed: single, sequential, batches-10"),
        ({**TWO, "protocols": "single", "orders": [1, 2]}, "single edits have no order"),
        ({**TWO, "overrides": {"ROME": {"lr": 1}}}, "overrides names 'ROME'; allowed: a method of methods"),
        ({**TWO, "overrides": {"FT": {"lr": []}}}, "overrides.FT.lr is []"),
        ({**TWO, "exclude": [{"method": "ROME"}]}, "true of no cell"),
        ({**TWO, "exclude": [{"methods": "FT"}]}, "exclude names 'methods'; allowed: data, method, model"),
        ({**TWO, "exclude": [{"model": "world"}]}, "exclude leaves no cell"),
        ({**TWO, "data": {"mine": "none.json"}}, "none.json: cannot be read"),
        ({**TWO, "data": "mine.json"}, "data is 'mine.json'; allowed: a mapping of names"),
        (
            {**TWO, "data": {"a/b": "SWEEP.yaml", "a-b": "SWEEP.yaml"}},
            "data names 'a/b' and 'a-b', whose runs would share the folder",
        ),
        (
            {**TWO, "models": ["a/world", "../a/./world"]},
            "models names 'a/world' and '../a/./world', whose runs would share the folder a/world/KDPO_own-2_single_seed-0",
        ),
        (
            {**TWO, "overrides": {"FT": {"lr": [0.001, 1e-3]}}},
            "overrides names {'lr': 0.001} and {'lr': 0.001}, whose runs would share",
        ),
        ({**TWO, "data": {"mine": {"file": "SWEEP.yaml", "datatype": ["zsre"]}}}, "data.mine.datatype is ['zsre']; allowed: "),
        ({**TWO, "models": "qwen1.5-0.5b"}, "data_dir is missing"),
        ({**TWO, "num_gpus": 1.5}, "num_gpus is 1.5"),
        ({**TWO, "num_gpus": {"wrold": 2}}, "num_gpus names 'wrold'; allowed: a model of models"),
        ({**TWO, "num_gpus": {"world": float("nan")}}, "num_gpus is nan; allowed: a number, 0 or above"),
        ({**TWO, "num_cpus": float("inf")}, "num_cpus is inf; allowed: a number, 1 or above"),
        ({**TWO, "memory": "1.2.3GB"}, "memory is '1.2.3GB'; allowed: a number of bytes, or such as 40GB"),
        ({**TWO, "memory": "40 gigs"}, "memory is '40 gigs'; allowed: a number of bytes, or such as 40GB"),
        ({**TWO, "methods": ["KDPO", "MEND"]}, "MEND on world and 1 more: editing_method is 'MEND', which needs an editor"),
        ({**TWO, "overrides": {"KDPO": {"lr": -1}}}, "lr is -1; allowed: a number above 0"),
        ({**TWO, "overrides": {"FT": {"rank": 4}}}, "unknown key 'rank'"),
        (
            {**TWO, "methods": "ROME", "protocols": "batches-2"},
            "ROME on world: edit_batch is 2, and ROME make one edit at a time",
        ),
        (
            {**TWO, "methods": "KDPO", "protocols": "batches-10", "sizes": [5, 10]},
            "KDPO on world: edit_batch is 10, and there are 5 edits; allowed: at most as many as there are",
        ),
        *(({**TWO, key: []}, f"{key} is empty; name at least one") for key in ("protocols", "sizes", "seeds", "orders")),
    ],
)
def test_bad_input_is_told_before_anything_is_done(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(write(tmp_path, **content))]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "sweep").exists()


def test_batches_larger_than_what_there_is_are_told_before_a_cell_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdpo_easyedit.sweep.tasks.Here.submit", lambda *_: pytest.fail("a cell is run"))
    Path("edits.json").write_text(json.dumps([{"subject": "Ann", "prompt": "Ann lives in", "target_new": "Rome"}]))
    batches = {"models": "world", "methods": "KDPO", "protocols": ["single", "batches-100000"]}
    for data, edits in ({"mine": "edits.json"}, 1), ({"own": None}, 500):
        assert main(["sweep", str(write(tmp_path, **batches, data=data)), *LOCAL]) == 2
        assert f"edit_batch is 100000, and there are {edits} edits" in capsys.readouterr().err
        assert Path("sweep").exists() == ("own" in data)  # to know how many edits the world has it is built


def test_a_key_given_twice_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("SWEEP.yaml").write_text("models: world\nmethods: [KDPO]\nsizes: 1\nmethods: [FT]\n")
    assert main(["sweep", "SWEEP.yaml", "--dry_run"]) == 2
    assert "the key 'methods' is given twice" in capsys.readouterr().err


def test_contexts_and_checkpoints_may_be_none(tmp_path):
    plan = read_plan(write(tmp_path, **TWO, context=[], eval_at=[]))
    assert (plan.how.contexts, plan.eval_at) == ((), None)


def test_a_dry_run_shows_the_cells_and_what_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["sweep", str(write(tmp_path, **TWO)), "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (
        len(printed) == 6
        and printed[-1] == "4 runs, into sweep"
        and printed[1].split()[:5] == ["world", "KDPO", "own", "2", "single"]
    )
    assert main(["sweep", str(write(tmp_path, **TWO | {"methods": ["KDPO", "MEND"]})), "--dry_run"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("refused: editing_method is 'MEND'") == 2 and "MEND on world and 1 more" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"SWEEP.yaml"}


def test_without_sizes_all_edits_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {key: value for key, value in TWO.items() if key != "sizes"}
    assert main(["sweep", str(write(tmp_path, **content)), "--dry_run"]) == 0
    assert " all " in capsys.readouterr().out


def test_a_sweep_is_its_cells_run_alone(tmp_path, monkeypatch, capsys):
    """To the bit; the model is loaded once, and measured once before any edit. Called again, it has nothing to do."""
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(write(tmp_path, **TWO)), "--quiet", *LOCAL]) == 0
    assert "4 of 4 runs are done, 1 loads of a model for 4 cells" in capsys.readouterr().out
    alone = ["--hparams_dir", "world", "--editing_method", *TWO["methods"], "--ds_size", "2", "--metrics_save_dir", "alone"]
    assert main([*alone, "--no_fluency", "--quiet"]) == 0
    cells = from_json(Cell, json.loads(Path("sweep/sweep.json").read_text()))
    assert [(cell.state, cell.tries) for cell in cells] == [("done", 1)] * 4
    for cell in cells:
        assert_same(Path("sweep") / cell.folder, Path("alone"), cell)
    changed = {file: file.stat().st_mtime_ns for file in Path("sweep/cells").rglob("*")}
    capsys.readouterr()
    assert main(["sweep", "SWEEP.yaml", "--quiet", *LOCAL]) == 0
    printed = capsys.readouterr()
    assert "4 of 4 runs are done; " in printed.out and printed.err == ""
    assert changed == {file: file.stat().st_mtime_ns for file in Path("sweep/cells").rglob("*")}


def test_a_changed_sweep_is_not_mixed_with_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = {"models": "world", "methods": "KDPO", "sizes": 1, "no_fluency": True}
    assert main(["sweep", str(write(tmp_path, **one)), "--quiet", *LOCAL]) == 0
    assert main(["sweep", str(write(tmp_path, **one | {"no_fluency": False})), "--quiet", *LOCAL]) == 2
    assert "holds another run: measuring.fluency is False there and True here" in capsys.readouterr().err
    shutil.rmtree("sweep/cells")
    cut = {**one, "methods": ["KDPO", "FT"]}
    assert main(["sweep", str(write(tmp_path, **cut)), "--quiet", *LOCAL]) == 0
    (before,) = Path("sweep/before").rglob("before.jsonl")
    assert all(file.read_bytes() == before.read_bytes() for file in Path("sweep/cells").rglob("before.jsonl"))


def test_another_model_under_the_same_name_is_not_mixed_with_what_is_there(tmp_path, monkeypatch, capsys, small_world):
    monkeypatch.chdir(tmp_path)

    def call(model_name: str, method: str) -> int:
        for of in ("FT", "KDPO"):
            path = tmp_path / "mine" / of / "world.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                yaml.safe_dump(yaml.safe_load((HPARAMS_DIR / of / "world.yaml").read_text()) | {"model_name": model_name})
            )
        content = {"models": "mine/world", "methods": method, "sizes": 1, "no_fluency": True}
        return main(["sweep", str(write(tmp_path, **content)), "--quiet", *LOCAL])

    assert call("wolrd", "FT") == 1  # which is none: no run of it is in the way
    assert call("world", "FT") == 0
    capsys.readouterr()
    for method in ("FT", "KDPO"):
        assert call(str(small_world.folder), method) == 2
        told = f"holds runs of another model: model_name is 'world' there and {str(small_world.folder)!r} here. Name another"
        assert told in capsys.readouterr().err
    assert call("world", "FT") == 0 and "1 of 1 runs are done; " in capsys.readouterr().out


def test_a_sweep_that_was_killed_before_it_began_goes_on(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json.1.unfinished").write_text("[{")
    with opened(read_plan(write(tmp_path, **TWO)), tmp_path / "sweep"):
        assert states(tmp_path / "sweep") == ["waiting"] * 4


def test_how_the_cells_stand_is_on_disk_at_once_and_when_it_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: 0.0))  # no second passes
    plan = read_plan(write(tmp_path, **TWO))
    with opened(plan, tmp_path / "sweep") as sweep:
        for _ in run(sweep, Done()):
            assert states(tmp_path / "sweep") == [cell.state for cell in sweep.cells.values()]
    monkeypatch.setattr(run_module, "_AT_ONCE", 0)  # as where writing takes too long
    with pytest.raises(KeyboardInterrupt), opened(plan, tmp_path / "stopped") as sweep:
        for event in run(sweep, Done()):
            assert states(tmp_path / "stopped") == ["waiting"] * 4
            if event.task.name == plan.cells[1].name:
                raise KeyboardInterrupt
    assert states(tmp_path / "stopped") == ["done", "running", "waiting", "waiting"]


def test_writing_how_thousands_of_cells_stand_takes_little_of_the_time(tmp_path, monkeypatch):
    clock, spent = SimpleNamespace(now=0.0), []

    class Busy(Done):
        def events(self) -> Iterator[Event]:
            for _ in range(10_000):
                clock.now += 0.05
                yield Event(self.tasks[0], "running", 1, "nowhere")

    def write_slowly(sweep: object) -> None:
        spent.append(0.3)
        clock.now += 0.3

    with opened(read_plan(write(tmp_path, **TWO)), tmp_path / "sweep") as sweep:
        monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(run_module, "_write", write_slowly)
        list(run(sweep, Busy()))
    assert 0.01 * clock.now < sum(spent) < 0.02 * clock.now + 2


def fails(place: Place, times: int, tries: list[int]) -> str:
    tries.append(1)
    if len(tries) <= times:
        raise ValueError(f"try {len(tries)}\nand no more")
    return "well"


def test_what_raises_is_tried_three_times_while_others_go_on(tmp_path):
    workers = Here(tmp_path)
    workers.submit(*(Task(f"{n}", fails, (n, [])) for n in (3, 1, 0)))
    events = [(event.task.name, event.state, event.tries) for event in workers.events() if event.state != "running"]
    assert events == [
        ("3", "again", 1), ("1", "again", 1), ("0", "done", 1), ("3", "again", 2), ("1", "done", 2), ("3", "failed", 3),
    ]  # fmt: skip
    workers.submit(Task("last", fails, (9, [])))
    *_, event = workers.events()
    assert event.state == "failed" and event.error.endswith("ValueError: try 3\nand no more") and event.tries == TRIES


def test_tasks_that_want_the_loaded_model_come_first(tmp_path):
    workers = Here(tmp_path)
    workers.submit(*(Task(f"{model}{n}", fails, (0, []), model=model) for n in (1, 2) for model in "ab"))
    assert [event.task.name for event in workers.events() if event.state == "done"] == ["a1", "a2", "b1", "b2"]


def test_a_cell_that_cannot_be_run_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdpo_easyedit.sweep.work._PATIENCE", 0.1)
    path = write(tmp_path, models="world", methods=["KDPO", "FT"], sizes=1, no_fluency=True)
    held = tmp_path / "sweep/cells/world/KDPO_own-1_single_seed-0"
    held.mkdir(parents=True)
    (tmp_path / "sweep/sweep.json").write_text("[]")
    with FileLock(held / ".lock"):
        assert main(["sweep", str(path), "--quiet", *LOCAL]) == 1
    printed = capsys.readouterr()
    assert "KDPO_own-1_single_seed-0: given up after try 3" in printed.err and "1 of 2 runs are done" in printed.out
    cells = {cell.method: cell for cell in from_json(Cell, json.loads((tmp_path / "sweep/sweep.json").read_text()))}
    assert (cells["FT"].state, cells["KDPO"].state, cells["KDPO"].tries) == ("done", "failed", TRIES)
    assert "could not be acquired" in cells["KDPO"].error
    assert main(["sweep", str(path), "--quiet", *LOCAL]) == 0
    assert "2 of 2 runs are done, 1 loads of a model for 1 cells" in capsys.readouterr().out


def test_a_cell_of_which_no_edit_can_be_made_is_told(tmp_path, monkeypatch, capsys):
    """Called again too, when there is nothing to do."""
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path, models="world", methods=["KDPO"], protocols="single", sizes=1, no_fluency=True,
        overrides={"KDPO": {"lr": [1e-3, 1e38]}},
    )  # fmt: skip
    for _ in range(2):
        assert main(["sweep", str(path), "--quiet", *LOCAL]) == 1
        printed = capsys.readouterr().out
        assert printed.count("no edit could be made") == 1 and "lr=1e+38; " in printed and "2 of 2 runs are done" in printed


def test_second_moments_are_taken_once_a_layer_and_kept_in_the_sweeps_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"Person {n} works as a painter in the city." for n in range(30)))
    one = {"models": "world", "methods": ["KDPO", "KDPO+C"], "sizes": 1, "seeds": [0, 1], "no_fluency": True}
    plan = read_plan(write(tmp_path, **one, stats_text="text.txt"))
    made = []
    with opened(plan, Path("sweep")) as sweep:
        for event in run(sweep, Here(sweep.folder)):
            made += [event.task.name] if event.state == "done" and event.task.name.startswith("statistics") else []
    assert {cell.state for cell in sweep.cells.values()} == {"done"}
    (layer,) = plan.hparams["world/KDPO+C_own-1_single_seed-0"].layers
    (name,) = made
    assert name.startswith(f"statistics/world/layer-{layer}-text-")
    (file,) = Path("sweep/statistics").rglob("*.npz")
    assert file.with_suffix(".json").exists() and f"h.{layer}.mlp" in file.name
    assert not [left for left in Path("sweep/unfinished").rglob("*") if left.is_file()]
    for seed in (0, 1):
        run_json = json.loads(Path(f"sweep/cells/world/KDPO+C_own-1_single_seed-{seed}/run.json").read_text())
        assert run_json["methods"]["KDPO+C"]["stats_dir"] == str(tmp_path / "sweep/statistics/world")
        assert run_json["methods"]["KDPO+C"]["mom2_n_samples"] == 30
