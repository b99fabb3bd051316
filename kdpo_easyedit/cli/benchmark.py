"""``kdpo benchmark``: what an edit costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from ..bench.benchmark import SHAPES, Result, UsageCost, hyper_params, load, measure, measure_usage
from ..bench.datasets import load_requests
from ..bench.edit_benchmark import EditCost, benchmark_edits, ways
from ..bench.facts import FILES
from ..bench.metrics_benchmark import MetricsBenchmark, benchmark_metrics, whole_words
from ..devices import DTYPES

# A step is timed from the one before it; four of the tokens are the target's, and the rest a prompt.
_LEAST = {"steps": 2, "tokens": 6, "repeats": 1}

DESCRIPTION = "What an edit costs: the straightforward form of the method against this package's, in one run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument("--shape", choices=SHAPES, default="small", help="architecture, with random weights (default: small)")
    parser.add_argument(
        "--model", metavar="PATH", help="a model of Llama's layout or GPT-2's instead; the layer two thirds up is edited"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, mps … (default: cpu)")
    parser.add_argument("--steps", type=int, default=8, help="of an edit (default: 8)")
    parser.add_argument("--tokens", type=int, default=18, help="of prompt and target (default: 18)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each form is timed (default: 5)")
    parser.add_argument("--mom2", action="store_true", help="KDPO against KDPO+C instead")
    real = parser.add_argument_group("edits of a real model")
    real.add_argument(
        "--edit",
        action="store_true",
        help="KDPO+C without contexts, with them, and all edits at once, against ROME, by the YAMLs for --hparams_dir",
    )
    real.add_argument("--hparams_dir", metavar="NAME", default="smollm2-135m", help="(default: smollm2-135m)")
    measuring = parser.add_argument_group("measuring instead of editing")
    measuring.add_argument(
        "--metrics",
        action="store_true",
        help="this package's measuring against EasyEdit's, in turn, on --model or random weights in --shape",
    )
    measuring.add_argument("--no_fluency", action="store_true", help="the teacher-forced metrics alone")
    edits = parser.add_argument_group("the edits of --edit and --metrics")
    edits.add_argument("--data", metavar="FILE", help="a benchmark file (default: edits of real facts)")
    edits.add_argument("--size", type=int, metavar="N", help="how many of it (default: 4 with --edit, 50 with --metrics)")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, and print it."""
    for flag, least in _LEAST.items():
        if getattr(options, flag) < least:
            parser.error(f"--{flag} is {getattr(options, flag)}; allowed: a whole number, {least} or above")
    dtype, console = getattr(torch, options.dtype), Console(highlight=False)
    what = f"{options.dtype} on {options.device} ({torch.get_num_threads()} threads)"
    if options.edit:
        requests = load_requests(options.data or FILES["development"], size=options.size or 4, need_subject=True)
        console.print(f"{options.hparams_dir}, {len(requests)} edits, {what}")
        methods = ways(options.hparams_dir, options.device, options.dtype)
        print_edits(benchmark_edits(methods, requests), console)
        return 0
    if options.metrics:
        requests = load_requests(options.data or FILES["reported"], size=options.size or 50)
        model, _ = load(options.shape, options.model, dtype, options.device)
        tok = AutoTokenizer.from_pretrained(options.model) if options.model else whole_words(requests, model.config.vocab_size)
        console.print(f"{options.model or options.shape}, {model.num_parameters() / 1e6:.0f} million parameters, {what}")
        print_metrics(benchmark_metrics(model, tok, requests, not options.no_fluency), console)
        return 0
    model, layer = load(options.shape, options.model, dtype, options.device)
    hparams = hyper_params(model, layer, options.steps, options.device)
    console.print(
        f"{options.model or options.shape}, layer {layer} of {model.config.num_hidden_layers}, {options.tokens} tokens, "
        f"{options.steps} steps, {what}"
    )
    if options.mom2:
        print_usage(measure_usage(model, hparams, options.tokens, options.repeats), console)
    else:
        print_result(measure(model, hparams, options.tokens, repeats=options.repeats), console)
    return 0


def print_usage(cost: UsageCost, console: Console) -> None:
    """KDPO and KDPO+C side by side."""
    console.print(f"factorising the statistics, once a model: {cost.factorisation:.1f} s, {cost.inverse / 1e6:.0f} MB kept")
    console.print(f"seconds an edit: KDPO {cost.plain:.3f}, KDPO+C {cost.aware:.3f}, {cost.aware / cost.plain:.2f} × as long")
    console.print(f"of which S times the keys: {cost.products:.3f}, letting the keys count: {cost.update:.3f}")


def print_edits(costs: Sequence[EditCost], console: Console) -> None:
    """Show the ways to make an edit side by side, and how far each is from the floor of what it does."""
    table = Table()
    table.add_column("an edit by", no_wrap=True)
    for heading in ("seconds", "ratio", "steps", "floor", "ratio"):
        table.add_column(heading, justify="right")
    for cost in costs:
        steps = "–" if cost.steps is None else f"{cost.steps:.1f}"
        to_first, to_floor = (f"{cost.seconds / other:.2f}" for other in (costs[0].seconds, cost.floor))
        table.add_row(cost.name, f"{cost.seconds:.3g}", to_first, steps, f"{cost.floor:.3g}", to_floor)
    console.print(table)
    console.print(
        "seconds: of processor time on a CPU; ratio: to the first row's; floor: of the products with weights; ratio: to it"
    )


def print_result(result: Result, console: Console) -> None:
    """The two forms side by side, and how far the engine is from the floor."""
    slow, fast = result.straightforward, result.engine
    table = Table()
    for heading in ("", "straightforward", "engine", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, a, b, shown in (
        ("seconds a step", slow.step, fast.step, "{:.4f}"),
        ("seconds an edit", slow.edit, fast.edit, "{:.3f}"),
        ("MB beyond the model", slow.memory / 1e6, fast.memory / 1e6, "{:.0f}"),
    ):
        table.add_row(label, shown.format(a), shown.format(b), f"{a / b:.1f}")
    console.print(table)
    console.print(f"the two forms' losses differ by {result.loss_difference:.1e} at most")
    console.print(f"the engine's memory is {fast.memory / result.weight_bytes:.1f} × that of W in float32")
    console.print(f"the floor of a step is {result.floor:.4f} s; the engine takes {fast.step / result.floor:.1f} × as long")


def print_metrics(result: MetricsBenchmark, console: Console) -> None:
    """Show it as a table."""
    table = Table(title=f"measuring {result.edits} edits, seconds an edit")
    for column in ("", "EasyEdit", "engine", "times faster"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {"rewrite, rephrase, locality, portability": result.forced, "all metrics": result.everything}
    for name, cost in rows.items():
        if cost:
            table.add_row(name, f"{cost.easyedit:.3f}", f"{cost.engine:.3f}", f"{cost.ratio:.1f}")
    console.print(table)
    equal = result.figures - len(result.differing)
    console.print(f"teacher-forced figures equal, prompt by prompt: {equal} of {result.figures}")
    for prompt in result.differing[:5]:
        console.print(f"  differs: {prompt}", markup=False)
    if result.fluency:
        console.print("fluency, mean: EasyEdit {:.3f} of prompt and text, engine {:.3f} of the text".format(*result.fluency))
