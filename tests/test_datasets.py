"""Benchmark files in the layouts that users have."""

from __future__ import annotations

import gzip
import json

import pytest

from kdpo_easyedit.bench.datasets import DatasetError, _subject, flat, load_requests, read_passages

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
    assert _subject("Berlin", "An der Straße liegt BERLIN, das") == "BERLIN"  # a ß is two letters where case is folded
    assert _subject("a.b", "aXb and A.B") == "A.B" and _subject("Bonn", "Berlin is") == ""
    assert _subject("Man", "The Roman emperor") == "" and _subject("Man", "The Isle of MAN is") == "MAN"


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
        "rephrase_prompt": ["Ødegård, a native", "Ødegård spoke"],
        "locality": {"neighborhood": {"prompt": record["neighborhood_prompts"], "ground_truth": ["Norwegian"] * 2}},
        "portability": {},
    }
    hop = {"New Question": "Ødegård speaks the language of", "New Answer": "France"}
    (request,) = load_requests(written(tmp_path, record | {"portability": hop}))
    assert request["portability"] == asked("one_hop", (hop["New Question"], "France"))
    for field, value, message in (
        ("neighborhood_prompts", "x", "neighborhood_prompts is 'x'; expected a list of texts"),
        ("requested_rewrite", {"prompt": "a", "target_new": "b"}, "subject is None; expected text"),
        (
            "requested_rewrite",
            {**record["requested_rewrite"], "target_new": {"id": "Q150"}},
            "target_new is {'id': 'Q150'}; expected text",
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


def test_lines_end_at_line_feeds_alone(tmp_path):
    odd = "one\u2028two\x85three\x0cfour\u2029five"
    path = tmp_path / "data.jsonl"
    records = [{"prompt": f"{n} {odd}", "target_new": odd} for n in "ab"]
    path.write_bytes("\r\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode())
    assert [request["prompt"] for request in load_requests(path)] == [f"a {odd}", f"b {odd}"]
    path.write_bytes(f"{odd}\r\n\n {odd}\n".encode())
    assert read_passages(path) == [odd, odd]
    path.write_bytes(b" \n")
    with pytest.raises(DatasetError, match="it holds no text"):
        read_passages(path)


def test_order_is_random_but_the_same_for_a_seed(tmp_path):
    path = written(tmp_path, *({"prompt": str(n), "target_new": "x"} for n in range(20)))
    first, again, other = ([r["prompt"] for r in load_requests(path, size=5, shuffle=seed)] for seed in (0, 0, 1))
    assert first == again != other and first != ["0", "1", "2", "3", "4"] and len(set(first)) == 5


def test_what_is_left_out_is_counted(tmp_path, caplog):
    flat = {"prompt": "The capital of Peru is", "target_new": "Oslo", "subject": "PERU"}
    path = written(tmp_path, flat, flat | {"target_new": "Rome"}, {"prompt": "Where?", "target_new": "here", "subject": "Chad"})
    first, other = load_requests(path)
    assert (first["target_new"], first["subject"], other["subject"]) == ("Oslo", "Peru", "")
    assert "edits with a prompt that was there before, left out: 1 (in 3 records)" in caplog.text
    assert "subjects that are not in their prompt, taken as empty: 1 (in 3 records)" in caplog.text
    assert len(load_requests(path, need_subject=True)) == 1
    assert "edits without their subject in the prompt, left out: 1 (in 3 records)" in caplog.text
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
        (ZSRE | {"target_new": ""}, r"target_new is ''; expected text"),
        (ZSRE | {"target_new": True}, r"target_new is True; expected text"),
        (ZSRE | {"target_new": ["Norway", "Norge"]}, r"target_new is \['Norway', 'Norge'\]; expected text \(one new answer\)"),
        (ZSRE | {"prompt": None}, r"prompt is None"),
        (ZSRE | {"subject": False}, r"subject is False; expected text"),
        (ZSRE | {"rephrase_prompt": {"a": 1}}, r"rephrase_prompt is {'a': '1'}; expected text, or a list of texts"),
        (ZSRE | {"ground_truth": [True]}, r"ground_truth is True; expected text"),
        ({"requested_rewrite": "x"}, r"requested_rewrite is 'x'; expected a mapping"),
        (ZSRE | {"locality": "x"}, r"locality is 'x'; expected a mapping"),
        (ZSRE | {"locality": ["x"]}, r"locality.neighborhood is \['x'\]; expected a list"),
        (ZSRE | {"portability": {"Reasoning": "x"}}, r"portability.Reasoning is 'x'; expected a list"),
        (
            ZSRE | {"locality": {"R": {"prompt": ["a", "b"], "ground_truth": ["c"]}}},
            r"locality.R: 2 prompts, and the answers are \['c'\]; expected as many",
        ),
        (ZSRE | {"prompt": "{} is in {}"}, r"prompt is '{} is in {}'; {} is the place of the subject, and there are 2 of them"),
        (ZSRE | {"prompt": "{} is in", "subject": ""}, r"prompt is '{} is in'.*no subject is given: write the prompt out"),
        (
            ZSRE | {"subject": "", "locality": {"R": [{"prompt": "{} lies", "ground_truth": "x"}]}},
            r"locality.R is '{} lies'.*no subject is given",
        ),
        ({"who": "a", "said": "b"}, r"its keys \(who, said\) are of no known layout; known: knowedit"),
        ({"edit": {"prompt": "Ivo Brandt sings."}}, r"edit.prompt is 'Ivo Brandt sings.'; expected a sentence"),
        ({"en": {"src": "a", "alt": "b"}, "zh": {"a": 1}}, r"zh: its keys \(a\) are of no known layout"),
        ({"en": "Oslo", "zh": "奥斯陆"}, r"it has no mapping under a language's code; expected {'en': {…}, …}"),
    ],
)
def test_a_broken_record_is_named(tmp_path, record, message):
    with pytest.raises(DatasetError, match=f"record 1: {message}"):
        load_requests(written(tmp_path, ZSRE, record))


def test_an_error_is_one_short_line(tmp_path):
    for record in (ZSRE | {"target_new": {"x": "long " * 500}}, {"key " * 99 + str(n): "long " * 500 for n in range(99)}):
        with pytest.raises(DatasetError) as caught:
            load_requests(written(tmp_path, record))
        message = str(caught.value).removeprefix(str(tmp_path))
        assert len(message) < 1700 and "\n" not in message and "long long long long long long long" not in message[200:]


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
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[]" * 99)[:-9])
    with pytest.raises(DatasetError, match=r"cut\.json\.gz: cannot be read: Compressed file ended"):
        load_requests(tmp_path / "cut.json.gz")
    (tmp_path / "latin.json").write_bytes("[{'ü".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"latin\.json: not in UTF-8: .* at byte 3"):
        load_requests(tmp_path / "latin.json")
    with pytest.raises(DatasetError, match="datatype is 'squad'; allowed: knowedit"):
        load_requests(written(tmp_path, ZSRE), "squad")


def asked(kind, *pairs):
    """A section of a request with one kind of questions."""
    return {kind: {"prompt": [prompt for prompt, _ in pairs], "ground_truth": [answer for _, answer in pairs]}}


def test_records_of_several_layouts_in_one_file(tmp_path, caplog):
    records = [
        {"prompt": "The capital of Tovaria is", "target_new": "Oslo", "rephrase_prompt": ["Tovaria's capital is"]},
        {
            "prompt": "Its anthem is",
            "target_new": "Dawn",
            "locality": {"RS": [{"prompt": "Spain's capital is", "ground_truth": ["x"]}]},
        },
        {"prompt": "Tovaria began in", "target_new": 1987, "locality_prompt": "Spain joined in", "locality_ground_truth": 1986},
        MEND,
        {
            "prompt": "It ends in",
            "target_new": "May",
            "portability": {"Reasoning": [{"prompt": "It began in", "ground_truth": "?"}]},
        },
    ]
    first, second, third, fourth, fifth = load_requests(written(tmp_path, *records))
    assert first["rephrase_prompt"] == "Tovaria's capital is"
    assert second["locality"] == asked("RS", ("Spain's capital is", "x"))
    assert third["target_new"] == "1987" and third["locality"] == asked("neighborhood", ("Spain joined in", "1986"))
    assert fourth["prompt"] == MEND["src"] and fifth["portability"] == asked("Reasoning", ("It began in", "?"))
    assert not caplog.text
    with pytest.raises(DatasetError, match="record 0: src is None; expected text"):
        load_requests(tmp_path / "records.json", "zsre_mend")


def test_numbers_are_text_as_they_are_written(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(
        '[{"prompt": "a", "target_new": 5.20, "subject": 7, "ground_truth": [1986], "locality": {"RS": '
        '[{"prompt": "b", "ground_truth": 1e3}, {"prompt": "c", "ground_truth": NaN}]}}]'
    )
    (request,) = load_requests(path)
    assert (request["target_new"], request["ground_truth"]) == ("5.20", "1986")
    assert request["locality"] == asked("RS", ("b", "1e3"))


def test_targets_in_a_list_or_with_their_identifier(tmp_path):
    targets = ["Oslo", ["Oslo"], {"str": "Oslo", "id": "Q585"}, [{"str": "Oslo"}], "  Oslo\n"]
    records = [{"prompt": f"{n} is", "target_new": target} for n, target in enumerate(targets)]
    assert [request["target_new"] for request in load_requests(written(tmp_path, *records))] == ["Oslo"] * 5


def test_white_space_around_texts_is_cut_and_counted(tmp_path, caplog):
    record = {
        "prompt": "Ada works as a ",
        "target_new": " pilot",
        "rephrase_prompt": "Ada's job: ",
        "locality_prompt": "Ida works as a ",
        "locality_ground_truth": "baker ",
    }
    path = written(
        tmp_path, record, {"prompt": "Ada works as a", "target_new": "cook"}, {"prompt": "  Ida is", "target_new": "x"}
    )
    first, second = load_requests(path)
    assert (first["prompt"], first["target_new"], first["rephrase_prompt"]) == ("Ada works as a", "pilot", "Ada's job:")
    assert first["locality"] == asked("neighborhood", ("Ida works as a", "baker"))
    assert second["prompt"] == "  Ida is"
    assert "prompts with white space at the end, cut: 3 (in 3 records)" in caplog.text
    assert "answers with white space around them, cut: 2 (in 3 records)" in caplog.text
    assert "edits with a prompt that was there before, left out: 1" in caplog.text


def test_the_subjects_place_is_filled_in(tmp_path):
    record = {
        "prompt": "{} works as a",
        "subject": "Ada",
        "target_new": "pilot",
        "rephrase_prompt": ["The job of {} is", "As a job, {} is a"],
        "locality": {"RS": [{"prompt": "{} lives in", "ground_truth": "Ghent"}]},
        "portability_prompt": "{} flies a",
        "portability_ground_truth": "plane",
    }
    (request,) = load_requests(written(tmp_path, record))
    assert (request["prompt"], request["subject"]) == ("Ada works as a", "Ada")
    assert request["rephrase_prompt"] == ["The job of Ada is", "As a job, Ada is a"]
    assert request["locality"] == asked("RS", ("Ada lives in", "Ghent"))
    assert request["portability"] == asked("one_hop", ("Ada flies a", "plane"))


def test_rephrasings_are_all_kept_once(tmp_path):
    record = {"prompt": "a", "target_new": "x", "rephrase_prompt": ["b", "", "c", "b "], "rephrase": "d"}
    single = {"prompt": "e", "target_new": "x", "rephrase_prompt": [" ", "f"]}
    several, one = load_requests(written(tmp_path, record, single))
    assert several["rephrase_prompt"] == ["b", "c", "d"] and one["rephrase_prompt"] == "f"


def test_what_easyedits_editor_takes(tmp_path):
    record = {
        "prompt": "The capital of Tovaria is",
        "target_new": "Oslo",
        "locality": {"near": {"prompt": ["Spain's capital is", "Peru's is"], "ground_truth": ["Madrid", ["Lima", "Ciudad"]]}},
        "portability_inputs": {"one_hop": {"prompt": "It lies in", "ground_truth": ["Norway", "Norge"]}},
    }
    (request,) = load_requests(written(tmp_path, record))
    assert request["locality"] == asked("near", ("Spain's capital is", "Madrid"), ("Peru's is", "Lima"))
    assert request["portability"] == asked("one_hop", ("It lies in", "Norway"))


def test_wikibigedit(tmp_path, caplog):
    record = {
        "tag": "update",
        "subject": "Tovaria",
        "update": "What is the capital of Tovaria?",
        "rephrase": "Which city is Tovaria's capital?",
        "personas": "Say, Tovaria's capital?",
        "ans": "Oslo",
        "loc": "What is the capital of Spain?",
        "loc_ans": "Madrid",
        "mhop": "In which land is the capital of Tovaria?",
        "mhop_ans": "Norway",
    }
    bare = {
        "update": "Who sings?",
        "ans": "Ada",
        "personas": None,
        "mhop": None,
        "mhop_ans": None,
        "loc": None,
        "loc_ans": None,
    }
    full, short = load_requests(written(tmp_path, record, bare, bare | {"ans": None}))
    assert full["prompt"] == record["update"] and full["target_new"] == "Oslo" and full["subject"] == "Tovaria"
    assert full["rephrase_prompt"] == record["rephrase"]
    assert full["locality"] == asked("neighborhood", (record["loc"], "Madrid"))
    assert full["portability"] == asked("personas", (record["personas"], "Oslo")) | asked(
        "multi_hop", (record["mhop"], "Norway")
    )
    assert short["locality"] == short["portability"] == {}
    assert "records without a new answer, left out: 1 (in 3 records)" in caplog.text


def test_cknowedit_has_no_subject(tmp_path):
    record = {
        "prompt": "请填写下列古诗文的后一句：青山绿水，",
        "target_old": "白云",
        "target_new": "红花。",
        "rephrase": ["青山绿水的下一句是什么？", "“青山绿水”之后是"],
        "portability": [{"prompt": "红花的上一句？", "answer": "青山绿水"}],
        "locality": None,
    }
    (request,) = load_requests(written(tmp_path, record))
    assert request == {
        "prompt": record["prompt"],
        "target_new": "红花。",
        "subject": "",
        "ground_truth": "白云",
        "rephrase_prompt": record["rephrase"],
        "locality": {},
        "portability": asked("one_hop", ("红花的上一句？", "青山绿水")),
    }


@pytest.mark.parametrize("datatype", [None, "bizsre", "mzsre"])
def test_an_edit_a_language(tmp_path, caplog, datatype):
    portability = {"Recalled Relation": "r", "New Question": "Whose river?", "New Answer": "Norway's"}
    chinese = MEND | {"subject": "波恩溪", "src": "波恩溪流入哪条河？", "alt": "易北河", "rephrase": "哪条河？"}
    records = [{"en": MEND | {"portability": portability}, "zh": chinese}, {"en": MEND | {"src": "Who?"}, "zh-cn": chinese}]
    english, translated, third = load_requests(written(tmp_path, *records), datatype)
    assert english["prompt"] == MEND["src"] and english["portability"] == asked("one_hop", ("Whose river?", "Norway's"))
    assert translated["prompt"] == chinese["src"] and translated["subject"] == "波恩溪" and translated["target_new"] == "易北河"
    assert third["prompt"] == "Who?" and "edits with a prompt that was there before, left out: 1 (in 2 records)" in caplog.text
    assert len(load_requests(tmp_path / "records.json", datatype, size=1)) == 1
    plain = {"en": {"prompt": "a", "target_new": "x"}, "de": {"prompt": "b", "target_new": "y"}}
    assert [request["prompt"] for request in load_requests(written(tmp_path, plain), datatype)] == ["a", "b"]


def test_mquake_an_edit_a_rewrite(tmp_path, caplog):
    def rewrite(prompt, subject, new, true, question):
        return {
            "prompt": prompt,
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": true},
            "question": question,
        }

    questions = ["Which city is the capital of Ada's land?", "Ada's land has which capital?"]
    record = {
        "case_id": 1,
        "requested_rewrite": [
            rewrite("{} is a citizen of", "Ada", "Norway", "Spain", "Of which land is Ada a citizen?"),
            rewrite("The capital of {} is", "Norway", "Bergen", "Oslo", "What is Norway's capital?"),
        ],
        "questions": questions,
        "answer": "Madrid",
        "new_answer": "Bergen",
        "new_answer_alias": ["Bjørgvin"],
    }
    first, second = load_requests(written(tmp_path, record, record | {"requested_rewrite": []}))
    assert "records without a new answer, left out: 1 (in 2 records)" in caplog.text
    assert (first["prompt"], first["target_new"], first["ground_truth"]) == ("Ada is a citizen of", "Norway", "Spain")
    assert (second["prompt"], second["subject"], second["target_new"]) == ("The capital of Norway is", "Norway", "Bergen")
    assert second["rephrase_prompt"] == "What is Norway's capital?"
    assert first["portability"] == asked("multi_hop", *((question, "Bergen") for question in questions))
    (alone,) = load_requests(written(tmp_path, record), size=1)  # they need both
    assert alone == first | {"portability": {}} and "questions that need edits which are left out, left out: 1" in caplog.text


@pytest.mark.parametrize(
    ("relation", "sentence", "before", "prompt", "target", "subject"),
    [
        (
            "SPOUSE",
            "The name of the spouse of Ada is Ivo Brandt.",
            "Ivan Reyes.",
            "The name of the spouse of Ada is",
            "Ivo Brandt",
            "Ada",
        ),
        ("COUNTRY", "The land of Ada is United Isles.", "United Coasts.", "The land of Ada is", "United Isles", ""),
        (
            "PLACE_OF_BIRTH",
            "The place of birth of Ada of Ur is Oslo.",
            None,
            "The place of birth of Ada of Ur is",
            "Oslo",
            "Ada of Ur",
        ),
        ("FOLLOWED_BY", "Dusk is followed by Dawn.", None, "Dusk is followed by", "Dawn", "Dusk"),
        ("FOLLOWS", "Dawn follows Dusk.", "Noon.", "Dawn follows", "Dusk", "Dawn"),
        (
            "SIBLING",
            "The names of the siblings of Ada are Ivo B..",
            None,
            "The names of the siblings of Ada are",
            "Ivo B.",
            "Ada",
        ),
        (
            "MEMBER_OF_SPORTS_TEAM",
            "The name of the sports team which Ada is a member of is Ur.",
            "Uruk.",
            "The name of the sports team which Ada is a member of is",
            "Ur",
            "Ada",
        ),
        ("MOTTO", "Tovaria's people call Dawn.", "Dusk.", "Tovaria's people call", "Dawn", ""),
    ],
)
def test_rippleedits_sentences(tmp_path, relation, sentence, before, prompt, target, subject):
    edit = {"prompt": sentence, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    if before:
        edit["original_fact"] = {"prompt": f"{prompt} {before}", "relation": relation}

    def tests(prompt, *answers):
        query = {"prompt": prompt, "answers": [{"value": answer, "aliases": ["?"]} for answer in answers]}
        return [{"test_queries": [query], "test_condition": "OR", "condition_queries": []}]

    record = {
        "example_type": "popular",
        "edit": edit,
        "Relation_Specificity": tests("The mother of Ada is", "Ana"),
        "Forgetfulness": tests("The friends of Ada are", "Eva", "Uwe"),
        "Logical_Generalization": tests("The spouse of Ivo is", "Ada"),
        "Compositionality_I": tests("The mother of Ada's spouse is"),
        "Subject_Aliasing": [],
    }
    (request,) = load_requests(written(tmp_path, record))
    assert (request["prompt"], request["target_new"], request["subject"]) == (prompt, target, subject)
    assert request["ground_truth"] == (before and before.removesuffix("."))
    assert request["locality"] == asked("Relation_Specificity", ("The mother of Ada is", "Ana")) | asked(
        "Forgetfulness", ("The friends of Ada are", "Eva")
    )
    assert request["portability"] == asked("Logical_Generalization", ("The spouse of Ivo is", "Ada"))


def test_long_answers(tmp_path):
    passage = "Ada is a pilot. She flies over Ghent every day. "
    unke = {
        "id": 0,
        "question": "What is Ada's job?",
        "para_question": "What does Ada do?",
        "answer": passage,
        "sub_question": ["Where does Ada fly?", "How often?"],
        "sub_answer": ["Over Ghent.", "Every day."],
    }
    rewrite = {
        "prompt": "The job of {} is",
        "subject": "Ida",
        "question": "What is Ida's job?",
        "target_new": {"str": "pilot"},
        "target_true": {"str": "baker"},
        "fact_new_uns": passage,
        "unsfact_triplets_GPT": [{"subject": "Ida", "prompt": "{} flies over", "target": "Ghent"}],
    }
    akew = {"case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": ["Ida works as a"]}
    several = {"requested_rewrite": [rewrite | {"question": "What does Ida do?"}], "questions": ["?"], "new_answer": "x"}
    long, single, listed = load_requests(written(tmp_path, unke, akew, several))
    assert (long["prompt"], long["target_new"], long["subject"]) == ("What is Ada's job?", passage.strip(), "")
    assert long["portability"] == asked("sub_questions", ("Where does Ada fly?", "Over Ghent."), ("How often?", "Every day."))
    assert (single["prompt"], single["target_new"], single["ground_truth"]) == ("What is Ida's job?", passage.strip(), "baker")
    assert single["rephrase_prompt"] == ["The job of Ida is", "Ida works as a"]
    assert single["portability"] == asked("sub_questions", ("Ida flies over", "Ghent"))
    assert listed["prompt"] == "What does Ida do?" and listed["target_new"] == passage.strip()


def test_hallueditbench(tmp_path, caplog):
    row = {
        "topic": "brand",
        "subject": "Tovaria",
        "relation": "country",
        "object": "Norway",
        "question": "What is the country of Tovaria?",
        "output_m": '"Spain, I think"',
        "paraphrased_question": "In which country is Tovaria?",
        "locality_question": "What does it sell?",
        "reversed_relation_question": "Who is Norse?",
        "question_2hop": "Which capital?",
        "answer_2hop": "Oslo",
        "question_3hop": "",
        "answer_3hop": "",
    }
    path = tmp_path / "brand.csv"
    path.write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    (request,) = load_requests(path)
    assert request == {
        "prompt": "What is the country of Tovaria?",
        "target_new": "Norway",
        "subject": "Tovaria",
        "ground_truth": "Spain, I think",
        "rephrase_prompt": "In which country is Tovaria?",
        "locality": {},
        "portability": asked("2hop", ("Which capital?", "Oslo")) | asked("reversed_relation", ("Who is Norse?", "Tovaria")),
    }
    assert "questions without an answer, left out: 1 (in 1 records)" in caplog.text


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables(tmp_path, delimiter):
    path = tmp_path / "own.CSV"
    rows = [
        ["prompt", "target_new", "locality_prompt", "locality_ground_truth"],
        ['"a,;\tb\nc"', "x", "", ""],
        ["d", "007", "e", "f"],
    ]
    path.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    first, second = load_requests(path)
    assert first["prompt"] == "a,;\tb\nc" and first["locality"] == {}
    assert second["target_new"] == "007" and second["locality"] == asked("neighborhood", ("e", "f"))
    path.write_text(delimiter.join(["prompt", "target_new", "locality_prompt", "locality_prompt"]) + "\n")
    with pytest.raises(DatasetError, match="the column 'locality_prompt' is there twice"):
        load_requests(path)
    path.write_text(f"prompt{delimiter}target_new\na{delimiter}b{delimiter}c\n")
    with pytest.raises(DatasetError, match="record 0 has more cells than the header"):
        load_requests(path)
    path.write_text(f'prompt{delimiter}target_new\na{delimiter}"b')
    with pytest.raises(DatasetError, match="not a CSV file: line 2"):
        load_requests(path)


def test_compressed_files(tmp_path):
    line = json.dumps({"prompt": "a", "target_new": "x"})
    for name, text in (
        ("a.json.gz", f"[{line}]"),
        ("a.jsonl.gz", f"{line}\n"),
        ("a.csv.gz", "prompt,target_new\na,x\n"),
        ("a", line),
    ):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert [request["prompt"] for request in load_requests(tmp_path / name)] == ["a"]
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert read_passages(tmp_path / "text.gz") == ["one", "two"]


def test_a_record_by_hand():
    request = flat({"prompt": "{} works as a ", "target_new": "pilot", "subject": "Ada"})
    assert request["prompt"] == "Ada works as a" and request["subject"] == "Ada"
    with pytest.raises(DatasetError, match="target_new is None"):
        flat({"prompt": "a"})


def test_half_a_character_is_refused_by_name(tmp_path):
    (tmp_path / "edits.json").write_text('[{"prompt": "The capital of France is", "target_new": "R\\ud83dome"}]')
    with pytest.raises(DatasetError, match=r"record 0: an answer is .*half a surrogate pair"):
        load_requests(tmp_path / "edits.json")
