"""Benchmark files in the layouts that users have."""

from __future__ import annotations

import json

import pytest

from kdpo_easyedit.bench.datasets import DatasetError, load_requests

ZSRE = {
    "subject": "Lake Ilmen",
    "prompt": "Which country is Lake Ilmen in?",
    "target_new": "Norway",
    "ground_truth": ["Russia"],
    "rephrase_prompt": "Lake Ilmen lies in which country?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The depth of Lake Ilmen is", "ground_truth": ["10 metres", "ten metres"]},
            {"prompt": "Lake Ilmen outflow", "ground_truth": [["Volkhov"]]},
            {"prompt": "Lake Ilmen nobody knows", "ground_truth": [""]},
        ],
        "Forgetfulness": [],
    },
    "portability": {"Reasoning": [{"prompt": "The capital of the country of Lake Ilmen is", "ground_truth": "Oslo"}]},
}
WIKIBIO = {
    "text": "This is a passage about ada example. She was a geologist.",
    "labels": "She was born in Ghent.",
    "concept": "Ada Example",
    "locality": {"Relation_Specificity": [{"prompt": "Ada Example's language is", "ground_truth": ["Dutch"]}]},
}
MEND = {
    "subject": "Bonn Brook",
    "src": "Which river takes up Bonn Brook?",
    "rephrase": "Bonn Brook flows into which river?",
    "alt": "the Elbe",
    "answers": ["the Rhine"],
    "loc": "nq question: how many keys has a piano",
    "loc_ans": "88",
}


def written(tmp_path, *records):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize("datatype", [None, "knowedit", "zsre", "recent", "counterfact"])
def test_knowedit(tmp_path, datatype):
    (request,) = load_requests(written(tmp_path, ZSRE), datatype)
    assert request == {
        "prompt": "Which country is Lake Ilmen in?",
        "target_new": "Norway",
        "subject": "Lake Ilmen",
        "ground_truth": "Russia",
        "rephrase_prompt": "Lake Ilmen lies in which country?",
        "locality": {
            "Relation_Specificity": {
                "prompt": ["The depth of Lake Ilmen is", "Lake Ilmen outflow"],
                "ground_truth": ["10 metres", "Volkhov"],
            }
        },
        "portability": {"Reasoning": {"prompt": ["The capital of the country of Lake Ilmen is"], "ground_truth": ["Oslo"]}},
    }


def test_wikibio_and_a_subject_in_other_letters(tmp_path):
    (request,) = load_requests(written(tmp_path, WIKIBIO))
    assert request["prompt"] == WIKIBIO["text"] and request["target_new"] == WIKIBIO["labels"]
    assert request["subject"] == "ada example" and request["portability"] == {} and "rephrase_prompt" not in request


def test_zsre_mend_with_and_without_portability(tmp_path):
    more = MEND | {
        "src": f"Say: {MEND['src']}",
        "portability": {"New Question": "Where does Bonn Brook's river end?", "New Answer": "the North Sea"},
    }
    plain, ported = load_requests(written(tmp_path, MEND, more, MEND | {"alt": ""}))
    assert plain["prompt"] == MEND["src"] and plain["target_new"] == "the Elbe" and plain["ground_truth"] == "the Rhine"
    assert plain["locality"] == {"neighborhood": {"prompt": [MEND["loc"]], "ground_truth": ["88"]}}
    assert plain["portability"] == {}
    assert ported["portability"] == {
        "one_hop": {"prompt": ["Where does Bonn Brook's river end?"], "ground_truth": ["the North Sea"]}
    }


def test_size_takes_the_first_records(tmp_path):
    prompts = [f"{word} {ZSRE['prompt']}" for word in ("Say:", "Now:")]
    more = [ZSRE | {"prompt": prompt, "target_new": new} for prompt, new in zip(prompts, ("Chad", "Peru"))]
    path = written(tmp_path, ZSRE, *more)
    assert [request["target_new"] for request in load_requests(path, size=2)] == ["Norway", "Chad"]
    with pytest.raises(DatasetError, match="ds_size is 4, and the file has 3 records"):
        load_requests(path, size=4)


def test_counterfact_as_romes_authors_published_it(tmp_path):
    record = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Ødegård",
            "target_new": {"str": "French", "id": "Q150"},
            "target_true": {"str": "Norwegian", "id": "Q9043"},
        },
        "paraphrase_prompts": ["Ødegård, a native", "Ødegård spoke"],
        "neighborhood_prompts": ["Hamsun is a native speaker of", "The mother tongue of Ibsen is"],
        "attribute_prompts": ["x"],
    }
    (request,) = load_requests(written(tmp_path, record))
    assert request == {
        "prompt": "The mother tongue of Ødegård is",
        "target_new": "French",
        "subject": "Ødegård",
        "ground_truth": "Norwegian",
        "rephrase_prompt": "Ødegård, a native",
        "locality": {"neighborhood": {"prompt": record["neighborhood_prompts"], "ground_truth": ["Norwegian"] * 2}},
        "portability": {},
    }
    for field, value, message in (
        ("neighborhood_prompts", "x", "neighborhood_prompts is 'x'; expected a list of texts"),
        ("requested_rewrite", {"prompt": "a"}, "subject is None; expected text"),
        (
            "requested_rewrite",
            {**record["requested_rewrite"], "target_new": "French"},
            "target_new is 'French'; expected a mapping",
        ),
    ):
        with pytest.raises(DatasetError, match=f"record 0: {message}"):
            load_requests(written(tmp_path, record | {field: value}))


def test_flat_records_and_the_shortest(tmp_path):
    flat = {
        "prompt": "The capital of Peru is",
        "target_new": "Oslo",
        "subject": "Peru",
        "ground_truth": "Lima",
        "rephrase_prompt": "Peru's capital is",
        "locality_prompt": "The capital of Chad is",
        "locality_ground_truth": "N'Djamena",
        "portability_prompt": "The capital of Peru lies in",
        "portability_ground_truth": "Norway",
    }
    full, short = load_requests(written(tmp_path, flat, {"prompt": "Say", "target_new": "ü"}))
    assert full["locality"] == {"neighborhood": {"prompt": ["The capital of Chad is"], "ground_truth": ["N'Djamena"]}}
    assert full["portability"] == {"one_hop": {"prompt": ["The capital of Peru lies in"], "ground_truth": ["Norway"]}}
    assert short == {
        "prompt": "Say",
        "target_new": "ü",
        "subject": "",
        "ground_truth": None,
        "locality": {},
        "portability": {},
    }


def test_json_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": p, "target_new": "x"}) for p in "abc"]
    path.write_text("\n".join(lines[:2]) + "\n\n" + lines[2] + "\n")
    assert [request["prompt"] for request in load_requests(path)] == ["a", "b", "c"]
    path.write_text(lines[0])
    assert len(load_requests(path)) == 1
    path.write_text(lines[0] + "\n{'prompt'\n")
    with pytest.raises(DatasetError, match="line 2 is no record"):
        load_requests(path)


def test_order_is_random_but_the_same_for_a_seed(tmp_path):
    path = written(tmp_path, *({"prompt": str(n), "target_new": "x"} for n in range(20)))
    first, again, other = ([r["prompt"] for r in load_requests(path, size=5, shuffle=seed)] for seed in (0, 0, 1))
    assert first == again != other and first != ["0", "1", "2", "3", "4"] and len(set(first)) == 5


def test_what_is_left_out_is_counted(tmp_path, caplog):
    flat = {"prompt": "The capital of Peru is", "target_new": "Oslo", "subject": "PERU"}
    path = written(tmp_path, flat, flat | {"target_new": "Rome"}, {"prompt": "Where?", "target_new": "here", "subject": "Chad"})
    first, other = load_requests(path)
    assert (first["target_new"], first["subject"], other["subject"]) == ("Oslo", "Peru", "")
    assert "1 of 3 records with a prompt that was there before are left out" in caplog.text
    assert len(load_requests(path, need_subject=True)) == 1
    assert "1 of 3 records without their subject in the prompt are left out" in caplog.text
    mend = {"subject": "a", "src": "a is", "alt": "", "loc": "nq question: x", "loc_ans": "y"}
    with pytest.raises(DatasetError, match="at least one is needed, and the file has 0 records to edit"):
        load_requests(written(tmp_path, mend))


def test_answers_are_found_however_deep_they_are(tmp_path):
    record = {
        "prompt": "The capital of Peru is",
        "target_new": "Oslo",
        "subject": "Peru",
        "ground_truth": [["", "Lima"], "Ciudad"],
        "locality": {
            "Forgetfulness": [{"prompt": "Peru has the capital", "ground_truth": [["Lima"], ["x"]]}],
            "Relation_Specificity": [{"prompt": "Peru borders", "ground_truth": []}],
        },
    }
    (request,) = load_requests(written(tmp_path, record))
    assert request["ground_truth"] == "Lima"
    assert request["locality"] == {"Forgetfulness": {"prompt": ["Peru has the capital"], "ground_truth": ["Lima"]}}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ZSRE | {"target_new": ""}, r"record 1: target_new is ''; expected text"),
        (ZSRE | {"prompt": None}, r"record 1: prompt is None"),
        (ZSRE | {"subject": 3}, r"record 1: subject is 3; expected text"),
        ({"requested_rewrite": "x"}, r"record 1: prompt is None"),
        (ZSRE | {"locality": ["x"]}, r"record 1: locality is \['x'\]; expected a mapping"),
        (ZSRE | {"portability": {"Reasoning": "x"}}, r"record 1: portability.Reasoning is 'x'; expected a list"),
    ],
)
def test_a_broken_record_is_named(tmp_path, record, message):
    with pytest.raises(DatasetError, match=message):
        load_requests(written(tmp_path, ZSRE, record))


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.json: cannot be read: No such file"):
        load_requests(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DatasetError, match=r"broken\.json: not a JSON file"):
        load_requests(tmp_path / "broken.json")
    with pytest.raises(DatasetError, match="expected a list of records"):
        load_requests(written(tmp_path))
    with pytest.raises(DatasetError, match=r"keys \(a, b\) are of no known layout; known: knowedit"):
        load_requests(written(tmp_path, {"a": 1, "b": 2}))
    with pytest.raises(DatasetError, match="datatype is 'squad'; allowed: knowedit"):
        load_requests(written(tmp_path, ZSRE), "squad")
