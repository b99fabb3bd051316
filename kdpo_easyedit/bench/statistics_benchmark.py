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
    parser.add_argument("--passages", type=int, default=50, help="(default: 50, some 5 000 tokens)")
    options = parser.parse_args(arguments)
    tok = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    passages = wikipedia_openings()[0][: options.passages]
    tokens = sum(map(len, tok(passages)["input_ids"]))
    cost = measure(model, tok, [options.module.format(layer) for layer in options.layers], passages)
    print(
        f"{len(options.layers)} layers, {tokens} tokens, {torch.get_num_threads()} threads: layer_stats {cost.theirs:.1f} s, "
        f"one pass {cost.ours:.1f} s: {cost.theirs / cost.ours:.1f} × as fast; moments differ by {cost.difference:.1e} at most"
    )


if __name__ == "__main__":
    main()
