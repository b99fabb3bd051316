"""A sweep as one page: figures over runs, ranks over seeds, what is missing, and the way to every run's report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from kdpo_easyedit.bench.measuring import Measuring, per_edit
from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.runs import RunError
from kdpo_easyedit.bench.schema import FOUR, Cell, EditMetrics, Summary, from_json, to_json
from kdpo_easyedit.bench.significance import joint_interval, share_interval
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.files import json_text
from kdpo_easyedit.report.documents import document_run, write_sweep
from kdpo_easyedit.report.sweep import Run, content, figures, ranks, read_sweep


@pytest.fixture(scope="module")
def sweep(small_world, requests, loaded, tmp_path_factory) -> Path:
    """KDPO and FT on the small world, each in two orders of three edits; MEMIT failed, and of another model none is done."""
    folder = tmp_path_factory.mktemp("table")
    cells = []
    for method in ("KDPO", "FT"):
        hparams = load_hparams(method, "world")
        hparams.model_name = str(small_world.folder)
        for seed in (0, 1):
            cell = Cell("small", method, "own", "sequential", 3, seed, state="done")
            made = compare(
                [Method(method, hparams)], requests[3 * seed : 3 * seed + 3], ["sequential"], folder / cell.folder, seed,
                eval_at=[3], quiet=True, how=Measuring(fluency=False), loaded=loaded,
            )  # fmt: skip
            document_run(made, folder / cell.folder)
            cells.append(cell)
    failed = Cell(
        "small", "MEMIT", "own", "sequential", 3, 0, state="failed", tries=3, error="OutOfMemoryError: <b>no room</b>"
    )
    cells += [failed, replace(failed, seed=1, state="running", error="")]
    cells += [replace(cell, model="other", state="waiting", error="") for cell in cells]
    (folder / "sweep.json").write_text(json_text(to_json(cells)))
    return folder


def test_a_figure_is_the_mean_over_runs_with_its_interval_over_edits(sweep):
    runs = [run for run in read_sweep(sweep) if run.method == "KDPO" and run.cell.model == "small"]
    assert [run.cell.seed for run in runs] == [0, 1] and all(run.row is not None for run in runs)
    metrics = [
        from_json(EditMetrics, json.loads((sweep / run.cell.folder / "metrics-KDPO-sequential.json").read_text()))
        for run in runs
    ]
    edits = per_edit(metrics[0] + metrics[1], "post")  # different edits: each counts by itself
    for key in ("mean", *FOUR):
        value, interval = figures(sweep, runs, [key])[key]
        assert value == pytest.approx(np.mean([getattr(run.row, key) for run in runs]))
        wanted = (
            joint_interval([edits[of] for of in FOUR])
            if key == "mean"
            else share_interval([v for v in edits[key] if v is not None])
        )
        assert interval == wanted
    value, interval = figures(sweep, runs[:1], ["mean"])["mean"]
    assert value == runs[0].row.mean and interval == runs[0].row.intervals["mean"]
    # The same edits twice are as sure as once.
    assert figures(sweep, [runs[0], runs[0]], ["locality"])["locality"][1] == runs[0].row.intervals["locality"]
    assert figures(sweep, [run for run in read_sweep(sweep) if run.method == "MEMIT"], ["mean"]) == {}


def test_every_cell_is_in_the_matrix_and_leads_to_its_report(sweep):
    drawn = content(sweep, sweep)
    assert drawn["states"] == {"done": 4, "running": 1, "waiting": 6, "failed": 1} and drawn["models"] == ["small", "other"]
    (table,) = drawn["tables"]
    assert table["title"] == "The models’ own edits: 3 sequential edits, measured on the final model"
    assert table["cells"].keys() == {"KDPO", "FT", "MEMIT"}
    links = [run["link"] for models in table["cells"].values() for cell in models.values() for run in cell["runs"]]
    assert len(links) == 12 and all((sweep / link).is_file() for link in links if link) and links.count(None) == 8
    assert [run["state"] for run in table["cells"]["MEMIT"]["small"]["runs"]] == ["failed", "running"]
    assert drawn["failed"] == [
        {"name": "small/MEMIT_own-3_sequential_seed-0", "tries": 3, "error": "OutOfMemoryError: <b>no room</b>"}
    ]
    best = [method for method in ("KDPO", "FT") if table["cells"][method]["small"]["figures"]["mean"]["best"]]
    values = {method: table["cells"][method]["small"]["figures"]["mean"]["value"] for method in ("KDPO", "FT")}
    assert best == [max(values, key=values.__getitem__)] and not table["cells"]["KDPO"]["other"]["figures"]
    assert table["ranks"]["mean"]["comparisons"] == 2 and table["ranks"]["mean"]["of"].keys() == {"KDPO", "FT"}
    assert drawn["overall"] == {}  # there is one table


def test_the_page_lies_where_it_is_asked_for(sweep, tmp_path, capsys):
    assert main(["report", str(sweep), "--metrics_save_dir", str(tmp_path / "r")]) == 0
    page, text = (Path(line) for line in capsys.readouterr().out.splitlines())
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    (run, _) = data["sweep"]["tables"][0]["cells"]["KDPO"]["small"]["runs"]
    assert (page.parent / run["link"]).resolve().is_file() and "<b>no room" not in page.read_text()
    lines = text.read_text().splitlines()
    assert "Runs: 4 done, 1 running, 6 waiting, 1 failed." in lines
    (row,) = [line for line in lines if line.startswith("| MEMIT |")]
    assert row == "| MEMIT | (failed, running) | (waiting) | – |"
    (row,) = [line for line in lines if line.startswith("| KDPO |")]
    assert data["sweep"]["tables"][0]["cells"]["KDPO"]["small"]["figures"]["mean"]["text"] in row and row.count("<sub>") == 2
    with pytest.raises(SystemExit):
        main(["report", str(sweep), str(tmp_path)])
    assert "is a sweep, which has a report of its own" in capsys.readouterr().err
    with pytest.raises(RunError, match="holds other things than reports"):
        write_sweep(sweep, sweep / "cells")
    with pytest.raises(RunError, match="holds no sweep"):
        read_sweep(tmp_path)


def test_methods_that_change_no_weights_are_told_apart(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "s")
    for file in (tmp_path / "s" / "cells" / "small").glob("KDPO*/run.json"):
        record = json.loads(file.read_text())
        record["about"]["memories"] = ["KDPO"]
        file.write_text(json.dumps(record))
    drawn = content(tmp_path / "s", tmp_path / "s")
    (table,) = drawn["tables"]
    assert drawn["methods"] == ["FT", "MEMIT", "KDPO ‡"] == list(table["cells"])
    best = {method: cells["small"]["figures"]["mean"]["best"] for method, cells in table["cells"].items() if method != "MEMIT"}
    assert best == {"FT": True, "KDPO ‡": False} and list(table["ranks"]["mean"]["of"]) == ["FT"]


def test_a_run_that_could_make_no_edit_is_the_best_of_nothing(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "s")
    for file in (tmp_path / "s" / "cells" / "small").glob("FT*/summary.json"):
        (row,) = json.loads(file.read_text())
        file.write_text(json.dumps([row | {"failed": row["n_edits"], "locality": 101.0}]))
    (table,) = content(tmp_path / "s", tmp_path / "s")["tables"]
    best = {method: table["cells"][method]["small"]["figures"]["locality"]["best"] for method in ("KDPO", "FT")}
    assert best == {"KDPO": True, "FT": False} and list(table["ranks"]["locality"]["of"]) == ["KDPO"]


def test_nothing_done_yet_is_a_page_too(sweep, tmp_path):
    cells = [replace(cell, state="waiting") for cell in from_json(Cell, json.loads((sweep / "sweep.json").read_text()))]
    (tmp_path / "sweep.json").write_text(json_text(to_json(cells)))
    page, text = write_sweep(tmp_path, tmp_path)
    assert '"measures":{}' in page.read_text() and "Runs: 12 waiting." in text.read_text()


def test_ranks_are_over_comparisons_that_all_methods_have_and_then_over_seeds():
    def run(method: str, model: str, seed: int, mean: float | None, **more: object) -> Run:
        cell = Cell(model, method, "own", "single", 3, seed, **more)
        return Run(cell, None if mean is None else Summary(method, "single", 3, *[None] * 9, intervals={}, mean=mean))

    runs = [
        *(run("A", "m", seed, 90.0) for seed in (0, 1, 2)),
        *(run("B", "m", seed, mean) for seed, mean in ((0, 80.0), (1, 95.0), (2, 90.0))),
        *(run("C", "m", seed, 10.0) for seed in (0, 1, 2)),
        run("A", "n", 0, 10.0), run("B", "n", 0, None), run("C", "n", 0, 90.0),  # B would be missed here
        *(run("D", model, 0, None) for model in "mn"),  # done nowhere
    ]  # fmt: skip
    found, comparisons = ranks(runs, "mean")
    assert comparisons == 3 and list(found) == ["A", "B", "C"]
    of_a, of_b = [1, 2, 1.5], [2, 1, 1.5]
    assert found["A"].mean == pytest.approx(np.mean(of_a)) and found["B"].mean == pytest.approx(np.mean(of_b))
    half = t.ppf(0.975, 2) * np.std(of_a, ddof=1) / np.sqrt(3)
    assert found["A"].interval == pytest.approx([max(1, 1.5 - half), min(3, 1.5 + half)])
    assert found["C"].mean == 3 and found["C"].interval == [3, 3]
    one, comparisons = ranks([of for of in runs if of.cell.seed == 0 and of.cell.model == "m"], "mean")
    assert comparisons == 1 and [(rank.mean, rank.interval) for rank in one.values()] == [(1, []), (2, []), (3, [])]
    assert ranks([of for of in runs if of.method == "D"], "mean") == ({}, 0)
    # One that could make no edit is missing there.
    failed = [replace(of, row=replace(of.row, failed=3)) if (of.method, of.cell.seed) == ("C", 0) else of for of in runs[:9]]
    assert ranks(failed, "mean")[1] == 2
    # Of costs, less is better; a changed hyper-parameter is a row of its own.
    costs = [replace(of, row=replace(of.row, seconds_per_edit=of.row.mean)) for of in runs if of.row and of.cell.model == "m"]
    assert ranks(costs, "seconds_per_edit")[0]["C"].mean == 1
    # Methods that change no weights are ranked where there are no others.
    with_memory = [replace(of, memory=of.method == "B") for of in runs]
    assert list(ranks(with_memory, "mean")[0]) == ["A", "C"] and ranks(with_memory, "mean")[1] == 4
    assert list(ranks([replace(of, memory=True) for of in runs], "mean")[0]) == ["A ‡", "B ‡", "C ‡"]
    assert run("A", "m", 0, 1.0, overrides={"lr": 0.1}).method == "A, lr 0.1"
