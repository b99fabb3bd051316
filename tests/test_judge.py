"""The judge, on a stand-in for a server: what it is asked, what is kept, and that a run goes on without it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from kdpo_easyedit.bench import judge as judging
from kdpo_easyedit.bench.judge import Judge
from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.runs import Journal
from kdpo_easyedit.bench.schema import SEQUENTIAL, SINGLE
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.report.documents import write_documents

ASKED = ("Tor lives in", "Oslo", "Oslo, Norway.")


class Server:
    """An endpoint that says yes where the answer holds the expected one, and fails where it is told to."""

    def __init__(self):
        self.bodies, self.keys, self.statuses, self.say = [], [], [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append((self.path, body))
                outer.keys.append(self.headers["Authorization"])
                status = outer.statuses.pop(0) if outer.statuses else 200
                if isinstance(status, bytes):  # all that it says, and no HTTP
                    self.wfile.write(status)
                    return
                lines = dict(line.split(": ", 1) for line in body["messages"][0]["content"].splitlines() if ": " in line)
                says = outer.say or ("Yes." if lines["Expected answer"] in lines.get("Model's answer", "") else "no")
                reply = {"choices": [{"message": {"content": says}}]} if status == 200 else {"error": "too busy"}
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judging, "_PAUSES", (0, 0))
    monkeypatch.delenv(judging.KEY, raising=False)
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def kdpo(loaded, hparams) -> Method:
    hparams.model_name = loaded
    return Method("KDPO", hparams)


def test_it_is_asked_what_the_documentation_says(server, tmp_path, monkeypatch):
    monkeypatch.setenv(judging.KEY, "secret")
    found = Judge(server.url + "/", "small", Journal(tmp_path / "judge.jsonl")).verdicts(
        [ASKED, ("Tor lives in", "Oslo", "Rome")]
    )
    assert found == [True, False]
    path, body = min(server.bodies, key=lambda sent: len(sent[1]["messages"][0]["content"]))
    assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("small", 0)
    assert body["messages"] == [
        {"role": "user", "content": judging.PROMPT.format(prompt="Tor lives in", target="Oslo", answer="Rome")}
    ]
    assert server.keys == ["Bearer secret"] * 2
    assert judging.PROMPT in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_braces_in_what_is_judged_stay_as_they_are(server, tmp_path):
    question = ("{target} is", "Oslo", "{answer} Oslo")
    assert Judge(server.url, "small", Journal(tmp_path / "j.jsonl")).verdicts([question]) == [True]
    assert "Text: {target} is" in server.bodies[0][1]["messages"][0]["content"]


def test_what_was_judged_once_is_not_asked_again(server, tmp_path):
    for _ in range(2):
        assert Judge(server.url, "small", Journal(tmp_path / "judge.jsonl")).verdicts([ASKED, ASKED]) == [True, True]
    assert len(server.bodies) == 1
    assert Judge(server.url, "large", Journal(tmp_path / "judge.jsonl")).verdicts([ASKED]) == [True]
    assert len(server.bodies) == 2


def test_a_verdict_follows_from_the_reply_that_is_kept(server, tmp_path):
    journal, kept = Journal(tmp_path / "judge.jsonl"), dict(zip(("prompt", "target", "answer"), ASKED))
    journal.append({"model": "small", **kept, "verdict": False, "reply": "no, wait</think>yes"})  # as once it was judged
    assert Judge(server.url, "small", journal).verdicts([ASKED]) == [True] and not server.bodies


def test_a_reply_that_is_neither_yes_nor_no_is_no_verdict(server, tmp_path):
    for number, (says, verdict) in enumerate(
        (
            ("<think>no, or</think> yes", True),
            ("It has no country, but Oslo is right.\n</think>\n\nyes", True),  # the template has begun the thoughts
            ("<think>There is no doubt, so", None),  # cut off
            ("Perhaps", None),
            ("NO", False),
            ("It is nowhere", None),
        )
    ):
        server.say = says
        assert Judge(server.url, "small", Journal(tmp_path / f"{number}.jsonl")).verdicts([ASKED]) == [verdict]


NO_HTTP, CUT = b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"
CUT_ERROR = b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nno"


@pytest.mark.parametrize(
    ("statuses", "requests", "failure"),
    [
        ([503, 429], 3, None), ([503] * 3, 3, "HTTP 503: "), ([401], 1, "HTTP 401: "), ([NO_HTTP, CUT], 3, None),
        ([NO_HTTP] * 3, 3, "BadStatusLine: garbage"), ([CUT] * 3, 3, "IncompleteRead: "), ([CUT_ERROR] * 3, 3, "HTTP 500: Oh"),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again_and_what_does_not_is_told(server, tmp_path, statuses, requests, failure):
    server.statuses = list(statuses)
    judge = Judge(server.url, "small", Journal(tmp_path / "judge.jsonl"))
    assert judge.verdicts([ASKED]) == [None if failure else True] and len(server.bodies) == requests
    assert (judge.failure or "").startswith(f"{server.url}, small: {failure}" if failure else "")
    assert judge.verdicts([("another", "x", "y")]) == [None if failure else False]
    assert len(server.bodies) == requests + (not failure)  # one that has failed is asked no more


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://the judge/v1"])
def test_an_address_that_is_none_fails_the_judge_alone(url, tmp_path):
    judge = Judge(url, "small", Journal(tmp_path / "judge.jsonl"))
    assert judge.verdicts([ASKED]) == [None] and judge.failure.startswith(f"{url}, small: ")


def test_a_run_has_the_verdicts_and_goes_on_without_them(server, kdpo, requests, tmp_path, capfd):
    def run(url):
        judge = (url, "small") if url else None
        comparison = compare([kdpo], requests[:3], [SINGLE, SEQUENTIAL], tmp_path, quiet=True, judge=judge)
        return comparison, capfd.readouterr().err

    comparison, errors = run("http://127.0.0.1:9/v1")  # nobody is there
    assert (
        errors.count("the judge cannot be asked, and the run goes on without it (http://127.0.0.1:9/v1, small: URLError") == 1
    )
    assert all(row.judged_success is None for row in comparison.rows) and comparison.rows[0].edit_success == 100
    measured = [path.stat().st_mtime for path in tmp_path.glob("KDPO-*.jsonl")]

    comparison, errors = run(server.url)  # the same command goes on, and has what is missing judged
    assert "judge" not in errors and [path.stat().st_mtime for path in tmp_path.glob("KDPO-*.jsonl")] == measured
    single, sequential = comparison.rows
    assert single.judged_success == single.generated_success == 100 and "judged_success" in single.intervals
    assert 0 <= sequential.judged_generalization <= 100 and comparison.before.judged_success is None
    (entry, *_) = json.loads((tmp_path / "metrics-KDPO-single.json").read_text())
    assert entry["pre"]["generated"]["rewrite_judged"] == [0] and entry["post"]["generated"]["rewrite_judged"] == [1]
    page, text, *_ = write_documents([tmp_path], tmp_path)
    assert "edit success, judged" in text.read_text() and '"judged"' in page.read_text()
    asked = len(server.bodies)
    for url in (server.url, None):  # and what is judged stays so without a judge
        assert run(url)[0].rows == comparison.rows and len(server.bodies) == asked


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--judge_url", "http://x/v1"], "--judge_url and --judge_model go together"),
        (["--judge_url", "file:///etc/passwd", "--judge_model", "m"], "--judge_url is 'file:///etc/passwd'; allowed: http://"),
    ],
)
def test_a_judge_is_named_in_full(arguments, error, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert error in capsys.readouterr().err
