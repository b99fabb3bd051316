"""lm-evaluation-harness on the model in memory, with a task that is made here. Without it, that it is told."""

from __future__ import annotations

import builtins
import importlib.util
import json

import pytest
import yaml
from conftest import same_state, state

from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.schema import SEQUENTIAL, SINGLE
from kdpo_easyedit.bench.tasks import Tasks, TasksError
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.report.documents import write_documents

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")


@pytest.fixture
def task(requests, tmp_path, monkeypatch):
    """A task of one's own: which of two answers the prompt of an edit has."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    questions = [{"q": r["prompt"], "choices": [r["ground_truth"], r["target_new"]], "gold": 0} for r in requests[:8]]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    config = {
        "task": "old_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "old_facts.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "old_facts.yaml"


@harness
def test_a_task_is_scored_before_and_after_on_the_model_in_memory(task, loaded, hparams, requests, tmp_path):
    model, tok = loaded
    before, side = state(model), tok.padding_side
    hparams.model_name = loaded
    tasks = Tasks([str(task)], 4)
    scores = tasks.measured(model, tok)
    assert scores["further"] == {"task: old_facts acc": 1.0} and scores["intervals"] == {"task: old_facts acc": [1.0, 1.0]}
    assert same_state(before, state(model)) and tok.padding_side == side
    folder = tmp_path / "run"
    comparison = compare([Method("KDPO", hparams)], requests[:4], [SINGLE, SEQUENTIAL], folder, quiet=True, tasks=tasks)
    single, sequential = comparison.rows
    assert comparison.before.further["task: old_facts acc"] == 1.0
    assert sequential.further["task: old_facts acc"] < 0.6 and not any(key.startswith("task") for key in single.further)
    assert same_state(before, state(model))
    text = write_documents([folder], folder)[1].read_text()
    assert "What the model can still do, 4 sequential edits" in text and r"| old\_facts acc" in text


@harness
@pytest.mark.parametrize("name", ["no_such_task", "missing.yaml"])
def test_a_task_that_is_not_there_is_told_before_any_work(name, tmp_path, capsys):
    arguments = ["--sequential_edit", "--ability_tasks", f"{name}", "--metrics_save_dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert f"ability_tasks names {name!r}, which is no task of lm-evaluation-harness" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_the_harness_it_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    own = builtins.__import__

    def absent(name, *arguments):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return own(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(TasksError, match=r"ability_tasks is 'mmlu,gsm8k', and lm-evaluation-harness cannot be imported"):
        Tasks(["mmlu", "gsm8k"], 5)
    folder = tmp_path / "run"
    assert main(["--sequential_edit", "--ability_tasks", "mmlu", "--metrics_save_dir", str(folder)]) == 2
    assert "pip install 'lm_eval[hf]'" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--ability_limit", "3"], "--ability_limit is 3; allowed: a whole number, 1 or above, with --ability_tasks"),
        (["--hparams_dir", "qwen1.5-0.5b", "--data_dir", "x.json", "--ability_tasks", "mmlu"], "add --sequential_edit"),
        (["--hparams_dir", "qwen1.5-0.5b", "--data_dir", "x.json", "--eval_at", "2"], "is for edits one after another"),
    ],
)
def test_flags_that_go_together(arguments, error, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert error in capsys.readouterr().err
