"""Draws ``pictures/hundred.png``, from ``results.md``: what edits say, and what follows from them, against what they keep."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
OURS = {"KDPO+C": "C3", "KDPO": "C0"}
# Where a name stands beside its point, in points of type, where others are near.
BESIDE = {
    "generalization": {"ROME": (6, 5), "MEMIT": (6, -12), "R-ROME": (-46, 3), "AlphaEdit": (7, -2)},
    "portability": {
        "ROME": (-40, -9),
        "MEMIT": (6, -7),
        "R-ROME": (-46, 3),
        "FT-M": (-39, -4),
        "PMET": (-12, 8),
        "DPO": (-33, -6),
        "EMMET": (2, -14),
        "WISE ‡": (-38, 3),
    },
}


def table(section: str) -> dict[str, dict[str, float]]:
    """Method → measure → percent, of the first table after a heading, without the rows of other settings."""
    page = (FOLDER / "results.md").read_text(encoding="utf-8")
    own = page.split(f"### {section}\n")[1].split("*by other settings")[0]
    names, _, _, *rows = (
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", own, re.MULTILINE)
    )
    return {row[0]: {key: float(row[names.index(key)]) for key in ("locality", *BESIDE)} for row in rows}


methods = table("100 in sequence")
figure, axes = plt.subplots(1, 2, figsize=(12.4, 5), sharex=True)
for axis, key, title in zip(axes, BESIDE, ("said in other words: generalization, %", "what follows: portability, %")):
    for method, figures in methods.items():
        colour, point = OURS.get(method, "0.35"), (figures["locality"], figures[key])
        # A ring: a memory beside the model, whose weights stay.
        axis.scatter(*point, s=46, color="white" if "‡" in method else colour, edgecolor=colour, linewidth=1.4, zorder=3)
        axis.annotate(
            method.removesuffix(" ‡"),
            point,
            BESIDE[key].get(method, (7, -4)),
            textcoords="offset points",
            color=colour,
            fontsize=10,
            weight="bold" if method in OURS else "normal",
        )
    axis.set_xlim(0, 112)
    axis.set_ylim(0, 104 if key == "generalization" else 65)
    axis.set_xlabel("kept: locality, %")
    axis.set_title(title, fontsize=11, loc="left")
    axis.grid(color="0.92", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout(w_pad=3)
figure.savefig(FOLDER / "pictures" / "hundred.png", dpi=100)
