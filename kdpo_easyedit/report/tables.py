"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.protocols import Comparison, Example
from ..bench.schema import FOUR, MEASURES, SEQUENTIAL, SINGLE, PairedTest, Summary, batch_size, is_order
from .results import Results

#: A Summary's measures as the field names them.
NAMES = {
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
LESS_IS_BETTER = (*COSTS, "once_seconds", "perplexity", "divergence")
_DECIMALS = {"fluency": 2, "seconds_per_edit": 2, "once_seconds": 2, "perplexity": 2, "divergence": 3, "tokens_per_second": 0}
# The columns of a table in a terminal; some are there where they were measured.
_PRINTED = {
    "edit_success": "edit\nsuccess",
    "generalization": "general-\nization",
    "portability": "port-\nability",
    "locality": "locality",
    "fluency": "fluency",
    "perplexity": "per-\nplexity",
    "seconds_per_edit": "seconds\nan edit",
}
_WHERE_MEASURED = ("fluency", "perplexity")
_SIGNIFICANT = 0.05
_MARK = "†"
MEMORY_MARK = "‡"
#: The columns of a table with two lines of headings each.
COLUMNS = {
    "edit_success": ("edit success", "forced"),
    "generated_success": ("edit success", "written"),
    "exact_success": ("edit success", "whole"),
    "judged_success": ("edit success", "judged"),
    "generalization": ("generalization", "forced"),
    "generated_generalization": ("generalization", "written"),
    "exact_generalization": ("generalization", "whole"),
    "judged_generalization": ("generalization", "judged"),
    "portability": ("portability", ""),
    "locality": ("locality", ""),
    "mean": ("mean of", "the four"),
    "fluency": ("fluency", "bits"),
    "perplexity": ("ordinary text", "perplexity"),
    "divergence": ("ordinary text", "KL, nats"),
    "seconds_per_edit": ("an edit takes", "seconds"),
    "megabytes_per_edit": ("an edit takes", "MB"),
    "once_seconds": ("once", "seconds"),
}
#: What has to be said of the columns.
NOTES = (
    "In percent, with 95 % confidence intervals (shares: Wilson's over the edits; all else by bootstrap); the best in bold.",
    "forced: the share of the target's tokens that the model says under teacher forcing; written: how often what it writes on "
    "its own begins with the target; whole: how often that is the target and nothing else. "
    "The mean is of the four forced shares.",
    "Ordinary text: held-out text that no edit is about; KL from the unedited model. Of sequences only.",
    "fluency: n-gram entropy. (before): the unedited model on the same prompts.",
    "once: what a method makes for the model and keeps (contexts, covariances, factors), in the whole run; no edit's seconds.",
    "MB: the most memory that an edit takes beyond what was taken before it; the median over the edits.",
)


@dataclass(frozen=True)
class Cell:
    """A figure of a table, and how it is shown.

    Attributes:
        interval: its 95 % confidence interval, where there is one.
        best: whether no method of the table that changes weights, and could make an edit, has a better one.
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
    """By protocol and method, the unedited model's included, the cell of every measure and cost.

    Methods that change no weights come last, and are held against one another only where there are no others; one that could
    make no edit, and so disturbs nothing, is held against none.
    """
    keys = tuple(dict.fromkeys((*MEASURES, *COLUMNS)))
    tests = {(test.protocol, test.method, test.measure): test for test in comparison.tests}
    made = {}
    for protocol in dict.fromkeys(row.protocol for row in comparison.rows):
        rows = [row for row in comparison.rows if row.protocol == protocol]
        rows.sort(key=lambda row: row.method in comparison.memories)
        ranked = [row for row in rows if row.method not in comparison.memories] or rows
        ranked = [row for row in ranked if not row.none_made]
        best = {key: _best(ranked, key) for key in keys}
        made[protocol] = {
            row.method: {
                key: Cell(
                    getattr(row, key),
                    shown(key, getattr(row, key)),
                    ends(key, row.intervals.get(key, ())),
                    row in ranked and getattr(row, key) is not None and getattr(row, key) == best[key],
                    tests.get((protocol, row.method, key)),
                )
                for key in keys
            }
            for row in (comparison.before, *rows)
        }
    return made


def ends(key: str, interval: Sequence[float]) -> str:
    """An interval; of percentages without decimals, which it has none to give."""
    if None in interval:  # of what is no number, as files have it
        return ""
    decimals = key in _DECIMALS or key.startswith("task: ")
    return "–".join(shown(key, end) if decimals else f"{end:.0f}" for end in interval)


@dataclass(frozen=True)
class Sheet:
    """Figures that stand beside the tables.

    Attributes:
        note: what has to be said of them.
        rows: by protocol and method, texts by their headings.
        prominent: whether a report shows them without being asked.
    """

    title: str
    note: str
    rows: dict[str, dict[str, dict[str, str]]]
    prominent: bool = False


def sheets(comparison: Comparison, context: str = "plain") -> list[Sheet]:
    """What was measured beside the columns of the tables; of nothing, no sheet.

    Args:
        context: how the written answers of the tables were asked for.
    """
    keys = list(dict.fromkeys(key for row in comparison.rows for key in row.further))
    contexts = [key.removeprefix("unstopped_") for key in keys if key.startswith("unstopped_")]
    written = {key: words for key, words in _WRITTEN.items() if contexts and key != "unstopped"}
    headings = {key: f"{context}: {words}" for key, words in written.items()} | {"unstopped": f"{context}: did not stop"}
    for other in contexts:
        headings |= {f"{key}_{other}": f"{other}: {words}" for key, words in _WRITTEN.items()}
    headings["tokens_per_second"] = "tokens a second"
    still = {"perplexity": "perplexity", "divergence": "KL, nats", "fluency": "fluency, bits"}
    tasks = {key: key.removeprefix("task: ") for key in keys if key.startswith("task: ")}
    found = [
        Sheet(
            "What the model can still do",
            "After the sequence, with 95 % intervals: perplexity of held-out text and the KL divergence of its next-token "
            "distributions from the unedited model's (by bootstrap over the passages), fluency, and tasks of "
            "lm-evaluation-harness (from its standard errors).",
            _rows(comparison, still | tasks, [row for row in comparison.rows if row.protocol != SINGLE], before=True),
            prominent=True,
        ),
        Sheet(
            "Written answers",
            "How often what the model writes begins with the target, is the target and nothing else, and did not stop by "
            "itself: as the prompt asks (plain), as a question and answer (qa), through the chat template (chat).",
            _rows(comparison, headings, comparison.rows, before=True),
        ),
        Sheet(
            "New answer against old: ES, PS, NS",
            "As ROME’s line of papers measures CounterFact: how often the new answer is more probable than the old one after "
            "the prompt (ES) and rephrased ones (PS), and on neighbours their own answer than the new one (NS); EM, PM and NM: "
            "by how much, in points of probability; score is the harmonic mean of ES, PS and NS.",
            _rows(comparison, {key: key.upper() for key in ("es", "ps", "ns", "em", "pm", "nm")} | {"score": "score"},
                  [row for row in comparison.rows if row.es is not None]),
        ),
        Sheet(
            "Negation and contradiction",
            "Negated: how often after “The following is false:” and the prompt the old answer is more probable than the new "
            "one. Both true: how often the model calls the prompt with either answer true, new and old.",
            _rows(comparison, {"negation": "negated", "contradiction": "both true"}, comparison.rows, before=True),
        ),
    ]  # fmt: skip
    return [sheet for sheet in found if sheet.rows]


# Measures of written answers, as a sheet calls them.
_WRITTEN = {
    "generated_success": "begins with it",
    "exact_success": "whole",
    "generated_generalization": "rephrased, begins with it",
    "exact_generalization": "rephrased, whole",
    "unstopped": "did not stop",
}


def _rows(
    comparison: Comparison, headings: Mapping[str, str], rows: Sequence[Summary], before: bool = False
) -> dict[str, dict[str, dict[str, str]]]:
    """By protocol and method, those figures with their intervals that some row has."""
    there = {key: words for key, words in headings.items() if any(figure(row, key) is not None for row in rows)}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for protocol in dict.fromkeys(row.protocol for row in rows) if there else ():
        shown_rows = [comparison.before] * before + [row for row in rows if row.protocol == protocol]
        found[protocol] = {row.method: {words: with_interval(row, key) for key, words in there.items()} for row in shown_rows}
    return found


def figure(row: Summary, key: str) -> float | None:
    """A figure of a row, whether it has a field of its own or stands among the further ones."""
    found = row.further.get(key) if key in row.further else getattr(row, key, None)
    return found


def with_interval(row: Summary, key: str) -> str:
    """A figure with its interval behind it."""
    interval = ends(key, row.intervals.get(key, ()))
    return shown(key, figure(row, key)) + (f" ({interval})" if interval else "")


def shown_name(comparison: Comparison, method: str) -> str:
    """A method's name in tables: marked where it changes no weights."""
    return f"{method} {MEMORY_MARK}" if method in comparison.memories else method


def protocol_title(protocol: str) -> str:
    """How the edits of a table were made, after their number."""
    if protocol == SINGLE:
        return "single edits, each from the original model"
    if (size := batch_size(protocol)) > 1:
        return f"edits in batches of {size}, measured on the final model"
    number = protocol.removeprefix(f"{SEQUENTIAL}-") if is_order(protocol) else ""
    return "sequential edits, measured on the final model" + (f", in order {number}" if number else "")


def over_orders(rows: Sequence[Summary]) -> list[str]:
    """In words, a method's means over the orders that its edits were made in, with the least and the most."""
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        orders = [row for row in rows if row.method == method and (row.protocol == SEQUENTIAL or is_order(row.protocol))]
        if len(orders) < 2:
            continue
        parts = []
        for key in (*FOUR, "mean"):
            values = [value for row in orders if (value := getattr(row, key)) is not None]
            if values:
                name = NAMES.get(key, "mean of the four")
                parts.append(f"{name} {sum(values) / len(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        found.append(f"{method} over {len(orders)} orders: {', '.join(parts)}.")
    return found


def measured(methods: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """The columns of a table that hold anything of the methods; the unedited model comes before them."""
    _, *edited = methods.values()
    return [key for key in COLUMNS if any(cells[key].value is not None for cells in edited)]


def flips(rows: Sequence[Summary]) -> list[str]:
    """In words, the pairs of methods that teacher forcing and whole written answers put into opposite orders.

    By each, a method's figure is the mean over prompt and rephrasings; differences below a point are none.
    """

    def figure(row: Summary, keys: tuple[str, str]) -> float | None:
        values = [value for key in keys if (value := getattr(row, key)) is not None]
        return sum(values) / len(values) if values else None

    found = []
    for number, one in enumerate(rows):
        for other in rows[number + 1 :]:
            by = [
                [figure(row, keys) for row in (one, other)]
                for keys in (("edit_success", "generalization"), ("exact_success", "exact_generalization"))
            ]
            if any(value is None for pair in by for value in pair):
                continue
            forced, whole = (a - b for a, b in by)  # type: ignore[operator]
            if forced * whole < 0 and min(abs(forced), abs(whole)) >= 1:
                first, second = (one, other) if forced > 0 else (other, one)
                found.append(
                    f"{first.method} is ahead of {second.method} by teacher forcing ({abs(forced):.1f} points), and behind it "
                    f"by whole answers that it writes ({abs(whole):.1f})."
                )
    return found


def remarks(comparison: Comparison) -> list[str]:
    """What a reader of the tables has to know of these rows: edits that failed, and rankings that flip."""
    found = [
        f"{row.method}, {row.protocol}: {row.failed} of {row.n_edits} edits could not be made, and count as the model stands "
        "without them."
        for row in comparison.rows
        if row.failed
    ]
    found += [f"{method}: {words}." for method, words in comparison.caveats.items()]
    found += [f"{words}." for words in comparison.left_out]
    if comparison.memories:
        found.append(
            f"{MEMORY_MARK} changes no weights, and keeps edits in a memory beside them; in bold the best of the others."
        )
    for protocol in dict.fromkeys(row.protocol for row in comparison.rows):
        words = flips([row for row in comparison.rows if row.protocol == protocol])
        found += [f"{protocol}: {sentence}" for sentence in words]
    found += over_orders(comparison.rows)
    if all_of_it := sum(comparison.spent.values()):
        measuring = comparison.spent["measuring"]
        found.append(
            f"Measuring took {measuring:.0f} s of the {all_of_it:.0f} s of editing and measuring: {measuring / all_of_it:.0%}."
        )
    return found


def shown(key: str, value: float | None) -> str:
    """A figure with the decimals that its measure is given with."""
    if value is None:
        return "–"
    return f"{value:.{3 if key.startswith('task: ') else _DECIMALS.get(key, 1)}f}"


def print_ablation(comparison: Comparison, console: Console) -> None:
    """One table for :func:`kdpo_easyedit.bench.protocols.ablation`: a row a method and checkpoint, the best there in bold."""
    table = Table(title="sequential edits, all measured on the model at that point", title_justify="left", title_style="bold")
    table.add_column("negatives")
    for key in NAMES:
        table.add_column(_PRINTED[key], justify="right")
    for n_edits in sorted({row.n_edits for row in comparison.curve}):
        rows = [row for row in comparison.curve if row.n_edits == n_edits]
        table.add_section()
        table.add_row(Text(f"after {n_edits} edits", style="italic"))
        for row in rows:
            cells = []
            for key in NAMES:
                value = getattr(row, key)
                text = shown(key, value)
                text += f" ({getattr(row, _GENERATED[key]):.0f})" if value is not None and key in _GENERATED else ""
                cells.append(Text(text, style="bold" if value is not None and value == _best(rows, key) else ""))
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
    return min(values) if key in LESS_IS_BETTER else max(values)


def significance(comparison: Comparison) -> str:
    """What the dagger says."""
    if not comparison.tests:
        return ""
    against: dict[str, list[str]] = {}
    for test in comparison.tests:
        against.setdefault(test.against, []).append(test.protocol)
    words = [name + (f" ({', '.join(dict.fromkeys(of))})" if len(against) > 1 else "") for name, of in against.items()]
    return f"{_MARK} differs from {' or '.join(words)}: paired permutation test, p < {_SIGNIFICANT} by Holm"


def print_tables(comparison: Comparison, console: Console) -> None:
    """One table a protocol, a row a method; the best of each column in bold."""
    for protocol, methods in tables(comparison).items():
        title = f"{comparison.before.n_edits} {protocol_title(protocol)}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("method")
        there = measured(methods)
        columns = [key for key in _PRINTED if key in there or key not in _WHERE_MEASURED]
        for key in columns:
            table.add_column(_PRINTED[key], justify="right")
        for method, cells in methods.items():
            row = []
            for key in columns:
                cell = cells[key]
                generated = cells[_GENERATED[key]].value if key in _GENERATED else None
                brackets = "" if generated is None else f" ({generated:.0f})"
                row.append(Text(f"{cell.text}{cell.mark}{brackets}", style="bold" if cell.best else ""))
            table.add_row(shown_name(comparison, method), *row, style="dim" if method == comparison.before.method else "")
        console.print(table)
    rows = [comparison.before, *comparison.rows]
    notes = [
        "in percent by teacher forcing; in brackets, how often the model writes it",
        "(before): the unedited model, same prompts",
        "fluency: n-gram entropy in bits" if any(row.fluency is not None for row in rows) else "",
        "perplexity: of ordinary text that no edit is about" if any(row.perplexity is not None for row in rows) else "",
        significance(comparison),
        *remarks(comparison),
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


def short_name(model: str) -> str:
    """A model's name on the hub, or the name of its folder."""
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def title(result: Results) -> str:
    """What a section on one model and its edits is called."""
    return f"{short_name(result.model)}, {result.settings['data'] or 'edits without a name'}"
