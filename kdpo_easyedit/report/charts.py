"""Pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..bench.protocols import Comparison
from ..bench.schema import Summary
from ..files import whole
from .tables import NAMES


def spokes(rows: Sequence[Summary]) -> dict[str, str]:
    """The measures that a radar chart shows, and their names: those that any row has."""
    return {key: name for key, name in NAMES.items() if any(getattr(row, key) is not None for row in rows)}


def radar_chart(comparison: Comparison, path: Path) -> None:
    """The paper's figure: a polygon a method over the five measures, one chart a protocol, as a PNG.

    Percentages run from 0 to 100; fluency from 0 to the highest value of any row.
    """
    protocols = list(dict.fromkeys(row.protocol for row in comparison.rows))
    highest = max((row.fluency or 0 for row in (comparison.before, *comparison.rows)), default=0) or 1
    names = spokes(comparison.rows)
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    figure, axes = plt.subplots(
        1, len(protocols), figsize=(6.8 * len(protocols), 6), subplot_kw={"projection": "polar"}, squeeze=False
    )
    for axis, protocol in zip(axes[0], protocols):
        axis.set_theta_offset(math.pi / 2)
        axis.set_theta_direction(-1)
        axis.set_ylim(0, 100)
        axis.set_yticks([25, 50, 75, 100], labels=["25", "50", "75", "100"], color="0.5", fontsize=8)
        axis.set_rlabel_position(180 / len(names))  # between two spokes, where no polygon has a corner
        axis.set_xticks(angles, labels=list(names.values()), fontsize=11)
        for angle, label in zip(angles, axis.get_xticklabels()):  # labels stand outside the circle
            side = math.sin(angle)
            label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axis.tick_params(axis="x", pad=6)
        axis.grid(color="0.85")
        axis.spines["polar"].set_color("0.85")
        rows = [row for row in comparison.rows if row.protocol == protocol]
        for number, row in enumerate(rows):
            values = [(getattr(row, key) or 0) * (100 / highest if key == "fluency" else 1) for key in names]
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
    figure, axes = plt.subplots(1, len(NAMES), figsize=(3.1 * len(NAMES), 3.4))
    for axis, (key, label) in zip(axes, NAMES.items()):
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
