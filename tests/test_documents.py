"""report.html, summary.md and summary.tex: what they hold, what they refuse, and how the page behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import on_main

from kdpo_easyedit.bench.measuring import Measuring
from kdpo_easyedit.bench.protocols import Method, compare
from kdpo_easyedit.bench.runs import RunError
from kdpo_easyedit.bench.schema import SEQUENTIAL, SINGLE
from kdpo_easyedit.cli.main import main
from kdpo_easyedit.easyedit.hparams import load_hparams
from kdpo_easyedit.report.documents import markdown, page, write_documents
from kdpo_easyedit.report.results import read_results
from kdpo_easyedit.report.tables import COLUMNS

N = 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: Columns without figures are left out: no ordinary text is read here.
MEASURED = COLUMNS.keys() - {"perplexity", "divergence", "judged_success", "judged_generalization"}
HOSTILE = '</script><img src=x onerror=alert(1)> & "{data}" 100 % of_it'


@pytest.fixture(scope="module")
def make(small_world, requests, tmp_path_factory):
    """Makes a run: its methods, its edits and whatever else is said."""

    def made(name: str, methods=("KDPO", "FT"), edits=None, **options) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        loaded = [Method(method, load_hparams(method, "world")) for method in methods]
        for method in loaded:
            method.hparams.model_name = str(small_world.folder)
        given = {"protocols": [SINGLE], "data_name": "edits.json", "quiet": True} | options
        compare(loaded, edits or requests[:N], folder=folder, **given)
        return folder

    return made


@pytest.fixture(scope="module")
def run(make, requests) -> Path:
    """Both protocols; the last edit's subject is nothing a page should take for its own."""
    edits = [*requests[: N - 1], {**requests[N - 1], "subject": HOSTILE}]
    return make("run_1", edits=edits, protocols=[SINGLE, SEQUENTIAL])


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(run, tmp_path / "copied"))


def data_of(html: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


def test_the_page_has_every_figure_and_every_edit(run, requests):
    html = page(read_results([run]))
    (result,) = data_of(html)["results"]
    rows = json.loads((run / "summary.json").read_text())
    assert result["rows"] == rows and result["curve"] == json.loads((run / "curve.json").read_text())
    for row in rows:
        assert result["tables"][row["protocol"]][row["method"]]["edit_success"]["text"].startswith(f"{row['edit_success']:.1f}")
    assert [edit["prompt"] for edit in result["edits"]] == [request["prompt"] for request in requests[:N]]
    assert result["edits"][N - 1]["subject"] == HOSTILE
    for method in ("KDPO", "FT"):
        for protocol in (SINGLE, SEQUENTIAL):
            metrics = json.loads((run / f"metrics-{method}-{protocol}.json").read_text())
            for outcome, entry in zip(result["outcomes"][protocol][method], metrics, strict=True):
                assert [outcome["rewrite"][1]] == entry["post"]["generated"]["rewrite"]
                assert outcome["locality"]["Relation_Specificity"] == entry["post"]["locality"]["Relation_Specificity_acc"]
    trace = result["outcomes"][SINGLE]["KDPO"][0]["trace"]
    assert trace["steps"] > 0 and trace["losses"][0][0] == pytest.approx(0.6931, abs=1e-4)
    assert trace["negative_texts"][0].split()[0] == requests[0]["ground_truth"].split()[0]
    assert result["outcomes"][SINGLE]["FT"][0]["trace"] == {}
    assert bool(result["easyedit"]) == on_main()
    # Costs are the edits': the unedited model has none.
    assert result["tables"][SINGLE]["(before)"]["seconds_per_edit"]["text"] == "–"


def test_no_text_ends_the_data_and_nothing_is_fetched(run):
    html = page(read_results([run]))
    assert html.count("</script>") == 2 and "<img" not in html
    template = html.replace(re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)[0], "")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|url\(|@import|fetch\(|innerHTML", template)
    assert "default-src 'none'" in template


def test_a_text_from_right_to_left_turns_nothing_around_it(run):
    """Between two of those an arrow would point the other way: every prompt and answer is isolated from what is beside it."""
    script = page(read_results([run])).rpartition("<script>")[2]
    for text in (
        "sentence(edit.before.rewrite[1])",
        "sentence(after.rewrite[1])",
        'bidi(edit.prompt, " ", h("b", {}, edit.target_new))',
        'bidi(of.rewrite[1] ?? "–")',
        'bidi(of.rephrase?.[1] ?? "–")',
        "bidi(text)",
        "bidi(prompt, answers[i]",
        "bidi(negatives[i].trim())",
    ):
        assert text in script
    assert 'const bidi = (...text) => h("bdi", {}, text);' in script and "const sentence = text => bidi(" in script


def test_a_word_of_any_length_breaks_where_the_page_ends(run):
    (body,) = re.findall(r"^body \{(.*?)\}", page(read_results([run])), re.DOTALL | re.MULTILINE)
    assert "overflow-wrap: anywhere" in body


def test_a_run_without_written_answers_has_a_report_too(make, tmp_path):
    run = make("silent", ["KDPO"], how=Measuring(contexts=(), fluency=False))
    write_documents([run], tmp_path / "report")
    (result,) = data_of((tmp_path / "report" / "report.html").read_text())["results"]
    assert result["settings"]["context"] == "plain" and result["outcomes"][SINGLE]["KDPO"][0]["rewrite"] == [1, None, None]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
class TestInABrowser:
    """The page as Chromium draws it, with no network."""

    def dom(self, file: Path, fragment: str = "") -> str:
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", f"--user-data-dir={file.parent / 'profile'}", "--dump-dom", file.as_uri() + fragment],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr  # no script fails, and no policy is broken
        return done.stdout

    @pytest.fixture(scope="class")
    def file(self, run, tmp_path_factory) -> Path:
        into = tmp_path_factory.mktemp("page")
        write_documents([run], into / "report")
        return into / "report" / "report.html"

    def test_rows_tables_and_charts(self, file, requests):
        dom = self.dom(file)
        assert len(re.findall(r'<details class="edit"', dom)) == N and f">{N} of {N} edits<" in dom
        for request in requests[:N]:
            assert request["prompt"] in dom
        assert dom.count("<table>") >= 4 and dom.count("single edits, each from the original model") >= 2
        assert len(re.findall(r'aria-label="Profile, ', dom)) == 2
        assert len(re.findall(r'aria-label="[a-z ]+ over sequential edits\.', dom)) == 5

    def test_the_search_finds_what_it_is_asked_for(self, file, requests):
        wanted = requests[1]["prompt"]
        dom = self.dom(file, f"#q={wanted.replace(' ', '+')}&method=FT&protocol=sequential")
        assert f">1 of {N} edits<" in dom and len(re.findall(r'<details class="edit"', dom)) == 1
        assert f"<bdi>{wanted} <b>" in dom.partition('id="edits"')[2]
        assert f">0 of {N} edits<" in self.dom(file, "#q=no+such+words")

    def test_what_an_edit_says_stays_text(self, file):
        dom = self.dom(file, "#q=onerror")
        assert f">1 of {N} edits<" in dom and "<img" not in dom


def test_the_markdown_has_bold_intervals_and_a_row_a_method(run):
    results = read_results([run])
    text = markdown(results)
    main, *sheets = (
        [line for line in part.splitlines() if line.startswith("|")]
        for part in re.split(r"^(?=What the model can still do|Written answers|New answer)", text, flags=re.MULTILINE)
    )
    assert [sheet[0].split(" | ")[1] for sheet in sheets] == ["fluency, bits |", *["plain: did not stop"] * 2, *["ES"] * 2]
    tables = main
    assert {line.count("|") for line in tables} == {len(MEASURED) + 2}
    assert [line.split("|")[1].strip() for line in tables] == ["method", "---", "(before)", "KDPO", "FT"] * 2
    row = next(row for row in results[0].comparison.rows if row.method == "KDPO")
    low, high = row.intervals["edit_success"]
    assert f"**{row.edit_success:.1f}**<br><sub>{low:.0f}–{high:.0f}</sub>" in tables[3]


def test_latex_is_escaped(copied):
    record = json.loads((copied / "run.json").read_text())
    record["about"]["data"] = r"50%_of #1 & {~^\}"
    (copied / "run.json").write_text(json.dumps(record))
    assert [path.name for path in write_documents([copied], copied, latex=True)] == ["report.html", "summary.md", "summary.tex"]
    text = (copied / "summary.tex").read_text()
    assert r"50\%\_of \#1 \& \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    rows = re.findall(r"(?m)^(?:KDPO|FT|\(before\)) & .*\\\\\n & .*\\\\\[2pt\]$", text)  # with its intervals, each
    assert len(rows) == 6 and all(row.count("& ") == 2 * len(MEASURED) for row in rows)
    assert r"\textbf{" in text


def test_several_runs_are_one_report(make, run, requests, tmp_path):
    one, other = make("one", ["KDPO"]), make("other", ["FT", "KDPO"])
    elsewhere = make("elsewhere", ["KDPO"], edits=requests[3:5], data_name="more.json")
    first, second = read_results([one, other, elsewhere])
    assert [row.method for row in first.comparison.rows] == ["KDPO (one)", "FT", "KDPO (other)"]
    assert first.settings["data"] == "edits.json" and second.settings["data"] == "more.json"
    # A test needs pairs, and these are of two runs.
    same = next(t for t in first.comparison.tests if (t.method, t.measure) == ("KDPO (other)", "edit_success"))
    assert (same.against, same.n_edits, same.difference) == ("KDPO (one)", N, 0)
    write_documents([one, other, elsewhere], tmp_path / "report")
    content = data_of((tmp_path / "report" / "report.html").read_text())
    assert [result["data"] for result in content["results"]] == ["edits.json", "more.json"]
    write_documents([one], tmp_path / "report")  # a report may be made anew


def test_the_unedited_models_perplexity_is_there_in_any_order(make, requests):
    text = {"ability_texts": ["The harbour lies in the north.", "Its boats come home at night."]}
    runs = make("one", ["KDPO"], **text), make("all", ["FT"], protocols=[SEQUENTIAL], **text)
    for folders in (runs, runs[::-1]):
        (result,) = read_results(folders)
        assert result.comparison.before.perplexity > 1


def test_the_unedited_models_row_has_what_any_of_the_runs_has_of_it(make):
    fluent = make("fluent", ["KDPO"])
    probed = make("probed", ["FT"], how=Measuring(fluency=False, probes=True))
    for folders in ([fluent, probed], [probed, fluent]):
        (result,) = read_results(folders)
        before = result.comparison.before
        assert (
            before.fluency is not None and "negation" in before.further and {"fluency", "negation"} <= before.intervals.keys()
        )


def test_what_was_measured_differently_is_not_put_side_by_side(make, requests, copied, tmp_path):
    one = make("one", ["KDPO"])
    for name, options, message in (
        ("seed", {"seed": 1}, r"seed is 0 there and 1 here"),
        ("edits", {"edits": requests[:2]}, rf"edits is {N} there and 2 here"),
        ("records", {"edits": requests[1 : N + 1]}, r"records is '\w+' there and '\w+' here"),
    ):
        with pytest.raises(RunError, match=message):
            read_results([one, make(name, ["FT"], **options)])
    record = json.loads((copied / "run.json").read_text())
    record["versions"]["transformers"] = "4.56.0"
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        RunError, match=r"copied was not measured as .*one was: versions.transformers is '.+' there and '4.56.0'"
    ):
        read_results([one, copied])
    record["versions"] = json.loads((one / "run.json").read_text())["versions"]
    for key, value, message in (
        ("ability", "0123", "ability_text is .* and '0123' here"),
        ("engine", "easyedit", "metrics is "),
    ):
        (copied / "run.json").write_text(json.dumps(record | {"measuring": record["measuring"] | {key: value}}))
        with pytest.raises(RunError, match=message):
            read_results([one, copied])
    with pytest.raises(RunError, match="named twice"):
        read_results([one, one])


def test_what_is_no_complete_run_is_refused_in_one_line(run, copied, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "holds no run" in refused(tmp_path / "nowhere")
    assert "other things than reports, such as .lock" in refused(copied, "--metrics_save_dir", run)
    rows = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(rows[:-1]))
    assert "copied: the run is not complete; its own command goes on with it" in refused(copied)
    (copied / "summary.json").write_text(json.dumps(rows))
    (copied / "metrics-FT-single.json").unlink()
    assert "copied: the run is not complete" in refused(copied)
    (copied / "summary.json").write_text("[{")
    assert "summary.json: cannot be read" in refused(copied)
    assert not (copied / "report.html").exists() and not (run / "report.html").exists()


def test_the_command_writes_into_the_runs_folder_or_where_it_is_told(copied, tmp_path, capsys):
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().out.split() == [str(copied / "report.html"), str(copied / "summary.md")]
    assert main(["report", str(copied), "--metrics_save_dir", str(tmp_path / "new" / "report"), "--latex"]) == 0
    written = {path.name for path in (tmp_path / "new" / "report").iterdir()}
    assert written == {"report.html", "summary.md", "summary.tex"}
