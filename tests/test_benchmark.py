"""The price of an edit, held at the small shape so that nobody loses it unnoticed."""

from __future__ import annotations

import itertools

import pytest
import torch
import yaml
from conftest import ROOT
from rich.console import Console

from kdpo_easyedit.bench import benchmark, edit_benchmark
from kdpo_easyedit.cli.benchmark import print_result
from kdpo_easyedit.cli.main import main


def measured() -> benchmark.Result:
    model, layer = benchmark.load("small", None, torch.float32, "cpu")
    return benchmark.measure(model, benchmark.hyper_params(model, layer, 8, "cpu"), repeats=3)


@pytest.fixture(scope="module")
def result() -> benchmark.Result:
    return measured()


def test_both_forms_make_the_same_edit(result):
    assert result.loss_difference < 1e-5


def test_the_engine_is_much_faster_than_the_straightforward_form(result):
    # Measured: 5.7 to 6.8 times a step and 5.3 to 5.6 times an edit. The bounds leave room for a noisy machine, which may
    # spoil one measurement all the same, hardly three.
    results = itertools.chain([result], (measured() for _ in range(2)))
    assert any(of.straightforward.step > 3 * of.engine.step and of.straightforward.edit > 2 * of.engine.edit for of in results)
    assert 0 < result.floor < result.engine.step


def test_memory_is_six_times_w_and_the_activations(result):
    assert result.engine.memory < 6 * result.weight_bytes + 2e6
    assert result.engine.memory < result.straightforward.memory / 5


def test_half_precision_needs_no_more():
    model, layer = benchmark.load("tiny", None, torch.bfloat16, "cpu")
    result = benchmark.measure(model, benchmark.hyper_params(model, layer, 2, "cpu"), repeats=1)
    assert result.engine.memory < 6 * result.weight_bytes + 5e5
    assert result.engine.memory < result.straightforward.memory / 4


def test_a_models_weights_are_as_they_were():
    model, layer = benchmark.load("small", None, torch.float32, "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    benchmark.measure(model, benchmark.hyper_params(model, layer, 2, "cpu"), repeats=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_command_prints_ratios_memory_and_the_floor(small_world, capsys):
    main(["benchmark", "--model", str(small_world.folder), "--steps", "2", "--tokens", "6", "--repeats", "1"])
    printed = capsys.readouterr().out
    for words in ("layer 3 of 4", "seconds a step", "seconds an edit", "MB beyond the model", "the floor of a step is"):
        assert words in printed


@pytest.mark.parametrize(("flag", "least"), [("steps", 2), ("tokens", 6), ("repeats", 1)])
def test_too_little_to_time_is_refused(flag, least, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", f"--{flag}", str(least - 1)])
    assert f"--{flag} is {least - 1}; allowed: a whole number, {least} or above" in capsys.readouterr().err


def test_a_result_reads_well():
    costs = benchmark.Cost(2.0, 18.0, 2_000_000_000), benchmark.Cost(0.04, 0.6, 60_000_000)
    console = Console(record=True, width=80)
    print_result(benchmark.Result(*costs, 0.01, 1e-7, 10_000_000), console)
    text = console.export_text()
    assert "50.0" in text and "30.0" in text and "33.3" in text and "6.0 × that of W" in text and "4.0 × as long" in text


def test_the_cost_of_knowing_what_the_layer_is_used_for(capsys):
    # An edit with KDPO+C steps through the same layers, without W's gradient and Adam on it.
    main(["benchmark", "--mom2", "--repeats", "3"])
    printed = capsys.readouterr().out
    assert "factorising the statistics, once a model" in printed
    model, layer = benchmark.load("small", None, torch.float32, "cpu")
    hparams = benchmark.hyper_params(model, layer, 8, "cpu")
    costs = (benchmark.measure_usage(model, hparams) for _ in range(3))  # a noisy machine may spoil one
    cost = next((of for of in costs if of.aware < 1.5 * of.plain and of.products + of.update < of.plain), None)
    assert cost and cost.inverse == 4 * model.config.intermediate_size**2


def test_edits_of_a_real_model_against_romes(small_world, tmp_path, capsys):
    """On the small world: one by one and together, the floor below all of them, and the model as it was."""
    for method, changes in (("KDPO+C", {"contexts": 1}), ("ROME", {"context_template_length_params": [[2, 5]]})):
        (tmp_path / method).mkdir()
        config = yaml.safe_load((ROOT / "hparams" / method / "world.yaml").read_text())
        config |= {"model_name": str(small_world.folder), "stats_dir": str(small_world.statistics), **changes}
        (tmp_path / method / "small.yaml").write_text(yaml.safe_dump(config))
    main(["benchmark", "--edit", "--hparams_dir", str(tmp_path / "small"), "--data", str(small_world.edits), "--size", "2"])
    lines = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line] for line in lines]
    forms = ["KDPO+C", "KDPO+C, 2 at once", "KDPO+C, 1 contexts", "KDPO+C, 1 contexts, 2 at once"]
    assert [row[0] for row in rows] == [*forms, "ROME, 5 contexts", "ROME, 20 contexts"]
    assert rows[0][2] == "1.00" and float(rows[0][3]) >= 1 and rows[-1][3] == "–"
    assert all(0 < float(row[4]) < float(row[1]) for row in rows)
    assert float(rows[-1][4]) > 2 * float(rows[-2][4])  # twenty texts before the prompt where there were five


def test_the_floor_counts_what_is_run():
    layer = torch.nn.Linear(300, 200)
    with edit_benchmark._products(layer, bandwidth=1e9, rate=1e10) as floor:
        layer(torch.zeros(2, 50, 300, requires_grad=True))
        with torch.no_grad():
            layer(torch.zeros(1, 300))
    assert floor == pytest.approx([2 * 2 * 100 * 300 * 200 / 1e10, 300 * 200 * 4 / 1e9])
    assert not layer._forward_hooks
