"""run_kdpo.py, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from conftest import ROOT, on_main, real

from kdpo_easyedit.bench import protocols
from kdpo_easyedit.bench.facts import FILES
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.models.packed import wikipedia_openings


def run(*arguments: object, folder: Path, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess:
    """The command line, from a folder of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run_kdpo.py"), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def small_yaml(small_world, tmp_path_factory) -> Path:
    """hparams/KDPO/world.yaml for the small world."""
    config = yaml.safe_load((ROOT / "hparams" / "KDPO" / "world.yaml").read_text())
    path = tmp_path_factory.mktemp("hparams") / "small.yaml"
    path.write_text(yaml.safe_dump({**config, "model_name": str(small_world.folder)}))
    return path


def test_help_reads_well_and_needs_nothing(tmp_path):
    done = run("--help", folder=tmp_path, EASYEDIT_HOME="/nowhere")
    assert done.returncode == 0 and done.stderr == ""
    for flag in (
        "--editing_method", "--hparams_dir", "--data_dir", "--datatype", "--ds_size", "--metrics_save_dir",
        "--sequential_edit", "--easyedit_dir", "--device", "--seed", "--latex", "report output hundred",
    ):  # fmt: skip
        assert flag in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


HAND = ["--prompt", "Ada works as a", "--target_new", "judge"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editing_method", "KDPOO"], "editing_method is 'KDPOO'"),
        (["--hparams_dir", "qwen1.5-0.5"], "qwen1.5-0.5b"),
        (["--hparams_dir", "qwen1.5-0.5b"], "data_dir is missing"),
        (["--data_dir", "none.json"], "none.json: cannot be read"),
        (["--data_dir", "broken.json"], "broken.json: not a JSON file"),
        (["--data_dir", "data.json", "--ds_size", "7"], "ds_size is 7, and the file has 1"),
        (["--data_dir", "data.json", "--datatype", "zsre_ment"], "datatype is 'zsre_ment'; allowed: knowedit"),
        (["--ds_size", "0"], "--ds_size is 0"),
        (["--eval_at", "10", "0"], "--eval_at is [10, 0]"),
        (["--sequential_edit", "--eval_at", "1", "3", "--data_dir", "data.json"], "eval_at is 3, and there are 1 edits"),
        (
            ["--ablation", "--eval_at", "1", "3", "--ds_size", "1", "--data_dir", "data.json"],
            "eval_at is 3, and there are 1 edits",
        ),
        (["--edit_batch", "0"], "--edit_batch is [0]"),
        (["--editing_method", "MEMIT", "ROME", "--edit_batch", "1", "10"], "ROME makes one edit at a time: no batches of 10"),
        (
            ["--editing_method", "MEMIT", "--edit_batch", "3", "--data_dir", "data.json"],
            "edit_batch is 3, and there are 1 edits",
        ),
        (["--edit_batch", "2", "--orders", "2"], "--edit_batch makes edits in the given order"),
        (["--save_edits", "x"], "name one method"),
        (
            ["--editing_method", "MEND"],
            "editing_method is 'MEND', which needs an editor that was trained for the model",
        ),
        pytest.param(
            ["--editing_method", "WISE"],
            "editing_method is 'WISE', which EasyEdit's release does not have, but its GitHub main branch does",
            marks=pytest.mark.skipif(on_main(), reason="main has it"),
        ),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--save_edits", "no/x", "--editing_method", "KDPO"], "save_edits is 'no/x', whose folder is not there"),
        (["--ablation", "--editing_method", "KDPO"], "--ablation compares four methods of its own, and takes no --edit"),
        (["--ablation", "--prompt", "a", "--target_new", "b"], "takes no --ablation"),
        (["--prompt", "Ada is"], "--prompt is for one edit by hand, which needs --prompt and --target_new"),
        (["--subject", "Ada"], "--subject is for one edit by hand"),
        ([*HAND, "--data_dir", "data.json"], "--prompt makes one edit by hand, and takes no --data_dir"),
        ([*HAND, "--sequential_edit"], "takes no --sequential_edit"),
        ([*HAND, "--metrics_save_dir", "output"], "takes no --metrics_save_dir"),
        ([*HAND, "--editing_method", "KDPO", "ROME"], "subject is missing: ROME edits at it (fact_token: subject_last)"),
        ([*HAND, "--subject", "Bob"], "subject is 'Bob', which is not in the prompt 'Ada works as a'"),
        ([*HAND, "--rephrase_prompt", " "], "rephrase_prompt is ' '; allowed"),
        ([*HAND, "--editing_method", "KDPO", "FT", "--save_edits", "x"], "name one method"),
    ],
)
def test_bad_input_gets_one_line_before_anything_is_done(tmp_path, monkeypatch, capsys, arguments, message):
    record = {"prompt": "Ada was born in", "target_new": "Paris", "subject": "Ada", "locality": {}}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    (tmp_path / "broken.json").write_text("[{")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "cache"))
    try:
        assert main(arguments if "--hparams_dir" in arguments else [*arguments, "--hparams_dir", "world"]) == 2
    except SystemExit as error:  # argparse's way
        assert error.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and printed.out == ""
    assert not (tmp_path / "output").exists() and not (tmp_path / "cache").exists()


def test_a_reader_that_has_read_enough_ends_the_command_quietly(tmp_path):
    (tmp_path / "sweep.yaml").write_text("{models: world, methods: KDPO, sizes: 1}")
    command = [sys.executable, str(ROOT / "run_kdpo.py"), "sweep", "sweep.yaml", "--dry_run"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)


def test_an_easyedit_that_is_not_there_is_told_in_one_line(tmp_path):
    done = run("--hparams_dir", "world", "--easyedit_dir", "nowhere", folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "EASYEDIT_HOME is 'nowhere'" in done.stderr and "git clone" in done.stderr


@pytest.mark.parametrize("layout", ["knowedit", "zsre_mend"])
def test_data_files_are_edited_and_nothing_is_written_elsewhere(small_world, small_yaml, tmp_path, layout):
    records = json.loads(small_world.edits.read_text())[:1]
    if layout == "zsre_mend":
        records = [
            {
                "subject": record["subject"],
                "src": record["prompt"],
                "alt": record["target_new"],
                "answers": record["ground_truth"],
                "rephrase": record["rephrase_prompt"],
                "loc": f"nq question: {record['locality']['Relation_Specificity'][0]['prompt']}",
                "loc_ans": record["locality"]["Relation_Specificity"][0]["ground_truth"][0],
            }
            for record in records
        ]
    cache = set(Path(os.environ["KDPO_CACHE"]).rglob("*"))
    (tmp_path / "data.json").write_text(json.dumps(records))
    done = run(
        "--editing_method", "KDPO", "--hparams_dir", small_yaml, "--data_dir", "data.json", "--datatype", layout,
        "--metrics_save_dir", "results", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results"
    assert {path.name for path in tmp_path.iterdir()} == {"data.json", "results"}
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "run.json", "before.jsonl", "measuring.jsonl", "KDPO-single.jsonl", "metrics-KDPO-single.json",
        "summary.json", "radar.png",
        "logs", "tests.json", "report.html", "summary.md", *(["easyedit-summary.json"] if on_main() else []),
    }  # fmt: skip
    assert done.stdout.splitlines()[-1] == "the report: results/report.html"
    assert set(Path(os.environ["KDPO_CACHE"]).rglob("*")) == cache
    (row,) = json.loads((folder / "summary.json").read_text())
    assert (row["method"], row["protocol"], row["n_edits"], row["edit_success"]) == ("KDPO", "single", 1, 100)
    assert f"→ {records[0].get('target_new', records[0].get('alt'))}" in done.stdout and "1 single edits" in done.stdout
    bars = {line.partition(":")[0] for line in done.stderr.splitlines() if line}
    assert bars == {"before editing", "KDPO, single edits"}  # and none of EasyEdit's own


def test_an_edit_by_hand_is_shown_and_kept_where_asked_and_nowhere_else(small_world, small_yaml, tmp_path):
    record = json.loads(small_world.edits.read_text())[0]
    arguments = ("--prompt", record["prompt"], "--target_new", record["target_new"], "--hparams_dir", small_yaml)
    done = run(*arguments, "--save_edits", "one.safetensors", folder=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    (before,) = re.findall(r"^  \(before\) +(.*\S)", done.stdout, re.M)
    (after,) = re.findall(r"^  KDPO +(.*\S)", done.stdout, re.M)
    assert before.startswith(record["ground_truth"][0]) and after.startswith(record["target_new"])
    assert "the target is said" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80


def test_where_no_edit_can_be_made_the_status_says_so(small_world, small_yaml, tmp_path, monkeypatch, capsys):
    """Here for a step that leads to no numbers; the run is complete, and its report says why."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(small_yaml.read_text()) | {"lr": 1e38}
    (tmp_path / "kdpo.yaml").write_text(yaml.safe_dump(settings))
    data = ["--data_dir", str(small_world.edits), "--ds_size", "1", "--no_fluency", "--quiet"]
    assert main(["--editing_method", "KDPO", "--hparams_dir", "kdpo.yaml", *data]) == 1
    assert "1 of 1 edits could not be made" in capsys.readouterr().out


def test_a_folder_with_a_summary_of_something_else_is_told(small_world, small_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for content in ("# no JSON", "5"):
        Path("summary.json").write_text(content)
        command = ["--hparams_dir", str(small_yaml), "--data_dir", str(small_world.edits), "--ds_size", "1", "--quiet"]
        assert main([*command, "--metrics_save_dir", "."]) == 2
        assert "what it holds is no run" in capsys.readouterr().err and Path("summary.json").read_text() == content


def test_a_folder_is_no_file_to_save_edits_in(small_world, small_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--hparams_dir", str(small_yaml), "--data_dir", str(small_world.edits), "--ds_size", "1", "--quiet"]
    assert main([*given, "--editing_method", "KDPO", "--sequential_edit", "--save_edits", str(tmp_path)]) == 2
    assert "which is a folder; name a file in it" in capsys.readouterr().err


def test_the_ablation_is_one_command_and_one_table(small_world, small_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--ablation", "--hparams_dir", str(small_yaml), "--data_dir", str(small_world.edits), "--eval_at", "2"]
    assert main([*arguments, "--ds_size", "3", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"after {n} edits") for n in (2, 3)] == [1, 1] and printed.count("DPO-ablation-once") == 2
    rows = json.loads((tmp_path / "output" / "curve.json").read_text())
    assert [(row["method"], row["n_edits"]) for row in rows] == [
        (method, n) for method in ("KDPO", "KDPO-once", "DPO-ablation", "DPO-ablation-once") for n in (2, 3)
    ]


def test_the_main_job_on_the_world(tmp_path):
    done = run("--hparams_dir", "world", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    rows = {(row["method"], row["protocol"]): row for row in json.loads((folder / "summary.json").read_text())}
    assert list(rows) == [(m, p) for p in ("single", "sequential") for m in ("KDPO", "KDPO+C", "FT", "ROME", "MEMIT")]
    assert all(row["n_edits"] == 20 for row in rows.values())
    assert min(rows[method, "single"]["edit_success"] for method in ("KDPO", "KDPO+C")) >= 95
    for baseline in ("FT", "ROME", "MEMIT"):  # tuned: a baseline that does not edit would be no comparison
        assert rows[baseline, "single"]["edit_success"] >= 75
    for method, protocol in rows:
        metrics = json.loads((folder / f"metrics-{method}-{protocol}.json").read_text())
        assert len(metrics) == 20 and all("pre" in entry and "post" in entry for entry in metrics)
        assert f"{rows[method, protocol]['edit_success']:.1f}" in done.stdout
    assert matplotlib.image.imread(folder / "radar.png").shape[0] > 500
    assert matplotlib.image.imread(folder / "curve.png").shape[1] > 1000
    assert [r["n_edits"] for r in json.loads((folder / "curve.json").read_text()) if r["method"] == "KDPO"] == [1, 10, 20]
    assert done.stdout.count("before  ") == done.stdout.count("after   ") == 3


@real
def test_the_default_run_is_the_main_job_on_the_real_model(tmp_path):
    """The first command of the README, with one edit, and little text for second moments."""
    openings, held_out = wikipedia_openings()
    (tmp_path / "text.txt").write_text("\n".join(openings[:30]))
    (tmp_path / "read.txt").write_text("\n".join(held_out[:3]))
    flags = "--ds_size", 1, "--stats_text", "text.txt", "--ability_text", "read.txt", "--no_fluency"
    done = run(*flags, folder=tmp_path, timeout=3000, OMP_NUM_THREADS=str(os.cpu_count()))  # as users run it; one takes long
    assert done.returncode == 0, done.stderr
    rows = {(row["method"], row["protocol"]): row for row in json.loads((tmp_path / "output" / "summary.json").read_text())}
    assert list(rows) == [(m, p) for p in ("single", "sequential") for m in ("KDPO", "KDPO+C", "FT", "ROME", "MEMIT")]
    assert all(row["n_edits"] == 1 and not row["failed"] for row in rows.values())
    assert all(rows[method, "sequential"]["perplexity"] > 5 for method, _ in rows)
    assert min(rows[method, "single"]["edit_success"] for method in ("KDPO", "KDPO+C", "ROME")) == 100
    (first, *_) = json.loads(FILES["reported"].read_text())
    assert f"{first['prompt']}   → {first['target_new']}" in " ".join(done.stdout.split("\n"))
    (before,) = re.findall(r"^    before  (.*)", done.stdout, re.M)
    (after,) = re.findall(r"^    after   (.*)", done.stdout, re.M)
    assert before.startswith(first["ground_truth"][0]) and after.startswith(first["target_new"])


@real
def test_of_the_main_jobs_few_edits_no_texts_are_written_for_fluency(monkeypatch, small_world):
    """And of a file's edits the model's own protocols are not made: single ones alone, as for any model."""
    asked = []

    def stop(_methods, _requests, chosen, *arguments, **how):
        asked.append((chosen, how["how"].fluency, how["eval_at"]))
        raise SystemExit

    monkeypatch.setattr(protocols, "compare", stop)
    for arguments in ([], ["--ds_size", "2"], ["--data_dir", str(small_world.edits), "--ds_size", "2"]):
        with pytest.raises(SystemExit):
            main(arguments)
    both = ["single", "sequential"]
    assert asked == [(both, False, [2]), (both, True, None), (["single"], True, None)]


def test_statistics_that_are_missing_are_told_or_made_from_a_text(small_world, tmp_path):
    config = yaml.safe_load((ROOT / "hparams" / "KDPO+C" / "world.yaml").read_text())
    own = {"model_name": str(small_world.folder), "stats_dir": "stats", "mom2_dataset": "of-nobody"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config | own))
    arguments = "--editing_method", "KDPO+C", "--hparams_dir", "mine.yaml", "--data_dir", small_world.edits, "--ds_size", 1
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2 and "there are no such statistics" in done.stderr and "--stats_text" in done.stderr
    assert not (tmp_path / "output" / "before.jsonl").exists()
    done = run(*arguments, "--stats_text", small_world.folder / "text.txt", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "stats").rglob("*.npz")
    assert "text-" in str(file) and (tmp_path / "output" / "report.html").exists()
