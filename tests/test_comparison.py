"""Methods × requests → metrics: the same as EasyEdit's own, for every method on the same model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict

import easyeditor
import numpy as np
import pytest
import yaml
from conftest import ROOT, on_main, same_state, state, uncosted
from safetensors.torch import load_file
from test_host import arguments

from kdpo_easyedit import HParamsError
from kdpo_easyedit.bench import measuring, protocols
from kdpo_easyedit.bench.datasets import DatasetError
from kdpo_easyedit.bench.measuring import Measuring, per_edit, summarise
from kdpo_easyedit.bench.protocols import Method, ablation, compare
from kdpo_easyedit.bench.schema import MEASURES, SEQUENTIAL, SINGLE, EditMetrics, from_json
from kdpo_easyedit.bench.significance import paired_tests, share_interval
from kdpo_easyedit.bench.writing import write_answers
from kdpo_easyedit.easyedit import host
from kdpo_easyedit.easyedit import methods as algorithms
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.easyedit.loading import in_place
from kdpo_easyedit.easyedit.measuring import edit_quality, own_summary

N = 3


@pytest.fixture(scope="module")
def methods(small_world) -> list[Method]:
    found = []
    for name in ("KDPO", "FT", "ROME", "MEMIT"):
        hparams = load_hparams(name, "world")
        hparams.model_name = str(small_world.folder)
        if hasattr(hparams, "stats_dir"):
            hparams.stats_dir = str(small_world.statistics)
        found.append(Method(name, hparams))
    return found


@pytest.fixture(scope="module")
def run(methods, requests, tmp_path_factory):
    """Both protocols on the small world, with what they print."""
    folder = tmp_path_factory.mktemp("run")
    return compare(methods, requests[:N], [SINGLE, SEQUENTIAL], folder), folder


def test_a_row_for_every_method_and_protocol(run):
    comparison, folder = run
    assert [(row.method, row.protocol) for row in comparison.rows] == [
        (method, protocol) for protocol in (SINGLE, SEQUENTIAL) for method in ("KDPO", "FT", "ROME", "MEMIT")
    ]
    for row in comparison.rows:
        assert row.n_edits == N
        for measure in (row.edit_success, row.generalization, row.locality, row.portability):
            assert 0 <= measure <= 100
        assert 1 < row.fluency < 9 and row.seconds_per_edit > 0
    assert json.loads((folder / "summary.json").read_text()) == [asdict(row) for row in comparison.rows]
    assert comparison.before.edit_success < comparison.rows[0].edit_success == 100


def test_what_easyedit_prints_and_writes_is_in_the_runs_folder(run, capfd):
    _, folder = run
    log = (folder / "logs" / "easyedit.log").read_text()
    assert "Executing FT algo for" in log and "MEMIT request sample" in log
    assert capfd.readouterr().out == ""
    names = ("KDPO", "FT", "ROME", "MEMIT")
    expected = {".lock", "logs", "run.json", "before.jsonl", "measuring.jsonl", "summary.json", "curve.json", "tests.json"}
    expected |= {"easyedit-summary.json"} if on_main() else set()
    for name in names:
        expected |= {f"{name}-{p}.jsonl" for p in (SINGLE, SEQUENTIAL)}
        expected |= {f"metrics-{name}-{p}.json" for p in (SINGLE, SEQUENTIAL, f"{SEQUENTIAL}-at-1")}
        expected.add(f"weights-{name}.safetensors")
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("method", ["KDPO", "FT"])
def test_single_edits_are_measured_as_base_editor_does(methods, requests, method, tmp_path, monkeypatch):
    """With the host's own code; test_metrics.py holds ours against it prompt by prompt."""
    monkeypatch.chdir(tmp_path)
    hparams = next(m.hparams for m in methods if m.name == method)
    chosen = [m for m in methods if m.name == method]
    compare(chosen, requests[:N], [SINGLE], tmp_path / "run", how=measuring.Measuring("easyedit"))
    ours = json.loads((tmp_path / "run" / f"metrics-{method}-single.json").read_text())
    restoring = {} if on_main() else {"keep_original_weight": True}
    theirs = easyeditor.BaseEditor.from_hparams(hparams).edit(**arguments(requests[:N]), **restoring)[0]
    for mine, other in zip(ours, theirs):
        assert mine["requested_rewrite"]["prompt"] == other["requested_rewrite"]["prompt"]
        for key in ("rewrite_acc", "rephrase_acc"):
            assert mine["post"][key] == pytest.approx(other["post"][key])
            assert mine["pre"][key] == pytest.approx(other["pre"][key])
        key = "Relation_Specificity_acc"
        assert mine["post"]["locality"][key] == pytest.approx(other["post"]["locality"][key])


def test_sequential_edits_are_measured_on_the_final_model(run, methods, requests):
    editor = host.BaseEditor(in_place(methods[1].hparams))
    for request in requests[:N]:
        algorithms.apply_edit(editor, editor.model, request)
    expected = [edit_quality(editor, editor.model, request, fluency=False) for request in requests[:N]]
    ours = json.loads((run[1] / "metrics-FT-sequential.json").read_text())
    for mine, other in zip(ours, expected):
        assert mine["post"]["rewrite_acc"] == pytest.approx(other["rewrite_acc"])
        assert mine["post"]["rephrase_acc"] == pytest.approx(other["rephrase_acc"])


def test_single_edits_measured_together_have_the_figures_of_each_alone(run, methods, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "runs_by_rows", lambda *_: False)
    apart = compare(methods, requests[:N], [SINGLE], tmp_path)
    together = [row for row in run[0].rows if row.protocol == SINGLE]
    for one, other in zip(apart.rows, together, strict=True):
        assert all(getattr(one, measure) == getattr(other, measure) for measure in MEASURES)
        assert one.further == pytest.approx(other.further, abs=1e-3)  # probabilities among them
    for method in methods:
        one, other = (json.loads((f / f"metrics-{method.name}-single.json").read_text()) for f in (tmp_path, run[1]))
        for key in ("rewrite", "rephrase", "tokens"):
            assert [entry["post"]["generated"][key] for entry in one] == [entry["post"]["generated"][key] for entry in other]
        assert [entry["post"]["locality"] for entry in one] == [entry["post"]["locality"] for entry in other]


def test_single_edits_of_which_some_cannot_be_measured_with_others(run, methods, requests, tmp_path, monkeypatch):
    asked = []

    def sometimes(model, names):
        asked.append(names)
        return len(asked) not in (2, 3)

    monkeypatch.setattr(protocols, "runs_by_rows", sometimes)
    (row,) = compare(methods[:1], requests[:N], [SINGLE], tmp_path).rows
    assert all(getattr(row, measure) == getattr(run[0].rows[0], measure) for measure in MEASURES) and len(asked) == N + 1
    lines = [json.loads(line)["what"] for line in (tmp_path / "measuring.jsonl").read_text().splitlines()]
    assert lines == ["before", "KDPO-single", "KDPO-single", "KDPO-single"]


def test_kdpo_is_told_which_protocol_it_runs_under(methods, requests, tmp_path, monkeypatch):
    seen = []
    apply = host.ALG_DICT["KDPO"]

    def noted(model, tok, requests, hparams, **kwargs):
        seen.append(hparams.sequential_edit)
        return apply(model, tok, requests, hparams, **kwargs)

    monkeypatch.setitem(host.ALG_DICT, "KDPO", noted)
    compare(methods[:1], requests[:1], [SINGLE, SEQUENTIAL], tmp_path)
    assert seen == [False, True] and methods[0].hparams.sequential_edit is None


def test_the_same_seed_gives_the_same_figures(run, methods, requests, tmp_path):
    again = compare([methods[2], methods[3]], requests[:N], [SEQUENTIAL], tmp_path)
    for row in again.rows:
        before = next(r for r in run[0].rows if (r.method, r.protocol) == (row.method, row.protocol))
        assert uncosted(row) == uncosted(before)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(methods, requests, loaded, tmp_path, monkeypatch):
    model, _ = loaded
    before = state(model)
    method = Method("KDPO", in_place(methods[0].hparams))
    method.hparams.model_name = loaded
    edited = []

    def failing(*_, **__):
        edited.append(not same_state(before, state(model)))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(protocols, "measure_after", failing)
    for protocol, by_rows in ((SINGLE, True), (SINGLE, False), (SEQUENTIAL, True)):
        monkeypatch.setattr(protocols, "runs_by_rows", lambda *_, by_rows=by_rows: by_rows)
        with pytest.raises(RuntimeError, match="in the middle"):
            compare([method], requests[:2], [protocol], tmp_path / f"{protocol}-{by_rows}")
        assert same_state(before, state(model)) and not any("forward" in vars(module) for module in model.modules())
    assert edited == [False, True, True]


def test_the_ablation_changes_the_negatives_and_has_the_papers_steps(methods, requests, tmp_path):
    hparams = methods[0].hparams
    cells = ablation(hparams)
    assert [(m.hparams.negatives, m.hparams.online, m.hparams.num_steps, m.hparams.cycles) for m in cells] == [
        ("teacher_forced", True, 8, 20),
        ("teacher_forced", False, 8, 20),
        ("autoregressive", True, 6, 5),
        ("autoregressive", False, 6, 5),
    ]
    assert cells[0].hparams == hparams and len({m.name for m in cells} - {"DPO"}) == 4
    with pytest.raises(HParamsError, match="negatives is 'autoregressive' and online is True; allowed for an ablation"):
        ablation(cells[2].hparams)
    compare(cells, requests[:2], [SEQUENTIAL], tmp_path)
    for cell in cells:
        for line in (tmp_path / f"{cell.name}-sequential.jsonl").read_text().splitlines():
            trace = json.loads(line)
            assert len(trace["negatives"]) > 1 and len(trace["negatives"]) <= cell.hparams.cycles
            if not cell.hparams.online:
                assert all(negatives == trace["negatives"][0] for negatives in trace["negatives"])


def test_paths_in_a_yaml_are_meant_from_where_the_command_is_given(methods, requests, small_world, tmp_path, monkeypatch):
    monkeypatch.chdir(small_world.folder)
    memit = copy.copy(methods[3].hparams)
    memit.model_name, memit.stats_dir = f"../{small_world.folder.name}", "stats"
    (row,) = compare([Method("MEMIT", memit)], requests[:1], [SINGLE], tmp_path).rows
    assert row.n_edits == 1 and memit.stats_dir == "stats"


def test_methods_on_different_models_are_refused(methods, requests, tmp_path):
    other = in_place(methods[1].hparams)
    other.model_name = "another"
    with pytest.raises(host.HostError, match="different models"):
        compare([methods[0], Method("FT", other)], requests[:1], [SINGLE], tmp_path)


def test_a_summary_is_the_mean_over_edits_of_the_mean_over_prompts():
    def entry(rewrite, locality, portability, seconds, generated):
        post = {
            "rewrite_acc": rewrite,
            "locality": {"a_acc": locality[:1], "b_acc": locality[1:], "a_output": [[1]]},
            "portability": {"c_acc": portability} if portability else {},
            "fluency": {"ngram_entropy": 5.0},
            "generated": {"rewrite": "x", "rewrite_acc": generated},
        }
        return EditMetrics(0, {}, {}, post, seconds)

    metrics = [entry([1.0], [0.0, 1.0, 1.0], [0.5], 2.0, 1.0), entry([0.5], [1.0], [], 4.0, 0.0)]
    row = summarise("X", SINGLE, metrics, "post")
    assert (row.edit_success, row.portability, row.fluency, row.seconds_per_edit) == (75, 50, 5, 3)
    assert row.locality == pytest.approx(np.mean([2 / 3, 1]) * 100, abs=1e-3)
    assert row.generalization is None and row.generated_success == 50 and row.generated_generalization is None
    low, high = row.intervals["edit_success"]
    assert 0 < low < 50 and 90 < high < 100 and "portability" not in row.intervals
    assert row.mean == pytest.approx((75 + row.locality + 50) / 3, abs=1e-3)
    before = summarise(
        "(before)", "", [EditMetrics(0, {}, {"rewrite_acc": [0.5], "locality": {}, "portability": {}}, {}, 0.0)], "pre"
    )
    assert before.edit_success == 50 and before.mean is None and "mean" not in before.intervals  # it has no locality


def test_what_is_no_number_is_in_no_mean():
    """Where float16 overflows a model says NaN, which files have as null."""
    for broken in (math.nan, None):
        entries = [
            EditMetrics(
                0,
                {},
                {},
                {
                    "rewrite_acc": [1.0],
                    "locality": {},
                    "portability": {},
                    "probabilities": {"success": {"magnitudes": magnitudes}},
                },
                1.0,
            )
            for magnitudes in ([0.25, broken], [broken])
        ]
        assert summarise("X", SINGLE, entries, "post").further["em"] == 25
        assert "em" not in summarise("X", SINGLE, entries[1:], "post").further


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    entries = [
        [
            EditMetrics(
                0,
                {},
                {},
                {
                    "rewrite_acc": [float(rng.random() < 0.7)],
                    "locality": {},
                    "portability": {},
                    "fluency": {"ngram_entropy": 1.0},
                    "generated": {"rewrite_acc": 1.0},
                },
            )
            for _ in range(60)
        ]
        for _ in range(100)
    ]
    found = [summarise("X", SINGLE, metrics, "post").intervals["edit_success"] for metrics in entries]
    assert 88 <= sum(low <= 70 <= high for low, high in found) <= 99


def test_a_sample_that_hardly_varies_is_no_surer_than_one_that_does_not_vary():
    same, hardly = share_interval([100.0] * 100), share_interval([100.0] * 99 + [99.0])
    assert same == [pytest.approx(96.3, abs=0.1), 100.0] and hardly[0] <= same[0]
    rng = np.random.default_rng(0)
    drawn = [rng.choice([100.0, 95.0], 20, p=[0.9, 0.1]).tolist() for _ in range(200)]
    covered = sum(low <= 99.5 <= high for low, high in map(share_interval, drawn))
    assert covered >= 190


def values(**methods: list[float | None]) -> dict:
    """Of methods that have these edit successes, and the same of everything else."""
    return {
        (name, SINGLE): {key: success if key == "edit_success" else [1.0] * len(success) for key in MEASURES}
        for name, success in methods.items()
    }


def test_methods_are_tested_against_kdpo_over_the_edits_that_both_have():
    always, never = [100.0] * 8, [0.0] * 8
    tests = paired_tests(values(FT=[*never, 0.0, None], KDPO=[*always, None, 0.0], ROME=[*always[:7], 0.0, 50.0, 0.0]))
    assert [(t.measure, t.method, t.against) for t in tests] == [(m, of, "KDPO") for m in MEASURES for of in ("FT", "ROME")]
    ft, rome = tests[:2]
    assert (ft.n_edits, ft.difference, ft.p_value) == (
        8,
        -100,
        pytest.approx(2 / 2**8, abs=1e-6),
    )  # all signs alike: two ways of 2⁸
    assert (rome.n_edits, rome.difference, rome.p_value) == (9, pytest.approx(-100 / 9, abs=1e-4), 1)
    assert ft.p_corrected == pytest.approx(2 * ft.p_value) and rome.p_corrected == 1
    assert all(test.difference == 0 and test.p_value == 1 for test in tests[2:])
    assert {test.against for test in paired_tests(values(FT=never, ROME=always))} == {"FT"}
    assert paired_tests(values(KDPO=always)) == []


def test_holm_takes_the_smallest_p_value_times_all_and_never_falls():
    base = [0.0] * 12
    tests = paired_tests(values(KDPO=base, A=[1.0] * 6 + base[6:], B=[1.0] * 10 + base[10:], C=[1.0] * 7 + base[7:]))[:3]
    a, b, c = (test.p_value for test in tests)
    assert (a, b, c) == pytest.approx((2 / 2**6, 2 / 2**10, 2 / 2**7), abs=1e-6)
    assert [test.p_corrected for test in tests] == pytest.approx([2 * c, 3 * b, 2 * c], abs=2e-6)


def test_a_test_rejects_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    found = [paired_tests(values(KDPO=list(rng.random(30)), FT=list(rng.random(30))))[0].p_value for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in found) <= 20


def test_a_run_has_its_tests_and_its_memory(run):
    comparison, folder = run
    assert json.loads((folder / "tests.json").read_text()) == [asdict(test) for test in comparison.tests]
    assert len(comparison.tests) == 2 * 3 * (len(MEASURES) - 2) and {test.against for test in comparison.tests} == {"KDPO"}
    metrics, of_kdpo = (
        from_json(EditMetrics, json.loads((folder / f"metrics-{name}-single.json").read_text())) for name in ("FT", "KDPO")
    )
    kdpo = per_edit(of_kdpo, "post")["locality"]
    test = next(t for t in comparison.tests if (t.method, t.protocol, t.measure) == ("FT", SINGLE, "locality"))
    assert test.difference == pytest.approx(np.mean(np.subtract(per_edit(metrics, "post")["locality"], kdpo)), abs=1e-3)
    memory = [entry.memory for entry in metrics]
    row = next(row for row in comparison.rows if (row.method, row.protocol) == ("FT", SINGLE))
    expected = None if None in memory else pytest.approx(np.median(memory) / 1e6, abs=1e-3)
    assert row.megabytes_per_edit == expected


def test_easyedits_own_summary_is_beside_ours_where_it_has_one(run):
    comparison, folder = run
    if not on_main():
        assert own_summary([{"pre": {}, "post": {}}]) is None and not (folder / "easyedit-summary.json").exists()
        return
    theirs = json.loads((folder / "easyedit-summary.json").read_text())
    assert [(row["method"], row["protocol"]) for row in theirs] == [(row.method, row.protocol) for row in comparison.rows]
    for mine, other in zip(comparison.rows, theirs):
        assert 100 * other["rewrite_acc"] == pytest.approx(mine.edit_success, abs=1e-3)
        assert 100 * other["locality"]["Relation_Specificity_acc"] == pytest.approx(mine.locality, abs=1e-3)
    assert not (folder / "logs" / "results.json").exists()


def test_easyedits_own_summary_takes_edits_of_one_rephrasing_and_of_several():
    if not on_main():
        return
    phases = [{"rewrite_acc": [1.0], "rephrase_acc": scores, "locality": {}, "portability": {}} for scores in ([1.0], [1.0, 0])]
    metrics = [{"pre": {}, "post": phase} for phase in phases]
    assert own_summary(metrics)["post"]["rephrase_acc"] == 0.75 and metrics[1]["post"]["rephrase_acc"] == [1.0, 0]


def test_what_the_model_writes_is_kept_for_every_edit(run, loaded, requests):
    _, folder = run
    for entry, request in zip(json.loads((folder / "metrics-KDPO-single.json").read_text()), requests):
        pre, post = entry["pre"]["generated"], entry["post"]["generated"]
        assert pre["rewrite"] == [write_answers(*loaded, [request["prompt"]], [request["target_new"]])[0].text]
        assert pre["rewrite"][0].startswith(request["ground_truth"]) and pre["rewrite_acc"] == [0]
        assert post["rewrite"][0].startswith(request["target_new"]) and post["rewrite_acc"] == [1]
        assert post["rewrite_exact"] == [1] and post["rewrite_stopped"] == [1]
        assert post["rephrase_acc"] in ([0], [1])


def test_examples_are_in_words(run, requests):
    examples = run[0].examples
    assert [example.prompt for example in examples] == [request["prompt"] for request in requests[:N]]
    for example, request in zip(examples, requests):
        assert example.before == f"{request['ground_truth']}."
        assert example.after.startswith(request["target_new"])


def test_every_checkpoint_is_measured_on_the_model_as_it_stands_then(run, methods, requests):
    comparison, folder = run
    assert [(row.method, row.n_edits) for row in comparison.curve] == [
        (name, n) for name in ("KDPO", "FT", "ROME", "MEMIT") for n in (1, N)
    ]
    assert json.loads((folder / "curve.json").read_text()) == [asdict(row) for row in comparison.curve]
    assert [row for row in comparison.curve if row.n_edits == N] == [r for r in comparison.rows if r.protocol == SEQUENTIAL]
    editor = host.BaseEditor(in_place(methods[1].hparams))
    algorithms.apply_edit(editor, editor.model, requests[0])
    (entry,) = json.loads((folder / "metrics-FT-sequential-at-1.json").read_text())
    assert entry["post"]["rewrite_acc"] == edit_quality(editor, editor.model, requests[0])["rewrite_acc"]


def test_what_the_model_has_no_room_for_is_refused_before_any_work(methods, requests, loaded, tmp_path):
    words = "word " * 60  # fits by itself
    tok = loaded[1]
    room = (256 - len(tok(f" {requests[1]['target_new']}")["input_ids"]) - 2) // len(tok(" word")["input_ids"])
    neighbours = {"neighborhood": {"prompt": [words], "ground_truth": ["Oslo"]}}
    for change, what in (
        ({"rephrase_prompt": "word " * 300}, "rephrase_prompt and target_new"),
        ({"ground_truth": "word " * 300}, "a prompt and ground_truth"),
        ({"target_new": "word " * 30, "prompt": "Ada is a", "locality": neighbours}, "a prompt of locality and target_new"),
        ({"prompt": "word " * room}, "a prompt and answer of a probe"),
        ({"prompt": "word " * room, "ground_truth": None}, "a prompt as qa and target_new"),
    ):
        long = {"ground_truth": "judge", **requests[1], **change}
        message = rf"edit 1 \('.*'…\): {what} have \d+ tokens, and the model takes 256"
        with pytest.raises(DatasetError, match=message):
            compare(methods[:1], [requests[0], long], [SINGLE], tmp_path, how=Measuring(contexts=("plain", "qa"), probes=True))
        assert not (tmp_path / "before.jsonl").exists()


def test_a_prompt_that_leaves_no_more_room_than_the_target_needs_runs(methods, requests, loaded, tmp_path):
    model, tok = loaded
    room = model.config.max_position_embeddings
    filler = "".join(f" {request['prompt']} {request['target_new']}." for request in requests)
    ids = tok(filler)["input_ids"][: room - 10]
    request = {**requests[0], "prompt": tok.decode(ids) + f" {requests[0]['prompt']}", "locality": {}, "portability": {}}
    while len(tok(f"{request['prompt']} {request['target_new']}")["input_ids"]) > room:
        ids = ids[:-1]
        request["prompt"] = tok.decode(ids) + f" {requests[0]['prompt']}"
    (row,) = compare(methods[:1], [request], [SINGLE], tmp_path).rows
    assert 0 <= row.edit_success <= 100 and row.fluency is not None


# Methods that come without hyper-parameters: those of another, and what is their own.
UNTUNED = {
    "MEMIT-FE": ("MEMIT", {}),
    "CORE": ("MEMIT", {}),
    "SPHERE": ("AlphaEdit", {"cumulative_ratio": 0.5, "suppression_strength": 0.5}),
    "KN": (
        "GRACE",
        {"lr_scale": 1.0, "n_toks": 10, "refine": False, "batch_size": 20, "steps": 20, "adaptive_threshold": 0.2, "p": 0.4},
    ),
}  # fmt: skip
TUNED = sorted({path.parent.name for path in (ROOT / "hparams").glob("*/world.yaml")} - {"FT"})


def method_for(name: str, small_world, tmp_path) -> Method:
    """A method with the world's hyper-parameters, on the small world."""
    folder, own = UNTUNED.get(name, (name, {}))
    config = yaml.safe_load((ROOT / "hparams" / folder / "world.yaml").read_text())
    config |= {"model_name": str(small_world.folder)} | own
    config["alg_name"] = {"FT-M": "FT", "KDPO+C": "KDPO"}.get(name, name)
    if "stats_dir" in config:
        config["stats_dir"] = str(small_world.statistics)
    known = algorithms.hyper_params_class(config["alg_name"]).__dataclass_fields__
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if key in known}))
    return Method(name, load_hparams(name, path))


FEW = 2
HOW = measuring.Measuring(fluency=False)


def untimed(rows) -> list[dict]:
    return [uncosted(row) for row in rows]


@pytest.fixture(scope="module")
def afterwards(methods, requests, tmp_path_factory):
    """FT when no other method has run."""
    return compare(
        [methods[1]], requests[:FEW], [SINGLE, SEQUENTIAL], tmp_path_factory.mktemp("alone"), eval_at=[1], how=HOW
    ).rows


@pytest.mark.skipif(not on_main(), reason="most methods are on EasyEdit's main branch only")
@pytest.mark.parametrize("name", [*TUNED, *UNTUNED])
def test_a_method_edits_and_the_next_one_does_not_see_it(
    name, methods, afterwards, small_world, requests, loaded, tmp_path, monkeypatch
):
    """Cut off in the middle it goes on, or starts over, to the same end; what comes after it gets the model as it was."""
    if name in algorithms._PACKAGES:
        pytest.importorskip(algorithms._PACKAGES[name])
    method = method_for(name, small_world, tmp_path)
    undo = algorithms.undo_edits

    def undone(editor, originals):
        undo(editor, originals)
        assert same_state(loaded[0].state_dict(), editor.model.state_dict()) and not algorithms.memory()[1]

    monkeypatch.setattr(algorithms, "undo_edits", undone)
    whole = compare([method, methods[1]], requests[:FEW], [SINGLE, SEQUENTIAL], tmp_path / "whole", eval_at=[1], how=HOW)
    assert untimed(row for row in whole.rows if row.method == "FT") == untimed(afterwards)
    single, sequential = (row for row in whole.rows if row.method == name)
    for row in (single, sequential):
        assert row.edit_success > whole.before.edit_success or (name in ("KN", "Retrieval") and row.locality < 100)

    edit, edits = algorithms.apply_edit, []

    def stopping(*arguments):
        edits.append(arguments)
        if len(edits) == FEW:
            raise KeyboardInterrupt
        return edit(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "apply_edit", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare([method], requests[:FEW], [SEQUENTIAL], tmp_path / "cut", eval_at=[1], how=HOW)
    again = compare([method], requests[:FEW], [SEQUENTIAL], tmp_path / "cut", eval_at=[1], how=HOW)
    assert untimed(again.rows) == untimed([sequential])
    saved = [folder / f"weights-{name}.safetensors" for folder in (tmp_path / "whole", tmp_path / "cut")]
    if algorithms.can_resume(method.hparams):
        assert same_state(*map(load_file, saved))
    else:
        assert not any(file.exists() for file in saved)
        monkeypatch.setattr(algorithms, "apply_edit", None)  # nothing is left to do
        assert untimed(compare([method], requests[:FEW], [SEQUENTIAL], tmp_path / "cut", eval_at=[1], how=HOW).rows) == untimed(
            again.rows
        )


def test_what_lora_lacks_is_told_before_any_work(methods, requests, tmp_path, monkeypatch):
    hparams = copy.copy(methods[1].hparams)
    hparams.alg_name = "LoRA"
    method = Method("LoRA", hparams)
    monkeypatch.setattr(algorithms.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(host.HostError, match="pip install peft"):
        compare([method], requests[:1], [SINGLE], tmp_path / "run")
    monkeypatch.setattr(algorithms.importlib.util, "find_spec", lambda name: "here")
    monkeypatch.setattr(algorithms, "IS_RELEASE", True)
    with pytest.raises(host.HostError, match="sequential edits need its main branch"):
        compare([method], requests[:1], [SEQUENTIAL], tmp_path / "run")
    monkeypatch.setattr(algorithms, "IS_RELEASE", False)
    with pytest.raises(host.HostError, match="LoRA changes none"):
        compare([method], requests[:1], [SEQUENTIAL], tmp_path / "run", save_edits=tmp_path / "x")
    assert not (tmp_path / "run").exists()
