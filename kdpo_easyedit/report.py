"""Tables and pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .comparison import MEASURES, SEQUENTIAL, SINGLE, Comparison, Example, PairedTest, Summary
from .files import whole

# A Summary's measures as the field names them.
_MEASURES = {
    "edit_success": "edit success",
    "generalization": "generalization",
    "portability": "portability",
    "locality": "locality",
    "fluency": "fluency",
}
# Measures under teacher forcing → the same by free generation.
_GENERATED = {"edit_success": "generated_success", "generalization": "generated_generalization"}
# Costs, of which less is better, with their units.
COSTS = {"seconds_per_edit": "seconds", "megabytes_per_edit": "MB"}
PROTOCOLS = {
    SINGLE: "single edits, each from the original model",
    SEQUENTIAL: "sequential edits, measured on the final model",
}
_SIGNIFICANT = 0.05
_MARK = "†"


@dataclass(frozen=True)
class Cell:
    """A figure of a table, and how it is shown.

    Attributes:
        interval: its 95 % confidence interval, where there is one.
        best: whether no method of the table has a better one.
        test: against the reference method, where it was tested.
    """

    value: float | None
    text: str
    interval: str = ""
    best: bool = False
    test: PairedTest | None = None

    @property
    def mark(self) -> str:
        """A dagger where the method differs from the reference one."""
        return _MARK if self.test is not None and self.test.p_corrected < _SIGNIFICANT else ""


def tables(comparison: Comparison) -> dict[str, dict[str, dict[str, Cell]]]:
    """By protocol and method, the unedited model's included, the cell of every measure and cost."""
    keys = (*MEASURES, *COSTS)
    tests = {(test.protocol, test.method, test.measure): test for test in comparison.tests}
    made = {}
    for protocol in dict.fromkeys(row.protocol for row in comparison.rows):
        rows = [row for row in comparison.rows if row.protocol == protocol]
        best = {key: _best(rows, key) for key in keys}
        made[protocol] = {
            row.method: {
                key: Cell(
                    getattr(row, key),
                    shown(key, getattr(row, key)),
                    "–".join(shown(key, end) for end in row.intervals.get(key, ())),
                    row in rows and getattr(row, key) is not None and getattr(row, key) == best[key],
                    tests.get((protocol, row.method, key)),
                )
                for key in keys
            }
            for row in (comparison.before, *rows)
        }
    return made


def shown(key: str, value: float | None) -> str:
    """A figure with the decimals that its measure is given with."""
    if value is None:
        return "–"
    return f"{value:.2f}" if key in ("fluency", "seconds_per_edit") else f"{value:.1f}"


def print_ablation(comparison: Comparison, console: Console) -> None:
    """One table for :func:`kdpo_easyedit.comparison.ablation`: a row a method and checkpoint, the best there in bold."""
    table = Table(title="sequential edits, all measured on the model at that point", title_justify="left", title_style="bold")
    table.add_column("negatives")
    for heading in ("edit\nsuccess", "general-\nization", "port-\nability", "locality", "fluency"):
        table.add_column(heading, justify="right")
    for n_edits in sorted({row.n_edits for row in comparison.curve}):
        rows = [row for row in comparison.curve if row.n_edits == n_edits]
        table.add_section()
        table.add_row(Text(f"after {n_edits} edits", style="italic"))
        for row in rows:
            cells = []
            for key in _MEASURES:
                value = getattr(row, key)
                shown = "–" if value is None else f"{value:.2f}" if key == "fluency" else f"{value:.1f}"
                shown += f" ({getattr(row, _GENERATED[key]):.0f})" if value is not None and key in _GENERATED else ""
                cells.append(Text(shown, style="bold" if value is not None and value == _best(rows, key) else ""))
            table.add_row(row.method, *cells)
    console.print(table)
    console.print(
        "KDPO: negatives by teacher forcing; DPO-ablation: as the model writes them, and\n"
        "the paper's number of steps for it; -once: generated at an edit's start only\n"
        "in percent by teacher forcing; in brackets, how often the model writes it\n"
        "fluency: n-gram entropy in bits",
        style="dim",
        highlight=False,
    )


def _best(rows: Sequence[Summary], key: str) -> float | None:
    values = [getattr(row, key) for row in rows if getattr(row, key) is not None]
    if not values:
        return None
    return min(values) if key in COSTS else max(values)


def significance(comparison: Comparison) -> str:
    """What the dagger says."""
    if not comparison.tests:
        return ""
    return f"{_MARK} differs from {comparison.tests[0].against}: paired permutation test, p < {_SIGNIFICANT} by Holm"


def print_tables(comparison: Comparison, console: Console) -> None:
    """One table a protocol, a row a method; the best of each column in bold."""
    for protocol, methods in tables(comparison).items():
        title = f"{comparison.before.n_edits} {PROTOCOLS[protocol]}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("method")
        for heading in ("edit\nsuccess", "general-\nization", "port-\nability", "locality", "fluency", "seconds\nan edit"):
            table.add_column(heading, justify="right")
        for method, cells in methods.items():
            row = []
            for key in (*_MEASURES, "seconds_per_edit"):
                cell = cells[key]
                generated = cells[_GENERATED[key]].value if key in _GENERATED else None
                brackets = "" if generated is None else f" ({generated:.0f})"
                row.append(Text(f"{cell.text}{cell.mark}{brackets}", style="bold" if cell.best else ""))
            table.add_row(method, *row, style="dim" if method == comparison.before.method else "")
        console.print(table)
    notes = [
        "in percent by teacher forcing; in brackets, how often the model writes it",
        "fluency: n-gram entropy in bits; (before): the unedited model, same prompts",
        significance(comparison),
    ]
    console.print("\n".join(filter(None, notes)), style="dim", highlight=False)


def print_examples(method: str, examples: Sequence[Example], console: Console) -> None:
    """Edits in words: the prompt, what the model said before, what it says now."""
    if not examples:
        return
    console.print(Text(f"\nThe first edits of {method}, in words", style="bold"))
    for example in examples:
        console.print(Text.assemble("\n  ", (example.prompt, "italic"), f"   → {example.target}"))
        console.print(Text.assemble("    before  ", example.before or "(nothing)"))
        console.print(Text.assemble("    after   ", (example.after or "(nothing)", "bold")))
    console.print()


def radar_chart(comparison: Comparison, path: Path) -> None:
    """The paper's figure: a polygon a method over the five measures, one chart a protocol, as a PNG.

    Percentages run from 0 to 100; fluency from 0 to the highest value of any row.
    """
    protocols = list(dict.fromkeys(row.protocol for row in comparison.rows))
    highest = max((row.fluency or 0 for row in (comparison.before, *comparison.rows)), default=0) or 1
    angles = [2 * math.pi * i / len(_MEASURES) for i in range(len(_MEASURES))]
    figure, axes = plt.subplots(
        1, len(protocols), figsize=(6.8 * len(protocols), 6), subplot_kw={"projection": "polar"}, squeeze=False
    )
    for axis, protocol in zip(axes[0], protocols):
        axis.set_theta_offset(math.pi / 2)
        axis.set_theta_direction(-1)
        axis.set_ylim(0, 100)
        axis.set_yticks([25, 50, 75, 100], labels=["25", "50", "75", "100"], color="0.5", fontsize=8)
        axis.set_rlabel_position(math.degrees(angles[1] / 2))  # between two spokes, where no polygon has a corner
        axis.set_xticks(angles, labels=list(_MEASURES.values()), fontsize=11)
        for angle, label in zip(angles, axis.get_xticklabels()):  # labels stand outside the circle
            side = math.sin(angle)
            label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axis.tick_params(axis="x", pad=6)
        axis.grid(color="0.85")
        axis.spines["polar"].set_color("0.85")
        rows = [row for row in comparison.rows if row.protocol == protocol]
        for number, row in enumerate(rows):
            values = [getattr(row, key) or 0 for key in _MEASURES]
            values[-1] *= 100 / highest
            line = axis.plot([*angles, 0], [*values, values[0]], label=row.method, linewidth=2, color=f"C{number}")
            axis.fill([*angles, 0], [*values, values[0]], color=line[0].get_color(), alpha=0.04)
        axis.set_title(f"{rows[0].n_edits} {protocol} edits", fontsize=13, pad=24)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(handles), frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 0.98), w_pad=3)
    _save(figure, path)


def curve_chart(curve: Sequence[Summary], path: Path) -> None:
    """Each measure over the number of sequential edits, all of them measured at that point: a line a method, as a PNG."""
    methods = list(dict.fromkeys(row.method for row in curve))
    ticks = sorted({row.n_edits for row in curve})
    figure, axes = plt.subplots(1, len(_MEASURES), figsize=(3.1 * len(_MEASURES), 3.4))
    for axis, (key, label) in zip(axes, _MEASURES.items()):
        for number, method in enumerate(methods):
            points = [
                (row.n_edits, getattr(row, key)) for row in curve if row.method == method and getattr(row, key) is not None
            ]
            axis.plot(
                *(zip(*points) if points else ([], [])), "o-", label=method, color=f"C{number}", linewidth=2, markersize=4
            )
        axis.set_title(label, fontsize=12)
        axis.set_xscale("log")
        axis.set_xticks(ticks, labels=[str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_xlabel("edits")
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1] if key == "fluency" else 104)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("percent")
    axes[-1].set_ylabel("bits")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(handles), frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
    plt.close(figure)
