"""The figures of runs, read back from their folders, side by side where they were measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.measuring import per_edit, summarise
from ..bench.protocols import Comparison, with_ability
from ..bench.runs import RunError, RunFolder, differences
from ..bench.schema import VERSION, EditMetrics, PairedTest, Row, Summary, from_json, is_order
from ..bench.significance import paired_tests

Key = tuple[str, str]


@dataclass
class Results:
    """What was measured of one model on the same edits, by one run or several.

    Attributes:
        model: its name, as the hyper-parameters have it.
        settings: what all the figures have in common: ``data``, ``device``, ``seed``, ``versions``.
        comparison: without examples.
        metrics: EasyEdit's, of every edit, by method and protocol.
        traces: of every edit, what the journal has of the method's own work.
        hparams: by method.
        easyedit: EasyEdit's own summaries, where it has them.
    """

    model: str
    settings: dict[str, Any]
    comparison: Comparison
    metrics: dict[Key, list[EditMetrics]]
    traces: dict[Key, list[dict[str, Any]]]
    hparams: dict[str, dict[str, Any]]
    easyedit: list[dict[str, Any]]


def read_results(folders: Sequence[Path]) -> list[Results]:
    """Read runs; those of the same model and data come together, and a method's name that comes twice gets its folder's.

    Raises:
        RunError: a folder holds no complete run, or the runs were measured differently.
    """
    runs: list[Results] = []
    for folder in folders:
        if sum(folder.resolve() == other.resolve() for other in folders) > 1:
            raise RunError(f"{folder}: named twice")
        run = _read(folder)
        first = runs[0] if runs else run
        _refuse(folders[0], folder, first.settings["versions"], run.settings["versions"], "versions")
        runs.append(run)
    groups: dict[Key, list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault((run.model, run.settings["data"]), []).append(number)
    return [_joined([(folders[number], runs[number]) for number in numbers]) for numbers in groups.values()]


def _read(folder: Path) -> Results:
    run = RunFolder(folder, {})
    record = run.read("run.json")
    if record is None:
        raise RunError(f"{folder}: holds no run; name a folder that --metrics_save_dir has named")
    if record.get("schema", 1) > VERSION:
        raise RunError(f"{folder}: written by a later version of kdpo-easyedit (its files are of version {record['schema']})")
    rows, tests = _rows(run, Summary, "summary.json") or [], _rows(run, PairedTest, "tests.json")
    keys = [(row.method, row.protocol) for row in rows]
    metrics = {key: _rows(run, EditMetrics, "metrics-{}-{}.json".format(*key)) or [] for key in keys}
    traces = {(method, protocol): run.journal(f"{method}-{protocol}.jsonl").entries for method, protocol in keys}
    for key, of in metrics.items():  # other orders' edits beside the given one's
        if is_order(key[1]) and len(of) == len(traces[key]):
            places = sorted(range(len(of)), key=lambda place: of[place].case_id)
            metrics[key], traces[key] = ([its[place] for place in places] for its in (of, traces[key]))
    apart = record.get("about", {}).get("left_out", [])
    whole = "about" in record and len(rows) + len(apart) == len(record["methods"]) * len(record["protocols"])
    if not whole or tests is None or any(len(of) != len(traces[key]) for key, of in metrics.items()):
        raise RunError(f"{folder}: the run is not complete; its own command goes on with it")
    before = with_ability(summarise("(before)", "", metrics[keys[0]], "pre"), run.read("ability-before.json") or {})
    comparison = Comparison(
        before=replace(before, tokens_per_second=run.tokens_per_second("before")),
        rows=rows,
        examples=[],
        curve=_rows(run, Summary, "curve.json") or [],
        tests=tests,
        caveats=record["about"].get("caveats", {}),
        left_out=apart,
        memories=record["about"].get("memories", []),
        spent=run.spent(keys),
    )
    hparams = next(iter(record["methods"].values()))
    loading = {key: hparams.get(key, False) for key in ("device", "model_parallel")}
    loading["dtype"] = hparams.get("dtype") or ("float16" if hparams.get("fp16") else "float32")
    measuring = record.get("measuring", {})
    return Results(
        model=hparams["model_name"],
        settings={
            "data": record["about"]["data"],
            "edits": comparison.before.n_edits,
            "records": record["data"],
            "seed": record["seed"],
            "context": next(iter(measuring.get("contexts", ())), "plain"),
            "metrics": measuring.get("engine"),
            **{
                f"ability_{what}": measuring[key]
                for what, key in (("text", "ability"), ("tasks", "tasks"), ("limit", "limit"))
                if key in measuring
            },
            "hardware": record["about"]["device"],
            **loading,
            **record.get("found", {}),
            "versions": record["versions"],
        },
        comparison=comparison,
        metrics=metrics,
        traces=traces,
        hparams=record["methods"],
        easyedit=run.read("easyedit-summary.json") or [],
    )


def _rows(run: RunFolder, cls: type[Row], name: str) -> list[Row] | None:
    content = run.read(name)
    try:
        return None if content is None else from_json(cls, content)
    except ValueError as error:
        raise RunError(f"{run.path / name}: {error}") from None


def _joined(runs: Sequence[tuple[Path, Results]]) -> Results:
    """Runs of one model on one file of edits as one."""
    (first_folder, first), *others = runs
    if not others:
        return first
    named = [method for _, run in runs for method in run.hparams]
    before = _completed([run.comparison.before for _, run in runs])
    joined = Results(first.model, first.settings, Comparison(before, [], [], []), {}, {}, {}, [])
    labels = _labels([folder for folder, _ in runs])
    for (folder, run), label in zip(runs, labels):
        _refuse(first_folder, folder, first.settings, run.settings, "")
        names = {method: method if named.count(method) == 1 else f"{method} ({label})" for method in run.hparams}
        joined.comparison.rows += [replace(row, method=names[row.method]) for row in run.comparison.rows]
        joined.comparison.curve += [replace(row, method=names[row.method]) for row in run.comparison.curve]
        joined.metrics |= {(names[method], protocol): of for (method, protocol), of in run.metrics.items()}
        joined.traces |= {(names[method], protocol): of for (method, protocol), of in run.traces.items()}
        joined.hparams |= {names[method]: of for method, of in run.hparams.items()}
        joined.comparison.caveats |= {names[method]: words for method, words in run.comparison.caveats.items()}
        joined.comparison.memories += [names[method] for method in run.comparison.memories]
        joined.comparison.left_out += run.comparison.left_out
        for key, seconds in run.comparison.spent.items():
            joined.comparison.spent[key] = joined.comparison.spent.get(key, 0) + seconds
        joined.easyedit += [row | {"method": names[row["method"]]} for row in run.easyedit]
    joined.comparison.tests = paired_tests({key: per_edit(metrics, "post") for key, metrics in joined.metrics.items()})
    return joined


def _completed(befores: Sequence[Summary]) -> Summary:
    """The unedited model's row, with what only some of the runs have looked at: fluency, what sequences are measured by."""
    row, *others = befores
    for other in others:
        missing = {key: value for key, value in vars(other).items() if getattr(row, key) is None}
        joined = {key: getattr(other, key) | getattr(row, key) for key in ("further", "intervals")}
        row = replace(row, **missing, **joined)
    return row


def _labels(folders: Sequence[Path]) -> list[str]:
    """As much of the end of each folder's path as tells them all apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({of[-n:] for of in parts}) == len(parts))
    return ["/".join(of[-depth:]) for of in parts]


def _refuse(one_folder: Path, other_folder: Path, one: Any, other: Any, where: str) -> None:
    found = differences(one, other, where)
    if found:
        raise RunError(
            f"{other_folder} was not measured as {one_folder} was: {'; '.join(found)}. Report them apart, or run one again"
        )
