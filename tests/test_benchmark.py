"""The price of an edit, held at the small shape so that nobody loses it unnoticed."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from kdpo_easyedit.bench import benchmark
from kdpo_easyedit.cli.benchmark import print_result
from kdpo_easyedit.cli.main import main


@pytest.fixture(scope="module")
def result() -> benchmark.Result:
    model, layer = benchmark.load("small", None, torch.float32, "cpu")
    return benchmark.measure(model, benchmark.hyper_params(model, layer, 8, "cpu"), repeats=3)


def test_both_forms_make_the_same_edit(result):
    assert result.loss_difference < 1e-5


def test_the_engine_is_much_faster_than_the_straightforward_form(result):
    # Measured: 5.7 to 6.8 times a step and 5.3 to 5.6 times an edit. The bounds leave room for a noisy machine.
    assert result.straightforward.step > 3 * result.engine.step
    assert result.straightforward.edit > 2 * result.engine.edit
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
    main(["benchmark", "--model", str(small_world.folder), "--steps", "2", "--repeats", "1"])
    printed = capsys.readouterr().out
    for words in ("layer 3 of 4", "seconds a step", "seconds an edit", "MB beyond the model", "the floor of a step is"):
        assert words in printed


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
    cost = benchmark.measure_usage(model, benchmark.hyper_params(model, layer, 8, "cpu"))
    assert cost.aware < 1.5 * cost.plain and cost.products + cost.update < cost.plain
    assert cost.inverse == 4 * model.config.intermediate_size**2
