"""Edits by hand, as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.by_hand import PROMPTS, Said


def print_by_hand(record: dict[str, str], found: Sequence[Said], console: Console) -> None:
    """What was said before and after, prompt by prompt, and a table of figures."""
    console.print(Text.assemble("\n", (record["prompt"], "italic"), "  → ", (record["target_new"], "bold"), "\n"))
    words = Table.grid(padding=(0, 2))
    words.add_column(no_wrap=True)
    words.add_column(overflow="fold")
    for field in found[0].texts:
        words.add_row(Text(PROMPTS[field], style="bold"), Text(record.get(field, record["prompt"]), style="italic"))
        for one in found:
            words.add_row(f"  {one.name}", Text(one.texts[field] or "(nothing)", style="dim" if one is found[0] else ""))
        words.add_row()
    console.print(words)

    figures = Table("method", title="the new answer", title_justify="left", title_style="bold")
    in_context = found[0].plain_probability is not None
    for heading in ("probability", *(("as plain text",) if in_context else ()), "steps", "cycles", "seconds"):
        figures.add_column(heading, justify="right")
    figures.add_column("why it ended")
    for one in found:
        trace = one.trace if "steps" in one.trace else None
        figures.add_row(
            one.name,
            _percent(one.probability),
            *([_percent(one.plain_probability)] if one.plain_probability is not None else []),
            str(trace["steps"]) if trace else "–",
            str(sum(map(bool, trace["losses"]))) if trace else "–",  # one that finds the target said does nothing
            "–" if one.seconds is None else f"{one.seconds:.2f}",
            trace["ended"] if trace else "–",
            style="dim" if one is found[0] else "",
        )
    console.print(figures)
    console.print("probability: of the whole answer, the product over its tokens", style="dim", highlight=False)


def print_side_by_side(before: Said, after: Said, console: Console) -> None:
    """What was said before one edit and after it, side by side."""
    table = Table("", "before", "after")
    for field, text in before.texts.items():
        table.add_row(PROMPTS[field], *(Text(said or "(nothing)") for said in (text, after.texts[field])))
    table.add_row("the new answer's probability", _percent(before.probability), _percent(after.probability))
    if before.plain_probability is not None and after.plain_probability is not None:
        table.add_row("… as plain text", _percent(before.plain_probability), _percent(after.plain_probability))
    console.print(table)


def _percent(probability: float) -> str:
    """A probability in percent: to two decimals, and below those to two digits."""
    percent = 100 * probability
    return f"{percent:.2f} %" if percent >= 0.01 or percent == 0 else f"{percent:.1e} %"
