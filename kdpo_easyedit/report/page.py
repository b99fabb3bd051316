"""report.html: a template that draws what it is given as JSON. One file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np

from ..bench.measuring import retention
from ..bench.schema import SEQUENTIAL, EditMetrics, Metrics
from ..bench.significance import share_interval
from ..files import json_text
from .results import Results
from .tables import COLUMNS, NOTES, Cell, protocol_title, remarks, sheets, short_name, shown_name, significance, tables, title


def page(results: Sequence[Results]) -> str:
    """``report.html``: one file that needs nothing else."""
    content = {
        "versions": results[0].settings["versions"],
        "columns": [[key, *heading] for key, heading in COLUMNS.items()],
        "notes": NOTES,
        "protocols": {row.protocol: protocol_title(row.protocol) for of in results for row in of.comparison.rows},
        "results": [_content(result) for result in results],
    }
    return filled(content)


def filled(content: Mapping[str, Any]) -> str:
    """The template with what it is to draw: ``results``, or ``sweep``."""
    # Nothing in a text can end the element that holds it.
    data = json_text(content, separators=(",", ":"), default=float).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split("{data}")
    return before + data + after


def _content(result: Results) -> dict[str, Any]:
    comparison = result.comparison
    first = next(iter(result.metrics.values()))
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    return {
        "title": title(result),
        "model": short_name(result.model),
        "data": result.settings["data"],
        "settings": {"model": result.model, **{key: value for key, value in result.settings.items() if key != "versions"}},
        "hparams": result.hparams,
        "methods": methods,
        "marked": {method: shown_name(comparison, method) for method in comparison.memories},
        "tables": {
            protocol: {method: {key: _cell(cells[key]) for key in COLUMNS} for method, cells in rows.items()}
            for protocol, rows in tables(comparison).items()
        },
        "significance": significance(comparison),
        "remarks": remarks(comparison),
        "sheets": [asdict(sheet) for sheet in sheets(comparison, result.settings["context"])],
        "retention": {
            method: retention(metrics) for (method, protocol), metrics in result.metrics.items() if protocol == SEQUENTIAL
        },
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


def _by_kind(metrics: Sequence[EditMetrics]) -> dict[str, str]:
    """Percentages of every kind of locality and portability, with their intervals: the mean over the edits that have it."""
    found: dict[str, list[float]] = {}
    for entry in metrics:
        for section in ("locality", "portability"):
            for kind, scores in _scores(entry.post, section).items():
                found.setdefault(f"{section}: {kind}", []).append(100 * float(np.mean(scores)))
    ends = {kind: "–".join(f"{end:.0f}" for end in share_interval(of)) for kind, of in found.items() if len(of) > 1}
    return {kind: f"{np.mean(of):.1f}" + (f" ({ends[kind]})" if kind in ends else "") for kind, of in found.items()}


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


def _edit(entry: EditMetrics) -> dict[str, Any]:
    """What an edit asks for, and what the unedited model says."""
    request = entry.requested_rewrite
    return {
        **{key: request.get(key) for key in ("prompt", "target_new", "subject", "ground_truth", "rephrase_prompt")},
        **{
            section: {kind: [asked["prompt"], asked["ground_truth"]] for kind, asked in request[section].items()}
            for section in ("locality", "portability")
        },
        "before": _said(entry.pre),
    }


def _said(phase: Metrics) -> dict[str, Any]:
    """What a model says of an edit, in words and scores."""
    generated = phase.get("generated", {})  # of a run without contexts, nothing

    def said(kind: str) -> list[Any] | None:
        if f"{kind}_acc" not in phase:
            return None
        written = generated.get(kind)  # in version 1 one text, since then a list
        text = written if isinstance(written, str) or written is None else " · ".join(written)
        return [round(float(np.mean(phase[f"{kind}_acc"])), 3), text, _mean(generated.get(f"{kind}_acc"))]

    return {
        "rewrite": said("rewrite"),
        "rephrase": said("rephrase"),
        "locality": _scores(phase, "locality"),
        "portability": _scores(phase, "portability"),
        "fluency": round(float(phase["fluency"]["ngram_entropy"]), 2) if "fluency" in phase else None,
    }


def _mean(scores: Any) -> float | None:
    return float(np.mean(scores)) if np.size(scores) and scores is not None else None


def _outcome(entry: EditMetrics, trace: Mapping[str, Any]) -> dict[str, Any]:
    """What the edited model says, and how the method got there as far as it tells."""
    steps = {key: trace[key] for key in ("steps", "ended", "negative_texts", "token_accuracy") if key in trace}
    if "losses" in trace:
        steps["losses"] = [[float(f"{loss:.4g}") for loss in cycle] for cycle in trace["losses"]]
    seconds = None if entry.time is None else round(entry.time, 4)
    return _said(entry.post) | {"seconds": seconds, "memory": entry.memory, "trace": steps}
