"""The README and docs/: their links lead somewhere, and what they tell to type can be typed."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import kdpo_easyedit
from kdpo_easyedit.cli.main import SUBCOMMANDS
from kdpo_easyedit.method.config import find_hparams
from kdpo_easyedit.models import packed, world

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {name: argparse.ArgumentParser(prog=name, exit_on_error=False) for name in SUBCOMMANDS}
for _name, _parser in PARSERS.items():
    importlib.import_module(f"kdpo_easyedit.cli.{_name.replace('-', '_')}").add_arguments(_parser)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a language; those without one are commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for its, block in found if its == language]


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command line of the package on a page, as subcommand and arguments: in blocks, in text, and over tables."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in blocks(text):
        variables = {}
        for line in block.replace("\\\n", "").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if found := re.fullmatch(r"([A-Z]+)=(.*)", line):
                variables[found[1]] = " ".join(shlex.split(found[2]))
            lines.append(line)
    lines += re.findall(r"`([^`\n]+)`", prose(text))
    lines += re.findall(r"figures: (.*?)(?: -->|$)", text, re.MULTILINE)
    for line in lines:
        # An inline `kdpo` alone is a name.
        if found := re.search(r"(?:^|\s)(?:python run_kdpo\.py(?= |$)|kdpo (?=[a-z]))(.*)", line):
            arguments = shlex.split(found[1])
            named = bool(arguments) and not arguments[0].startswith("-")
            yield (arguments[0], arguments[1:]) if named else ("compare", arguments)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert len(re.findall(r"^pip install .*&& python run_kdpo\.py$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^pip install .*pytest$", text, re.MULTILINE)) == 1  # which .ci/run looks for


@each_page
def test_links_and_pictures_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose(page.read_text(encoding="utf-8"))):
        if file.startswith(("http:", "https:")):
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.is_file() and target.is_relative_to(ROOT), f"{page.name}: {file}"
        assert not anchor or anchor in slugs(target), f"{page.name}: {file}#{anchor}"


def test_every_page_is_linked_from_the_readme_and_every_picture_shown():
    readme, *pages = (page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"](docs/{page.name})" in readme for page in PAGES[1:])
    shown = {Path(path).name for text in (readme, *pages) for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert shown == {picture.name for picture in (ROOT / "docs" / "pictures").iterdir()}


def test_commands_are_understood_and_their_hyperparameters_are_there():
    found = [(page, *command) for page in PAGES for command in commands(page)]
    assert {subcommand for _, subcommand, _ in found} >= {"compare", "report", "benchmark"} and len(found) > 30
    for page, subcommand, arguments in found:
        assert subcommand in SUBCOMMANDS, f"{page.name}: kdpo {subcommand}"
        options, rest = PARSERS[subcommand].parse_known_args(arguments)  # raises where a choice is not known
        assert not rest, f"{page.name}: {subcommand} {rest}"
        if subcommand in ("compare", "edit"):
            # Where no model is named, it is one of two.
            for name in [options.hparams_dir] if options.hparams_dir else [packed.DEFAULT, world.NAME]:
                own = name in world.RECIPES or name in packed.MODELS
                for method in options.editing_method or (["KDPO", "KDPO+C", "FT", "ROME", "MEMIT"] if own else ["KDPO"]):
                    find_hparams(method, name)


@each_page
def test_flags_in_the_text_are_some_commands(page):
    known = {flag for parser in PARSERS.values() for flag in parser._option_string_actions}
    named = set(re.findall(r"`(--\w+)", prose(page.read_text(encoding="utf-8"))))
    assert named <= known, named - known


@each_page
def test_python_can_be_read_and_the_packages_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "kdpo_easyedit":
                assert all(hasattr(kdpo_easyedit, name.name) for name in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdpo_easyedit":
                assert hasattr(kdpo_easyedit, node.attr)
        for name in re.findall(r'from_hparams\("([^"]+)"\)', block):
            find_hparams("KDPO", name)


def test_every_table_of_figures_says_how_they_are_made():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    before = re.findall(r"(.*)\n\n\|.*\|\n\|[-:|]*-:", text)  # figures are aligned to the right
    assert len(before) > 10 and all(line.endswith("-->") for line in before)
