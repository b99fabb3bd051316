"""What is written of results: a page to read and search (report.html), and tables to paste (summary.md, summary.tex)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.protocols import Comparison
from ..bench.runs import RunError
from ..files import whole
from .charts import curve_chart, radar_chart
from .page import filled, page
from .results import Results, read_results
from .sweep import content as sweep_content
from .tables import COLUMNS, NOTES, Cell, measured, protocol_title, remarks, sheets, shown_name, significance, tables, title

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
    _check_empty(into, folders)
    results = read_results(folders)
    written = {_PAGE: page(results), _TEXT: markdown(results)} | ({_LATEX: latex_tables(results)} if latex else {})
    return _write(into, written)


def write_sweep(folder: Path, into: Path) -> list[Path]:
    """Write ``report.html`` and ``summary.md`` of a sweep, also of one that is not done.

    Args:
        folder: the sweep's.
        into: a folder, made if need be: the sweep's own, or one that holds nothing but such documents.

    Returns:
        The files.

    Raises:
        RunError: the folder holds no sweep, or ``into`` holds something else.
    """
    _check_empty(into, [folder])
    drawn = sweep_content(folder, into)
    return _write(into, {_PAGE: filled({"sweep": drawn}), _TEXT: sweep_markdown(drawn)})


def document_run(comparison: Comparison, folder: Path, latex: bool = False) -> Path:
    """Charts and documents of a run that is complete, in its own folder; the report, which comes last, is returned."""
    radar_chart(comparison, folder / "radar.png")
    if comparison.curve:
        curve_chart(comparison.curve, folder / "curve.png")
    return write_documents([folder], folder, latex)[0]


def _check_empty(into: Path, folders: Sequence[Path]) -> None:
    if [into.resolve()] != [folder.resolve() for folder in folders] and into.exists():
        foreign = sorted({path.name for path in into.iterdir()} - {_PAGE, _TEXT, _LATEX}) if into.is_dir() else [into.name]
        if foreign:
            raise RunError(f"{into}: holds other things than reports, such as {foreign[0]}; name another --metrics_save_dir")


def _write(into: Path, written: Mapping[str, str]) -> list[Path]:
    into.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        with whole(into / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return [into / name for name in written]


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
        lines += [f"## {_markdown(title(result))}", ""]
        for protocol, methods in tables(result.comparison).items():
            columns = measured(methods)
            headings = [", ".join(filter(None, COLUMNS[key])) for key in columns]
            lines += [f"{result.comparison.before.n_edits} {protocol_title(protocol)}:", ""]
            lines += [_row(["method", *headings]), _row(["---", *(["---:"] * len(columns))])]
            for method, cells in methods.items():
                lines.append(
                    _row([_markdown(shown_name(result.comparison, method)), *(_markdown_cell(cells[key]) for key in columns)])
                )
            lines.append("")
        for sheet in sheets(result.comparison, result.settings["context"]):
            for protocol, rows in sheet.rows.items():
                headings = list(next(iter(rows.values())))
                lines += [f"{sheet.title}, {result.comparison.before.n_edits} {protocol_title(protocol)}:", ""]
                lines += [_row(["method", *map(_markdown, headings)]), _row(["---", *(["---:"] * len(headings))])]
                lines += [_row([_markdown(method), *(of[heading] for heading in headings)]) for method, of in rows.items()]
                lines += ["", _markdown(sheet.note), ""]
        lines += [*_notes(result), _markdown(_about(result)), ""]
    return "\n".join(lines)


def sweep_markdown(drawn: Mapping[str, Any]) -> str:
    """A sweep's tables by the mean of the four measures, as GitHub's Markdown shows them."""
    measure = next(iter(drawn["measures"]), "mean")
    states = ", ".join(f"{number} {state}" for state, number in drawn["states"].items())
    lines = [f"# {_markdown(drawn['name'])}", "", f"Runs: {states}.", ""]
    for table in drawn["tables"]:
        models = [model for model in drawn["models"] if any(model in cells for cells in table["cells"].values())]
        ranks = table["ranks"].get(measure, {"of": {}, "comparisons": 0})
        lines += [f"## {_markdown(table['title'])}", ""]
        lines += [_row(["method", *map(_markdown, models), "rank"]), _row(["---", *["---:"] * (len(models) + 1)])]
        for method, cells in table["cells"].items():
            row = [_sweep_cell(cells.get(model), measure) for model in models]
            lines.append(_row([_markdown(method), *row, _figure(ranks["of"].get(method))]))
        lines += ["", f"Ranks are over {ranks['comparisons']} comparisons in which all methods are done.", ""]
    return "\n".join([*lines, " ".join(drawn["notes"]), ""])


def _sweep_cell(cell: Mapping[str, Any] | None, measure: str) -> str:
    if cell is None:
        return "–"
    states = ", ".join(dict.fromkeys(run["state"] for run in cell["runs"] if run["state"] != "done"))
    figure = cell["figures"].get(measure)
    return " ".join(filter(None, [_figure(figure) if figure else "", f"({states})" if states else ""])) or "–"


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    text = f"**{figure['text']}**" if figure["best"] else figure["text"]
    return text + (f"<br><sub>{figure['interval']}</sub>" if figure["interval"] else "")


def _notes(result: Results) -> list[str]:
    tested = significance(result.comparison)
    return [" ".join(filter(None, (*NOTES, tested and tested + ".", *remarks(result.comparison))))]


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
    columns = measured(methods)
    groups: dict[str, int] = {}
    for heading, _ in (COLUMNS[key] for key in columns):
        groups[heading] = groups.get(heading, 0) + 1
    ends = np.cumsum(list(groups.values())) + 1
    rules = " ".join(f"\\cmidrule(lr){{{end - n + 1}-{end}}}" for n, end in zip(groups.values(), ends) if n > 1)
    body = []
    for method, cells in methods.items():  # intervals stand on a line of their own, or ten columns would be too wide
        intervals = (cells[key].interval for key in columns)
        body.append(
            " & ".join([_latex(shown_name(result.comparison, method)), *(_latex_cell(cells[key]) for key in columns)]) + r" \\"
        )
        body.append(" & ".join(["", *(rf"{{\scriptsize {_latex(interval)}}}" for interval in intervals)]) + r" \\[2pt]")
    caption = f"{title(result)}: {result.comparison.before.n_edits} {protocol_title(protocol)}. {' '.join(_notes(result))}"
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering\small\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            " & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{_latex(heading)}}}" for heading, n in groups.items())]) + r" \\",
            rules,
            " & ".join(["method", *(_latex(COLUMNS[key][1]) for key in columns)]) + r" \\",
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
    "‡": r"$^{\ddagger}$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''",
}  # fmt: skip


def _latex(text: str) -> str:
    return re.sub(r"[&%$#_{}]|[\\~^–†‡<>|\"]", lambda found: _LATEX_NAMES.get(found[0], "\\" + found[0]), text)
