"""EasyEdit's own metrics."""

from __future__ import annotations

import contextlib
import tempfile
from types import SimpleNamespace
from typing import Any

import nltk
import numpy as np
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from .host import IS_RELEASE, submodule


def words(text: str) -> list[str]:
    """A text's words as nltk splits them; without the data that it downloads, as its untrained splitter does."""
    try:
        return nltk.word_tokenize(text)
    except LookupError:
        sentences = PunktSentenceTokenizer().tokenize(text)
        return [word for sentence in sentences for word in NLTKWordTokenizer().tokenize(sentence)]


def mend_fluency() -> None:
    """EasyEdit splits text into words with data that nltk downloads; here :func:`words` does."""
    submodule("evaluate.evaluate_utils").compute_freq = lambda sentence, n=2: nltk.FreqDist(nltk.ngrams(words(sentence), n))


#: What EasyEdit's metrics read of hyper-parameters, the same for all methods, so that figures can be compared: main measures
#: GRACE by other means, and puts prompts into a chat template where a method's YAML says so. No answer is cut to max_length.
MEASURED_WITH = {"alg_name": "KDPO", "use_chat_template": False, "max_length": 40}


def edit_quality(editor: Any, model: Any, request: dict[str, Any], fluency: bool = True) -> dict[str, Any]:
    """EasyEdit's metrics of one request on a model: ``rewrite_acc``, ``rephrase_acc``, ``locality`` …"""
    hparams = SimpleNamespace(**MEASURED_WITH, device=editor.hparams.device)
    return submodule("evaluate").compute_edit_quality(
        model, editor.model_name, hparams, editor.tok, request, hparams.device, test_generation=fluency
    )


def own_summary(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What EasyEdit itself makes of a run's metrics, by phase; None on the release, which makes nothing of them.

    Every key is averaged on its own, over the edits that have it. Main prints the result and returns nothing, and writes the
    metrics once more where it stands. It knows one rephrasing an edit, and cannot average several where edits have more and
    less of them: it is given each edit's mean.
    """
    if IS_RELEASE:
        return None
    metrics = [entry | {phase: _with_one_rephrasing(entry[phase]) for phase in ("pre", "post")} for entry in metrics]
    module = submodule("editors.utils")
    printed: list[tuple[Any, ...]] = []
    module.print = lambda *values: printed.append(values)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            module.summary_metrics(metrics)
    finally:
        del module.print
    return next(values[1] for values in printed if values[0] == "Metrics Summary: ")


def _with_one_rephrasing(phase: dict[str, Any]) -> dict[str, Any]:
    scores = phase.get("rephrase_acc", [])
    return phase | {"rephrase_acc": [float(np.mean(scores))]} if len(scores) > 1 else phase
