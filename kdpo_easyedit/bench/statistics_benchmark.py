"""What second moments cost: EasyEdit's ``layer_stats``, layer by layer, against this package's one pass, in one run.

``python -m kdpo_easyedit.bench.statistics_benchmark MODEL`` takes both over the same passages and prints the seconds of
processor time, which other work on the machine stretches least, their ratio, and how far the moments are from each other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..easyedit.statistics import compute_statistics, statistics_file
from ..method.statistics import Text, make, second_moment
from ..models.packed import wikipedia_openings


@dataclass(frozen=True)
class Cost:
    """Attributes:
    theirs: EasyEdit's seconds for all layers, without those of the processes that read its text.
    ours: this package's.
    difference: the largest ‖A − B‖ / ‖A‖ of a layer's two moments.
    """

    theirs: float
    ours: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as fast this package is."""
        return self.theirs / self.ours


def measure(model: Any, tok: Any, names: Sequence[str], passages: Sequence[str]) -> Cost:
    """Take the second moments of the named projections' inputs both ways, files included."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "theirs"), Path(folder, "ours")
        began = time.process_time()
        files = make(model, tok, names, Text("benchmark", passages), ours, quiet=True)
        between = time.process_time()
        for name in names:
            compute_statistics(model, tok, name, theirs, "benchmark", len(passages), texts=passages)
        ended = time.process_time()
        differences = []
        for name, file in files.items():
            expected = second_moment(statistics_file(theirs, model.config.name_or_path, name, "benchmark", len(passages)))
            differences.append(((second_moment(file) - expected).norm() / expected.norm()).item())
        return Cost(ended - between, between - began, max(differences))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--module", default="model.layers.{}.mlp.down_proj", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10, 15, 20], help="(default: 5 10 15 20)")
    parser.add_argument("--passages", type=int, default=50, help="(default: 50, some 4 000 tokens)")
    parser.add_argument("--pairs", type=int, default=1, help="how often to take both (default: 1)")
    options = parser.parse_args(arguments)
    tok = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, use_safetensors=True)
    passages = wikipedia_openings()[0][: options.passages]
    tokens = sum(map(len, tok(passages)["input_ids"]))
    names = [options.module.format(layer) for layer in options.layers]
    print(f"{len(names)} layers, {tokens} tokens, {torch.get_num_threads()} threads")
    costs = []
    for _ in range(options.pairs):
        costs.append(cost := measure(model, tok, names, passages))
        print(
            f"layer_stats {cost.theirs:.1f} s, one pass {cost.ours:.1f} s: {cost.ratio:.1f} × as fast; "
            f"moments differ by {cost.difference:.1e} at most",
            flush=True,
        )
    ratios = sorted(cost.ratio for cost in costs)
    print(f"median of {len(ratios)}: {median(ratios):.1f} × as fast, {ratios[0]:.1f} to {ratios[-1]:.1f}")


if __name__ == "__main__":
    main()
