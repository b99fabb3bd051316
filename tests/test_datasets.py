"""Benchmark files in the layouts that users have."""

from __future__ import annotations

import json

import pytest

from kdpo_easyedit.datasets import DatasetError, load_requests

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
    more = MEND | {"portability": {"New Question": "Where does Bonn Brook's river end?", "New Answer": "the North Sea"}}
    plain, ported = load_requests(written(tmp_path, MEND, more, MEND | {"alt": ""}))
    assert plain["prompt"] == MEND["src"] and plain["target_new"] == "the Elbe" and plain["ground_truth"] == "the Rhine"
    assert plain["locality"] == {"neighborhood": {"prompt": [MEND["loc"]], "ground_truth": ["88"]}}
    assert plain["portability"] == {}
    assert ported["portability"] == {
        "one_hop": {"prompt": ["Where does Bonn Brook's river end?"], "ground_truth": ["the North Sea"]}
    }


def test_size_takes_the_first_records(tmp_path):
    path = written(tmp_path, ZSRE, ZSRE | {"target_new": "Chad"}, ZSRE | {"target_new": "Peru"})
    assert [request["target_new"] for request in load_requests(path, size=2)] == ["Norway", "Chad"]
    with pytest.raises(DatasetError, match="ds_size is 4, and the file has 3 records"):
        load_requests(path, size=4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ZSRE | {"target_new": ""}, r"record 1: target_new is ''; expected text"),
        (ZSRE | {"prompt": None}, r"record 1: prompt is None"),
        (ZSRE | {"subject": "Lake Superior"}, r"record 1: subject is 'Lake Superior', which does not stand in the prompt"),
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
