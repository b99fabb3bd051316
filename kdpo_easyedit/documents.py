"""What is written of results: a page to read and search (report.html), and tables to paste (summary.md, summary.tex)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Metrics
from .files import whole
from .report import PROTOCOLS, Cell, significance, tables
from .results import Results, read_results
from .runs import RunError

#: The columns of a table with two lines of headings each.
COLUMNS = {
    "edit_success": ("edit success", "forced"),
    "generated_success": ("edit success", "written"),
    "generalization": ("generalization", "forced"),
    "generated_generalization": ("generalization", "written"),
    "portability": ("portability", ""),
    "locality": ("locality", ""),
    "fluency": ("fluency", "bits"),
    "seconds_per_edit": ("an edit takes", "seconds"),
    "megabytes_per_edit": ("an edit takes", "MB"),
}
_NOTES = (
    "In percent, with 95 % confidence intervals (bootstrap over the edits); the best in bold.",
    "forced: the share of the target's tokens that the model says under teacher forcing; written: how often it writes the "
    "target on its own.",
    "fluency: n-gram entropy. (before): the unedited model on the same prompts.",
    "MB: the most memory that an edit takes beyond what was taken before it; the median over the edits.",
)
_PAGE, _TEXT, _LATEX = "report.html", "summary.md", "summary.tex"


def write_documents(folders: Sequence[Path], into: Path, latex: bool = False) -> list[Path]:
    """Write ``report.html`` and ``summary.md`` of one or several runs, and ``summary.tex`` where asked for.

    Args:
        folders: of complete runs.
        into: a folder, made if need be: the one run's own, or one that holds nothing but such documents.

    Returns:
        The files.

    Raises:
        RunError: a folder holds no complete run, the runs were measured differently, or ``into`` holds something else.
    """
    if [into.resolve()] != [folder.resolve() for folder in folders] and into.exists():
        foreign = sorted({path.name for path in into.iterdir()} - {_PAGE, _TEXT, _LATEX}) if into.is_dir() else [into.name]
        if foreign:
            raise RunError(f"{into}: holds other things than reports, such as {foreign[0]}; name another --metrics_save_dir")
    results = read_results(folders)
    written = {_PAGE: page(results), _TEXT: markdown(results)} | ({_LATEX: latex_tables(results)} if latex else {})
    into.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        with whole(into / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return [into / name for name in written]


def short_name(model: str) -> str:
    """A model's name on the hub, or the name of its folder."""
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def _title(result: Results) -> str:
    return f"{short_name(result.model)}, {result.settings['data'] or 'edits without a name'}"


def _about(result: Results) -> str:
    settings = result.settings
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    return f"Model {result.model}; {settings['edits']} edits; seed {settings['seed']}; {settings['hardware']}; {versions}."


# --------------------------------------------------------------------------------------------------------------------
# Tables to paste.


def markdown(results: Sequence[Results]) -> str:
    """The tables as GitHub's Markdown shows them."""
    lines = []
    for result in results:
        lines += [f"## {_markdown(_title(result))}", ""]
        for protocol, methods in tables(result.comparison).items():
            headings = [", ".join(filter(None, heading)) for heading in COLUMNS.values()]
            lines += [f"{result.comparison.before.n_edits} {PROTOCOLS[protocol]}:", ""]
            lines += [_row(["method", *headings]), _row(["---", *(["---:"] * len(COLUMNS))])]
            for method, cells in methods.items():
                lines.append(_row([_markdown(method), *(_markdown_cell(cells[key]) for key in COLUMNS)]))
            lines.append("")
        lines += [*_notes(result), _markdown(_about(result)), ""]
    return "\n".join(lines)


def _notes(result: Results) -> list[str]:
    return [" ".join(filter(None, (*_NOTES, significance(result.comparison) and significance(result.comparison) + ".")))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text}{cell.mark}" + (f"<br><sub>{cell.interval}</sub>" if cell.interval else "")


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text.replace("\n", " "))


def latex_tables(results: Sequence[Results]) -> str:
    """The tables for a paper; they need the package booktabs."""
    return "\n".join(
        _latex_table(result, protocol, methods) for result in results for protocol, methods in tables(result.comparison).items()
    )


def _latex_table(result: Results, protocol: str, methods: Mapping[str, Mapping[str, Cell]]) -> str:
    groups: dict[str, int] = {}
    for heading, _ in COLUMNS.values():
        groups[heading] = groups.get(heading, 0) + 1
    ends = np.cumsum(list(groups.values())) + 1
    rules = " ".join(f"\\cmidrule(lr){{{end - n + 1}-{end}}}" for n, end in zip(groups.values(), ends) if n > 1)
    body = []
    for method, cells in methods.items():  # intervals stand on a line of their own, or ten columns would be too wide
        intervals = (cells[key].interval for key in COLUMNS)
        body.append(" & ".join([_latex(method), *(_latex_cell(cells[key]) for key in COLUMNS)]) + r" \\")
        body.append(" & ".join(["", *(rf"{{\scriptsize {_latex(interval)}}}" for interval in intervals)]) + r" \\[2pt]")
    caption = f"{_title(result)}: {result.comparison.before.n_edits} {PROTOCOLS[protocol]}. {' '.join(_notes(result))}"
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
            r"\toprule",
            " & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{_latex(heading)}}}" for heading, n in groups.items())]) + r" \\",
            rules,
            " & ".join(["method", *(_latex(unit) for _, unit in COLUMNS.values())]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{_latex(caption)}}}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    mark = r"$^{\dagger}$" if cell.mark else ""
    return (rf"\textbf{{{text}}}" if cell.best else text) + mark


_LATEX_NAMES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "†": r"$^{\dagger}$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''",
}  # fmt: skip


def _latex(text: str) -> str:
    return re.sub(r"[&%$#_{}]|[\\~^–†<>|\"]", lambda found: _LATEX_NAMES.get(found[0], "\\" + found[0]), text)


# --------------------------------------------------------------------------------------------------------------------
# The page: a template that draws what it is given as JSON.


def page(results: Sequence[Results]) -> str:
    """``report.html``: one file that needs nothing else."""
    content = {
        "versions": results[0].settings["versions"],
        "columns": [[key, *heading] for key, heading in COLUMNS.items()],
        "notes": _NOTES,
        "protocols": PROTOCOLS,
        "results": [_content(result) for result in results],
    }
    # Nothing in a text can end the element that holds it.
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=float).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split("{data}")
    return before + data + after


def _content(result: Results) -> dict[str, Any]:
    comparison = result.comparison
    first = next(iter(result.metrics.values()))
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    return {
        "title": _title(result),
        "model": short_name(result.model),
        "data": result.settings["data"],
        "settings": {"model": result.model, **{key: value for key, value in result.settings.items() if key != "versions"}},
        "hparams": result.hparams,
        "methods": methods,
        "tables": {
            protocol: {method: {key: _cell(cells[key]) for key in COLUMNS} for method, cells in rows.items()}
            for protocol, rows in tables(comparison).items()
        },
        "significance": significance(comparison),
        "before": asdict(comparison.before),
        "rows": [asdict(row) for row in comparison.rows],
        "curve": [asdict(row) for row in comparison.curve],
        "kinds": {
            protocol: {
                method: _by_kind(result.metrics[method, protocol]) for method in methods if (method, protocol) in result.metrics
            }
            for protocol in tables(comparison)
        },
        "easyedit": {
            protocol: {row["method"]: _flat(row) for row in result.easyedit if row["protocol"] == protocol}
            for protocol in tables(comparison)
            if result.easyedit
        },
        "edits": [_edit(entry) for entry in first],
        "outcomes": {
            protocol: {
                method: [
                    _outcome(entry, trace)
                    for entry, trace in zip(result.metrics[method, protocol], result.traces[method, protocol])
                ]
                for method in methods
                if (method, protocol) in result.metrics
            }
            for protocol in tables(comparison)
        },
    }


def _cell(cell: Cell) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": cell.text + cell.mark, "interval": cell.interval, "best": cell.best}
    if cell.test is not None:
        test = cell.test
        shown["test"] = (
            f"{test.difference:+.2f} against {test.against} over {test.n_edits} edits, "
            f"p = {test.p_value:.4f}, by Holm {test.p_corrected:.4f}"
        )
    return shown


def _by_kind(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Percentages of every kind of locality and portability: the mean over the edits that have it."""
    found: dict[str, list[float]] = {}
    for entry in metrics:
        for section in ("locality", "portability"):
            for kind, scores in _scores(entry["post"], section).items():
                found.setdefault(f"{section}: {kind}", []).append(100 * float(np.mean(scores)))
    return {kind: round(float(np.mean(values)), 1) for kind, values in found.items()}


def _flat(row: Mapping[str, Any]) -> dict[str, float]:
    """EasyEdit's own means in percent, under the names that it has for them."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict) and key in ("locality", "portability"):
            flat |= {f"{key}: {kind}": round(100 * mean, 1) for kind, mean in value.items()}
        elif key.endswith("_acc"):
            flat[key] = round(100 * value, 1)
    return flat


def _scores(phase: Metrics, section: str) -> dict[str, list[float]]:
    """By kind, the score of every prompt of locality or portability."""
    return {
        key.removesuffix("_acc"): [round(float(score), 3) for score in scores]
        for key, scores in phase[section].items()
        if key.endswith("_acc") and len(scores)
    }


def _edit(entry: Metrics) -> dict[str, Any]:
    """What an edit asks for, and what the unedited model says."""
    request = entry["requested_rewrite"]
    return {
        **{key: request.get(key) for key in ("prompt", "target_new", "subject", "ground_truth", "rephrase_prompt")},
        **{
            section: {kind: [asked["prompt"], asked["ground_truth"]] for kind, asked in request[section].items()}
            for section in ("locality", "portability")
        },
        "before": _said(entry["pre"]),
    }


def _said(phase: Metrics) -> dict[str, Any]:
    """What a model says of an edit, in words and scores."""
    return {
        "rewrite": [
            round(float(np.mean(phase["rewrite_acc"])), 3),
            phase["generated"].get("rewrite"),
            phase["generated"].get("rewrite_acc"),
        ],
        "rephrase": [
            round(float(np.mean(phase["rephrase_acc"])), 3),
            phase["generated"].get("rephrase"),
            phase["generated"].get("rephrase_acc"),
        ]
        if "rephrase_acc" in phase
        else None,
        "locality": _scores(phase, "locality"),
        "portability": _scores(phase, "portability"),
        "fluency": round(float(phase["fluency"]["ngram_entropy"]), 2),
    }


def _outcome(entry: Metrics, trace: Mapping[str, Any]) -> dict[str, Any]:
    """What the edited model says, and how the method got there as far as it tells."""
    steps = {key: trace[key] for key in ("steps", "ended", "negative_texts", "token_accuracy") if key in trace}
    if "losses" in trace:
        steps["losses"] = [[float(f"{loss:.4g}") for loss in cycle] for cycle in trace["losses"]]
    return _said(entry["post"]) | {"seconds": round(entry["time"], 4), "memory": entry.get("memory"), "trace": steps}
