"""Tables and pictures."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from kdpo_easyedit.bench.protocols import Comparison, Example
from kdpo_easyedit.bench.schema import PairedTest, Summary
from kdpo_easyedit.report.charts import curve_chart, radar_chart, spokes
from kdpo_easyedit.report.tables import ends, print_ablation, print_examples, print_tables, significance, tables


@pytest.fixture
def comparison() -> Comparison:
    def row(method, protocol, *values):
        keys = ("edit_success", "generalization", "locality", "portability", "fluency", "generated_success")
        given = dict(zip((*keys, "seconds_per_edit"), values)) | {"generated_generalization": None, "megabytes_per_edit": None}
        return Summary(method=method, protocol=protocol, n_edits=20, intervals={}, **given)

    rows = [
        row("KDPO", "single", 100.0, 90.0, 95.0, 40.0, 5.9, 85.0, 0.02),
        row("ROME", "single", 99.0, 91.0, 70.0, None, 5.5, 80.0, 0.9),
        row("KDPO", "sequential", 60.0, 50.0, 80.0, 20.0, 5.8, 40.0, 0.03),
    ]
    before = row("(before)", "", 10.0, 11.0, None, 12.0, 5.95, 0.0, None)
    tests = [
        PairedTest("single", measure, "ROME", "KDPO", 20, -1.0, p / 2, p)
        for measure, p in (("edit_success", 0.2), ("locality", 0.004), ("generated_success", 0.001))
    ]
    return Comparison(before, rows, [], [rows[2]], tests)


def printed(print_, *arguments, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system="standard", force_terminal=True)
    print_(*arguments, console)
    return console.file.getvalue()


def test_a_table_a_protocol_and_a_row_a_method(comparison):
    plain = Console(file=io.StringIO(), width=100)
    print_tables(comparison, plain)
    text = plain.file.getvalue()
    assert "20 single edits" in text and "20 sequential edits" in text
    rows = [line.split()[0] for line in text.splitlines() if re.match(r" +\S+ +\d", line)]
    assert rows == ["(before)", "KDPO", "ROME", "(before)", "KDPO"]


def test_the_best_of_a_column_is_bold(comparison):
    text = printed(print_tables, comparison)
    for best in ("100.0", "91.0", "95.0", "40.0", "5.90", "0.02"):
        assert re.search(rf"\x1b\[1m *{re.escape(best)}( \(\d+\))?\x1b", text)
    for other in ("99.0", "90.0", "70.0", "5.50", "5.95", "12.0"):
        assert other in text and not re.search(rf"\x1b\[1m *{re.escape(other)}\x1b", text)


def test_a_method_that_could_make_no_edit_is_the_best_of_nothing(comparison):
    """It has all of the locality, and takes no time."""
    comparison.rows.append(replace(comparison.rows[1], method="MEMIT", locality=100.0, seconds_per_edit=0.0, failed=20))
    of = tables(comparison)["single"]
    assert not any(cell.best for cell in of["MEMIT"].values()) and of["KDPO"]["locality"].best
    comparison.rows = [replace(row, failed=row.n_edits) for row in comparison.rows]  # nor has any other made one
    assert not any(cell.best for methods in tables(comparison).values() for of in methods.values() for cell in of.values())


def test_what_differs_from_kdpo_is_marked(comparison):
    text = printed(print_tables, comparison)
    assert "70.0†" in text and text.count("†") == 2 and "† differs from KDPO" in text
    comparison.tests.clear()
    assert "†" not in printed(print_tables, comparison)


def test_the_table_fits_eighty_columns(comparison):
    all_of_them = dict.fromkeys(("edit_success", "generated_success", "generalization", "generated_generalization"), 100.0)
    comparison.rows[1] = replace(comparison.rows[1], method="AlphaEdit", **all_of_them)
    measures = ("edit_success", "generalization", "portability", "locality", "fluency")
    comparison.tests = [PairedTest("single", measure, "AlphaEdit", "KDPO", 20, 1.0, 0.01, 0.01) for measure in measures]
    plain = Console(file=io.StringIO(), width=80)
    print_tables(comparison, plain)
    text = plain.file.getvalue()
    assert "100.0† (100)" in text and "…" not in text and max(map(len, text.splitlines())) <= 80


def test_the_ablation_is_one_table_with_the_best_of_every_checkpoint(comparison):
    rows = [replace(comparison.rows[0], generated_generalization=80.0, method=method) for method in ("KDPO", "DPO-ablation")]
    weaker = [replace(rows[0], n_edits=500, locality=31.0), replace(rows[1], n_edits=500, locality=32.0, portability=None)]
    comparison.curve = [rows[0], weaker[0], rows[1], weaker[1]]  # as compare gives them: method by method
    text = printed(print_ablation, comparison, width=80)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    order = [plain.index(part) for part in ("after 20 edits", "KDPO ", "DPO-ablation ", "after 500 edits")]
    assert order == sorted(order) and len(re.findall(r"after \d+ edits", plain)) == 2
    assert re.search(r"\x1b\[1m *32\.0\x1b", text) and not re.search(r"\x1b\[1m *31\.0\x1b", text)
    assert "90.0 (80)" in plain and "–" in plain and max(map(len, plain.splitlines())) <= 80


def test_examples_show_before_and_after():
    text = printed(print_examples, "KDPO", [Example("X was born in", "Oslo", "Bonn.", "Oslo."), Example("Y is", "a", "", "b")])
    assert "X was born in" in text and "before  Bonn." in text and "Oslo." in text and "(nothing)" in text


def test_the_radar_chart_is_a_picture_with_a_polygon_a_method(comparison, tmp_path):
    radar_chart(comparison, tmp_path / "radar.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "radar.png"]
    picture = matplotlib.image.imread(tmp_path / "radar.png")[..., :3]
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # the first two of matplotlib's cycle
        assert (np.abs(picture - np.array(colour) / 255).max(-1) < 0.02).sum() > 300


def test_a_spoke_a_measure_that_was_measured(comparison):
    """A spoke of what was not would show it as 0."""
    assert list(spokes(comparison.rows)) == ["edit_success", "generalization", "portability", "locality", "fluency"]
    rows = [replace(row, fluency=None, portability=None) for row in comparison.rows]
    assert list(spokes(rows)) == ["edit_success", "generalization", "locality"]


def test_the_note_names_what_each_protocol_is_tested_against(comparison):
    """Runs that are reported together may have no method in common."""
    comparison.tests.append(PairedTest("batches-10", "locality", "FT", "MEMIT", 20, -1.0, 0.002, 0.004))
    assert significance(comparison).startswith("† differs from KDPO (single) or MEMIT (batches-10): ")


def test_an_interval_of_no_numbers_is_left_out():
    """As files have what float16 could not hold."""
    assert ends("em", [None, None]) == "" and ends("edit_success", [10.2, 90.4]) == "10–90"


def test_the_curve_chart_has_a_line_a_method(comparison, tmp_path):
    rows = [replace(row, method=m, n_edits=n) for row in comparison.curve for m in ("KDPO", "FT") for n in (1, 10, 100)]
    curve_chart([*rows, replace(rows[-1], edit_success=10.0)], tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "curve.png"]
    picture = matplotlib.image.imread(tmp_path / "curve.png")[..., :3]
    assert (np.abs(picture - np.array((0xFF, 0x7F, 0x0E)) / 255).max(-1) < 0.02).sum() > 300
