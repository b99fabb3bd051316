"""Settings chosen on development edits: the same budget for each method, nothing lost, nothing of what is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import on_main, uncosted

from kdpo_easyedit import HParamsError
from kdpo_easyedit.bench import companions as bench_companions
from kdpo_easyedit.bench import protocols
from kdpo_easyedit.bench.companions import companions
from kdpo_easyedit.bench.datasets import DatasetError, load_requests
from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.runs import RunError
from kdpo_easyedit.bench.schema import Summary, to_json
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.method.config import HPARAMS_DIR, read_yaml
from kdpo_easyedit.sweep import development, space, tuning
from kdpo_easyedit.sweep.development import read_development
from kdpo_easyedit.sweep.space import Range, Space
from kdpo_easyedit.sweep.tasks import Event, Here, Task, connect
from kdpo_easyedit.sweep.tuning import HOW, TuneError, Tuning, score, tune

ALL = sorted(file.stem for file in (Path(space.__file__).parent / "spaces").glob("*.yaml"))
METHODS = ["KDPO", "FT"]


@pytest.fixture(scope="module")
def three() -> Tuning:
    """Three development edits of the world that comes with the package, three trials."""
    inputs = read_development("world", "world", size=3)
    return Tuning("world", inputs.requests, inputs.data_name, ["single", "sequential"], trials=3)


def row(method: str, protocol: str) -> Summary:
    """A row without figures."""
    return Summary(method, protocol, 3, *[None] * 9, intervals={})


class Noting(Here):
    """Does tasks here, and notes their names."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.names: list[str] = []

    def submit(self, *tasks: Task) -> None:
        self.names += [task.name for task in tasks if "trials" in task.name]
        super().submit(*tasks)


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """What a study's journal has chosen, trial by trial."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "study.jsonl")))
    (study,) = storage.get_all_studies()
    return [
        {"params": t.params, "value": t.value, "state": t.state.name} | t.user_attrs
        for t in storage.get_all_trials(study._study_id)
    ]


@pytest.fixture(scope="module")
def tuned(three, tmp_path_factory):
    """Two trials of two methods, then a third of each by the same call with more of them."""
    folder = tmp_path_factory.mktemp("tune")
    first = tune(METHODS, replace(three, trials=2), folder, Noting(folder))
    workers = Noting(folder)
    return folder, first, tune(METHODS, three, folder, workers), workers.names


def test_every_method_has_the_same_budget_and_only_missing_trials_are_run(tuned, three):
    folder, first, second, names = tuned
    assert [(found.method, found.trials) for found in first] == [("KDPO", 2), ("FT", 2)]
    assert [(found.method, found.trials) for found in second] == [("KDPO", 3), ("FT", 3)]
    assert names == ["world/KDPO/trials/002", "world/FT/trials/002"]
    workers = Noting(folder)
    assert tune(METHODS, three, folder, workers) == second and workers.names == []
    assert not list(folder.rglob("weights-*"))


def test_the_first_trial_has_the_present_settings(tuned):
    folder, _, second, _ = tuned
    for found in second:
        first, *others = trials_of(folder / "world" / found.method)
        assert first["settings"] == {} and first["value"] == found.present and first["state"] == "COMPLETE"
        assert all(other["settings"].keys() >= {"lr", "layers"} for other in others)
        assert found.best == max(trial["value"] for trial in (first, *others) if trial["value"] is not None)


def test_what_is_reported_is_never_used(tuned):
    folder = tuned[0]
    own = companions("world")
    reported = {request["prompt"] for request in load_requests(own.edits)}
    chosen_on = {request["prompt"] for request in load_requests(own.development)}
    used = set()
    for file in (folder / "world").rglob("metrics-*.json"):
        used |= {entry["requested_rewrite"]["prompt"] for entry in json.loads(file.read_text())}
    assert len(used) == 3 and used <= chosen_on and not used & reported


def test_the_yaml_loads_says_what_was_tried_and_reproduces_its_figure(tuned, three, tmp_path):
    _, _, (found, _), _ = tuned
    text = found.file.read_text()
    told = ("for KDPO on world", "3 development edits", "3 trials: the settings", f"Score: {found.best:.2f}")
    for words in (*told, "lr 1e-05 to 0.01, log"):
        assert words in " ".join(text.replace("# ", " ").split())
    assert f"began with score {found.present:.2f}" in " ".join(text.replace("# ", " ").split())
    assert read_yaml(found.file) == read_yaml(HPARAMS_DIR / "KDPO" / "world.yaml") | found.changed
    hparams = load_hparams("KDPO", found.file)
    again = compare([Method("KDPO", hparams)], three.requests, three.protocols, tmp_path, eval_at=[3], how=HOW, quiet=True)
    assert score(again.rows, None) == found.best


def test_a_study_that_is_killed_in_a_trial_goes_on_to_the_same_result(tuned, three, tmp_path, monkeypatch):
    whole = trials_of(tuned[0] / "world" / "KDPO")
    edits = []
    timed = protocols.timed_edit

    def killed(*arguments: Any) -> Any:
        edits.append(arguments)
        if len(edits) == 8:  # the second one of the second trial
            raise KeyboardInterrupt
        return timed(*arguments)

    monkeypatch.setattr(protocols, "timed_edit", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(["KDPO"], three, tmp_path, Here(tmp_path))
    assert [trial["state"] for trial in trials_of(tmp_path / "world" / "KDPO")] == ["COMPLETE", "RUNNING"]
    with (tmp_path / "world" / "KDPO" / "study.jsonl").open("a") as journal:
        journal.write('{"op_code":6,"worker')  # a line that was cut off
    left = tmp_path / "world" / "KDPO" / "trials" / "001" / "weights-KDPO.safetensors.1.unfinished"
    left.write_text("half")
    workers = Noting(tmp_path)
    tune(["KDPO"], three, tmp_path, workers)
    assert workers.names == ["world/KDPO/trials/001", "world/KDPO/trials/002"] and not left.exists()
    assert len(edits) == 3 * 6 + 2  # the edit in which it was killed is made again, and the one that was not measured yet
    assert [{**trial, "rows": [uncosted(of) for of in trial["rows"]]} for trial in trials_of(tmp_path / "world" / "KDPO")] == [
        {**trial, "rows": [uncosted(of) for of in trial["rows"]]} for trial in whole
    ]


def test_settings_that_go_too_far_are_a_failed_trial_and_not_the_end(three, tmp_path, monkeypatch):
    monkeypatch.setattr(space, "read_space", lambda method: {"lr": {"choices": [1e30]}})
    (found,) = tune(["KDPO"], replace(three, trials=4, protocols=["single"]), tmp_path, Here(tmp_path))
    states = [trial["state"] for trial in trials_of(tmp_path / "world" / "KDPO")]
    assert states[0] == "COMPLETE" and found.failed == states.count("FAIL") > 0 and found.trials == 4
    assert "none of the single edits could be made" in found.error
    assert found.best == found.present and found.changed == {} and found.file.exists()
    assert f"4 trials, of which {found.failed} failed" in found.file.read_text()


def test_a_yaml_that_is_there_is_written_over_only_where_asked(tuned, three, tmp_path):
    folder, _, (found, _), _ = tuned
    theirs = tmp_path / "FT" / "world.yaml"
    theirs.parent.mkdir()
    theirs.write_text("alg_name: FT\n")
    workers = Noting(folder)
    with pytest.raises(TuneError, match=r"FT/world\.yaml is there already.*--overwrite"):
        tune(METHODS, replace(three, trials=9), folder, workers, tmp_path)
    assert workers.names == [] and theirs.read_text() == "alg_name: FT\n" and not (tmp_path / "KDPO").exists()
    tune(METHODS, three, folder, workers, tmp_path, overwrite=True)
    assert read_yaml(theirs)["num_steps"] > 0 and (tmp_path / "KDPO" / "world.yaml").read_text() == found.file.read_text()


def test_two_methods_that_go_into_one_yaml_are_refused(three, tmp_path):
    with pytest.raises(TuneError, match=r"names FT and FT-L, which both go into .*hparams/FT/world\.yaml; leave one"):
        tune(["KDPO", "FT", "FT-L"], three, tmp_path, Here(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_present_settings_may_be_written_over_and_the_study_goes_on(tuned, three, tmp_path):
    """Where the YAML that a study begins with is the one that it writes."""
    source = tmp_path / "hparams" / "KDPO" / "mine.yaml"
    source.parent.mkdir(parents=True)
    shutil.copyfile(HPARAMS_DIR / "KDPO" / "world.yaml", source)
    mine = replace(three, hparams=str(source), trials=1, protocols=["single"])
    for trials in (1, 2):
        (found,) = tune(
            ["KDPO"], replace(mine, trials=trials), tmp_path / "t", Here(tmp_path / "t"), tmp_path / "hparams", overwrite=True
        )
        source.write_text(source.read_text() + "sequential_lr_scale: 0.7\n")
    assert read_yaml(tmp_path / "t" / "mine" / "KDPO" / "present.yaml") == read_yaml(HPARAMS_DIR / "KDPO" / "world.yaml")
    assert found.trials == 2 and found.file == source and "2 trials" in source.read_text()


def test_the_yamls_are_found_by_folder_and_name_with_the_models_own_edits(tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tuned[0].parent)
    name = f"{tuned[0].name}/hparams/world"
    command = ["--editing_method", *METHODS, "--hparams_dir", name, "--ds_size", "1", "--no_fluency", "--quiet"]
    assert main([*command, "--metrics_save_dir", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["about"]["data"] == "the world's own edits" and record["protocols"] == ["single", "sequential"]
    for found in tuned[2]:
        assert record["methods"][found.method].items() >= found.changed.items()


def test_the_device_and_dtype_of_the_command_go_before_the_yamls(three, tmp_path):
    asked = replace(three, dtype="bfloat16", trials=1, protocols=["single"])
    (found,) = tune(["FT"], asked, tmp_path, Here(tmp_path))
    assert json.loads((tmp_path / "world" / "FT" / "run.json").read_text())["dtype"] == "torch.bfloat16"
    trial = json.loads((tmp_path / "world" / "FT" / "trials" / "000" / "run.json").read_text())
    assert trial["methods"]["FT"]["dtype"] == "bfloat16" and "dtype" not in found.file.read_text()


def test_another_study_in_the_folder_is_refused(tuned, three):
    folder = tuned[0]
    with pytest.raises(RunError, match=r"seed is 0 there and 1 here\. Name another folder, or remove this one"):
        tune(["KDPO"], replace(three, seed=1), folder, Here(folder))


def test_the_command_tells_what_was_found(tuned, capsys):
    folder, _, second, _ = tuned
    command = [
        "tune",
        "--hparams_dir",
        "world",
        "--editing_method",
        *METHODS,
        "--trials",
        "3",
        "--ds_size",
        "3",
        "--metrics_save_dir",
        str(folder),
    ]
    assert main([*command, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{found.best:.2f}" in printed and str(found.file) in printed.replace("\n", "") for found in second)
    with pytest.raises(SystemExit):
        main(["tune", "--data_dir", "edits.json"])
    assert "--reported is missing" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Edits.


def test_edits_that_are_reported_are_left_out_of_a_file(small_world, requests):
    taken = read_development("gpt2", "gpt2", str(small_world.edits), reported=5).requests
    assert taken == requests[5:45] and len(taken) >= 3
    with pytest.raises(DatasetError, match="ds_size is 1, and beside those reported there are 0 edits"):
        read_development("gpt2", "gpt2", str(small_world.edits), reported=len(requests))
    with pytest.raises(DatasetError, match="data_dir is missing"):
        read_development("gpt2", "gpt2")


def test_development_edits_that_are_reported_are_refused(monkeypatch):
    own = companions("world")
    assert not {r["prompt"] for r in load_requests(own.development)} & {r["prompt"] for r in load_requests(own.edits)}
    monkeypatch.setattr(development, "companions", lambda *_: replace(own, development=own.edits))
    with pytest.raises(DatasetError, match="is among the edits to report"):
        read_development("world", "world")


def test_a_real_models_development_edits_and_text_are_none_of_the_reported(monkeypatch):
    openings = [f"article {n}" for n in range(900)]
    monkeypatch.setattr(bench_companions.packed, "wikipedia_openings", lambda: (openings, ["held out"]))
    own, inputs = companions("smollm2-135m"), read_development("smollm2-135m", "smollm2-135m")
    reported = {request["subject"] for request in load_requests(own.edits)}
    assert len(inputs.requests) == 40 and not {request["subject"] for request in inputs.requests} & reported
    assert inputs.stats_text.passages == openings[:300] and inputs.ability_texts == openings[300:600]


# --------------------------------------------------------------------------------------------------------------------
# Spaces and scores.


class Fixed:
    """A trial that has given values."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def suggest_int(self, name: str, low: int, high: int, log: bool = False) -> int:
        assert low <= self.values[name] <= high
        return self.values[name]

    suggest_float = suggest_int

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert self.values[name] in choices
        return self.values[name]


@pytest.mark.parametrize("method", ALL)
def test_every_method_has_a_space_that_holds_its_present_settings(method):
    assert len(ALL) == 19
    for file in sorted((HPARAMS_DIR / method).glob("*.yaml")):
        try:
            hparams = load_hparams(method, file)
        except HParamsError as error:
            assert not on_main() and "release" in str(error)
            continue
        its = Space(method, hparams, 40)
        for name, value in its.settings(Fixed(its.present)).items():
            present = getattr(hparams, name)
            if isinstance(present, list) and not isinstance(value, list):  # one for every layer
                (present,) = set(present)
            assert value == (present if isinstance(value, (list, str, bool)) else pytest.approx(present)), (file, name)
        assert 2 <= len(its.parameters) <= 7 and its.words().keys() >= {"lr"} & its.parameters.keys()


def test_layers_are_a_share_of_the_depth(monkeypatch, hparams):
    monkeypatch.setattr(space, "read_space", lambda _: {"layers": {"depth": [0.5, 1.0], "number": [1, 3]}})
    its = Space("MEMIT", replace(hparams, layers=[2]), 31)
    assert its.words() == {"layers": "2 to 30", "layers, how many": "1 to 3"}  # 15 to 30, and where it is now
    assert its.settings(Fixed({"layers": 29, "layers.number": 3})) == {"layers": [29, 30]}
    monkeypatch.setattr(space, "read_space", lambda _: {"layers": {"between": [0, 1]}})
    with pytest.raises(HParamsError, match=r"layers is \{'between': \[0, 1\]\}; allowed: "):
        Space("MEMIT", hparams, 31)
    modules = SimpleNamespace(inner_params=["model.layers.22.mlp", "model.layers.23.mlp"])
    monkeypatch.setattr(space, "read_space", lambda _: {"inner_params": {"depth": [0.0, 1.0], "number": [1, 3]}})
    its = Space("ULTRAEDIT", modules, 31)
    assert its.present == {"inner_params": 22, "inner_params.number": 2}
    assert its.settings(Fixed({"inner_params": 30, "inner_params.number": 2})) == {"inner_params": ["model.layers.30.mlp"]}
    modules.inner_params[1] = "model.layers.30.mlp"
    with pytest.raises(HParamsError, match="allowed for a search: one module, of consecutive layers"):
        Space("ULTRAEDIT", modules, 31)
    with pytest.raises(HParamsError, match="IKE has no search space; those that have one: AlphaEdit, DPO"):
        Space("IKE", hparams, 31)


def test_what_has_no_logarithm_is_told(monkeypatch):
    monkeypatch.setattr(space, "read_space", lambda _: {"kl_factor": {"from": 1e-2, "to": 4.0, "log": True}})
    with pytest.raises(HParamsError, match=r"kl_factor is 0; allowed where ROME is tuned: a number above 0.* from 0\.01 to 4"):
        Space("ROME", SimpleNamespace(kl_factor=0), 31)
    assert Space("ROME", SimpleNamespace(kl_factor=5e-3), 31).words() == {"kl_factor": "0.005 to 4, log"}


def test_weights_that_differ_from_layer_to_layer_are_told(monkeypatch):
    monkeypatch.setattr(space, "read_space", lambda _: {"mom2_update_weight": {"from": 10.0, "to": 100.0}})
    assert Space("EAMET", SimpleNamespace(mom2_update_weight=[20, 20]), 31).present == {"mom2_update_weight": 20}
    with pytest.raises(HParamsError, match=r"mom2_update_weight is \[20, 30\]; allowed where EAMET is tuned: the same"):
        Space("EAMET", SimpleNamespace(mom2_update_weight=[20, 30]), 31)


def test_numbers_are_short():
    class Long:
        def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
            return 0.00123456789

    assert Range(1e-4, 1e-2, log=True).suggest(Long(), "lr") == 0.00123
    assert Range(1e-4, 0.0012, log=True).suggest(Long(), "lr") == 0.0012


def test_perplexity_counts_against_a_sequence_beyond_two_percent():
    rows = [replace(row("KDPO", "single"), mean=80.0), replace(row("KDPO", "sequential"), mean=60.0, perplexity=20.4)]
    assert score(rows, 20.0) == 70 and score(rows, None) == 70
    assert score([rows[0], replace(rows[1], perplexity=21.0)], 20.0) == pytest.approx(70 - 3 / 2)
    with pytest.raises(ArithmeticError, match=r"sequential edits: .*not finite"):
        score([rows[0], replace(rows[1], perplexity=float("inf"))], 20.0)


# --------------------------------------------------------------------------------------------------------------------
# Side by side.


class Backwards:
    """Does no task: makes results up, and those that come last first."""

    def __init__(self, order: int) -> None:
        self.order, self.waiting, self.most = order, [], 0

    def submit(self, *tasks: Task) -> None:
        self.waiting += tasks

    def events(self) -> Iterator[Event]:
        while self.waiting:
            self.most = max(self.most, len(self.waiting))
            task = self.waiting.pop(self.order)
            result = None
            if task.function is tuning.run_trial:
                lr = task.arguments[0].method.hparams.lr
                result = {"rows": to_json([replace(row("KDPO", "single"), mean=1000 * lr)]), "perplexity": None}
            yield Event(task, "done", 1, "nowhere", result=result)


def test_trials_side_by_side_choose_the_same_whichever_is_done_first(three, tmp_path):
    found = []
    for order in (0, -1):
        workers = Backwards(order)
        tune(METHODS, replace(three, trials=8, at_once=3), tmp_path / str(order), workers)
        assert workers.most == 6
        found.append([trials_of(tmp_path / str(order) / "world" / method) for method in METHODS])
    assert found[0] == found[1] and [len(of) for of in found[0]] == [8, 8]
    assert len({trial["params"]["lr"] for trial in found[0][0]}) == 8


def test_what_a_trial_chooses_follows_from_its_number_whoever_is_chosen_with_it(three, tmp_path):
    for trials in (3, 4):  # two at once: the third alone, and with a fourth
        tune(["KDPO"], replace(three, trials=trials, at_once=2), tmp_path / str(trials), Backwards(0))
    three_, four = (trials_of(tmp_path / str(trials) / "world" / "KDPO") for trials in (3, 4))
    assert three_ == four[:3]


def test_added_trials_that_are_stopped_leave_a_yaml_that_is_still_the_studys(three, tmp_path):
    class Stopping(Backwards):
        def events(self) -> Iterator[Event]:
            for number, event in enumerate(super().events()):
                if number == 2:  # after the measurement before, and a trial
                    raise KeyboardInterrupt
                yield event

    tune(["KDPO"], replace(three, trials=2), tmp_path, Backwards(0))
    with pytest.raises(KeyboardInterrupt):
        tune(["KDPO"], replace(three, trials=4), tmp_path, Stopping(0))
    assert [trial["state"] for trial in trials_of(tmp_path / "world" / "KDPO")] == ["COMPLETE"] * 3 + ["RUNNING"]
    (found,) = tune(["KDPO"], replace(three, trials=4), tmp_path, Backwards(0))
    assert found.trials == 4 and "4 trials" in found.file.read_text()
    found.file.write_text(found.file.read_text() + "# theirs\n")
    with pytest.raises(TuneError, match="is there already"):
        tune(["KDPO"], replace(three, trials=4), tmp_path, Backwards(0))


def test_on_a_cluster_the_same_is_found_as_here(three, tmp_path):
    pytest.importorskip("ray")
    asked = replace(three, trials=2, at_once=2, protocols=["single"], requests=three.requests[:2])
    found = []
    for address in ("local", None):  # None: a cluster of this machine's own
        folder = tmp_path / str(address)
        folder.mkdir()
        with connect(address, folder) as workers:
            found.append(tune(["FT"], asked, folder, workers))
    here, there = ([(of.method, of.trials, of.present, of.best, of.changed) for of in its] for its in found)
    assert here == there and found[0][0].file.read_text() == found[1][0].file.read_text()
