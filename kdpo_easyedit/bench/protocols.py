"""Methods × requests → EasyEdit's metrics, after single edits or after all of a sequence.

Every method is EasyEdit's own, through ``BaseEditor``, on the same model, and is measured by EasyEdit's own metrics. The
model before any edit is measured once, for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from ..devices import device_name, synchronize
from ..easyedit import host
from ..easyedit import methods as algorithms
from ..easyedit.loading import check_device, in_place, set_apart
from ..easyedit.measuring import own_summary
from ..easyedit.statistics import prepare, with_text
from ..edits import save_edits as write_edits
from ..edits.factors import Factors, from_tensors, to_tensors
from ..edits.file import check_place, one_by_one, samples_of
from ..method import kdpo_c
from ..method.asking import CONTEXTS, asked
from ..method.config import HParamsError, KDPOHyperParams, plain
from ..method.kdpo import EditTrace, note_unedited
from ..method.replay import projecting_by_rows, runs_by_rows
from ..method.statistics import Text
from ..method.weights import read, write
from ..once import once_seconds
from .ability import Ability, about_no_edit
from .datasets import DatasetError, Request
from .judge import Judge, judged
from .measuring import (
    Measuring,
    check_length,
    measure,
    measure_after,
    per_edit,
    rephrasings,
    seed_everything,
    summarise,
    token_accuracy,
)
from .metrics import probes_of
from .peak import PeakMemory
from .runs import Journal, RunFolder
from .schema import (
    FOUR,
    SEQUENTIAL,
    SINGLE,
    VERSION,
    EditMetrics,
    Metrics,
    PairedTest,
    Summary,
    batch_size,
    from_json,
    is_order,
    to_json,
)
from .significance import paired_tests
from .tasks import Tasks
from .versions import versions

LOG = logging.getLogger(__name__)

Bar = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """A method under the name that the comparison shows, with EasyEdit's hyper-parameters for it."""

    name: str
    hparams: Any


def ablation(hparams: KDPOHyperParams) -> list[Method]:
    """The paper's ablation, KDPO against DPO: four methods that differ in their negatives.

    The DPO rows have the paper's cycles and steps for them, which are fewer.

    Raises:
        HParamsError: ``hparams`` are of a part of the ablation, and not of KDPO itself.
    """
    if hparams.negatives != "teacher_forced" or not hparams.online:
        given = f"negatives is {hparams.negatives!r} and online is {hparams.online}"
        raise HParamsError(f"{given}; allowed for an ablation: 'teacher_forced' and True, KDPO's own, which it begins with")
    dpo = replace(hparams, negatives="autoregressive", num_steps=6, cycles=5)
    return [
        Method("KDPO", hparams),
        Method("KDPO-once", replace(hparams, online=False)),
        Method("DPO-ablation", dpo),
        Method("DPO-ablation-once", replace(dpo, online=False)),
    ]


@dataclass(frozen=True)
class Example:
    """One edit in words."""

    prompt: str
    target: str
    before: str
    after: str


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        before: the model before any edit.
        rows: one for every method and protocol.
        examples: some of the first method's edits.
        curve: one for every method and checkpoint of the sequential edits.
        tests: one for every measure of every row but the first method's, or KDPO's where it is there.
        caveats: what has to be known of a method's figures, by method.
        left_out: of methods and protocols that do not go together, why, in words.
        memories: the methods that change no weights, and keep edits beside them.
        spent: seconds of ``editing`` (what is made once included) and of ``measuring``.
    """

    before: Summary
    rows: list[Summary]
    examples: list[Example]
    curve: list[Summary]
    tests: list[PairedTest] = field(default_factory=list)
    caveats: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    memories: list[str] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)


def compare(
    methods: Sequence[Method],
    requests: Sequence[Request],
    protocols: Sequence[str],
    folder: Path,
    seed: int = 0,
    eval_at: Sequence[int] | None = None,
    quiet: bool = False,
    overwrite: bool = False,
    save_edits: Path | None = None,
    save_model: Path | None = None,
    stats_text: Text | None = None,
    data_name: str = "",
    how: Measuring = Measuring(),
    ability_texts: Sequence[str] = (),
    loaded: tuple[Any, Any] | None = None,
    before: Path | None = None,
    tasks: Tasks | None = None,
    judge: tuple[str, str] | None = None,
) -> Comparison:
    """Run every method under every protocol. What is done is in ``folder`` at once; the same call again goes on from there.

    Under ``"single"`` the model is restored after each edit. Under ``"sequential"`` every edit starts from what the last one
    left, and at every checkpoint all edits so far are measured on the model as it stands then; the last is the result. Under
    ``"batches-10"`` ten edits are made at once, then the next ten, and all are measured at the end; a method that makes one
    edit at a time is left out of it.

    Written are ``metrics-METHOD-PROTOCOL.json`` in EasyEdit's format (for earlier checkpoints ``…-at-N.json``),
    ``ability-METHOD-PROTOCOL.json`` likewise, ``summary.json``, for sequential edits ``curve.json``, ``tests.json``, where
    EasyEdit has a summary of its own ``easyedit-summary.json``, a journal and the edited weights, and EasyEdit's own output
    in ``logs/``.

    Args:
        methods: all on the same model.
        requests: the edits, as :func:`kdpo_easyedit.bench.datasets.load_requests` gives them.
        protocols: ``"single"``, ``"sequential"``, the same edits in other orders (:func:`.schema.in_order`), and in batches
            (:func:`.schema.in_batches`).
        folder: the run's own; made if need be.
        seed: of all sampling: fluency's, and the contexts that ROME and MEMIT write.
        eval_at: after how many sequential edits to measure; left out, at powers of ten and the end.
        quiet: show no progress.
        overwrite: start anew where the folder holds a run.
        save_edits: a file for the sequential edits of the one method, for :func:`kdpo_easyedit.apply_edits`.
        save_model: a folder for the model with the sequential edits of the one method, for ``from_pretrained``.
        stats_text: what to take second moments over, for the methods that go by them; left out, those that their
            hyper-parameters name are used, or EasyEdit fetches the dataset that they are named after.
        data_name: what reports call the edits.
        how: how all methods are measured.
        ability_texts: ordinary text: sequences are measured by how well the model still reads those passages of it that name
            no edit's subject.
        loaded: the methods' model, unedited, and its tokenizer; left out, they are loaded.
        before: the folder in which :func:`measure_before` has measured that model on these edits; left out, it is done here.
        tasks: what they are asked beside that.
        judge: the address and the name of a model that judges written answers (:class:`.judge.Judge`). It may come to a run
            later, and where it fails the run goes on without it.

    Raises:
        HostError: methods of different models, or a model or device that cannot be had.
        DatasetError: a request that the model has no room for, or text that names edits' subjects everywhere.
        RunError: a folder that cannot be used or written.
    """
    folder = folder.resolve()
    save_edits, save_model = (path and path.resolve() for path in (save_edits, save_model))
    check(methods, protocols, save_edits, save_model)
    check_batches(protocols, len(requests))
    methods = [Method(method.name, in_place(method.hparams)) for method in methods]
    if stats_text is not None:
        methods = [Method(method.name, with_text(method.hparams, stats_text)) for method in methods]
    settings = settings_of(methods, requests, protocols, seed, eval_at, how, ability_texts, tasks)
    checkpoints = settings["checkpoints"]
    sequences = any(protocol != SINGLE for protocol in protocols)
    if sequences and ability_texts and not (ability_texts := about_no_edit(ability_texts, requests)):
        raise DatasetError("ability_text: every passage names the subject of an edit; name a text that no edit is about")
    caveats = {method.name: words for method in methods if (words := algorithms.caveat(method.hparams))}
    apart = left_out(methods, protocols)
    memories = [method.name for method in methods if not algorithms.changes_weights(method.hparams)]
    about = {
        "data": data_name,
        "device": _machine(methods[0].hparams.device),
        "caveats": caveats,
        "left_out": list(apart.values()),
        "memories": memories,
        "judge": judge,
    }
    with RunFolder(folder, settings, overwrite, about) as run, algorithms.output_to(folder):
        first = _first_editor(methods[0], loaded)
        run.settle(weights=_known_by(first.model))
        _check_room(requests, first.model, first.tok, how)
        prepare(first.model, first.tok, [method.hparams for method in methods], stats_text, quiet)
        bar = partial(tqdm, unit="edit", file=sys.__stderr__, disable=quiet, dynamic_ncols=True)
        journal = run.adopt("before.jsonl", before) if before else run.journal("before.jsonl")
        with run.measuring("before") as costs:
            unedited_metrics = _measure_before(journal, first, requests, seed, how, bar, costs)
        unedited = summarise("(before)", "", unedited_metrics, "pre")
        unedited = replace(unedited, tokens_per_second=run.tokens_per_second("before"))
        ability = None
        if sequences and (ability_texts or tasks):
            able = run.read("ability-before.json")
            # A run that goes on needs its texts' distributions again, which is no part of what measuring takes.
            with nullcontext() if able else run.measuring("before"):
                ability = Ability.of(first.model, first.tok, ability_texts, tasks)
                able = able or ability.left_in(first.model, first.tok, edited=False)
            run.write("ability-before.json", able)
            unedited = with_ability(unedited, able)
        judging = Judge(*judge, run.journal("judge.jsonl")) if judge else None
        result = Comparison(unedited, [], [], [], caveats=caveats, left_out=list(apart.values()), memories=memories)
        for protocol in protocols:
            for method in methods:
                if (method.name, protocol) in apart:
                    continue
                editor = editor_of(method, first, protocol)
                algorithms.set_memory()
                if protocol == SINGLE:
                    row = _edit_one_by_one(run, editor, unedited_metrics, method.name, seed, how, judging, bar)
                else:
                    entries, kept = unedited_metrics, (save_edits, save_model)
                    if protocol != SEQUENTIAL:
                        kept = None, None
                    if is_order(protocol):
                        entries = _shuffled(unedited_metrics, f"{seed} {protocol}")
                    measured_at = checkpoints if batch_size(protocol) == 1 else checkpoints[-1:]
                    rows = _edit_in_sequence(
                        run, editor, entries, method.name, protocol, seed, how, ability, judging, measured_at, bar, *kept
                    )
                    row = rows[-1]
                    if protocol == SEQUENTIAL:
                        result.curve += rows
                        run.write("curve.json", to_json(result.curve))
                result.examples = result.examples or _examples(
                    from_json(EditMetrics, run.read(f"metrics-{method.name}-{protocol}.json"))
                )
                result.rows.append(row)
                run.write("summary.json", to_json(result.rows))
        result.tests = _compare_rows(run, result.rows)
        result.spent = run.spent([(row.method, row.protocol) for row in result.rows])
    return result


def check(
    methods: Sequence[Method], protocols: Sequence[str], save_edits: Path | None = None, save_model: Path | None = None
) -> None:
    """Whether :func:`compare` can do what it is asked, before anything is loaded.

    Raises:
        HostError: it cannot.
        EditsError: there is no place for ``save_edits``.
    """
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise host.HostError(f"editing_method names {twice!r} twice; name each method once")
    for method in methods:
        algorithms.check_method(method.hparams, any(protocol != SINGLE for protocol in protocols))
        if (save_edits or save_model) and not algorithms.edits_weights(method.hparams):
            raise host.HostError(f"save_edits and save_model keep changed weights, and {method.name} changes none")
    if (save_edits or save_model) and (len(methods) != 1 or SEQUENTIAL not in protocols):
        raise host.HostError("save_edits and save_model keep the sequential edits of one method; name one method")
    if save_edits:
        check_place(save_edits)
    if save_model and save_model.exists():
        raise host.HostError(f"save_model is {str(save_model)!r}, which is there already; name a new folder")
    if apart := set_apart(method.hparams for method in methods):
        raise host.HostError(f"{apart}; compare methods on one model")
    if not getattr(methods[0].hparams, "model_parallel", False):
        check_device(methods[0].hparams.device)


def check_batches(protocols: Sequence[str], edits: int) -> None:
    """Whether there are edits enough for every protocol.

    Raises:
        HostError: there are not.
    """
    largest = max(map(batch_size, protocols))
    if largest > edits:
        raise host.HostError(f"edit_batch is {largest}, and there are {edits} edits; allowed: at most as many as there are")


def left_out(methods: Sequence[Method], protocols: Sequence[str]) -> dict[tuple[str, str], str]:
    """By name and protocol, the methods that make one edit at a time and so cannot make batches, each with that in words.

    Raises:
        HostError: no method is left for a protocol.
    """
    apart: dict[tuple[str, str], str] = {}
    for protocol in protocols:
        if (size := batch_size(protocol)) > 1:
            single = [method.name for method in methods if not algorithms.takes_batches(method.hparams)]
            if len(single) == len(methods):
                raise host.HostError(
                    f"edit_batch is {size}, and {', '.join(single)} make one edit at a time; allowed: 1, or other methods"
                )
            apart |= {(name, protocol): f"{name} makes one edit at a time: no batches of {size}" for name in single}
    return apart


def settings_of(
    methods: Sequence[Method],
    requests: Sequence[Request],
    protocols: Sequence[str],
    seed: int,
    eval_at: Sequence[int] | None,
    how: Measuring,
    ability_texts: Sequence[str],
    tasks: Tasks | None = None,
) -> dict[str, Any]:
    """Everything that the figures of :func:`compare` follow from, as its folder's ``run.json`` has it."""
    return {
        "schema": VERSION,
        "methods": {method.name: plain(method.hparams) for method in methods},
        "data": hashlib.sha256(json.dumps(requests).encode()).hexdigest(),
        "protocols": list(protocols),
        "checkpoints": sorted({n for n in eval_at or _powers_of_ten(len(requests)) if n < len(requests)} | {len(requests)}),
        "seed": seed,
        "measuring": asdict(how)
        | {"ability": hashlib.sha256("\n".join(ability_texts).encode()).hexdigest()[:16]}
        | ({"tasks": [*tasks.names], "limit": tasks.limit} if tasks else {}),
        "versions": versions(),
    }


def measure_before(
    method: Method,
    requests: Sequence[Request],
    folder: Path,
    seed: int = 0,
    quiet: bool = False,
    how: Measuring = Measuring(),
    loaded: tuple[Any, Any] | None = None,
) -> None:
    """Measure the model before any edit, once for all the calls of :func:`compare` that are given this ``folder``.

    Args:
        method: any that edits the model: the figures are the same for all.

    Others as for :func:`compare`, which raises the same.
    """
    folder = folder.resolve()
    method = Method(method.name, in_place(method.hparams))
    settings = settings_of([], requests, [], seed, None, how, ()) | {"model": plain(method.hparams)["model_name"]}
    with RunFolder(folder, settings) as run, algorithms.output_to(folder):
        editor = _first_editor(method, loaded)
        run.settle(weights=_known_by(editor.model))
        _check_room(requests, editor.model, editor.tok, how)
        bar = partial(tqdm, unit="edit", file=sys.__stderr__, disable=quiet, dynamic_ncols=True)
        _measure_before(run.journal("before.jsonl"), editor, requests, seed, how, bar)


def _known_by(model: Any) -> str:
    """What a model's weights are known by, wherever they lie: a hash of samples of all of them."""
    return hashlib.sha256(json.dumps(samples_of(model)).encode()).hexdigest()[:16]


def _first_editor(method: Method, loaded: tuple[Any, Any] | None) -> Any:
    """EasyEdit's editor of a method, on a model that is loaded already or is loaded now."""
    hparams = copy.copy(method.hparams)
    if loaded:
        hparams.model_name = loaded
    return host.BaseEditor(hparams)


def _measure_before(
    journal: Journal,
    editor: Any,
    requests: Sequence[Request],
    seed: int,
    how: Measuring,
    bar: Bar,
    costs: dict[str, float] | None = None,
) -> list[EditMetrics]:
    """The metrics of the model before any edit, one entry a request."""
    with bar(total=len(requests), initial=len(journal.entries), desc="before editing") as progress:
        while rest := requests[len(journal.entries) :][:_AT_ONCE]:
            for metrics in measure(editor, editor.model, rest, seed, how, costs=costs):
                journal.append(metrics)
            progress.update(len(rest))
    return [EditMetrics(number, request, pre) for number, (request, pre) in enumerate(zip(requests, journal.entries))]


def _edit_one_by_one(
    run: RunFolder,
    editor: Any,
    before: Sequence[EditMetrics],
    name: str,
    seed: int,
    how: Measuring,
    judge: Judge | None,
    bar: Bar,
) -> Summary:
    """Single edits, each taken back, and each measured on its own model.

    Where edits are changes of linear layers, several models are measured at once: they differ in those layers alone.
    """
    journal = run.journal(f"{name}-{SINGLE}.jsonl")
    apart = how.engine == "easyedit" or not algorithms.edits_weights(editor.hparams)
    with bar(total=len(before), initial=len(journal.entries), desc=f"{name}, single edits") as progress:
        while rest := before[len(journal.entries) :]:
            edits: list[Edit] = []
            left: list[dict[str, torch.Tensor]] = []  # of every edit, the weights as it left them
            posts: list[Metrics] = []
            until, held = time.monotonic() + _SAVE_SECONDS, 0
            for entry in rest[: 1 if apart else _AT_ONCE]:
                edit = _tried(editor, editor.model, entry.requested_rewrite, seed)
                try:
                    if not apart and runs_by_rows(edit.model, edit.originals):
                        left.append({key: weight.clone() for key, weight in read(edit.model, edit.originals).items()})
                        held += sum(weight.nbytes for weight in left[-1].values())
                    elif left:  # those before it are measured first; then it is made again
                        break
                    else:
                        with run.measuring(f"{name}-{SINGLE}") as costs:
                            posts = measure_after(editor, edit.model, [entry], seed, how, costs=costs)
                finally:
                    algorithms.undo_edits(editor, edit.originals)
                edits.append(edit)
                progress.update()
                if posts or held > _HELD or time.monotonic() > until:
                    break
            if left:
                with run.measuring(f"{name}-{SINGLE}") as costs, projecting_by_rows(editor.model, left) as rows_are:
                    posts = measure_after(editor, editor.model, rest[: len(left)], seed, how, rows_are, costs)
            for edit, post in zip(edits, posts):
                journal.append({"time": edit.seconds, "post": post, **edit.traces[0]})
            progress.set_postfix_str(_running(journal.entries))
    file = f"metrics-{name}-{SINGLE}.json"
    metrics = from_json(EditMetrics, run.read(file) or [])
    if not metrics:  # else they may have a judge's verdicts already
        for entry, done in zip(before, journal.entries):
            metrics.append(replace(entry, **{key: done.get(key) for key in (*_OF_EDIT, "post")}))
        run.write(file, to_json(metrics))
    if judge:
        metrics = _judged(run, judge, f"{name}-{SINGLE}", metrics)
    row = summarise(name, SINGLE, metrics, "post")
    return replace(row, tokens_per_second=run.tokens_per_second(f"{name}-{SINGLE}"))


def _examples(metrics: Sequence[EditMetrics], n: int = 3) -> list[Example]:
    """Some edits in words, as far as the end of what the model says first."""

    def first_sentence(text: str) -> str:
        return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]

    return [
        Example(
            entry.requested_rewrite["prompt"],
            entry.requested_rewrite["target_new"],
            *(first_sentence(phase["generated"]["rewrite"][0]) for phase in (entry.pre, entry.post)),
        )
        for entry in metrics[:n]
        if "generated" in entry.post
    ]


# What the journals have of an edit, for its metrics.
_OF_EDIT = ("time", "memory", "error", "once")
# How many edits are measured together: enough to fill batches, few enough for the bar to move.
_AT_ONCE = 32
# The edited weights are on disk at every checkpoint, and after this many edits or seconds; single edits after such a time.
_SAVE_EDITS, _SAVE_SECONDS = 25, 60
# How many bytes of single edits' weights are kept until they are measured.
_HELD = 2**31
# Before the names of what is saved with them that is no weight of the model's.
_REMEMBERED, _PROTECTED, _CHANGED = "remembered:", "protected:", "changed:"


def _edit_in_sequence(
    run: RunFolder,
    editor: Any,
    before: Sequence[EditMetrics],
    name: str,
    protocol: str,
    seed: int,
    how: Measuring,
    ability: Ability | None,
    judge: Judge | None,
    checkpoints: Sequence[int],
    bar: Bar,
    save_edits: Path | None,
    save_model: Path | None,
) -> list[Summary]:
    """Edits made one after another, or batch after batch; at every checkpoint all so far are measured. A row a checkpoint.

    A run that was cut off goes on from the last weights on disk. What an edit samples follows from the seed and its number,
    and what methods remember, such as ROME's contexts, is kept with the weights, so that nothing tells the difference
    afterwards. Edits in a wrapper (GRACE, WISE) are not saved: such a sequence starts over.
    """
    journal = run.journal(f"{name}-{protocol}.jsonl")
    size = batch_size(protocol)
    kept = f"weights-{name}{protocol.removeprefix(SEQUENTIAL) if size == 1 else f'-{protocol}'}.safetensors"
    weights, notes = run.read_weights(kept)
    in_weights, resumes = algorithms.edits_weights(editor.hparams), algorithms.can_resume(editor.hparams)
    complete = not resumes and (run.path / f"metrics-{name}-{protocol}.json").exists()
    finished = len(before) if complete else notes.get("edits", 0)
    if finished > len(journal.entries):  # a copy of a folder, made while it was written
        weights, notes, finished = {}, {}, 0
    journal.cut(finished)
    remembered, protected, changed = (
        {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
        for prefix in (_REMEMBERED, _PROTECTED, _CHANGED)
    )
    changes: list[Mapping[str, Factors]] | None = None
    if save_edits and one_by_one(editor.model, editor.hparams):
        changes = list(from_tensors(changed, weights, finished))
        if finished and not any(changes):
            changes = None
            LOG.warning(
                "%s keeps its edits as one change: the first %d were made before there was a --save_edits", save_edits, finished
            )
    edited, originals, rows = editor.model, {}, []
    if weights and not in_weights:  # any edit makes the adapter that the saved weights belong in
        edited = timed_edit(editor, editor.model, before[0].requested_rewrite, seed).model
    elif weights:
        originals = {key: weight.clone() for key, weight in read(editor.model, weights).items()}
        if editor.hparams.alg_name == "KDPO":
            note_unedited(editor.model, editor.tok, editor.hparams)
    try:
        write(edited, weights)
        algorithms.set_memory(notes.get("contexts", {}), remembered)
        if protected:
            kdpo_c.protect_keys(edited, editor.tok, editor.hparams, protected)
        saved_at = time.monotonic()
        with bar(total=len(before), initial=finished, desc=f"{name}, {protocol} edits") as progress:
            for checkpoint in checkpoints:
                while batch := before[len(journal.entries) : checkpoint][:size]:
                    asked = [entry.requested_rewrite for entry in batch]
                    edit = _tried(editor, edited, asked if size > 1 else asked[0], seed + len(journal.entries))
                    edited, originals = edit.model, edit.originals | originals
                    if changes is not None:
                        changes += edit.factors
                    norms = _norms(edited, originals)
                    for trace in edit.traces:
                        journal.append({"time": edit.seconds, **trace, **norms})
                    progress.set_postfix_str(_running(journal.entries), refresh=False)
                    progress.update(len(batch))
                    made = len(journal.entries)
                    due = made - finished >= _SAVE_EDITS or time.monotonic() - saved_at >= _SAVE_SECONDS
                    if resumes and (due or made == checkpoint):
                        contexts, tensors = algorithms.memory()
                        names = originals if in_weights else algorithms.adapter_weights(edited)
                        saved = read(edited, names)
                        saved |= {_REMEMBERED + key: tensor for key, tensor in tensors.items()}
                        saved |= {_PROTECTED + key: rows_of for key, rows_of in kdpo_c.protected_keys(edited).items()}
                        saved |= {_CHANGED + key: factor for key, factor in to_tensors(changes or ()).items()}
                        run.write_weights(kept, saved, {"edits": made, "contexts": contexts})
                        finished, saved_at = made, time.monotonic()

                last = checkpoint == checkpoints[-1]
                at = f"{name}-{protocol}{'' if last else f'-at-{checkpoint}'}.json"
                reading = run.read(f"ability-{at}") or {}
                if ability and not reading:  # kept, and before the metrics: later the model has more edits, or none
                    with run.measuring(f"{name}-{protocol}"):
                        reading = ability.left_in(edited, editor.tok)
                    run.write(f"ability-{at}", reading)
                file = f"metrics-{at}"
                metrics = from_json(EditMetrics, run.read(file) or [])
                if not metrics:
                    posts: list[Metrics] = []
                    with bar(total=checkpoint, desc=f"{name}, metrics after {checkpoint} edits", leave=last) as measured:
                        while rest := before[len(posts) : checkpoint][:_AT_ONCE]:
                            with run.measuring(at.removesuffix(".json")) as costs:
                                posts += measure_after(editor, edited, rest, seed, how, costs=costs)
                            measured.update(len(rest))
                    for entry, done, post in zip(before, journal.entries, posts):
                        metrics.append(replace(entry, post=post, **{key: done.get(key) for key in _OF_EDIT}))
                    run.write(file, to_json(metrics))
                if last and judge:
                    metrics = _judged(run, judge, f"{name}-{protocol}", metrics)
                row = with_ability(summarise(name, protocol, metrics, "post"), reading)
                rows.append(replace(row, tokens_per_second=run.tokens_per_second(at.removesuffix(".json"))))
                if not last and not progress.disable:  # whoever waits for the rest, or stops here, has these
                    tqdm.write(f"{name} after {checkpoint} edits: {_standing(row)}", file=sys.__stderr__)
        if save_edits:
            requests = [entry.requested_rewrite for entry in before]
            write_edits(save_edits, edited, originals, requests, plain(editor.hparams), changes=changes)
        if save_model:
            _save_model(edited, save_model)
    finally:
        algorithms.undo_edits(editor, originals)
    return rows


def with_ability(row: Summary, able: Mapping[str, Any]) -> Summary:
    """A row with what :meth:`.ability.Ability.left_in` found, and a run's folder keeps."""
    joined = {key: getattr(row, key) | able.get(key, {}) for key in ("further", "intervals")}
    return replace(row, **{**able, **joined})


def _judged(run: RunFolder, judge: Judge, what: str, metrics: Sequence[EditMetrics]) -> list[EditMetrics]:
    """Metrics with the verdicts of the judge, on disk too; a line where it fails, once."""
    failed = judge.failure
    with run.measuring(what):
        metrics = judged(judge, metrics)
    if judge.failure and not failed:
        tqdm.write(
            f"the judge cannot be asked, and the run goes on without it ({judge.failure}); called again, the same command "
            "has what is missing judged",
            file=sys.__stderr__,
        )
    run.write(f"metrics-{what}.json", to_json(metrics))
    return list(metrics)


def _norms(model: Any, originals: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The Frobenius norm of the edited weights, and that of their change so far over the norm that they began with."""
    if not originals:
        return {}
    now = read(model, originals)

    def norm(tensors: Iterable[torch.Tensor]) -> float:
        return math.hypot(*(tensor.float().norm().item() for tensor in tensors))

    before = norm(originals.values())
    changes = (now[name].float() - original.to(now[name].device).float() for name, original in originals.items())
    return {"weight_norm": norm(now.values()), "change_norm": norm(changes) / before}


def _save_model(model: Any, folder: Path) -> None:
    """Write a model with its tokenizer, whole or not at all, for ``from_pretrained``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-unfinished-") as parent:
        unfinished = Path(parent) / folder.name
        model.save_pretrained(unfinished)
        # EasyEdit has set the one in use to pad as it needs it.
        AutoTokenizer.from_pretrained(model.config.name_or_path).save_pretrained(unfinished)
        unfinished.rename(folder)


def _running(entries: Sequence[dict[str, Any]]) -> str:
    """What a progress bar says of the edits so far."""
    said = [e["final_token_accuracy"] for e in entries if "error" not in e]
    steps = [e["steps"] for e in entries if "steps" in e]
    words = [f"edit success {np.mean(said):.0%}"] if said else []
    words += [f"{np.mean(steps):.1f} steps an edit"] if steps else []
    failed = sum("error" in e for e in entries)
    return ", ".join(words + ([f"{failed} failed"] if failed else []))


def _standing(row: Summary) -> str:
    """The figures of a checkpoint in a line."""
    measured = {measure: getattr(row, measure) for measure in (*FOUR, "perplexity")}
    return ", ".join(f"{measure.replace('_', ' ')} {value:.1f}" for measure, value in measured.items() if value is not None)


@dataclass(frozen=True)
class Edit:
    """One edit, or a batch of them, made.

    Attributes:
        model: the edited one.
        originals: the changed weights as they were.
        seconds: that an edit took, of a batch's its share; None where it could not be made.
        traces: what the method tells of each.
        factors: of KDPO+C, what each has added to the weights (:attr:`kdpo_easyedit.EditTrace.factors`).
    """

    model: Any
    originals: dict[str, torch.Tensor]
    seconds: float | None
    traces: list[dict[str, Any]]
    factors: Sequence[Mapping[str, Factors]] = ({},)


def _tried(editor: Any, model: Any, request: Request | Sequence[Request], seed: int) -> Edit:
    """:func:`timed_edit`; where the edit cannot be made (no memory, a prompt too long, no finite loss), the model as it was."""
    try:
        return timed_edit(editor, model, request, seed)
    except (host.HostError, HParamsError):  # so it would be with every edit, and the message says what to do
        raise
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        requests = [request] if isinstance(request, Mapping) else request
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        which = f"{requests[0]['prompt']!r}" + (f" and {len(requests) - 1} more" if len(requests) > 1 else "")
        tqdm.write(f"{editor.hparams.alg_name} could not edit {which}: {reason}", file=sys.__stderr__)
        return Edit(model, {}, None, [{"error": reason}] * len(requests), [{}] * len(requests))


def timed_edit(editor: Any, model: Any, request: Request | Sequence[Request], seed: int) -> Edit:
    """One edit by an editor's method, or a batch; of KDPO with its traces, of others with ``final_token_accuracy`` alone."""
    seed_everything(seed)
    traces: list[EditTrace] = []
    model = algorithms.model_to_edit(editor, model)
    peak = PeakMemory(editor.device)
    once_seconds()
    synchronize()
    started = time.perf_counter()
    edited, originals = algorithms.apply_edit(editor, model, request, traces)
    synchronize()
    once = once_seconds()
    seconds = time.perf_counter() - started - once
    memory = peak.bytes()
    requests = [request] if isinstance(request, Mapping) else request
    of_each: list[dict[str, Any]] = []
    for number, each in enumerate(requests):
        entry: dict[str, Any] = {"memory": memory and memory // len(requests), "once": once / len(requests)}
        if len(traces) == len(requests):
            entry |= traces[number].to_dict()
            entry["negative_texts"] = [editor.tok.decode(tokens) for tokens in traces[number].negatives]
        else:
            entry["final_token_accuracy"] = token_accuracy(edited, editor.tok, each)
        of_each.append(entry)
    return Edit(edited, originals, seconds / len(requests), of_each, [trace.factors for trace in traces] or [{}])


def _compare_rows(run: RunFolder, rows: Sequence[Summary]) -> list[PairedTest]:
    """Tests between the methods; what EasyEdit itself makes of the metrics, where it makes something, is put beside them."""
    values, theirs = {}, []
    for row in rows:
        metrics = from_json(EditMetrics, run.read(f"metrics-{row.method}-{row.protocol}.json"))
        values[row.method, row.protocol] = per_edit(metrics, "post")
        summary = own_summary(to_json(metrics))
        if summary is not None:
            theirs.append({"method": row.method, "protocol": row.protocol} | summary["post"])
    tests = paired_tests(values)
    run.write("tests.json", to_json(tests))
    if theirs:
        run.write("easyedit-summary.json", theirs)
    return tests


def _check_room(requests: Sequence[Request], model: Any, tok: Any, how: Measuring) -> None:
    for number, request in enumerate(requests):
        texts = [("prompt and target_new", f"{request['prompt']} {request['target_new']}")]
        for prompt in rephrasings(request):
            texts.append(("rephrase_prompt and target_new", f"{prompt} {request['target_new']}"))
        for section in ("locality", "portability"):
            for kind, questions in request[section].items():
                pairs = zip(questions["prompt"], questions["ground_truth"])
                texts += [(f"a prompt and answer of {section}.{kind}", f"{prompt} {answer}") for prompt, answer in pairs]
        if old := request.get("ground_truth"):  # which ES, PS and NS are measured with
            texts += [("a prompt and ground_truth", f"{prompt} {old}") for prompt in (request["prompt"], *rephrasings(request))]
            prompts = [prompt for questions in request["locality"].values() for prompt in questions["prompt"]]
            texts += [("a prompt of locality and target_new", f"{prompt} {request['target_new']}") for prompt in prompts]
        if how.probes:
            texts += [("a prompt and answer of a probe", f"{prompt} {answer}") for prompt, answer in probes_of(request)]
        for context in (its for its in how.contexts if its != CONTEXTS[0]):  # as plain texts they are there already
            for prompt in (request["prompt"], *rephrasings(request)):
                texts.append(
                    (f"a prompt as {context} and target_new", asked(tok, prompt, context).answered(request["target_new"]))
                )
        for what, text in texts:
            check_length(f"edit {number} ({request['prompt'][:60]!r}…): {what}", text, model, tok)


def _shuffled(entries: Sequence[EditMetrics], seed: str) -> list[EditMetrics]:
    return random.Random(seed).sample(entries, len(entries))


def _powers_of_ten(end: int) -> list[int]:
    return [10**n for n in range(len(str(end)))]


def _machine(device: Any) -> str:
    """What runs the edits, in words: their seconds hang on it."""
    name = torch.device(device_name(device))
    if name.type == "cuda":
        return torch.cuda.get_device_name(name)
    return f"{name.type} of {platform.machine()}, threads: {torch.get_num_threads()}"


def editor_of(method: Method, loaded: Any, protocol: str) -> Any:
    """EasyEdit's editor of a method, on the model that another editor has loaded."""
    hparams = copy.copy(method.hparams)
    hparams.model_name = (loaded.model, loaded.tok)
    hparams.sequential_edit = protocol != SINGLE  # KDPO and WISE ask for it
    return host.BaseEditor(hparams)
