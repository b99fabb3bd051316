"""The edits of real facts: what the files claim, and how they are composed."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest
from conftest import real
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_easyedit.bench import datasets, facts
from kdpo_easyedit.bench.facts import FILES, claims, load_known, says
from kdpo_easyedit.bench.facts.__main__ import main as facts_command
from kdpo_easyedit.models.packed import model_folder

RELATIONS, UNRELATED = load_known()
RECORDS = {split: json.loads(path.read_text(encoding="utf-8")) for split, path in FILES.items()}
ALL = [record for records in RECORDS.values() for record in records]


def asked(record, section):
    """The questions of a section."""
    return [item for items in record[section].values() for item in items]


def plain(subject):
    """A subject as ``known.json`` has it."""
    return subject if any(subject in r.truth for r in RELATIONS.values()) else subject[0].lower() + subject[1:]


def test_how_many():
    assert len(RECORDS["development"]) == 150 and len(RECORDS["reported"]) >= 300
    assert len({record["relation"] for record in RECORDS["reported"]}) >= 12
    assert all(len(set(RELATIONS[record["relation"]].wordings)) >= 3 for record in ALL)
    for records in RECORDS.values():
        relations = Counter(record["relation"] for record in records)
        assert max(relations.values()) <= len(records) / 4


def test_the_files_share_neither_a_relation_nor_a_subject():
    for of in ("relation", "subject"):
        one, other = ({record[of] for record in records} for records in RECORDS.values())
        assert not one & other
    for split, records in RECORDS.items():
        assert {RELATIONS[record["relation"]].split for record in records} == {split}


@pytest.mark.parametrize("split", FILES)
def test_a_subject_is_edited_once(split):
    subjects = Counter(record["subject"].casefold() for record in RECORDS[split])
    assert max(subjects.values()) == 1


@pytest.mark.parametrize("split", FILES)
def test_no_prompt_is_there_twice(split):
    """Nor is one edit's prompt another edit's question."""
    prompts = Counter()
    for record in RECORDS[split]:
        prompts.update(
            [record["prompt"], *record["rephrase_prompt"], *(item["prompt"] for item in asked(record, "portability"))]
        )
        questions = Counter(item["prompt"] for item in asked(record, "locality"))
        assert not questions or max(questions.values()) == 1
    assert max(prompts.values()) == 1
    assert not prompts.keys() & {item["prompt"] for record in RECORDS[split] for item in asked(record, "locality")}


def test_what_an_edit_is():
    for record in ALL:
        relation, subject = RELATIONS[record["relation"]], plain(record["subject"])
        truth = relation.truth[subject]
        assert record["subject"] in record["prompt"]
        assert says(record["ground_truth"][0], truth) and len(record["ground_truth"][0]) == len(truth)
        assert record["target_new"].casefold() != truth.casefold()
        assert any(says(record["target_new"], answer) for answer in relation.answers)
        *rephrased, before = record["rephrase_prompt"]
        wordings = {facts._prompt(wording, subject) for wording in relation.wordings}
        assert {record["prompt"], *rephrased} <= wordings and 1 <= len(rephrased) <= 2
        assert any(before == f"{text} {wording}" for text in UNRELATED for wording in wordings)


def test_what_the_model_said():
    """All that the records claim of it is in what they record."""
    for record in ALL:
        claimed = claims(record)
        assert all(prompt in record["written"] for some in claimed.values() for prompt, _ in some)
        for kind in ("edit", "new answer", "locality", "portability"):
            for prompt, answer in claimed[kind]:
                assert answer is None or says(record["written"][prompt], answer)
        for item in asked(record, "portability"):
            assert not says(record["written"][item["prompt"]], item["ground_truth"][0])


def test_the_new_answer_is_true_of_somebody_else():
    for record in ALL:
        relation = RELATIONS[record["relation"]]
        others = [s for s, answer in relation.truth.items() if answer.casefold() == record["target_new"].casefold()]
        assert any(record["target_said"] == facts._prompt(w, other) for other in others for w in relation.wordings)


def test_questions_of_locality_are_true_after_all_edits():
    """Each is about a fact that no edit of its file has a bearing on."""
    facts_of = {
        facts._prompt(wording, subject): (name, subject, answer)
        for name, relation in RELATIONS.items()
        for wording in relation.wordings
        for subject, answer in relation.truth.items()
    }
    kinds: Counter[str] = Counter()
    for records in RECORDS.values():
        edited = {plain(record["subject"]): record["relation"] for record in records}
        for record in records:
            for kind, items in record["locality"].items():
                kinds[kind] += 1
                for item in items:
                    name, subject, answer = facts_of[item["prompt"]]
                    assert says(item["ground_truth"][0], answer)
                    if kind == "Relation_Specificity":
                        assert subject == plain(record["subject"]) and name in RELATIONS[record["relation"]].leaves
                    else:
                        assert subject not in edited
                        assert (kind == "Neighborhood") == (name == record["relation"])
                        assert kind == "Distant" or answer.casefold() != record["target_new"].casefold()
    assert kinds.keys() == {"Neighborhood", "Relation_Specificity", "Distant"}
    assert kinds["Neighborhood"] == kinds["Distant"] == len(ALL) and kinds["Relation_Specificity"] >= 50


def test_what_follows_does_follow():
    """From the new answer, by a fact that no edit of the file changes."""
    number = 0
    for records in RECORDS.values():
        edited = {plain(record["subject"]): record["relation"] for record in records}
        for record in records:
            relation, subject = RELATIONS[record["relation"]], plain(record["subject"])
            new = next(answer for answer in relation.answers if answer.casefold() == record["target_new"].casefold())
            for item in asked(record, "portability"):
                number += 1
                follow = next(
                    f for f in relation.follows if facts._following(f["wording"], subject, RELATIONS) == item["prompt"]
                )
                answer = RELATIONS[follow["by"]].truth[new] if "by" in follow else new
                assert says(item["ground_truth"][0], answer)
                assert "by" not in follow or edited.get(new) != follow["by"]
                assert "{capital}" not in follow["wording"] or RELATIONS["capital"].truth[subject] not in edited
                others = [s for s, value in relation.truth.items() if value == new]
                assert item["said"] in {facts._following(follow["wording"], other, RELATIONS) for other in others}
    assert number >= 100


def test_known_facts_are_unambiguous():
    for relation in RELATIONS.values():
        subjects = [subject for some in relation.answers.values() for subject in some]
        assert all(relation.answers.values())
        assert len(subjects) == len(set(subjects)) == len({subject.casefold() for subject in subjects})
        assert set(relation.leaves) <= RELATIONS.keys()
        assert all(follow.get("by", "capital") in RELATIONS for follow in relation.follows)


@pytest.mark.parametrize("split", FILES)
def test_they_load_in_knowedits_layout(split):
    requests = datasets.load_requests(FILES[split], "knowedit", need_subject=True)
    assert requests == datasets.load_requests(FILES[split])
    assert len(requests) == len(RECORDS[split])
    assert requests[0]["locality"]["Neighborhood"]["ground_truth"]


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        (" Paris, and", "Paris", True),
        (" paris", "Paris", True),
        (" Parisian", "Paris", False),
        (" the city of Paris", "Paris", False),
        ("1914", "191", False),
        ("", "Paris", False),
    ],
)
def test_what_counts_as_said(written, answer, expected):
    assert says(written, answer) is expected


def test_edits_are_composed_alike_every_time():
    """Of a model that knows everything; from any seed they obey the rules, from one they are the same."""
    answers = {
        prompt: answer
        for name, relation in RELATIONS.items()
        for subject, answer in relation.truth.items()
        for wording in relation.wordings
        for prompt in [facts._prompt(wording, subject)]
    }
    for relation in RELATIONS.values():
        for follow in relation.follows:
            by = RELATIONS[follow["by"]].truth if "by" in follow else {a: a for a in relation.answers}
            for subject, answer in relation.truth.items():
                if prompt := facts._following(follow["wording"], subject, RELATIONS):
                    answers.setdefault(prompt, by.get(answer, ""))

    def write(prompts):
        return {prompt: f" {answers.get(prompt, 'nothing')}, of course" for prompt in prompts}

    sizes = {"development": 30, "reported": 60}
    made = facts.make(RELATIONS, UNRELATED, write, sizes, seed=1)
    assert {split: len(records) for split, records in made.items()} == sizes
    assert made == facts.make(RELATIONS, UNRELATED, write, sizes, seed=1)
    assert made != facts.make(RELATIONS, UNRELATED, write, sizes, seed=2)
    counts = facts.check(made["reported"], write)
    assert counts["edit"][0] == counts["edit"][1] and counts["portability"][1] > 20

    def forgetful(prompts):
        return dict.fromkeys(prompts, " I forget")

    assert facts.check(made["reported"], forgetful)["edit"][0] == 0


def test_a_models_own_settings_for_writing_are_no_matter(fresh, requests):
    model, tok = fresh
    prompts = [request["prompt"] for request in requests[:6]]
    expected = facts.write(model, tok, prompts)
    assert all(expected.values())
    model.config.eos_token_id = model.generation_config.eos_token_id = [tok.eos_token_id, tok.eos_token_id]
    model.generation_config.repetition_penalty = 2.0
    assert facts.write(model, tok, prompts, batch=4) == expected


def test_edits_of_another_model_need_a_folder(monkeypatch, capsys):
    """Else they would take the place of the package's own."""
    monkeypatch.setattr("sys.argv", ["facts", "make", "--model", "gpt2"])
    before = {path: path.stat().st_mtime_ns for path in FILES.values()}
    with pytest.raises(SystemExit) as error:
        facts_command()
    assert error.value.code == 2 and "--folder" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in FILES.values()}


def test_a_model_that_is_not_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["facts", "check", "--model", str(tmp_path / "none.gguf")])
    with pytest.raises(SystemExit):
        facts_command()
    assert "there is no such file" in capsys.readouterr().err


@real
def test_the_command_asks_for_a_folder_of_edits(monkeypatch, capsys, tmp_path):
    """``check --folder``: of two records that are there, what the model says."""
    for split, path in FILES.items():
        (tmp_path / path.name).write_text(json.dumps(RECORDS[split][:1]), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["facts", "check", "--folder", str(tmp_path)])
    assert facts_command() == 0
    assert re.search(r"development\.json: edit: (\d) of \1 \(100\.0%\)", capsys.readouterr().out)


def test_what_another_model_knows():
    """``keep``: of three records the second is not known, and of the first some questions are not, or are known already."""
    first, second, third = records = [r for r in RECORDS["reported"] if sum(map(len, r["portability"].values())) > 1][:3]
    right = {prompt: answer for record in records for some in claims(record).values() for prompt, answer in some}
    right[second["prompt"]] = "something else"
    unknown, known_already = asked(first, "locality")[0]["prompt"], asked(first, "portability")[0]
    right |= {unknown: "something else", first["rephrase_prompt"][0]: "something else"}
    right[known_already["prompt"]] = known_already["ground_truth"][0]
    questions = []

    def write(prompts):
        questions.extend(prompts)
        return {prompt: right[prompt] or "something else" for prompt in prompts}

    kept = facts.keep(records, write)
    assert [record["subject"] for record in kept] == [first["subject"], third["subject"]]
    assert kept[0]["rephrase_prompt"] == first["rephrase_prompt"][1:]
    assert asked(kept[0], "locality") == asked(first, "locality")[1:]
    assert asked(kept[0], "portability") == asked(first, "portability")[1:]
    assert {**kept[1], "written": {}} == {**third, "written": {}}
    assert set(kept[0]["written"]) == {prompt for some in claims(kept[0]).values() for prompt, _ in some}
    assert len(questions) == len(set(questions)), "nothing is asked twice"
    assert not set(questions) & {item["said"] for item in asked(second, "portability")}, "no more of what is not known"


@real
def test_the_command_keeps_what_is_known(monkeypatch, tmp_path):
    """The model of the files knows them: ``keep`` gives records in which it says all that they claim."""
    sample = {split: RECORDS[split][:2] for split in FILES}
    for split, records in sample.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")
    monkeypatch.setattr("kdpo_easyedit.bench.facts.__main__.FILES", {split: tmp_path / f"{split}.json" for split in FILES})
    monkeypatch.setattr("sys.argv", ["facts", "keep", "--folder", str(tmp_path / "new")])
    assert facts_command() == 0
    for split, records in sample.items():
        kept = json.loads((tmp_path / "new" / f"{split}.json").read_text(encoding="utf-8"))
        assert [record["prompt"] for record in kept] == [record["prompt"] for record in records]
        for record in kept:
            claimed = claims(record)
            del claimed["unrelated"]  # of which nothing is claimed
            asserted = [(prompt, answer) for some in claimed.values() for prompt, answer in some if answer is not None]
            assert len(asserted) > 3 and all(says(record["written"][prompt], answer) for prompt, answer in asserted)


@real
def test_the_model_says_what_is_claimed():
    """A sample; ``python -m kdpo_easyedit.bench.facts check`` asks for everything."""
    folder = model_folder(facts.MODEL)
    tok, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    sample = random.Random(0).sample(ALL, 20)
    counts = facts.check(sample, lambda prompts: facts.write(model, tok, prompts))
    for kind in ("edit", "new answer", "locality", "portability"):
        number, total = counts[kind]
        assert number >= 0.97 * total > 0
    assert counts["written"][0] >= 0.9 * counts["written"][1]


def test_no_names_in_unrelated_texts():
    words = {word for text in UNRELATED for word in re.findall(r"\w+", text)}
    assert not words & {answer for relation in RELATIONS.values() for answer in relation.answers if len(answer) > 2}
