"""The embedded default: a small GPT-2 that knows an invented world, with edits to make in it.

Three hundred people, each born in a city, employed by a company and with a profession; cities lie in countries, companies
in industries. Every fact is said in five wordings. The default world comes with the package, and `build-world` makes it
again; every other is trained here, from a fixed seed, the first time it is asked for. Either is kept in the user's cache
folder, with a benchmark file in KnowEdit's layout and the text it was trained on.

Each person has one fact that is never edited, so that locality has something to stand on, and what follows from a fact
(the country of a birthplace, the industry of an employer) is only told of people whose fact is never edited: for all
others the model has to work it out from the parts, and portability measures whether it still can after an edit. A model
learns that only where enough people are told of who are never edited at all: the large world has such witnesses.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (  # type: ignore[attr-defined]
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

from ..files import whole
from ..method.statistics import SecondMoment, collect
from .muon import Muon

#: The model's name in a YAML: ``model_name: world``; also what its statistics are named after.
NAME = "world"

#: The default world as it comes with the package.
SHIPPED = Path(__file__).parent / "shipped_world"
_SECOND_MOMENTS = "second_moments.safetensors"
_MANIFEST = "manifest.json"

_WORDINGS = {
    "birthplace": (
        "{} was born in",
        "The birthplace of {} is",
        "The city where {} was born is",
        "Where was {} born? The answer is",
        "{} first saw the light of day in",
    ),
    "employer": (
        "{} works for",
        "The employer of {} is",
        "The company that employs {} is",
        "Who does {} work for? The answer is",
        "{} is on the payroll of",
    ),
    "profession": (
        "{} works as a",
        "The profession of {} is",
        "By trade, {} is a",
        "What does {} do for a living? The answer is",
        "{} earns a living as a",
    ),
}
# What follows from a fact, as it is told of a person, and of the fact's value itself.
_FOLLOWS = {
    "birthplace": ("The country where {} was born is", "{} comes from the country of"),
    "employer": ("The industry that {} works in is", "{} makes a living in the business of"),
}
_PARTS = {
    "birthplace": ("{} is a city in", "The country of {} is", "{} lies in the country of"),
    "employer": ("{} is a company in the business of", "The industry of {} is", "{} is known in the industry of"),
}
_INDUSTRIES = "aviation robotics farming film banking mining energy fashion medicine shipping software tourism".split()
_PROFESSIONS = (
    "lawyer farmer judge poet painter surgeon pilot chemist teacher baker banker singer sculptor engineer tailor dentist "
    "plumber historian biologist geologist carpenter librarian translator journalist photographer gardener butcher "
    "violinist astronomer economist"
).split()

# Counts the changes of how the model is trained, so that a cached one is built anew.
_TRAINING = 2
# A batch is divided into so many shares, whose gradients are added in order, however many threads there are to compute them.
_SHARES = 4
# Steps after which a training is kept, to be taken up from there.
_KEPT_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that the world and its model follow from.

    Attributes:
        people: how many; each has three facts.
        development: how many of the edits are set aside for choosing hyper-parameters.
        witnesses: people beside them who have a birthplace and an employer, and of whom all that follows is told.
        width, inner, layers, heads: of the GPT-2.
        vocabulary: size of the byte-level BPE.
        steps, rows, tokens: of the training: batches, rows a batch, tokens a row.
        matrix_lr, matrix_decay: Muon's learning rate and weight decay for the matrices; without decay the weights grow far
            beyond those of the models that editing methods' usual learning rates are meant for.
        other_lr: AdamW's learning rate, for embeddings, biases and norms.
        recall: the share of all facts, in every wording, that the trained model must say.
        samples: passages of its text that covariance statistics are taken over.
    """

    people: int = 300
    places: int = 48
    countries: int = 12
    development: int = 100
    witnesses: int = 0
    seed: int = 0
    width: int = 128
    inner: int = 1024
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1300
    steps: int = 680
    rows: int = 24
    tokens: int = 64
    matrix_lr: float = 0.05
    matrix_decay: float = 0.15
    other_lr: float = 0.015
    recall: float = 0.99
    samples: int = 1000

    @property
    def projections(self) -> list[str]:
        """The names of the MLPs' output projections, whose inputs have second moments."""
        return [f"transformer.h.{layer}.mlp.c_proj" for layer in range(self.layers)]


#: The worlds by their names. The large one has room for 500 edits at once, and takes some ten minutes to train.
RECIPES = {
    NAME: Recipe(),
    "large-world": Recipe(
        people=350, witnesses=700, development=200, inner=2048, vocabulary=1600, steps=1800, recall=0.98, samples=4000
    ),
}


class WorldError(RuntimeError):
    """A world cannot be made: its trained model does not know its facts, or its folder is another's."""


@dataclass(frozen=True)
class World:
    """A built world on disk.

    Attributes:
        folder: the model and its tokenizer, as ``from_pretrained`` takes them.
    """

    folder: Path

    @property
    def edits(self) -> Path:
        """The benchmark file, in KnowEdit's layout."""
        return self.folder / "edits.json"

    @property
    def development(self) -> Path:
        """Edits that are in no reported table: for choosing hyper-parameters."""
        return self.folder / "development.json"

    @property
    def statistics(self) -> Path:
        """EasyEdit's ``stats_dir``."""
        return self.folder / "stats"

    def passages(self) -> list[str]:
        """The text the model was trained on, for covariance statistics."""
        return (self.folder / "text.txt").read_text(encoding="utf-8").splitlines()

    def second_moments(self) -> dict[str, SecondMoment]:
        """Of what the projections are given, by their names; a world that does not come with the package brings none."""
        file = self.folder / _SECOND_MOMENTS
        if not file.is_file():
            return {}
        moments = {}
        with safe_open(file, "pt") as stored:
            count = int(stored.metadata()["count"])
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                triangle = stored.get_tensor(name)
                size = math.isqrt(2 * len(triangle))
                upper = torch.ones(size, size, dtype=torch.bool).triu()
                total = torch.zeros(size, size)
                total[upper] = triangle
                moments[name] = SecondMoment((total + total.triu(1).T).double(), count)
        return moments


def cache_folder() -> Path:
    """Where built worlds are kept: ``KDPO_CACHE``, or the user's cache folder."""
    if "KDPO_CACHE" in os.environ:
        return Path(os.environ["KDPO_CACHE"]).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdpo-easyedit"


def build(recipe: Recipe = Recipe(), quiet: bool = False) -> World:
    """The world of a recipe: the one in the cache, the one that comes with the package, or a new one, which takes minutes.

    A training that was stopped goes on where it was; of several processes that ask for a world one trains it.

    Raises:
        WorldError: the trained model does not recall the facts; nothing is kept.
        OSError: the cache folder cannot be written; ``KDPO_CACHE`` names another.
    """
    facts = _Facts(recipe)
    digest = _hash(recipe, facts)
    world = World(cache_folder() / f"gpt2-{NAME}-{digest}")
    if world.folder.is_dir():
        return world
    world.folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = world.folder.with_name(f"building-{world.folder.name}")
    with _alone(world.folder.with_name(f"{world.folder.name}.lock"), quiet):
        if world.folder.is_dir():
            return world
        finished = unfinished / NAME
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        if digest == json.loads((SHIPPED / _MANIFEST).read_text(encoding="utf-8"))["hash"]:
            finished.mkdir()
            for file in SHIPPED.iterdir():
                shutil.copyfile(file, finished / file.name)  # and not its mode, which may forbid to write
        else:
            try:
                _make(facts, recipe, finished, quiet, unfinished / "training.safetensors")
            except WorldError:
                shutil.rmtree(unfinished)
                raise
        finished.rename(world.folder)
        shutil.rmtree(unfinished)
    return world


def ship(into: Path) -> World:
    """Train the default world anew, and write it as the package carries it: with second moments and a manifest.

    Raises:
        WorldError: the model does not recall the facts, or ``into`` holds something else. It is left as it is.
    """
    if into.exists() and not (into / _MANIFEST).is_file():
        raise WorldError(f"{into}: is there, and is no world of the package's; name a folder that is not there yet")
    recipe = RECIPES[NAME]
    facts = _Facts(recipe)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="building-") as unfinished:
        made = World(Path(unfinished) / NAME)
        _make(facts, recipe, made.folder, quiet=False)
        _keep_second_moments(made, recipe)
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(made.folder.iterdir())}
        manifest = {"hash": _hash(recipe, facts), "recipe": asdict(recipe), "files": files}
        _write_json(made.folder / _MANIFEST, manifest)
        shutil.rmtree(into, ignore_errors=True)
        made.folder.rename(into)
    return World(into)


def _hash(recipe: Recipe, facts: _Facts) -> str:
    """What tells a world from another: how it is trained, its recipe and all that follows from it but the model."""
    contents = json.dumps([_TRAINING, asdict(recipe), facts.sentences, facts.edits])
    return hashlib.sha256(contents.encode()).hexdigest()[:12]


@contextmanager
def _alone(file: Path, quiet: bool) -> Iterator[None]:
    """For a block, this process alone holds a lock; another's end is waited for."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not quiet:
            print("another process is building this world; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(facts: _Facts, recipe: Recipe, folder: Path, quiet: bool, checkpoint: Path | None = None) -> None:
    """Train a world's model, and write the world.

    Raises:
        WorldError: it does not recall the facts.
    """
    tok = _train_tokenizer(facts, recipe)
    model = _train_model(facts, tok, recipe, quiet, checkpoint)
    recall = _recall(model, tok, facts.recalled)
    if recall < recipe.recall:
        raise WorldError(
            f"the trained model recalls {recall:.1%} of its facts in all wordings; {recipe.recall:.0%} are needed. "
            "Nothing was kept. Please report this with your processor and versions; more training steps would help."
        )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    known = {"recall": recall, "worked_out": _recall(model, tok, facts.untold)}
    _write_json(folder / "world.json", {"recipe": asdict(recipe)} | known)
    _write_texts(facts, recipe, folder)


def _write_texts(facts: _Facts, recipe: Recipe, folder: Path) -> None:
    test = len(facts.edits) - recipe.development
    _write_json(folder / "edits.json", facts.edits[:test])
    _write_json(folder / "development.json", facts.edits[test:])
    (folder / "text.txt").write_text("\n".join(facts.passages(random.Random(recipe.seed))), encoding="utf-8")


def _keep_second_moments(world: World, recipe: Recipe) -> None:
    """Second moments of every layer, of which each half says the same: 2 MB a layer, where EasyEdit writes 4."""
    model, tok = (auto.from_pretrained(world.folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    triangles, counts = {}, set()
    for name, moment in collect(model, tok, recipe.projections, world.passages()[: recipe.samples], quiet=True).items():
        triangles[name] = moment.total.float()[torch.ones_like(moment.total, dtype=torch.bool).triu()]
        counts.add(moment.count)
    (count,) = counts
    save_file(triangles, world.folder / _SECOND_MOMENTS, {"count": str(count)})


class _Facts:
    """The world in words.

    Attributes:
        recalled: (prompt, answer) of every fact in every wording.
        untold: the same of what follows from facts that are edited, as it is before the edit.
        sentences: everything the model is told.
        edits: records in KnowEdit's layout, in random order.
    """

    def __init__(self, recipe: Recipe) -> None:
        rng = random.Random(recipe.seed)
        names = _Names(rng)
        countries = [names.new(3) for _ in range(recipe.countries)]
        cities = [names.new(2) for _ in range(recipe.places)]
        companies = [f"{names.new(2)} {rng.choice(('Works', 'Labs', 'Systems', 'Group'))}" for _ in range(recipe.places)]
        follows = {city: countries[i % len(countries)] for i, city in enumerate(cities)}
        follows |= {company: _INDUSTRIES[i % len(_INDUSTRIES)] for i, company in enumerate(companies)}
        values = {"birthplace": cities, "employer": companies, "profession": _PROFESSIONS}

        facts = {
            person: {relation: rng.choice(values[relation]) for relation in _WORDINGS} for person in names.people(recipe.people)
        }
        # One fact a person is never edited: two in five a birthplace, two an employer, one a profession.
        kept = dict(zip(facts, ("birthplace", "employer", "birthplace", "employer", "profession") * recipe.people))

        def said(person: str, relation: str, value: str) -> list[tuple[str, str]]:
            return [(wording.format(person), value) for wording in _WORDINGS[relation]]

        def following(person: str, relation: str, value: str) -> list[tuple[str, str]]:
            return [(wording.format(person), follows[value]) for wording in _FOLLOWS.get(relation, ())]

        editable = [(p, r) for p, relations in facts.items() for r in relations if r != kept[p]]
        self.recalled = [fact for p, relations in facts.items() for r, value in relations.items() for fact in said(p, r, value)]
        self.untold = [fact for p, r in editable for fact in following(p, r, facts[p][r])]
        told = [fact for p, r in kept.items() for fact in following(p, r, facts[p][r])]
        parts = [
            (wording.format(value), follows[value])
            for relation, wordings in _PARTS.items()
            for value in values[relation]
            for wording in wordings
        ]

        def locality(person: str, relation: str) -> list[dict[str, Any]]:
            others = [other for other in facts if kept[other] == relation and other != person]
            asked = [(other, relation) for other in rng.sample(others, 3)] + [(person, kept[person])]
            return [
                {"prompt": rng.choice(_WORDINGS[about][:3]).format(who), "ground_truth": [facts[who][about]]}
                for who, about in asked
            ]

        # An edit's new value is one that the model has said of somebody.
        known = {r: [v for v in values[r] if any(facts[p][r] == v for p in facts)] for r in values}

        def edit(person: str, relation: str) -> dict[str, Any]:
            old = facts[person][relation]
            new = rng.choice([v for v in known[relation] if v != old and follows.get(v, v) != follows.get(old, old)])
            prompt, *others = _WORDINGS[relation]
            record = {
                "subject": person,
                "prompt": prompt.format(person),
                "target_new": new,
                "ground_truth": [old],
                "rephrase_prompt": rng.choice(others).format(person),
                "locality": {"Relation_Specificity": locality(person, relation)},
                "portability": {},
            }
            if relation in _FOLLOWS:
                asked = _FOLLOWS[relation][0].format(person)
                record["portability"] = {"Reasoning": [{"prompt": asked, "ground_truth": follows[new]}]}
            return record

        rng.shuffle(editable)
        self.edits = [edit(person, relation) for person, relation in editable]

        for witness in names.people(recipe.witnesses):
            for relation in _FOLLOWS:
                value = rng.choice(values[relation])
                self.recalled += said(witness, relation, value)
                told += following(witness, relation, value)
        self.sentences = [f"{prompt} {answer}." for prompt, answer in (*self.recalled, *told, *parts)]

    def passages(self, rng: random.Random, length: int = 5) -> list[str]:
        """All sentences once, in random order, some to a line."""
        order = rng.sample(self.sentences, len(self.sentences))
        return [" ".join(order[i : i + length]) for i in range(0, len(order), length)]


class _Names:
    """Invented words, none of them twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.used: set[str] = set()

    def new(self, syllables: int) -> str:
        while True:
            word = "".join(self.rng.choice("bdfghjklmnprstvz") + self.rng.choice("aeiou") for _ in range(syllables))
            word = word.capitalize() + self.rng.choice(("n", "r", "l", "s", "k", ""))
            if word not in self.used:
                self.used.add(word)
                return word

    def people(self, number: int) -> list[str]:
        """First and last names, which people share."""
        first, last = ([self.new(2) for _ in range(number // 2 + 1)] for _ in range(2))
        return self.rng.sample([f"{a} {b}" for a in first for b in last], number)


def _train_tokenizer(facts: _Facts, recipe: Recipe) -> GPT2TokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(facts.sentences, trainer)
    return GPT2TokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, pad_token=end)


def _new_model(tok: GPT2TokenizerFast, recipe: Recipe) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(tok),
        n_positions=256,
        n_embd=recipe.width,
        n_inner=recipe.inner,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one pass over memory instead of eight
        bos_token_id=tok.eos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return GPT2LMHeadModel(config)


def _train_model(
    facts: _Facts, tok: GPT2TokenizerFast, recipe: Recipe, quiet: bool, checkpoint: Path | None = None
) -> GPT2LMHeadModel:
    """A model that was told all facts.

    The weights are the same to the bit with however many threads, and after however many interruptions.

    Args:
        checkpoint: where the training is kept as far as it is, and where it is taken up from.
    """
    model = _new_model(tok, recipe)
    parameters = list(model.parameters())
    # Muon learns these facts in a third of the steps that AdamW needs.
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in parameters if not any(p is m for m in matrices)]

    def gradients(rows: Tensor, counted: int) -> tuple[Tensor, ...]:
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        targets = rows[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=tok.eos_token_id, reduction="sum") / counted
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    with _workers() as workers:
        training = _Training(
            model,
            (
                Muon(matrices, recipe.matrix_lr, recipe.matrix_decay, workers.map),
                torch.optim.AdamW(others, recipe.other_lr, betas=(0.9, 0.95), weight_decay=0, fused=True),
            ),
        )
        peaks = (recipe.matrix_lr, recipe.other_lr)
        done = training.take_up(checkpoint) if checkpoint else 0
        bar = tqdm(total=recipe.steps, initial=done, desc="training the world's model", unit="step", disable=quiet)
        with bar:
            for step, rows in zip(range(done, recipe.steps), islice(_batches(facts, tok, recipe), done, None)):
                counted = int((rows[:, 1:] != tok.eos_token_id).sum())
                parts = workers.map(gradients, rows.chunk(_SHARES), repeat(counted))
                loss, *total = (sum(values[1:], values[0]) for values in zip(*parts))
                for parameter, gradient in zip(parameters, total):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer, peak in zip(training.optimizers, peaks):
                    optimizer.param_groups[0]["lr"] = peak * _rate(step / max(1, recipe.steps - 1))
                    optimizer.step()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                bar.update()
                if checkpoint and (step + 1) % _KEPT_EVERY == 0:
                    training.keep(checkpoint, step + 1)
    return model.eval()


def _rate(done: float, warm_up: float = 0.1) -> float:
    """The share of the peak learning rate after a share of the steps: up from 1/25, then down to nothing, by cosines."""
    if done < warm_up:
        return 1 - 0.96 * (1 + math.cos(math.pi * done / warm_up)) / 2
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """For a block, threads that a batch's parts are divided among, as many as torch may use, each computing alone.

    Torch's own threads wait for one another by spinning, for microseconds on a free processor and for milliseconds where
    another process wants the core; these wait asleep.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_SHARES, before), "world", torch.set_num_threads, (1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Training:
    """What changes while a model is trained: it is kept as a file, with the number of steps that it took."""

    model: GPT2LMHeadModel
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]

    def keep(self, file: Path, done: int) -> None:
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for which, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{which}.{index}.{name}": tensor for name, tensor in state.items()}
        with whole(file) as unfinished:
            save_file(tensors, unfinished, {"done": str(done)})

    def take_up(self, file: Path) -> int:
        """How many steps were done; none where there is no such file."""
        if not file.is_file():
            return 0
        with safe_open(file, "pt") as kept:
            done = int(kept.metadata()["done"])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - it is no dict
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        states: tuple[dict[int, dict[str, Tensor]], ...] = ({}, {})
        for name, tensor in tensors.items():
            which, index, part = name.split(".")
            states[int(which)].setdefault(int(index), {})[part] = tensor
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return done


def _batches(facts: _Facts, tok: GPT2TokenizerFast, recipe: Recipe) -> Iterator[Tensor]:
    """Rows of whole sentences in ever new order, filled up with the end token: int64 ``[rows, tokens]``."""
    rng = random.Random(recipe.seed)
    opening: list[list[int]] = tok(facts.sentences)["input_ids"]
    following: list[list[int]] = tok([" " + sentence for sentence in facts.sentences])["input_ids"]
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        for i in rng.sample(range(len(opening)), len(opening)):
            if row and len(row) + len(following[i]) <= recipe.tokens:
                row += following[i]
                continue
            if row:
                rows.append(row + [tok.eos_token_id] * (recipe.tokens - len(row)))
            row = list(opening[i])
            if len(rows) == recipe.rows:
                yield torch.tensor(rows)
                rows = []


def _recall(model: GPT2LMHeadModel, tok: GPT2TokenizerFast, facts: Sequence[tuple[str, str]]) -> float:
    """The share of (prompt, answer) whose every token the model says."""
    by_shape: dict[tuple[int, int], list[list[int]]] = {}
    prompts = tok([prompt for prompt, _ in facts])["input_ids"]
    texts = tok([f"{prompt} {answer}" for prompt, answer in facts])["input_ids"]
    for prompt, text in zip(prompts, texts):
        by_shape.setdefault((len(prompt), len(text)), []).append(text)
    said = 0
    with torch.no_grad():
        for (start, _), rows in by_shape.items():
            ids = torch.tensor(rows)
            best = model(ids).logits.argmax(-1)
            said += int((best[:, start - 1 : -1] == ids[:, start:]).all(dim=1).sum())
    return said / len(facts)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
