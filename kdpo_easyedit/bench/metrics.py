"""EasyEdit's metrics of many edits at once.

One teacher-forced pass over all prompts of all edits gives rewrite, rephrase, locality and portability, with the figures of
EasyEdit's ``compute_edit_quality`` of each prompt by itself, and another writes the texts that fluency is taken of.

Three things are otherwise than in EasyEdit's code, each on purpose:

* EasyEdit pads the prompts of one kind on the left and tells the model no positions. Where a model learns absolute positions
  (GPT-2), all but the longest prompt are then read at places where they do not stand. Here each is read as if alone.
* One space stands between prompt and answer, also where the answer brings one, as in training.
* Fluency is that of what is written, 100 new tokens. EasyEdit writes up to 100 in all, the prompt's among them, and scores
  prompt and text together: a long prompt writes nothing, and is scored itself.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..easyedit.measuring import words
from ..method.preference import edit_tokens, prompt_ids
from .batches import BY_DEVICE, Batching, in_batches, logits_at, network, running
from .writing import write_on

Metrics = dict[str, Any]
Request = Mapping[str, Any]

#: What EasyEdit samples from, and how much is written for fluency.
TOP_K, FLUENCY_TOKENS = 5, 100


@dataclass(frozen=True)
class Said:
    """What a model says of an answer under teacher forcing: at every token, given the prompt and the answer up to there.

    Attributes:
        tokens: the likeliest tokens, T of them.
        targets: the answer's own.
        log_probability: of the answer's tokens, in nats, their mean.
    """

    tokens: list[int]
    targets: list[int]
    log_probability: float

    @property
    def accuracy(self) -> float:
        """The share of the answer's tokens that the model says."""
        return sum(a == b for a, b in zip(self.tokens, self.targets)) / len(self.targets)


def measure(
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    fluency: bool = True,
    old_answers: bool = False,
    seed: int = 0,
    batching: Batching = BY_DEVICE,
) -> list[Metrics]:
    """The metrics of every request, in the structure of EasyEdit's ``compute_edit_quality``.

    Args:
        model: a causal language model, or what a method has wrapped around one.
        tok: its tokenizer; its settings for padding make no difference.
        requests: as :func:`kdpo_easyedit.bench.datasets.load_requests` gives them; ``rephrase_prompt`` may be a list.
        fluency: whether to write texts and measure it, which takes longer than all else.
        old_answers: whether to hold the new answer's probability against the old one's, which is ``ground_truth``; a request
            without one has no such figures.
        seed: of the texts that fluency is taken of.
        batching: where it tells rows apart, items are the requests.

    Returns:
        For each request ``rewrite_acc``, and with rephrasings ``rephrase_acc``, each a list of a score a prompt; ``locality``
        with ``{kind}_output``, the tokens that the model says in place of each answer's; ``portability`` with ``{kind}_acc``;
        ``fluency`` with ``ngram_entropy`` in bits; with ``old_answers``, ``probabilities`` as :func:`against_old_answers`
        gives them.

    Raises:
        ValueError: a prompt or answer without tokens.
        MetricsError: a prompt that the model has no room for.
    """
    asked = [_asked(request, old_answers) for request in requests]
    # One pass for what several requests ask, unless each is asked of an edit of its own.
    apart = batching.rows_are is not None
    owned = [
        (number * apart, pair) for number, of_request in enumerate(asked) for pairs in of_request.values() for pair in pairs
    ]
    owned = list(dict.fromkeys(owned))
    forced = teacher_forced(model, tok, [pair for _, pair in owned], batching.of([number for number, _ in owned]))
    said = dict(zip(owned, forced))
    results: list[Metrics] = []
    for number, of_request in enumerate(asked):
        found = {place: [said[number * apart, pair] for pair in its] for place, its in of_request.items()}
        result: Metrics = {"rewrite_acc": [], "locality": {}, "portability": {}}
        for (section, kind), answers in found.items():
            if section == "locality":
                result[section][f"{kind}_output"] = [answer.tokens for answer in answers]
            elif section == "portability":
                result[section][f"{kind}_acc"] = [answer.accuracy for answer in answers]
            elif section in ("rewrite", "rephrase"):
                result[f"{section}_acc"] = [answer.accuracy for answer in answers]
        if ("old", "rewrite") in found:
            result["probabilities"] = against_old_answers(found)
        results.append(result)
    if fluency:
        texts = written_for_fluency(model, tok, [request["prompt"] for request in requests], seed, batching)
        for result, text in zip(results, texts):
            result["fluency"] = {"ngram_entropy": ngram_entropy(text)}
    return results


def with_locality(pre: Metrics, post: Metrics) -> Metrics:
    """The metrics after an edit, with ``{kind}_acc`` of locality: the share of tokens that the model says as it did before.

    Raises:
        ValueError: they are not of the same prompts.
    """
    shares = {}
    for name, after in post["locality"].items():
        if name.endswith("_output"):
            pairs = zip(pre["locality"][name], after, strict=True)
            accuracy = [sum(a == b for a, b in zip(old, new, strict=True)) / len(old) for old, new in pairs]
            shares[f"{name.removesuffix('_output')}_acc"] = accuracy
    return {**post, "locality": {**post["locality"], **shares}}


def rephrasings(request: Request) -> list[str]:
    """A request's rephrased prompts: EasyEdit has one, or a list."""
    given = request.get("rephrase_prompt") or []
    return [given] if isinstance(given, str) else list(given)


def _asked(request: Request, old_answers: bool) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """A request's pairs of prompt and answer by section and kind."""
    new, old = request["target_new"], request.get("ground_truth")
    rephrased = rephrasings(request)
    asked = {("rewrite", ""): [(request["prompt"], new)]}
    if rephrased:
        asked["rephrase", ""] = [(prompt, new) for prompt in rephrased]
    neighbours = []
    for section in ("locality", "portability"):
        for kind, questions in (request.get(section) or {}).items():
            prompts, answers = questions["prompt"], questions["ground_truth"]
            prompts, answers = ([value] if isinstance(value, str) else value for value in (prompts, answers))
            asked[section, kind] = list(zip(prompts, answers, strict=True))
            neighbours += asked[section, kind] if section == "locality" else []
    if old_answers and old:
        asked["old", "rewrite"] = [(request["prompt"], old)]
        asked["old", "rephrase"] = [(prompt, old) for prompt in rephrased]
        asked["new", "neighbour"] = [(prompt, new) for prompt, _ in neighbours]
    return asked


def teacher_forced(model: Any, tok: Any, pairs: Sequence[tuple[str, str]], batching: Batching = BY_DEVICE) -> list[Said]:
    """What a model says of answers to prompts.

    Args:
        pairs: prompts and answers.

    Raises:
        ValueError: a prompt or an answer without tokens.
    """
    edits = [edit_tokens(tok, prompt, answer) for prompt, answer in pairs]
    # Nothing is predicted from the last token.
    inputs = [edit.input_ids[0, :-1] for edit in edits]
    device = network(model).device
    tokens = batching.tokens or (512 if device.type == "cpu" else 8192)

    def run(batch: list[int]) -> list[Said]:
        if batching.one_by_one and batching.decide_at:
            batching.decide_at(model, edits[batch[0]].prompt_length - 1)
        if batching.rows_are:
            batching.rows_are(batch)
        shape = len(batch), max(len(inputs[number]) for number in batch)
        input_ids, mask, wanted = (torch.zeros(shape, dtype=dtype) for dtype in (torch.long, torch.long, torch.bool))
        for row, number in enumerate(batch):
            length = len(inputs[number])
            input_ids[row, :length], mask[row, :length] = inputs[number], 1
            wanted[row, edits[number].prompt_length - 1 : length] = True
        given = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        logits, _ = logits_at(model, given, wanted)
        targets = torch.cat([edits[number].targets for number in batch])
        likeliest, log_probabilities = _read(logits, targets.to(logits.device))
        sizes = [len(edits[number].targets) for number in batch]
        return [
            Said(its.tolist(), target.tolist(), probabilities.mean().item())
            for its, target, probabilities in zip(likeliest.split(sizes), targets.split(sizes), log_probabilities.split(sizes))
        ]

    with running(model, batching):
        return in_batches(run, [len(ids) for ids in inputs], tokens, 1 if batching.one_by_one else None)


def _read(logits: Tensor, targets: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, and the log-probabilities of the targets in float32, both ``[N]`` on the CPU, of ``[N, V]``."""
    likeliest, found = [], []
    for some, wanted in zip(logits.split(rows), targets.split(rows)):  # float32 of all at once may be too much
        likeliest.append(some.argmax(-1).cpu())
        exact = some.float()
        found.append((exact.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - exact.logsumexp(-1)).cpu())
    return torch.cat(likeliest), torch.cat(found)


# --------------------------------------------------------------------------------------------------------------------
# Probabilities compared, as in ROME's line of papers.


def against_old_answers(found: Mapping[tuple[str, str], Sequence[Said]]) -> Metrics:
    """How the new answer stands against the old one, as ROME's paper (arXiv 2202.05262) measures CounterFact.

    Probabilities are of whole answers, e to the mean log-probability of their tokens.

    Returns:
        ``success``, ``paraphrase`` and ``neighborhood``, each with ``scores``, for each prompt 1.0 where the right answer is
        the more probable one (after an edit the new one; on neighbours the one that they have), and ``magnitudes``, by how
        much; means over prompts and edits are ES, PS and NS, and EM, PM and NM.
    """
    neighbours = [said for (section, _), its in found.items() if section == "locality" for said in its]
    compared = {
        "success": (found["rewrite", ""], found["old", "rewrite"]),
        "paraphrase": (found.get(("rephrase", ""), ()), found["old", "rephrase"]),
        "neighborhood": (neighbours, found["new", "neighbour"]),
    }
    result = {}
    for name, (right, wrong) in compared.items():
        pairs = [(math.exp(a.log_probability), math.exp(b.log_probability)) for a, b in zip(right, wrong, strict=True)]
        result[name] = {"scores": [float(a > b) for a, b in pairs], "magnitudes": [a - b for a, b in pairs]}
    return result


def harmonic_score(shares: Sequence[float]) -> float:
    """The harmonic mean of ES, PS and NS, their papers' score; 0 where one of them is 0."""
    return float(len(shares) / sum(1 / share for share in shares)) if all(shares) else 0.0


#: How a fact is denied, and how it is claimed, whatever the prompt's form.
NEGATED, CLAIM = "The following is false: {prompt}", "{prompt} {answer}\nTrue or false? Answer:"


def probes_of(request: Request) -> list[tuple[str, str]]:
    """What :func:`probe` asks of a request, as prompts and answers: six, or none where there is no old answer."""
    if not (old := request.get("ground_truth")):
        return []
    prompt, answers = request["prompt"], (request["target_new"], old)
    claims = [CLAIM.format(prompt=prompt, answer=answer) for answer in answers]
    return [(NEGATED.format(prompt=prompt), answer) for answer in answers] + [
        (claim, verdict) for claim in claims for verdict in ("True", "False")
    ]


def probe(model: Any, tok: Any, requests: Sequence[Request], batching: Batching = BY_DEVICE) -> list[Metrics]:
    """Whether an edit stays with what it says: probes of negation and contradiction, of requests that have an old answer.

    Returns:
        For each request ``negation``, 1.0 where after the denied prompt the old answer is more probable than the new one, and
        ``contradiction``, 1.0 where the model holds both answers to be true; empty without an old answer.
    """
    asked = [question for request in requests for question in probes_of(request)]
    owners = [number for number, request in enumerate(requests) for _ in probes_of(request)]
    said = iter(teacher_forced(model, tok, asked, batching.of(owners)))
    found: list[Metrics] = []
    for request in requests:
        if not request.get("ground_truth"):
            found.append({})
            continue
        new, old, *verdicts = (next(said).log_probability for _ in range(6))
        both = verdicts[0] > verdicts[1] and verdicts[2] > verdicts[3]
        found.append({"negation": float(old > new), "contradiction": float(both)})
    return found


# --------------------------------------------------------------------------------------------------------------------
# Fluency.


def written_for_fluency(
    model: Any, tok: Any, prompts: Sequence[str], seed: int = 0, batching: Batching = BY_DEVICE
) -> list[str]:
    """What a model writes after each prompt: :data:`FLUENCY_TOKENS` new tokens, or as many as it has room for.

    As in EasyEdit each token is drawn from the five likeliest ones, since small models repeat themselves when they are greedy,
    and an end token ends nothing: what a text's entropy can be hangs on its length. Every prompt has random numbers of its own,
    made on the CPU from the seed and its words, so that its text does not hang on the batch or the order.
    """
    ids = [prompt_ids(tok, prompt.rstrip(" ")) for prompt in prompts]  # a space at the end would begin a word
    uniforms = torch.stack([_uniforms(prompt, seed) for prompt in prompts]) if prompts else torch.empty(0)

    def draw(rows: list[int], step: int, logits: Tensor) -> Tensor:
        likeliest = logits.float().topk(min(TOP_K, logits.shape[-1]))
        below = likeliest.values.softmax(-1).cumsum(-1)[:, :-1] < uniforms[rows, step, None].to(logits.device)
        return likeliest.indices.gather(-1, below.sum(-1, keepdim=True)).squeeze(-1)

    written = write_on(model, ids, [FLUENCY_TOKENS] * len(ids), draw, batching=batching)
    return [
        unicodedata.normalize("NFKD", tok.decode(text.tokens, skip_special_tokens=True)).replace("\n\n", " ")
        for text in written
    ]


def _uniforms(prompt: str, seed: int) -> Tensor:
    number = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8], "big", signed=True)
    return torch.rand(FLUENCY_TOKENS, generator=torch.Generator().manual_seed(number))


def ngram_entropy(text: str) -> float:
    """EasyEdit's fluency of a text: the mean of ⅔ of its bigrams' entropy and 4/3 of its trigrams', in bits."""
    split = words(text)
    entropy = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(split[start:] for start in range(n)))).values()
        total = sum(counts)
        entropy += weight * sum(count / total * math.log2(total / count) for count in counts) / 2
    return entropy
